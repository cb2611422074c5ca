"""What ggml's blocks are said to take, and which of them are swept."""

import pytest
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


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_0"])
def test_rows_may_be_solved_apart(kind, monkeypatch):
    """And what is lost of the outputs' energy is said of all of them."""
    monkeypatch.setattr("quantkit.machine.os.cpu_count", lambda: 2)
    torch.set_num_threads(2)
    weight, inputs = torch.randn(40, 256).mul_(torch.linspace(0.1, 2, 40).unsqueeze(1)), torch.randn(1, 600, 256)
    damped = inputs[0].T @ inputs[0]
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    statistics = Statistics(frozenset({HESSIAN}))
    statistics.add(inputs)
    statistics.complete()
    solver = BlockSolver(lambda *_: (kind,), weighted=False, damping=0.01, sweeps=1)
    ((_, whole, _),) = solver.solve({"up": weight}, statistics)
    monkeypatch.setattr("quantkit.machine.FEWEST_ROWS", 8)
    monkeypatch.setattr("quantkit.machine.MOST_ROWS", 16)
    ((_, linear, facts),) = solver.solve({"up": weight}, statistics)
    # scales are searched in float32, and products of other shapes may sum otherwise: a block in a hundred may differ
    assert (linear.codes_OI != whole.codes_OI).float().mean() < 0.01
    error = weight - linear.dequantize()
    lost = (error @ damped @ error.T).trace() / (weight @ damped @ weight.T).trace()
    assert facts.loss == pytest.approx(float(lost), rel=1e-3)


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
