"""What the compiled loops read of their arrays, counted: none may go over its numbers more often than before.

The loops run as plain Python on a few rows, with arrays that count; `tests/test_operations.py` counts what is asked of
them in a build.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numba.core.dispatcher import Dispatcher

from quantkit import kernels
from quantkit.grids import blocks
from quantkit.kernels import compiled, compiled_search
from quantkit.kernels.levels import Levels

ROWS, LENGTH, CANDIDATES = 8, 32, 3
TOGETHER = 16  # rows of a tile: the sub-blocks of a block


class Counting(np.ndarray):
    """An array that counts the numbers that are read from it one at a time."""

    reads = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        Counting.reads += not isinstance(found, np.ndarray)
        return found

    def __iter__(self):
        return (self[place] for place in range(len(self)))


def counting(make):
    return lambda *arguments, **named: make(*arguments, **named).view(Counting)


@pytest.fixture
def as_python(monkeypatch):
    """The loops as Python runs them, all rows in one tile."""
    numbers = vars(np) | {name: counting(getattr(np, name)) for name in ("zeros", "empty", "empty_like")}
    for module in (compiled, compiled_search):
        for name, loop in vars(module).copy().items():
            if isinstance(loop, Dispatcher):
                monkeypatch.setattr(module, name, loop.py_func)
        monkeypatch.setattr(module, "np", SimpleNamespace(**numbers))
    monkeypatch.setattr(compiled, "BLOCK", TOGETHER)
    monkeypatch.setattr(compiled_search, "TILE", TOGETHER)
    plain = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: plain(tensor).view(Counting))
    monkeypatch.setattr(Counting, "reads", 0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5


def panel() -> None:
    levels = Levels.of_zeros(drawn(ROWS), drawn(ROWS), 15)
    codes, error = torch.zeros(LENGTH, ROWS, dtype=torch.uint8), torch.zeros(LENGTH, ROWS)
    kernels.solve_panel(drawn(LENGTH, ROWS), drawn(LENGTH, ROWS), drawn(LENGTH, LENGTH), levels, codes, error)


def block(name: str) -> None:
    kind = blocks.TYPES[name]
    shape = (1, kind.block // kind.sub, kind.sub) if kind.has_sub_scales else (ROWS, 1, kind.sub)
    blocks.search(drawn(*shape), drawn(*shape), kind)


LOOPS = {
    "solve_panel": panel,
    "rounding_errors": lambda: kernels.rounding_errors(
        drawn(LENGTH, ROWS), drawn(LENGTH), drawn(CANDIDATES, ROWS), drawn(CANDIDATES, ROWS), 15
    ),
    "best_scales": lambda: kernels.best_scales(drawn(LENGTH, ROWS), drawn(LENGTH), drawn(CANDIDATES, ROWS), 15),
    "best_scales, either sign": lambda: kernels.best_scales(
        drawn(LENGTH, ROWS), drawn(LENGTH), drawn(CANDIDATES, ROWS), 15, worth_turning=1.0
    ),
    "code_moments": lambda: kernels.code_moments(drawn(LENGTH, ROWS), drawn(LENGTH), drawn(ROWS), drawn(ROWS), 15),
    "round_groups": lambda: kernels.round_groups(
        drawn(ROWS, LENGTH), LENGTH, 15, torch.zeros(ROWS, LENGTH, dtype=torch.uint8)
    ),
    "squared_errors": lambda: kernels.squared_errors(
        drawn(ROWS, LENGTH), torch.zeros(ROWS, LENGTH, dtype=torch.uint8), *drawn(3, ROWS, 1)
    ),
    **{name: partial(block, name) for name in ("Q4_K", "Q6_K", "Q5_1", "Q5_0")},
}
# numbers read; fewer are welcome: then put the new figure here
READ = {
    "solve_panel": 18448,
    "rounding_errors": 3240,
    "best_scales": 2544,
    "best_scales, either sign": 3416,
    "code_moments": 4776,
    "round_groups": 528,
    "squared_errors": 2072,
    # the whole search for a block
    "Q4_K": 161495,
    "Q6_K": 37212,
    # fit_ranges and fit_offset
    "Q5_1": 476036,
    "Q5_0": 95334,
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.usefixtures("as_python")
def test_no_loop_reads_more_than_before(name):
    with np.errstate(all="ignore"):
        LOOPS[name]()
    assert READ[name] * 0.98 <= Counting.reads <= READ[name], "more than before, or fewer: then lower the table"
