"""GPTQ on ggml's block grids: error feedback through the columns, with scales searched for each block as it is reached.

The mathematics is that of `quantkit.solvers.gptq`; a group is a block, and its columns have the steps and mins of their
sub-blocks. Columns of a block may be visited in any order, for its scales are settled before the first of them.

Shape legend: O out features, I in features, N blocks of a row, S sub-blocks, L weights of a sub-block, P a panel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.channels import by_channel, by_row
from quantkit.grids.blocks import BlockGrid, BlockType, require_finite, search, steps_of
from quantkit.kernels import solve_panel
from quantkit.kernels.levels import Levels
from quantkit.solvers.gptq import PANEL, Factor, updated
from quantkit.solvers.refine import Sweeps, as_they_are, sweep


def solve_blocks(
    weight_OI: Tensor,
    factor: Factor,
    kind: BlockType,
    *,
    sweeps: Sweeps | None = None,
    where: str = "",
) -> tuple[Tensor, BlockGrid, float]:
    """Codes uint8 [O, I] and grid that minimize the linear's output error over the calibration tokens, tr(E H E^T).

    Args:
        weight_OI: [O, I] in the factor's dtype; I is a multiple of `kind.block`. Not modified.
        factor: the Hessian's factor; its order keeps the columns of a block together.
        kind: the ggml type.
        sweeps: how often every code is chosen again, by the Hessian in visiting order; None for not at all.
        where: the linear's name, for the error.

    Raises:
        RefusedError: weights too large for the type's float16 scales.
    """
    upper_II, order_I = factor.upper_II, factor.order_I
    weight_IO = by_channel(weight_OI, order_I)
    columns, rows = weight_IO.shape
    num_blocks, num_subs = columns // kind.block, kind.block // kind.sub
    error_IO = torch.empty_like(weight_IO)
    codes_IO = torch.empty((columns, rows), dtype=torch.uint8, device=weight_IO.device)
    halves_ON = [torch.empty((rows, num_blocks), device=weight_IO.device) for _ in range(2)]
    wholes_ONS = [
        torch.empty((rows, num_blocks, num_subs), dtype=torch.int16, device=weight_IO.device) for _ in range(2)
    ]
    shift_1O = weight_IO.new_full((1, rows), kind.offset)
    lost = weight_IO.new_zeros(())
    block_of_N = (order_I[:: kind.block] // kind.block).tolist()
    place_NI = (order_I % kind.block).view(num_blocks, kind.block)
    for block, place_I, start in zip(block_of_N, place_NI, range(0, columns, kind.block), strict=True):
        inside = slice(start, start + kind.block)
        feedback_IO = upper_II[:start, inside].t() @ error_IO[:start]
        free_IO = torch.empty_like(feedback_IO)
        free_IO[place_I] = updated(weight_IO[inside], feedback_IO, upper_II[inside, inside])
        importance_I = torch.empty_like(factor.importance_I[inside])
        importance_I[place_I] = factor.importance_I[inside]
        parts = (rows, num_subs, kind.sub)
        w_NSL = importance_I.float().view(1, num_subs, kind.sub).expand(parts)
        found, _ = search(free_IO.t().float().reshape(parts), w_NSL, kind)
        for store, value in zip((*halves_ON, *wholes_ONS), found, strict=True):
            store[:, block] = value.to(store.dtype)
        step_IO, less_IO = (value.t()[place_I // kind.sub].to(weight_IO.dtype) for value in steps_of(found))
        for first in range(0, kind.block, PANEL):
            panel = slice(first, min(first + PANEL, kind.block))
            here = slice(start + panel.start, start + panel.stop)
            feedback_PO = feedback_IO[panel]
            feedback_PO += upper_II[start : here.start, here].t() @ error_IO[start : here.start]
            levels = Levels(step_IO[panel], shift_1O, less_IO[panel], kind.top)
            lost += solve_panel(
                weight_IO[here], feedback_PO, upper_II[here, here], levels, codes_IO[here], error_IO[here]
            ).sum()
    grid = BlockGrid(kind, halves_ON[0], halves_ON[1], wholes_ONS[0], wholes_ONS[1])
    require_finite(grid, weight_OI, where=where)
    if sweeps is not None:
        steps = [part.to(weight_IO.dtype) for part in grid.steps()]
        settle = as_they_are(lambda visited: _levels(kind, steps, block_of_N[visited], place_NI[visited]))
        sizes = [kind.block] * num_blocks
        lost += sweep(weight_IO, codes_IO, error_IO, sizes, settle, sweeps)
    return by_row(codes_IO, order_I), grid, float(lost)


def _levels(kind: BlockType, steps: Sequence[Tensor], block: int, place_I: Tensor) -> Levels:
    """What a block's codes stand for, its columns as they are visited; for the steps see `BlockGrid.steps`."""
    step_LO, less_LO = (part_ONS[:, block].t()[place_I // kind.sub] for part_ONS in steps)
    return Levels(step_LO, torch.full_like(step_LO[:1], kind.offset), less_LO, kind.top)
