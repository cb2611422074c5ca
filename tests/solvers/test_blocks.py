"""What a search for ggml's blocks is said to take."""

from quantkit.costs import Shape, StageWork
from quantkit.solvers.blocks import SEARCHED_BYTES, BlockSolver


def test_every_piece_that_is_searched_at_a_time_takes_memory(monkeypatch):
    solver = BlockSolver(lambda name, columns: ("Q4_K",), weighted=False)
    work = StageWork((Shape("up", 512, 256),), columns=256, tokens=0)
    taken = []
    for pieces in (1, 4):
        monkeypatch.setattr("quantkit.solvers.blocks.pieces_at_a_time", lambda pieces=pieces: pieces)
        taken.append(solver.cost(work).memory_bytes)
    assert taken[1] - taken[0] == 3 * SEARCHED_BYTES
