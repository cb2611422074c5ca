"""GPTQ on EXL2's grid: the strongest input channels first, in the widest codes, with error feedback through all.

The mathematics is that of `quantkit.solvers.gptq` in activation order. Each group's scales are fitted when it is
reached, on the weights as earlier errors would have them, and errors are those of the float16 values a reader decodes.

Shape legend: O out features, I in features.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.calibration.statistics import BLOCK, HESSIAN, Statistics
from quantkit.costs import Cost, StageWork
from quantkit.errors import RefusedError
from quantkit.grids.exl2 import Exl2Grid, Mixture, column_scales, fit
from quantkit.kernels import solve_panel
from quantkit.kernels.levels import Levels
from quantkit.progress import timed
from quantkit.qtensor import LinearFacts, QuantizedLinear
from quantkit.solvers.gptq import FACTORISE, PANEL, Factor, factorize, feedback_cost, updated

LARGEST = torch.finfo(torch.float16).max


def solve_exl2(
    weight_OI: Tensor, factor: Factor, mixture: Mixture, *, candidates: int, where: str = ""
) -> tuple[QuantizedLinear, float]:
    """Codes and grid that minimize the linear's output error over the calibration tokens, and that error, tr(E H E^T).

    Args:
        weight_OI: [O, I] in the factor's dtype; I a multiple of 32. Not modified.
        factor: the Hessian's factor, strongest channels first.
        mixture: widths and group sizes.
        candidates: scales tried per column and group, see `quantkit.grids.exl2.fit`.
        where: the linear's name, for the error.

    Raises:
        RefusedError: weights too large for float16.
    """
    if float(weight_OI.abs().max()) > LARGEST:
        raise RefusedError(
            f"{where} holds weights beyond float16",
            where=where,
            fix="EXL2 stores float16 scales; this model cannot be stored in it",
        )
    upper_II, order_I = factor.upper_II, factor.order_I
    weight_IO = weight_OI.t()[order_I]
    columns, rows = weight_IO.shape
    groups = mixture.groups(columns)
    error_IO = torch.empty_like(weight_IO)
    codes_IO = torch.empty((columns, rows), dtype=torch.uint8, device=weight_IO.device)
    code_GO = torch.empty((len(groups), rows), dtype=torch.uint8, device=weight_IO.device)
    scale_max_G = torch.empty(len(groups), device=weight_IO.device)
    lost = weight_IO.new_zeros(())
    start = 0
    for group, (bits, size) in enumerate(groups):
        stop = start + size
        inside = slice(start, stop)
        feedback_IO = upper_II[:start, inside].t() @ error_IO[:start]
        free_IO = updated(weight_IO[inside], feedback_IO, upper_II[inside, inside])
        code_GO[group], scale_max_G[group] = fit(free_IO, factor.importance_I[inside], bits, candidates)
        scale_O = column_scales(code_GO[group : group + 1], scale_max_G[group : group + 1])[0].to(weight_IO.dtype)
        levels = replace(Levels.of_zeros(scale_O, torch.full_like(scale_O, 2 ** (bits - 1)), 2**bits - 1), half=True)
        for first in range(start, stop, PANEL):
            here = slice(first, min(first + PANEL, stop))
            feedback_PO = feedback_IO[here.start - start : here.stop - start]
            feedback_PO += upper_II[start:first, here].t() @ error_IO[start:first]
            panel = (weight_IO[here], feedback_PO, upper_II[here, here])
            lost += solve_panel(*panel, levels, codes_IO[here], error_IO[here]).sum()
        start = stop
    codes_OI = torch.empty((rows, columns), dtype=torch.uint8, device=weight_IO.device)
    codes_OI[:, order_I] = codes_IO.t()
    linear = QuantizedLinear(codes_OI, Exl2Grid(groups, scale_max_G, code_GO, order_I))
    return linear, float(lost)


def output_energy(weight_OI: Tensor, factor: Factor) -> float:
    """tr(W H W^T), what `solve_exl2`'s error is a share of; the same for every mixture."""
    weight_IO = weight_OI.t()[factor.order_I]
    columns = len(weight_IO)
    total = weight_IO.new_zeros(())
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        total += (factor.upper_II[:stop, start:stop].t() @ weight_IO[:stop]).square_().sum()
    return float(total)


@dataclass(frozen=True)
class Exl2Solver:
    """Adaptive GPTQ as the stream's solver: one factorization serves every linear of a stage in every variant.

    Attributes:
        mixtures: of each variant, by the linear's full name; a stream goes on with the first.
        damping: see `quantkit.solvers.gptq.factorize`.
        candidates: see `solve_exl2`.
    """

    mixtures: Callable[[str], tuple[Mixture, ...]]
    damping: float
    candidates: int

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN})

    def solve(
        self, weights: dict[str, Tensor], statistics: Statistics
    ) -> Iterator[tuple[str, QuantizedLinear, LinearFacts]]:
        """Solved linears, one by one; see `quantkit.solvers.contract.Solver`."""
        if not weights:
            return
        started = time.perf_counter()
        spent: dict[str, float] = {}
        with timed(spent, FACTORISE):
            factor = activation_factor(statistics, self.damping, where=next(iter(weights)))
        for name, weight in weights.items():
            weight_OI = weight.to(factor.upper_II.dtype)
            wanted = self.mixtures(name)
            solved = {
                mixture: solve_exl2(weight_OI, factor, mixture, candidates=self.candidates, where=name)
                for mixture in dict.fromkeys(wanted)
            }
            linear, lost = solved[wanted[0]]
            energy = output_energy(weight_OI, factor)
            others = tuple(solved[mixture][0] for mixture in wanted[1:])
            finished = time.perf_counter()
            share = lost / energy if energy else 0.0
            facts = LinearFacts(name, share, factor.damping, finished - started, spent.pop(FACTORISE, 0.0))
            yield name, replace(linear, others=others), facts
            started = finished

    def cost(self, work: StageWork) -> Cost:
        """One factor, and feedback for each variant."""
        solved = tuple(shape for shape in work.shapes for _ in self.mixtures(shape.name))
        return feedback_cost(replace(work, shapes=solved))


def activation_factor(statistics: Statistics, damping: float, *, where: str) -> Factor:
    """The factor that visits channels by falling energy, over all groups."""
    return factorize(statistics.hessian(), order="activation", group_size=-1, damping=damping, where=where)
