"""GPTQ on EXL2's grid: the strongest input channels first, in the widest codes, with error feedback through all.

The mathematics is that of `quantkit.solvers.gptq` in activation order. Each group's scales are fitted when it is
reached, on the weights as earlier errors would have them, and errors are those of the float16 values a reader decodes.
Then the codes are chosen again, see `quantkit.solvers.refine`.

Shape legend: O out features, I in features.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantkit.calibration.statistics import HESSIAN, Statistics
from quantkit.channels import by_channel, by_row
from quantkit.costs import Cost, StageWork
from quantkit.errors import RefusedError
from quantkit.grids.exl2 import UNIT, Exl2Grid, Groups, Mixture, column_scales, fit
from quantkit.kernels import solve_panel
from quantkit.kernels.levels import Levels
from quantkit.progress import timed
from quantkit.qtensor import LinearFacts, QuantizedLinear
from quantkit.solvers.gptq import FACTORISE, PANEL, Factor, factorize, feedback_cost, output_energy, updated
from quantkit.solvers.refine import Sweeps, as_they_are, refine_operations, sweep

LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Visited:
    """A solved linear, its input channels in the order they were visited.

    Attributes:
        codes_IO: uint8 [I, O].
        error_IO: the weights minus what the codes stand for.
        code_GO, scale_max_G: see `quantkit.grids.exl2.Exl2Grid`.
        lost: tr(E H E^T).
    """

    codes_IO: Tensor
    error_IO: Tensor
    code_GO: Tensor
    scale_max_G: Tensor
    lost: float


def solve_exl2(
    weight_OI: Tensor,
    factor: Factor,
    mixture: Mixture,
    *,
    candidates: int,
    sweeps: Sweeps | None = None,
    where: str = "",
) -> tuple[QuantizedLinear, float]:
    """Codes and grid that minimize the linear's output error over the calibration tokens, and that error, tr(E H E^T).

    Args:
        weight_OI: [O, I] in the factor's dtype; I a multiple of 32. Not modified.
        factor: the Hessian's factor, strongest channels first.
        mixture: widths and group sizes.
        candidates: scales tried per column and group, see `quantkit.grids.exl2.fit`.
        sweeps: how often every code is chosen again, by the Hessian in the factor's order; None for not at all.
        where: the linear's name, for the error.

    Raises:
        RefusedError: weights too large for float16.
    """
    order_I = factor.order_I
    groups = mixture.groups(weight_OI.shape[1])
    weight_IO = in_visiting_order(weight_OI, order_I, where=where)
    solved = solve_groups(weight_IO, factor, groups, candidates=candidates)
    lost = solved.lost
    if sweeps is not None:

        def levels(group: int) -> Levels:
            return _levels(groups[group][0], solved.code_GO[group], solved.scale_max_G[group], weight_IO.dtype)

        sizes = [size for _, size in groups]
        lost += sweep(weight_IO, solved.codes_IO, solved.error_IO, sizes, as_they_are(levels), sweeps)
    codes_OI = by_row(solved.codes_IO, order_I)
    return QuantizedLinear(codes_OI, Exl2Grid(groups, solved.scale_max_G, solved.code_GO, order_I)), lost


def in_visiting_order(weight_OI: Tensor, order_I: Tensor, *, where: str) -> Tensor:
    """[I, O], a copy.

    Raises:
        RefusedError: weights too large for float16, with the linear's name `where`.
    """
    if float(weight_OI.abs().max()) > LARGEST:
        raise RefusedError(
            f"{where} holds weights beyond float16",
            where=where,
            fix="EXL2 stores float16 scales; this model cannot be stored in it",
        )
    return by_channel(weight_OI, order_I)


def solve_groups(weight_IO: Tensor, factor: Factor, groups: Groups, *, candidates: int) -> Visited:
    """What `solve_exl2` finds, given the weights in visiting order, which are not modified.

    Args:
        weight_IO: [I, O] in the factor's dtype.
        factor: see there.
        groups: (bits, channels) of each group.
        candidates: see there.
    """
    upper_II = factor.upper_II
    columns, rows = weight_IO.shape
    error_IO = torch.empty_like(weight_IO)
    codes_IO = torch.empty((columns, rows), dtype=torch.uint8, device=weight_IO.device)
    code_GO = torch.empty((len(groups), rows), dtype=torch.uint8, device=weight_IO.device)
    scale_max_G = torch.empty(len(groups), device=weight_IO.device)
    lost = weight_IO.new_zeros(())
    for block, found in blocks(groups):
        # what errors before the block call for: a product with so few columns as a group has takes twice as long
        feedback_BO = upper_II[: block.start, block].t() @ error_IO[: block.start]
        for group, inside in found:
            bits = groups[group][0]
            before = slice(block.start, inside.start)
            feedback_IO = feedback_BO[inside.start - block.start : inside.stop - block.start]
            feedback_IO.addmm_(upper_II[before, inside].t(), error_IO[before])
            free_IO = updated(weight_IO[inside], feedback_IO, upper_II[inside, inside])
            code_GO[group], scale_max_G[group] = fit(free_IO, factor.importance_I[inside], bits, candidates)
            levels = _levels(bits, code_GO[group], scale_max_G[group], weight_IO.dtype)
            for first in range(inside.start, inside.stop, PANEL):
                here = slice(first, min(first + PANEL, inside.stop))
                feedback_PO = feedback_IO[here.start - inside.start : here.stop - inside.start]
                feedback_PO.addmm_(upper_II[inside.start : first, here].t(), error_IO[inside.start : first])
                panel = (weight_IO[here], feedback_PO, upper_II[here, here])
                lost += solve_panel(*panel, levels, codes_IO[here], error_IO[here]).sum()
    return Visited(codes_IO, error_IO, code_GO, scale_max_G, float(lost))


def _levels(bits: int, code_O: Tensor, scale_max: Tensor, dtype: torch.dtype) -> Levels:
    """What a group's codes stand for."""
    scale_O = column_scales(code_O.unsqueeze(0), scale_max.unsqueeze(0))[0].to(dtype)
    middle_O = torch.full_like(scale_O, 2 ** (bits - 1))
    return replace(Levels.of_zeros(scale_O, middle_O, 2**bits - 1), half=True)


