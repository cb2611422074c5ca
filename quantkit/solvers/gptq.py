"""GPTQ: codes that minimize the layer's output error, column by column with error feedback.

The paper (Frantar et al., arXiv 2210.17323) carries a Cholesky factor of the inverse Hessian. The same codes come
out of one Cholesky factorization without any inverse: with H = R R^T, R upper triangular, the output error of the
weight error E is ||E R||^2, and column i of E R holds only E_0 .. E_i. So the value column i should be rounded
from is W_i + (sum over j < i of E_j R_ji) / R_ii. This is the LDL view of Chee et al., arXiv 2307.13304; it costs
a third of n^3 instead of four thirds, reads the errors instead of rewriting the weights, and is better conditioned.

One thing differs from the inverse form: weights of later columns are never updated, so a group's grid cannot be
fitted on them as they stand. What the paper's form would hold there is W_g plus the solution of a small
triangular system inside the group (`updated`), and that is what the grid is fitted on.

Shape legend: O out features, I in features. Everything here is transposed (input channel first), because the loop
walks over input channels and wants each one contiguous.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantkit.calibration.statistics import DEVIATION, HESSIAN, Statistics
from quantkit.channels import by_channel, by_row, permuted
from quantkit.costs import FLOAT_BYTES, Cost, StageWork
from quantkit.errors import RunFailedError
from quantkit.grids.affine import AffineGrid, Rule
from quantkit.kernels import solve_panel
from quantkit.kernels.levels import Levels
from quantkit.machine import share_rows
from quantkit.progress import timed
from quantkit.qtensor import LinearFacts, QuantizedLinear
from quantkit.solvers.order import visiting_order
from quantkit.solvers.refine import Sweeps, refine_operations, refitted, sweep

DAMPING_STEP = 2.0
DAMPING_TRIES = 6
PANEL = 128
SPAN = 512  # channels whose feedback from all before them is one product: wide ones are faster
FACTORISE = "factorise"  # the stage of the record
WORKING_COPIES = 5  # float32 numbers for each weight of the linear that is being solved


@dataclass(frozen=True)
class GptqSolution:
    """What GPTQ decided about one linear.

    Attributes:
        codes_OI: uint8 [O, I] in the checkpoint's channel order.
        grid: scales, zeros and the group of every channel.
        lost: tr(E H E^T) with the damped H.
        energy: tr(W H W^T) with the damped H.
        damping: the fraction of mean(diag H) that was added.
    """

    codes_OI: Tensor
    grid: AffineGrid
    lost: float
    energy: float
    damping: float

    @property
    def loss(self) -> float:
        """The share of the linear's output energy that was lost; unitless."""
        return self.lost / self.energy if self.energy else 0.0


@dataclass(frozen=True)
class Factor:
    """A damped Hessian's upper factor for one visiting order; linears with the same input share it.

    Attributes:
        upper_II: R with H = R R^T, in visiting order.
        order_I: int64 [I], the channel visited at each position.
        importance_I: the damped Hessian's diagonal, in visiting order.
        damping: what was added, as a fraction of mean(diag H).
    """

    upper_II: Tensor
    order_I: Tensor
    importance_I: Tensor
    damping: float


def factorize(hessian_II: Tensor, *, order: str, group_size: int, damping: float, where: str = "") -> Factor:
    """The upper factor of the damped Hessian in visiting order.

    Damping starts at `damping` and doubles, at most six times, until the matrix is numerically positive definite;
    the value that worked is in the result and goes into the record. Channels that were never active are carried by
    damping alone; a matrix of zeros is damped as if its mean were 1.

    Args:
        hessian_II: [I, I], the sum over calibration tokens of x x^T; not modified.
        order, group_size: see `visiting_order`.
        damping: fraction of mean(diag H) added to the diagonal; unitless.
        where: the linear's name, for the error.

    Raises:
        RunFailedError: the matrix is not finite, or not positive definite after the last damping.
    """
    diagonal_I = hessian_II.diagonal()
    if not torch.isfinite(diagonal_I).all():
        raise RunFailedError(
            "the calibration activations are not finite",
            where=where,
            fix="compute in float32 (--set compute.dtype=float32), or look for the layer that overflows with "
            "`quantkit validate` on the source",
        )
    mean = float(diagonal_I.mean()) or 1.0
    order_I = visiting_order(diagonal_I, order, group_size)
    # reversing rows and columns turns the lower factor that the library computes into the upper one wanted here
    backwards_I = order_I.flip(0)
    permuted_II = permuted(hessian_II, backwards_I)
    original_I = permuted_II.diagonal().clone()
    for attempt in range(DAMPING_TRIES + 1):
        tried = damping * DAMPING_STEP**attempt
        permuted_II.diagonal().copy_(original_I + tried * mean)
        lower_II, failed_at = torch.linalg.cholesky_ex(permuted_II)
        if int(failed_at) == 0:
            importance_I = permuted_II.diagonal().flip(0).clone()
            del permuted_II
            return Factor(lower_II.flip(0, 1), order_I, importance_I, tried)
    raise RunFailedError(
        f"the Hessian is not positive definite with damping up to {tried:g}",
        where=where,
        fix="raise quantize.damping, or give more calibration windows",
    )


