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

PANEL = 128
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
        damping: fraction of mean(diag H) added to the diagonal.
        sweeps: times that every scale and every code is chosen again.
    """
    added = damping * hessian_II.diagonal().mean()
    scale_GO, zero_GO = (part.t().to(weight_OI.dtype).contiguous() for part in (grid.scale_OG, grid.zero_OG))
    weight_IO, codes_IO = weight_OI.t().contiguous(), codes_OI.t().contiguous()
    error_IO = weight_IO - grid.decode(codes_OI).t().to(weight_IO.dtype)
    change = weight_IO.new_zeros(())
    groups = [torch.nonzero(grid.group_I == group).squeeze(1) for group in range(len(scale_GO))]
    for _ in range(sweeps):
        for group, channels_S in enumerate(groups):
            hessian_SI = hessian_II[channels_S]
            inside_SS = hessian_SI[:, channels_S]
            inside_SS.diagonal().add_(added)
            weight_SO, codes_SO, error_SO = weight_IO[channels_S], codes_IO[channels_S], error_IO[channels_S]
            # what the errors of all other groups call for; damping stands on the diagonal alone
            own_SO = inside_SS @ error_SO
            pull_SO = hessian_SI @ error_IO - own_SO + added * error_SO
            slope_SO = pull_SO + own_SO
            change -= (error_SO * (slope_SO + pull_SO)).sum()
            scale_O, zero_O = rule.refit(codes_SO, scale_GO[group], zero_GO[group], inside_SS, slope_SO)
            scale_GO[group], zero_GO[group] = scale_O, zero_O
            error_SO = weight_SO - (codes_SO - zero_O) * scale_O
            _choose_again(weight_SO, pull_SO, inside_SS, scale_O, zero_O, 2**rule.bits - 1, codes_SO, error_SO)
            change += (error_SO * (inside_SS @ error_SO + 2 * pull_SO)).sum()
            codes_IO[channels_S], error_IO[channels_S] = codes_SO, error_SO
    refined = rule.grid(scale_GO.t().contiguous(), zero_GO.t().contiguous(), grid.group_I)
    return Refined(codes_IO.t().contiguous(), refined, float(change))


def refine_operations(rows: int, columns: int, group_size: int) -> float:
    """Operations of one sweep over a linear, a multiply-add being two.

    Args:
        group_size: channels per group, -1 for one group.
    """
    return 2.0 * rows * columns * (columns + PRODUCTS * (columns if group_size == -1 else group_size))


def _choose_again(
    weight_SO: Tensor,
    pull_SO: Tensor,
    inside_SS: Tensor,
    scale_O: Tensor,
    zero_O: Tensor,
    top: int,
    codes_SO: Tensor,
    error_SO: Tensor,
) -> None:
    """Every code of a group once more, one channel after another; `codes_SO` and `error_SO` are replaced."""
    levels = Levels.of_zeros(scale_O, zero_O, top)
    for first in range(0, len(weight_SO), PANEL):
        here = slice(first, first + PANEL)
        inside_PP = inside_SS[here, here].contiguous()
        # errors before a channel come as they are chosen, those behind it as they still are, its own not at all
        others_PS = inside_SS[here].clone()
        others_PS[:, here] = inside_PP.triu(1)
        feedback_PO = torch.addmm(pull_SO[here], others_PS, error_SO)
        chosen_PO, missed_PO = codes_SO[here], error_SO[here]
        solve_panel(weight_SO[here], feedback_PO, inside_PP, levels, chosen_PO, missed_PO)
