"""Solvers that need no calibration, and those that choose between others.

Shape legend: K weights of one group, N groups, M of them, O out features, I in features.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.calibration.statistics import Statistics
from quantkit.costs import FLOAT_BYTES, Cost, StageWork, total
from quantkit.grids.affine import AffineGrid, FloatZeroRule, LevelsOfRows, StridedGrid
from quantkit.kernels import squared_errors
from quantkit.machine import rows_together, side_by_side
from quantkit.qtensor import LinearFacts, QuantizedLinear
from quantkit.solvers.contract import Solver

WORKING_COPIES = 2  # float32 numbers for each weight of the linear that is being solved
CHUNK_GROUPS = 1 << 13  # groups solved together: bounds memory, and keeps the working set in cache
GPU_CHUNK_GROUPS = 1 << 17  # enough for a GPU to have something to do at every step


@dataclass(frozen=True)
class WeightSolver:
    """Codes from the weights alone.

    Attributes:
        quantize: codes and grid of one linear [O, I]: `GroupFit.quantize`, or `RoundToNearest.quantize`.
    """

    quantize: Callable[[Tensor], QuantizedLinear]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def solve(
        self, weights: dict[str, Tensor], statistics: Statistics
    ) -> Iterator[tuple[str, QuantizedLinear, LinearFacts]]:
        """Solved linears, one by one, with the loss of their weights; see `quantkit.solvers.contract.Solver`."""
        for name, weight in weights.items():
            started = time.perf_counter()
            quantized = self.quantize(weight)
            lost = relative_error(weight, quantized)
            yield name, quantized, LinearFacts(name, lost, None, time.perf_counter() - started)

    def cost(self, work: StageWork) -> Cost:
        """Memory alone: the search is elementwise."""
        return search_cost(work)


@dataclass(frozen=True)
class GroupFit:
    """A grid for every group of a linear, each by itself.

    Attributes:
        fit: chooses scale and zero [N] for groups [K, N]: `HalfQuadratic.fit`, or a rule's with equal importances.
        rule: encodes on that grid.
        group_size: K.
        axis: 1 groups consecutive inputs of a row; 0 groups rows r with equal r mod (O / K) of a column.
    """

    fit: Callable[[Tensor], tuple[Tensor, Tensor]]
    rule: FloatZeroRule
    group_size: int
    axis: int = 1

    def quantize(self, weight_OI: Tensor) -> QuantizedLinear:
        """Codes and grid of one linear.

        Args:
            weight_OI: [O, I]; I (axis 1) or O (axis 0) in multiples of the group size; taken in float32.
        """
        size, across = self.group_size, self.axis == 0
        rows, columns = weight_OI.shape
        codes_OI = torch.empty_like(weight_OI, dtype=torch.uint8, memory_format=torch.contiguous_format)
        scale_N, zero_N = torch.empty((2, weight_OI.numel() // size), device=weight_OI.device)
        groups = [
            whole_OI.view(size, -1).t() if across else whole_OI.view(-1, size) for whole_OI in (weight_OI, codes_OI)
        ]
        chunk = CHUNK_GROUPS if weight_OI.device.type == "cpu" else GPU_CHUNK_GROUPS
        parts = (values.split(chunk) for values in (*groups, scale_N, zero_N))
        side_by_side(self._fill, zip(*parts, strict=True), weight_OI.device)
        if across:
            shape = (rows // size, columns)
            return QuantizedLinear(codes_OI, StridedGrid(self.rule.bits, scale_N.view(shape), zero_N.view(shape)))
        group_I = torch.arange(columns, device=weight_OI.device, dtype=torch.int32) // size
        shape = (rows, columns // size)
        return QuantizedLinear(codes_OI, self.rule.grid(scale_N.view(shape), zero_N.view(shape), group_I))

    def _fill(self, weight_MK: Tensor, codes_MK: Tensor, scale_M: Tensor, zero_M: Tensor) -> None:
        """Fill in the codes and grids of some groups."""
        weight_KM = weight_MK.t().float().contiguous()
        fitted = self.fit(weight_KM)
        # torch transposes many times faster what keeps its dtype
        codes_MK.copy_(self.rule.encode(weight_KM, *fitted).to(torch.uint8).t())
        scale_M.copy_(fitted[0])
        zero_M.copy_(fitted[1])


def relative_error(weight_OI: Tensor, quantized: QuantizedLinear) -> float:
    """Squares of the weights' errors, summed, over those of the weights themselves.

    Args:
        weight_OI: [O, I]; not modified.
        quantized: what they became, on an affine grid whose groups are runs of one length, or axis 0's.
    """
    grid, rows = quantized.grid, rows_together(weight_OI)
    assert isinstance(grid, AffineGrid | StridedGrid), "only affine grids are chosen on the weights alone"
    pieces = zip(weight_OI.split(rows), quantized.codes_OI.split(rows), grid.levels(len(weight_OI), rows), strict=True)
    lost, whole = map(torch.stack, zip(*side_by_side(_squares, pieces, weight_OI.device), strict=True))
    return float(lost.sum() / whole.sum().clamp(min=1e-30))


def _squares(weight_RI: Tensor, codes_RI: Tensor, levels: LevelsOfRows) -> tuple[Tensor, Tensor]:
    """What codes miss the weights by, squared and summed, and the weights."""
    return squared_errors(weight_RI.float(), codes_RI, *levels)


def search_cost(work: StageWork) -> Cost:
    """What finding codes on the weights alone takes: no products."""
    return Cost(memory_bytes=WORKING_COPIES * work.largest * FLOAT_BYTES)


@dataclass(frozen=True)
class WhereCalibrated:
    """One solver for linears whose inputs were collected, another for what has none, such as an embedding.

    Attributes:
        calibrated: asks for statistics.
        blind: asks for none.
    """

    calibrated: Solver
    blind: Solver

    @property
    def needs(self) -> frozenset[str]:
        return self.calibrated.needs

    def solve(
        self, weights: dict[str, Tensor], statistics: Statistics
    ) -> Iterator[tuple[str, QuantizedLinear, LinearFacts]]:
        """Solved linears, one by one; see `quantkit.solvers.contract.Solver`."""
        chosen = self.calibrated if statistics.num_tokens else self.blind
        return chosen.solve(weights, statistics)

    def cost(self, work: StageWork) -> Cost:
        """Of the one that is chosen."""
        return (self.calibrated if work.tokens else self.blind).cost(work)


@dataclass(frozen=True)
class ByWidth:
    """Linears of one stage at several widths: each goes to the solver of its own.

    Attributes:
        solvers: by bits.
        bits_of: a linear's bits by its full name.
    """

    solvers: dict[int, Solver]
    bits_of: Callable[[str], int]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(solver.needs for solver in self.solvers.values()))

    def solve(
        self, weights: dict[str, Tensor], statistics: Statistics
    ) -> Iterator[tuple[str, QuantizedLinear, LinearFacts]]:
        """Solved linears, one by one; see `quantkit.solvers.contract.Solver`."""
        for bits, solver in self.solvers.items():
            yield from solver.solve(
                {name: weight for name, weight in weights.items() if self.bits_of(name) == bits}, statistics
            )

    def cost(self, work: StageWork) -> Cost:
        """Of all of them."""
        return total(
            solver.cost(replace(work, shapes=tuple(shape for shape in work.shapes if self.bits_of(shape.name) == bits)))
            for bits, solver in self.solvers.items()
        )
