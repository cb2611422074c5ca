"""How long a build will take: from short trials of the device, and of solvers whose work is no products."""

import os

import torch

from quantkit.calibration.statistics import SQUARES, Statistics
from quantkit.costs import StageWork
from quantkit.machine import pieces_at_a_time, product_dtype
from quantkit.progress import timed
from quantkit.solvers.contract import Solver

PROBE_SIDES = (1024, 4096)  # of matrices that are multiplied, the first that keeps the device at work
PROBES = 3
AT_WORK_SECONDS = 2e-3  # less is as long as it takes to hand products to a fast device
IN_FLOAT32 = ("factorise", "solve", "survey")
# the share of the probed matmul rate that the whole pass reaches; the column loop and small products keep it down
EFFICIENCY = 0.35
TRIAL_ROWS = 128  # of every linear, for each piece at a time: whole groups and blocks in any format
TRIAL_TOKENS = 64


def product_seconds(counted: dict[str, float], dtype: torch.dtype, device: torch.device) -> float:
    """Every stage at the rate that the device shows in the dtype it computes in.

    Args:
        counted: operations by stage.
        dtype: of the stream.
        device: that computes.
    """
    streamed = product_dtype(device, dtype)
    by_dtype: dict[torch.dtype, float] = {}
    for stage, count in counted.items():
        computed = torch.float32 if stage in IN_FLOAT32 else streamed
        by_dtype[computed] = by_dtype.get(computed, 0.0) + count
    return sum(count / _rate(computed, device) for computed, count in by_dtype.items()) / EFFICIENCY


def search_seconds(solver: Solver, stage: StageWork, dtype: torch.dtype, device: torch.device) -> float:
    """What a solver takes for a stage's linears, from what it takes for some rows of each; random ones.

    0 for one that asks for more than squares of inputs: there products decide. What has to be compiled first is not
    counted, and is compiled here.

    Args:
        solver: of the linears.
        stage: they.
        dtype: of the stream.
        device: that computes.
    """
    if not stage.shapes or not solver.needs <= {SQUARES}:
        return 0.0
    random = torch.Generator().manual_seed(0)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random).to(device, dtype)

    rows = TRIAL_ROWS * pieces_at_a_time()
    weights = {shape.name: drawn(min(shape.rows, rows), shape.columns) for shape in stage.shapes}
    statistics = Statistics(solver.needs)
    if stage.tokens:
        statistics.add(drawn(TRIAL_TOKENS, stage.columns))
    statistics.complete()
    spent: dict[str, float] = {}
    for trial in ("compiling", "solve"):
        with timed(spent, trial):
            for _solved in solver.solve(weights, statistics):
                pass
    tried = sum(weight.numel() for weight in weights.values())
    return spent["solve"] * sum(shape.size for shape in stage.shapes) / tried


def crowding(ranks: int, threads: int) -> float:
    """How many times longer ranks take that share the cores of a CPU than ranks that have their threads' own."""
    return max(1.0, ranks / max(1, (os.cpu_count() or 1) // threads))


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measured FLOP/s of a square matmul."""
    for side in PROBE_SIDES:
        left = torch.ones(side, side, dtype=dtype, device=device)
        left @ left
        spent: dict[str, float] = {}
        with timed(spent, "products"):
            for _ in range(PROBES):
                left @ left
        if spent["products"] >= AT_WORK_SECONDS:
            break
    return PROBES * 2.0 * side**3 / spent["products"]
