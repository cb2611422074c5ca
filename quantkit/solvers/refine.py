"""What is left to gain once GPTQ has chosen: scales fitted to the codes, and codes to the errors of all other channels.

GPTQ chooses a group's scale before any of its codes, and a channel's code as if the channels after it could make up for
its error exactly. Both can be chosen again, knowing everything else: coordinate descent on the same objective,
tr(E H E^T) with E the weights minus what their codes stand for. Every step keeps the better of old and new, so a sweep
never loses. (For the codes compare CDQuant, arXiv 2406.17542, which takes the best channel next; here they are taken in
order, so that a panel of them is one call of the kernel that GPTQ itself uses.) On affine grids `sweep` chooses both
(`refitted`); where scales are not free, as in EXL2's and ggml's files, the codes alone (`as_they_are`).

Shape legend: O out features, I in features, S channels of a group, P channels of a panel, G groups.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from quantkit.channels import permuted
from quantkit.grids.affine import Rule
from quantkit.kernels import solve_panel
from quantkit.kernels.levels import Levels

PANEL = 128
SPAN = 512  # channels that the errors of all others are multiplied for at once: wide products are faster
PRODUCTS = 4  # of a group's own [S, S] with [S, O], beside the one of its rows of H with all errors, in a sweep

Settle = Callable[[int, Tensor, Tensor, Tensor, Tensor], tuple[Levels, Tensor]]
"""What a group's codes are to stand for, and the errors [S, O] of those it has, a new tensor.

Given are the group, its codes uint8 [S, O], their errors so far, half of the loss's slope there, and the group's own
part [S, S] of the damped Hessian.
"""


@dataclass(frozen=True)
class Sweeps:
    """How often codes are chosen again once all are there, and what their errors are weighed by.

    Attributes:
        times: above 0.
        damped_II: [I, I], the damped Hessian in the order of channels that the solver goes by; not to be modified.
    """

    times: int
    damped_II: Tensor

    @classmethod
    def of(cls, times: int, hessian_II: Tensor, order_I: Tensor, damping: float) -> "Sweeps | None":
        """So many sweeps by a Hessian [I, I], which is not modified; None of none.

        Args:
            times: 0 or more.
            hessian_II: the sum over calibration tokens of x x^T, in the checkpoint's order of channels.
            order_I: the channel visited at each position.
            damping: fraction of mean(diag H) added to the diagonal, or of 1 where that is 0.
        """
        if not times:
            return None
        damped_II = permuted(hessian_II, order_I)
        diagonal_I = damped_II.diagonal()
        diagonal_I += damping * (float(diagonal_I.mean()) or 1.0)
        return cls(times, damped_II)


def sweep(
    weight_IO: Tensor,
    codes_IO: Tensor,
    error_IO: Tensor,
    sizes: Sequence[int],
    settle: Settle,
    sweeps: Sweeps,
) -> float:
    """Choose all codes again, so many times, group by group; by how much tr(E H E^T) is less then: not positive.

    Args:
        weight_IO: [I, O] in the Hessian's dtype, groups one behind the other; not modified.
        codes_IO: uint8 [I, O], replaced.
        error_IO: the weights minus what their codes stand for, replaced.
        sizes: channels of each group.
        settle: what a group's codes stand for, asked before they are chosen.
        sweeps: how many times, and the Hessian in that order of channels.
    """
    damped_II = sweeps.damped_II
    change = weight_IO.new_zeros(())
    edges = [0, *accumulate(sizes)]
    for first, last in [*_together(sizes)] * sweeps.times:
        span = slice(edges[first], edges[last])
        # half the loss's slope, with all errors as they are now
        slope_BO = damped_II[span] @ error_IO
        moved_BO = torch.zeros_like(slope_BO)
        for group in range(first, last):
            inside = slice(edges[group], edges[group + 1])
            here = slice(inside.start - span.start, inside.stop - span.start)
            slope_SO, missed_SO = slope_BO[here], error_IO[inside]
            slope_SO += damped_II[inside, span.start : inside.start] @ moved_BO[: here.start]
            inside_SS = damped_II[inside, inside]
            # what the errors of all other groups call for
            pull_SO = torch.addmm(slope_SO, inside_SS, missed_SO, alpha=-1)
            levels, error_SO = settle(group, codes_IO[inside], missed_SO, slope_SO, inside_SS)
            _choose_codes(weight_IO[inside], pull_SO, inside_SS, levels, codes_IO[inside], error_SO)
            moved_SO = torch.sub(error_SO, missed_SO, out=moved_BO[here])
            change += torch.dot(moved_SO.flatten(), torch.addmm(slope_SO, inside_SS, moved_SO, beta=2).flatten())
            error_IO[inside] = error_SO
    return float(change)


def refitted(rule: Rule, weight_IO: Tensor, scale_GO: Tensor, zero_GO: Tensor, sizes: Sequence[int]) -> Settle:
    """Groups on affine grids, whose scales and zeros are chosen again.

    Args:
        rule: how.
        weight_IO: what `sweep` is given.
        scale_GO, zero_GO: [G, O] what the codes mean so far, replaced.
        sizes: channels of each group.
    """
    weights = weight_IO.split(list(sizes))

    def settle(group: int, codes_SO: Tensor, _: Tensor, slope_SO: Tensor, inside_SS: Tensor) -> tuple[Levels, Tensor]:
        scale_O, zero_O = rule.refit(codes_SO, scale_GO[group], zero_GO[group], inside_SS, slope_SO)
        scale_GO[group], zero_GO[group] = scale_O, zero_O
        error_SO = torch.addcmul(weights[group], codes_SO - zero_O, scale_O, value=-1)
        return Levels.of_zeros(scale_O, zero_O, 2**rule.bits - 1), error_SO

    return settle


def as_they_are(levels: Callable[[int], Levels]) -> Settle:
    """Groups whose codes stand for what they stood for."""
    return lambda group, codes_SO, error_SO, slope_SO, inside_SS: (levels(group), error_SO.clone())


def _together(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First group, and that behind the last, of spans of no more channels than `SPAN`, or of a single group."""
    first, channels = 0, 0
    for group, size in enumerate(sizes):
        if group > first and channels + size > SPAN:
            yield first, group
            first, channels = group, 0
        channels += size
    yield first, len(sizes)


def refine_operations(rows: int, columns: int, group_size: int) -> float:
    """Operations of one sweep over a linear, a multiply-add being two.

    Args:
        group_size: channels per group, -1 for one group.
    """
    size = columns if group_size == -1 else group_size
    earlier = max(min(SPAN // size * size, columns) - size, 0) / 2  # of the same span, on average
    return 2.0 * rows * columns * (columns + PRODUCTS * size + earlier)


def _choose_codes(
    weight_SO: Tensor, pull_SO: Tensor, inside_SS: Tensor, levels: Levels, codes_SO: Tensor, error_SO: Tensor
) -> None:
    """Every code of a group once more, one channel after another; `codes_SO` and `error_SO` are replaced."""
    for first in range(0, len(weight_SO), PANEL):
        here = slice(first, first + PANEL)
        # errors before a channel come as they are chosen, those behind it as they still are, its own not at all
        others_PS = inside_SS[here].clone()
        others_PS[:, here].triu_(1)
        feedback_PO = torch.addmm(pull_SO[here], others_PS, error_SO)
        chosen_PO, missed_PO = codes_SO[here], error_SO[here]
        solve_panel(weight_SO[here], feedback_PO, inside_SS[here, here], levels.part(here), chosen_PO, missed_PO)
