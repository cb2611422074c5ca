"""What is left to gain once GPTQ has chosen: scales fitted to the codes, and codes to the errors of all other channels.

GPTQ chooses a group's scale before any of its codes, and a channel's code as if the channels after it could make up for
its error exactly. Both can be chosen again, knowing everything else: coordinate descent on the same objective,
tr(E H E^T) with E the weights minus what their codes stand for. Every step keeps the better of old and new, so a sweep
never loses. (For the codes compare CDQuant, arXiv 2406.17542, which takes the best channel next; here they are taken in
order, so that a panel of them is one call of the kernel that GPTQ itself uses.)

Shape legend: O out features, I in features, S channels of a group, P channels of a panel, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.grids.affine import AffineGrid, Rule
from quantkit.kernels import solve_panel
from quantkit.kernels.levels import Levels
from quantkit.solvers.order import permuted

PANEL = 128
SPAN = 512  # channels that the errors of all others are multiplied for at once: wide products are faster
PRODUCTS = 4  # of a group's own [S, S] with [S, O], beside the one of its rows of H with all errors, in a sweep


@dataclass(frozen=True)
class Refined:
    """What sweeps left of a loss.

    Attributes:
        codes_OI: uint8 [O, I].
        grid: what they mean.
        change: by how much tr(E H E^T) is less, with the damped H: not positive.
    """

    codes_OI: Tensor
    grid: AffineGrid
    change: float


def refine(
    weight_OI: Tensor,
    codes_OI: Tensor,
    grid: AffineGrid,
    hessian_II: Tensor,
    rule: Rule,
    *,
    damping: float,
    sweeps: int,
) -> Refined:
    """Codes and grid that lose no more than those given, after so many sweeps over all groups.

    Args:
        weight_OI: [O, I] in the Hessian's dtype; not modified.
        codes_OI, grid: uint8 [O, I] and what they mean, with groups of any channels; not modified.
        hessian_II: [I, I], the sum over calibration tokens of x x^T; not modified.
        rule: how scales and zeros may be chosen.
        damping: fraction of mean(diag H) added to the diagonal, or of 1 where that is 0.
        sweeps: times that every scale and every code is chosen again.
    """
    added = damping * (float(hessian_II.diagonal().mean()) or 1.0)
    scale_GO, zero_GO = (part.t().to(weight_OI.dtype).contiguous() for part in (grid.scale_OG, grid.zero_OG))
    # channels group by group, which they are already unless they were visited by their activations
    order_I = torch.argsort(grid.group_I, stable=True)
    if not torch.equal(order_I, torch.arange(len(order_I), device=order_I.device)):
        hessian_II = permuted(hessian_II, order_I)
    weight_IO, codes_IO = weight_OI.t()[order_I], codes_OI.t()[order_I]
    error_IO = weight_IO - grid.decode(codes_OI).t()[order_I].to(weight_IO.dtype)
    change = weight_IO.new_zeros(())
    edges = [0, *torch.bincount(grid.group_I).cumsum(0).tolist()]
    num_groups, together = len(scale_GO), max(SPAN // edges[1], 1)
    for first in [*range(0, num_groups, together)] * sweeps:
        last = min(first + together, num_groups)
        span = slice(edges[first], edges[last])
        # half the loss's slope, with all errors as they are now; damping stands on the diagonal alone
        slope_BO = torch.addmm(error_IO[span], hessian_II[span], error_IO, beta=added)
        moved_BO = torch.zeros_like(slope_BO)
        for group in range(first, last):
            inside = slice(edges[group], edges[group + 1])
            here = slice(inside.start - span.start, inside.stop - span.start)
            slope_BO[here] += hessian_II[inside, span.start : inside.start] @ moved_BO[: here.start]
            inside_SS = hessian_II[inside, inside].clone()
            inside_SS.diagonal().add_(added)
            (scale_GO[group], zero_GO[group]), error_SO, changed = _again(
                weight_IO[inside],
                codes_IO[inside],
                error_IO[inside],
                slope_BO[here],
                inside_SS,
                (scale_GO[group], zero_GO[group]),
                rule,
            )
            change += changed
            moved_BO[here] = error_SO - error_IO[inside]
            error_IO[inside] = error_SO
    refined_OI = torch.empty_like(codes_OI)
    refined_OI[:, order_I] = codes_IO.t()
    refined = rule.grid(scale_GO.t().contiguous(), zero_GO.t().contiguous(), grid.group_I)
    return Refined(refined_OI, refined, float(change))


def refine_operations(rows: int, columns: int, group_size: int) -> float:
    """Operations of one sweep over a linear, a multiply-add being two.

    Args:
        group_size: channels per group, -1 for one group.
    """
    size = columns if group_size == -1 else group_size
    earlier = max(min(SPAN // size * size, columns) - size, 0) / 2  # of the same span, on average
    return 2.0 * rows * columns * (columns + PRODUCTS * size + earlier)


def _again(
    weight_SO: Tensor,
    codes_SO: Tensor,
    error_SO: Tensor,
    slope_SO: Tensor,
    inside_SS: Tensor,
    grid: tuple[Tensor, Tensor],
    rule: Rule,
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """A group's scale and zero once more and then its codes, which are replaced; with its errors and the change of the
    loss.

    Args:
        error_SO: with the codes and the grid as they were.
        slope_SO: half of the loss's slope there.
        inside_SS: the group's own part of the damped Hessian.
        grid: scale [O] and zero [O] as they were.
    """
    own_SO = inside_SS @ error_SO
    pull_SO = slope_SO - own_SO  # what the errors of all other groups call for
    before = 2 * _dot(error_SO, slope_SO) - _dot(error_SO, own_SO)
    scale_O, zero_O = rule.refit(codes_SO, *grid, inside_SS, slope_SO)
    error_SO = torch.addcmul(weight_SO, codes_SO - zero_O, scale_O, value=-1)
    _choose_codes(weight_SO, pull_SO, inside_SS, Levels.of_zeros(scale_O, zero_O, 2**rule.bits - 1), codes_SO, error_SO)
    after = _dot(error_SO, inside_SS @ error_SO) + 2 * _dot(error_SO, pull_SO)
    return (scale_O, zero_O), error_SO, after - before


def _dot(left_SO: Tensor, right_SO: Tensor) -> Tensor:
    return torch.dot(left_SO.flatten(), right_SO.flatten())


def _choose_codes(
    weight_SO: Tensor, pull_SO: Tensor, inside_SS: Tensor, levels: Levels, codes_SO: Tensor, error_SO: Tensor
) -> None:
    """Every code of a group once more, one channel after another; `codes_SO` and `error_SO` are replaced."""
    for first in range(0, len(weight_SO), PANEL):
        here = slice(first, first + PANEL)
        inside_PP = inside_SS[here, here].contiguous()
        # errors before a channel come as they are chosen, those behind it as they still are, its own not at all
        others_PS = inside_SS[here].clone()
        others_PS[:, here] = inside_PP.triu(1)
        feedback_PO = torch.addmm(pull_SO[here], others_PS, error_SO)
        chosen_PO, missed_PO = codes_SO[here], error_SO[here]
        solve_panel(weight_SO[here], feedback_PO, inside_PP, levels, chosen_PO, missed_PO)
