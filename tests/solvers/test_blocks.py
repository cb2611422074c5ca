"""What ggml's blocks are said to take, and which of them are swept."""

import torch

from quantkit.calibration.statistics import HESSIAN, Statistics
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


def test_codes_of_few_bits_are_chosen_again():
    weight, inputs = torch.randn(8, 256), torch.randn(1, 600, 256)
    statistics = Statistics(frozenset({HESSIAN}))
    statistics.add(inputs)
    statistics.complete()
    work = StageWork((Shape("up", 8, 256),), columns=256, tokens=600)
    solved, operations = {}, {}
    for sweeps in (0, 1):
        for kind in ("Q3_K", "Q4_K"):
            solver = BlockSolver(lambda *_, kind=kind: (kind,), weighted=False, damping=0.01, sweeps=sweeps)
            ((_, linear, facts),) = solver.solve({"up": weight}, statistics)
            solved[sweeps, kind] = linear.codes_OI, facts.loss
            operations[sweeps, kind] = solver.cost(work).operations["solve"]
    assert torch.equal(solved[0, "Q4_K"][0], solved[1, "Q4_K"][0])
    assert operations[0, "Q4_K"] == operations[1, "Q4_K"]
    assert solved[0, "Q3_K"][1] > solved[1, "Q3_K"][1]
    assert operations[0, "Q3_K"] < operations[1, "Q3_K"]