def solve_gptq(
    weight_OI: Tensor,
    factor: Factor,
    rule: Rule,
    *,
    group_size: int,
    sweeps: Sweeps | None = None,
    panel: int = PANEL,
    span: int = SPAN,
) -> GptqSolution:
    """Codes and grid that minimize the linear's output error over the calibration tokens.

    Args:
        weight_OI: [O, I] in the factor's dtype; not modified.
        factor: the Hessian's factor, in visiting order.
        rule: how each group's scale and zero are chosen.
        group_size: channels per grid, in visiting order; -1 for one grid per row.
        sweeps: how often scales and codes are chosen again, by the Hessian in visiting order; None for not at all.
        panel, span: channels per lazy update, inside a group and of whole groups; they change speed and rounding noise,
            never the mathematics.
    """
    upper_II, order_I = factor.upper_II, factor.order_I
    weight_IO = by_channel(weight_OI, order_I)
    num_channels, rows = weight_IO.shape
    size = num_channels if group_size == -1 else group_size
    span = max(span // size, 1) * size

    error_IO = torch.empty_like(weight_IO)
    codes_IO = torch.empty((num_channels, rows), dtype=torch.uint8, device=weight_IO.device)
    scale_GO = weight_IO.new_empty((-(-num_channels // size), rows))
    zero_GO = torch.empty_like(scale_GO)
    lost_O = weight_IO.new_zeros(rows)

    for first in range(0, num_channels, span):
        ahead = slice(first, min(first + span, num_channels))
        # the part of every column's feedback that comes from earlier spans; groups and panels of this one add theirs
        feedback_SO = upper_II[:first, ahead].t() @ error_IO[:first]
        for start in range(first, ahead.stop, size):
            inside = slice(start, min(start + size, ahead.stop))
            feedback_IO = feedback_SO[start - first : inside.stop - first]
            feedback_IO += upper_II[first:start, inside].t() @ error_IO[first:start]
            free_IO = updated(weight_IO[inside], feedback_IO, upper_II[inside, inside])
            scale_O, zero_O = rule.fit(free_IO, factor.importance_I[inside])
            scale_GO[start // size], zero_GO[start // size] = scale_O, zero_O
            levels = Levels.of_zeros(scale_O, zero_O, 2**rule.bits - 1)
            for at in range(start, inside.stop, panel):
                here = slice(at, min(at + panel, inside.stop))
                feedback_PO = feedback_IO[at - start : here.stop - start]
                feedback_PO += upper_II[start:at, here].t() @ error_IO[start:at]
                lost_O += solve_panel(
                    weight_IO[here], feedback_PO, upper_II[here, here], levels, codes_IO[here], error_IO[here]
                )

    lost, energy = float(lost_O.sum()), output_energy(weight_IO, upper_II)
    if sweeps is not None:
        sizes = [len(part) for part in order_I.split(size)]
        settle = refitted(rule, weight_IO, scale_GO, zero_GO, sizes)
        lost += sweep(weight_IO, codes_IO, error_IO, sizes, settle, sweeps)
    group_I = torch.empty_like(order_I, dtype=torch.int32)
    group_I[order_I] = torch.arange(num_channels, device=order_I.device, dtype=torch.int32) // size
    grid = rule.grid(scale_GO.t().contiguous(), zero_GO.t().contiguous(), group_I)
    return GptqSolution(by_row(codes_IO, order_I), grid, lost, energy, factor.damping)


def output_energy(weight_IO: Tensor, upper_II: Tensor, span: int = SPAN) -> float:
    """tr(W H W^T) with H = R R^T; channels in visiting order.

    Args:
        weight_IO, upper_II: W turned, and R.
        span: channels at a time; wide products are faster, and take more of R's zeros along.
    """
    found = weight_IO.new_zeros(())
    for first in range(0, len(weight_IO), span):
        ahead = slice(first, first + span)
        # columns of W R; R is zero below its diagonal
        found += (upper_II[: ahead.stop, ahead].t() @ weight_IO[: ahead.stop]).square_().sum()
    return float(found)


def solve_by_rows(
    weight_OI: Tensor, factor: Factor, rule: Rule, *, group_size: int, sweeps: Sweeps | None = None
) -> GptqSolution:
    """`solve_gptq` of some rows on each thread of a CPU: rows have nothing to do with each other."""
    solve = partial(solve_gptq, factor=factor, rule=rule, group_size=group_size, sweeps=sweeps)
    return _joined(share_rows(solve, weight_OI))


def _joined(parts: Sequence[GptqSolution]) -> GptqSolution:
    """The solution of a linear, given those of its rows."""
    first = parts[0]
    grid = replace(
        first.grid,
        scale_OG=torch.cat([part.grid.scale_OG for part in parts]),
        zero_OG=torch.cat([part.grid.zero_OG for part in parts]),
    )
    codes_OI = torch.cat([part.codes_OI for part in parts])
    lost, energy = sum(part.lost for part in parts), sum(part.energy for part in parts)
    return GptqSolution(codes_OI, grid, lost, energy, first.damping)


def in_file_order(solution: GptqSolution) -> GptqSolution:
    """The same solution with groups renumbered so that `group_I` rises, where groups are contiguous in the file.

    Group-aware order visits groups by importance; the file lists them by position, which makes g_idx trivial.
    """
    grid = solution.grid
    num_groups = grid.scale_OG.shape[1]
    # first channel of each visited group, in file order
    first = torch.full((num_groups,), grid.group_I.numel(), device=grid.group_I.device)
    channels = torch.arange(grid.group_I.numel(), device=grid.group_I.device)
    first = first.scatter_reduce(0, grid.group_I.long(), channels, "amin")
    visited_at = torch.argsort(first)
    place = torch.empty_like(visited_at)
    place[visited_at] = torch.arange(num_groups, device=place.device)
    renumbered = replace(
        grid,
        scale_OG=grid.scale_OG[:, visited_at],
        zero_OG=grid.zero_OG[:, visited_at],
        group_I=place[grid.group_I.long()].to(torch.int32),
    )
    return replace(solution, grid=renumbered)


def towards_float(weights: Iterable[Tensor], deviation_RI: Tensor, factor: Factor, share: float) -> Iterator[Tensor]:
    """W + share * W D H^-1 [O, I] for each W: moved as the quantized stream has moved its inputs.

    With X the quantized stream's inputs and X' the float stream's, ||W X' - Q X||^2 differs from
    ||W* X - Q X||^2 by a constant, W* = W X' X^T H^-1 = W + W D H^-1. So solving for W* with the ordinary solver
    minimizes the distance to the float model's output. GPTAQ (arXiv 2504.02690) spreads the same correction column
    by column; this is its closed form.

    Args:
        weights: [O, I] of linears with the same input, in the factor's dtype.
        deviation_RI: D, the sum over tokens of (x' - x) x^T, [I, I]; or W D [O, I] of a single one with fewer outputs.
        factor: of the damped H, the sum over tokens of x x^T.
        share: of the whole way; unitless.
    """
    drift_II = None
    for weight_OI in weights:
        # equations for all input channels serve every linear; those for the output channels of one may be fewer
        rows, channels = weight_OI.shape
        if rows < channels:
            moved_OI = weight_OI @ deviation_RI if len(deviation_RI) == channels else deviation_RI
            yield weight_OI.add(over_hessian(moved_OI, factor), alpha=share)
            continue
        if drift_II is None:
            drift_II = over_hessian(deviation_RI, factor)
        yield torch.addmm(weight_OI, weight_OI, drift_II, alpha=share)


def over_hessian(rows_RI: Tensor, factor: Factor) -> Tensor:
    """B H^-1 [R, I] for rows B, with the damped H; channels in the checkpoint's order."""
    upper_II = factor.upper_II
    solved_RI = rows_RI.index_select(1, factor.order_I)
    # from the right, where rows are solved as they lie in memory
    torch.linalg.solve_triangular(upper_II.t(), solved_RI, upper=False, left=False, out=solved_RI)
    torch.linalg.solve_triangular(upper_II, solved_RI, upper=True, left=False, out=solved_RI)
    return solved_RI.index_select(1, torch.argsort(factor.order_I))


@dataclass(frozen=True)
class GptqSolver:
    """GPTQ as the stream's solver; linears with the same input share one factorization.

    Attributes:
        rule: how each group's scale and zero are chosen.
        group_size, order, damping: see `factorize`.
        asymmetric: share of the correction towards the float model's outputs (see `towards_float`); 0 is plain GPTQ.
        sweeps: times that all scales and codes are chosen again afterwards; see `quantkit.solvers.refine`.
    """

    rule: Rule
    group_size: int
    order: str
    damping: float
    asymmetric: float = 0.0
    sweeps: int = 0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN, DEVIATION} if self.asymmetric else {HESSIAN})

    def solve(
        self, weights: dict[str, Tensor], statistics: Statistics
    ) -> Iterator[tuple[str, QuantizedLinear, LinearFacts]]:
        """Solved linears, one by one; see `quantkit.solvers.contract.Solver`."""
        if not weights:
            return
        started = time.perf_counter()
        hessian_II = statistics.hessian()
        spent: dict[str, float] = {}
        with timed(spent, FACTORISE):
            factor = factorize(
                hessian_II,
                order=self.order,
                group_size=self.group_size,
                damping=self.damping,
                where=next(iter(weights)),
            )
        wanted: Iterable[Tensor] = (weight.to(factor.upper_II.dtype) for weight in weights.values())
        sweeps = Sweeps.of(self.sweeps, hessian_II, factor.order_I, factor.damping)
        if self.asymmetric:
            wanted = towards_float(wanted, statistics.deviation(), factor, self.asymmetric)
        for name, weight_OI in zip(weights, wanted, strict=True):
            solution = solve_by_rows(weight_OI, factor, self.rule, group_size=self.group_size, sweeps=sweeps)
            if self.order == "group-aware":
                solution = in_file_order(solution)
            finished = time.perf_counter()
            factorise_s = spent.pop(FACTORISE, 0.0)
            facts = LinearFacts(name, solution.loss, solution.damping, finished - started, factorise_s)
            yield name, QuantizedLinear(solution.codes_OI, solution.grid), facts
            started = finished

    def cost(self, work: StageWork) -> Cost:
        """Factorization, feedback and sweeps; with a correction its equations and its products too."""
        plain = feedback_cost(work)
        if self.sweeps:
            sweep = sum(refine_operations(shape.rows, shape.columns, self.group_size) for shape in work.shapes)
            plain = plain + Cost({"solve": self.sweeps * sweep}, plain.memory_bytes)
        if not self.asymmetric or not work.shapes:
            return plain
        side = work.columns
        few_rows = [shape.rows for shape in work.shapes if shape.rows < side]
        shared = side if len(few_rows) < len(work.shapes) else 0
        products = 0 if work.narrow else sum(shape.rows for shape in work.shapes)
        both = plain + Cost(
            {"solve": 2.0 * side**2 * (shared + sum(few_rows) + products)},
            # what all linears share, once it is made: the factor, the right side, the solution
            3 * shared * side * FLOAT_BYTES,
        )
        # the Hessian in order, which sweeps go by, is there beside that
        ordered = shared * side * FLOAT_BYTES if self.sweeps else 0
        return replace(both, memory_bytes=both.memory_bytes + ordered)


def feedback_cost(work: StageWork, *, factors: int = 1) -> Cost:
    """What error feedback through all input channels takes.

    Args:
        work: the linears; one that is solved several times stands there as often.
        factors: how many of the Hessian are made, and kept.
    """
    if not work.shapes:
        return Cost()
    return Cost(
        {
            "factorise": factors * work.columns**3 / 3,
            "solve": sum(1.0 * shape.size * work.columns for shape in work.shapes),
        },
        (factors + 1) * work.columns**2 * FLOAT_BYTES + WORKING_COPIES * work.largest * FLOAT_BYTES,
    )


def updated(weight_IO: Tensor, feedback_IO: Tensor, upper_II: Tensor) -> Tensor:
    """A group's weights as the inverse form of GPTQ would have updated them before its first column.

    They are what the group would be set to if it were free: the error's image under R, summed over earlier
    groups, is cancelled inside the group, R_g^T x = feedback.
    """
    # x^T R_g = feedback^T: from the left, rows would be copied to columns and back, and that takes three times as long
    return weight_IO + torch.linalg.solve_triangular(upper_II, feedback_IO.t(), upper=True, left=False).t()