def blocks(groups: Groups) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Channels of consecutive groups, at least so many as a panel has but at the end, and each group's place in them.

    Args:
        groups: (bits, channels) of each.
    """
    start = 0
    found: list[tuple[int, slice]] = []
    for group, (_, size) in enumerate(groups):
        begin = found[-1][1].stop if found else start
        found.append((group, slice(begin, begin + size)))
        if begin + size - start >= PANEL or group + 1 == len(groups):
            yield slice(start, begin + size), found
            start, found = begin + size, []


@dataclass(frozen=True)
class Exl2Solver:
    """Adaptive GPTQ as the stream's solver: one factorization serves every linear of a stage in every variant.

    Attributes:
        mixtures: of each variant, by the linear's full name; a stream goes on with the first.
        damping: see `quantkit.solvers.gptq.factorize`.
        candidates: see `solve_exl2`.
        sweeps: times that every code is chosen again.
    """

    mixtures: Callable[[str], tuple[Mixture, ...]]
    damping: float
    candidates: int
    sweeps: int = 0

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
        solve = partial(
            solve_exl2,
            factor=factor,
            candidates=self.candidates,
            sweeps=Sweeps.of(self.sweeps, statistics.hessian(), factor.order_I, factor.damping),
        )
        for name, weight in weights.items():
            weight_OI = weight.to(factor.upper_II.dtype)
            wanted = self.mixtures(name)
            solved = {mixture: solve(weight_OI, mixture=mixture, where=name) for mixture in dict.fromkeys(wanted)}
            linear, lost = solved[wanted[0]]
            energy = output_energy(by_channel(weight_OI, factor.order_I), factor.upper_II)
            others = tuple(solved[mixture][0] for mixture in wanted[1:])
            finished = time.perf_counter()
            share = lost / energy if energy else 0.0
            facts = LinearFacts(name, share, factor.damping, finished - started, spent.pop(FACTORISE, 0.0))
            yield name, replace(linear, others=others), facts
            started = finished

    def cost(self, work: StageWork) -> Cost:
        """One factor; feedback and sweeps for each variant."""
        solved = tuple(shape for shape in work.shapes for _ in self.mixtures(shape.name))
        feedback = feedback_cost(replace(work, shapes=solved))
        # in the smallest groups; in larger ones they take more
        swept = sum(refine_operations(shape.rows, shape.columns, UNIT) for shape in solved)
        return feedback + Cost({"solve": self.sweeps * swept}, feedback.memory_bytes)


def activation_factor(statistics: Statistics, damping: float, *, where: str) -> Factor:
    """The factor that visits channels by falling energy, over all groups."""
    return factorize(statistics.hessian(), order="activation", group_size=-1, damping=damping, where=where)
