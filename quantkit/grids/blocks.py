"""ggml's block grids: weight = d * scale * (code - offset) - dmin * min, with integer scales inside a block.

A block of 256 weights (K-quants) has sub-blocks with small integer scales and mins under two float16 numbers; a block
of 32 (the older types) has the float16 numbers alone. The search minimizes the squared error in the weighting that
ggml's own encoder uses (ggml-quants.c, MIT), so that the two can be compared; where that one fits scales, then rounds
them, this one goes on: with rounded scales it tries their neighbours, refits d and dmin to the codes and encodes again.

Shape legend: O rows, I columns, N blocks, S sub-blocks of a block, L weights of a sub-block, M = N S sub-blocks,
C candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantkit.errors import RefusedError
from quantkit.kernels import fit_offset, fit_ranges, search_blocks
from quantkit.kernels.levels import ABOVE, BELOW, RANGE, BlockSearch
from quantkit.kernels.reference import block_errors
from quantkit.machine import rows_together, side_by_side

K_BLOCK = 256
BLOCK = 32
REFINEMENTS = 3
LARGEST_HALF = torch.finfo(torch.float16).max
WHOLE_REFITS = 3  # of step and subtrahend, where no rounding of scales follows


@dataclass(frozen=True)
class BlockType:
    """One ggml type.

    Attributes:
        name: ggml's spelling.
        block: weights per block.
        sub: weights per sub-block; `block` where there is one scale only.
        bits: of a code.
        offset: subtracted from a code before scaling.
        scale_range: lowest and highest integer scale of a sub-block; (1, 1) where there is none.
        min_top: highest integer min; 0 where the type has no min, 1 where the min is a float16 of either sign.
        size_bytes: of a block in the file.
    """

    name: str
    block: int
    sub: int
    bits: int
    offset: int
    scale_range: tuple[int, int]
    min_top: int
    size_bytes: int

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    @property
    def has_sub_scales(self) -> bool:
        return self.scale_range != (1, 1)


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", BLOCK, BLOCK, 4, 8, (1, 1), 0, 18),
        BlockType("Q4_1", BLOCK, BLOCK, 4, 0, (1, 1), 1, 20),
        BlockType("Q5_0", BLOCK, BLOCK, 5, 16, (1, 1), 0, 22),
        BlockType("Q5_1", BLOCK, BLOCK, 5, 0, (1, 1), 1, 24),
        BlockType("Q8_0", BLOCK, BLOCK, 8, 128, (1, 1), 0, 34),
        BlockType("Q2_K", K_BLOCK, 16, 2, 0, (0, 15), 15, 84),
        BlockType("Q3_K", K_BLOCK, 16, 3, 4, (-32, 31), 0, 110),
        BlockType("Q4_K", K_BLOCK, 32, 4, 0, (0, 63), 63, 144),
        BlockType("Q5_K", K_BLOCK, 32, 5, 0, (0, 63), 63, 176),
        BlockType("Q6_K", K_BLOCK, 16, 6, 32, (-128, 127), 0, 210),
    )
}


@dataclass(frozen=True)
class BlockGrid:
    """What the codes of one linear mean.

    Attributes:
        kind: the ggml type.
        d_ON: float32 [O, N], every value a float16.
        dmin_ON: float32 [O, N], likewise; 0 where the type has no min.
        scale_ONS: int16 [O, N, S]; 1 where the type has no scales of sub-blocks.
        min_ONS: int16 [O, N, S].
    """

    kind: BlockType
    d_ON: Tensor
    dmin_ON: Tensor
    scale_ONS: Tensor
    min_ONS: Tensor

    @property
    def bits(self) -> int:
        return self.kind.bits

    def steps(self) -> tuple[Tensor, Tensor]:
        """float32 [O, N, S] each: the step between codes, and what is subtracted."""
        return self.d_ON.unsqueeze(2) * self.scale_ONS, self.dmin_ON.unsqueeze(2) * self.min_ONS

    def decode(self, codes_OI: Tensor) -> Tensor:
        """float32 [O, I]: the weights that uint8 codes stand for, in the order of operations of ggml's readers."""
        step_ONS, less_ONS = self.steps()
        codes_ONSL = codes_OI.reshape(*step_ONS.shape, self.kind.sub).float() - self.kind.offset
        return (step_ONS.unsqueeze(3) * codes_ONSL - less_ONS.unsqueeze(3)).reshape(codes_OI.shape)


def error_weights(weight_OI: Tensor, kind: BlockType, importance_I: Tensor | None) -> Tensor:
    """float32 [O, I]: the weight of each squared error, as ggml's encoder of the type has it.

    Args:
        weight_OI: float32.
        kind: the type; Q8_0 weighs all errors alike.
        importance_I: mean square of every input; None weighs by the weights alone.
    """
    square_OI = weight_OI.square()
    if kind.name == "Q8_0":
        return torch.ones_like(weight_OI)
    if importance_I is None:
        if kind.name in ("Q4_K", "Q5_K"):
            mean = square_OI.unflatten(1, (-1, kind.sub)).mean(2, keepdim=True).sqrt()
            return (mean + weight_OI.unflatten(1, (-1, kind.sub)).abs()).flatten(1)
        if kind.name == "Q2_K":
            return weight_OI.abs()
        return square_OI if kind.block == K_BLOCK else torch.ones_like(weight_OI)
    if kind.name == "Q6_K":
        return importance_I.expand_as(weight_OI)
    if kind.block == K_BLOCK:
        mean = square_OI.unflatten(1, (-1, K_BLOCK)).mean(2, keepdim=True)
        spread = mean * (1 if kind.name == "Q2_K" else 2) + square_OI.unflatten(1, (-1, K_BLOCK))
        return importance_I * spread.sqrt().flatten(1)
    return importance_I * (square_OI.mean(1, keepdim=True) + square_OI).sqrt()


def quantize(
    weight_OI: Tensor, kind: BlockType, importance_I: Tensor | None = None, *, where: str = ""
) -> tuple[Tensor, BlockGrid]:
    """Codes uint8 [O, I] and grid that keep the weighted squared error small.

    Args:
        weight_OI: any float dtype; I is a multiple of `kind.block`. Not modified.
        kind: the type.
        importance_I: mean square of every input, float32 [I]; None where it is not known.
        where: the linear's name, for the error.

    Raises:
        RefusedError: weights too large for the type's float16 scales.
    """
    pieces = ((part, kind, importance_I, where) for part in weight_OI.split(rows_together(weight_OI)))
    parts = side_by_side(quantize_rows, pieces, weight_OI.device)
    codes_OI, grids = torch.cat([codes for codes, _ in parts]), [grid for _, grid in parts]
    grid = BlockGrid(
        kind,
        torch.cat([part.d_ON for part in grids]),
        torch.cat([part.dmin_ON for part in grids]),
        torch.cat([part.scale_ONS for part in grids]),
        torch.cat([part.min_ONS for part in grids]),
    )
    assert codes_OI.shape == weight_OI.shape, "every weight has a code"
    return codes_OI, grid


def quantize_rows(
    weight_RI: Tensor, kind: BlockType, importance_I: Tensor | None, where: str
) -> tuple[Tensor, BlockGrid]:
    """What `quantize` finds, of rows that are searched together."""
    codes_RI, grid = _quantize(weight_RI.float(), kind, importance_I)
    require_finite(grid, weight_RI, where=where)
    return codes_RI, grid


def require_finite(grid: BlockGrid, weight_OI: Tensor, *, where: str = "") -> None:
    """Stop where float16 numbers cannot hold a linear's scales.

    Raises:
        RefusedError: naming the largest weight.
    """
    largest = float(torch.stack(weight_OI.aminmax()).abs().max())
    emptied = False
    if largest > LARGEST_HALF:
        # where scales are whole numbers times a float16, one that is not found leaves the block empty
        most_ON = weight_OI.unflatten(1, (-1, grid.kind.block)).abs().amax(2)
        emptied = bool(((grid.d_ON == 0) & (most_ON > LARGEST_HALF)).any())
    if emptied or not (torch.isfinite(grid.d_ON).all() and torch.isfinite(grid.dmin_ON).all()):
        raise RefusedError(
            f"weights up to {largest:g} are too large for {grid.kind.name}",
            where=where,
            fix="the type's scales are 16-bit floats; this model cannot be stored in it",
        )


def _quantize(weight_OI: Tensor, kind: BlockType, importance_I: Tensor | None) -> tuple[Tensor, BlockGrid]:
    rows, columns = weight_OI.shape
    parts = (-1, kind.block // kind.sub, kind.sub)
    (d_N, dmin_N, scale_NS, min_NS), codes_NSL = search(
        weight_OI.reshape(parts), error_weights(weight_OI, kind, importance_I).reshape(parts), kind
    )
    num_blocks, num_subs = columns // kind.block, parts[1]
    return codes_NSL.reshape(rows, columns).to(torch.uint8), BlockGrid(
        kind,
        d_N.reshape(rows, num_blocks),
        dmin_N.reshape(rows, num_blocks),
        scale_NS.reshape(rows, num_blocks, num_subs).to(torch.int16),
        min_NS.reshape(rows, num_blocks, num_subs).to(torch.int16),
    )


Fitted = tuple[Tensor, Tensor, Tensor, Tensor]
"""d [N], dmin [N], scale [N, S] and min [N, S], all float32, the last two whole numbers."""


def search(x_NSL: Tensor, w_NSL: Tensor, kind: BlockType) -> tuple[Fitted, Tensor]:
    """Scales and mins of blocks, and the codes [N, S, L], whole numbers.

    Args:
        x_NSL: float32, the weights of N blocks.
        w_NSL: the weight of each squared error, non-negative.
        kind: the type.
    """
    if kind.has_sub_scales:
        starts = tuple((RANGE, code) for code in _tried_codes(kind)) if kind.offset else tuple(_starts(kind))
        wanted = BlockSearch(kind.top, kind.offset, kind.scale_range, kind.min_top, starts, REFINEMENTS)
        whole = search_blocks(x_NSL, w_NSL, wanted)
        if whole is not None:
            return whole[:4], whole[4]
    found = fit(x_NSL, w_NSL, kind)
    return found, _codes(x_NSL, *steps_of(found), kind)


def fit(x_NSL: Tensor, w_NSL: Tensor, kind: BlockType) -> Fitted:
    """Scales and mins of blocks step by step, see `search`; what the search in one kernel is held against."""
    # a sub-block whose errors weigh nothing would have no best scale
    w_NSL = w_NSL + 1e-6 * w_NSL.mean((1, 2), keepdim=True) + 1e-30
    x_LM, w_LM = (part_NSL.flatten(0, 1).t().contiguous() for part_NSL in (x_NSL, w_NSL))
    if kind.offset:
        step_M = _fit_offset(x_LM, w_LM, kind)
        less_M = torch.zeros_like(step_M)
    else:
        step_M, less_M = _fit_ranges(x_LM, w_LM, kind)
    step_NS, less_NS = step_M.view(x_NSL.shape[:2]), less_M.view(x_NSL.shape[:2])
    if not kind.has_sub_scales:
        ones_NS = torch.ones_like(step_NS)
        return _half(step_NS[:, 0]), _half(less_NS[:, 0]), ones_NS, ones_NS if kind.min_top else ones_NS * 0
    total_NS = w_NSL.sum(2)
    d_N, scale_NS = _round_scales(step_NS, total_NS, *kind.scale_range)
    if kind.min_top:
        dmin_N, min_NS = _round_scales(less_NS, total_NS, 0, kind.min_top)
    else:
        dmin_N, min_NS = torch.zeros_like(d_N), torch.zeros_like(scale_NS)
    found = d_N, dmin_N, scale_NS, min_NS
    for _ in range(REFINEMENTS):
        found = _refit(x_NSL, w_NSL, x_LM, w_LM, _neighbours(x_LM, w_LM, found, kind), kind)
    return found


def _fit_offset(x_LM: Tensor, w_LM: Tensor, kind: BlockType) -> Tensor:
    """Steps [M] of sub-blocks without a min; of either sign, because one more code lies below zero than above."""
    most = kind.offset
    if kind.name == "Q8_0":
        # 127 on either side as every writer does it; the gain of a search is below what float16 loses
        return x_LM.abs().amax(0) / (most - 1)
    largest_M = x_LM.gather(0, x_LM.abs().argmax(0, keepdim=True)).squeeze(0)
    return fit_offset(x_LM, w_LM, largest_M, _tried(kind, x_LM.device), most, kind.top)


@cache
def _tried(kind: BlockType, device: torch.device) -> Tensor:
    """`_tried_codes` in float32, copied to a device once."""
    return torch.tensor(_tried_codes(kind), device=device)


def _tried_codes(kind: BlockType) -> list[float]:
    """What the largest weight's code, less the offset, is tried as."""
    below = [-(kind.offset + 0.1 * step) for step in range(-9, 10)]
    return below + [kind.offset - 1 + 0.1 * step for step in range(-9, 10, 3)]


def _fit_ranges(x_LM: Tensor, w_LM: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Steps and what is subtracted [M] of sub-blocks with a min; an integer min is not negative."""
    signed = kind.min_top == 1
    low_M, high_M = x_LM.amin(0), x_LM.amax(0)
    if not signed:
        low_M = low_M.clamp(max=0)
    zero_M = torch.zeros_like(low_M)
    spans = {
        RANGE: (low_M, high_M),
        ABOVE: (zero_M, high_M.clamp(min=0)),
        BELOW: (low_M.clamp(max=0), zero_M),
    }
    starts = [
        ((high - low) / number, zero_M - low)
        for (low, high), number in ((spans[span], number) for span, number in _starts(kind))
    ]
    step_CM, less_CM = (torch.stack([start[part] for start in starts]) for part in (0, 1))
    return fit_ranges(
        x_LM, w_LM, step_CM, less_CM, kind.top, signed=signed, refits=0 if kind.has_sub_scales else WHOLE_REFITS
    )


def _starts(kind: BlockType) -> Iterator[tuple[int, float]]:
    """Spans, and the codes spread over each: steps whose codes are worth fitting, the plain one first."""
    # codes beyond the top that are spread over the range: from, in steps of, how often; where no rounding of scales
    # follows that would swamp it, fewer codes may pay for a grid that lies on the few weights that rule a block
    spread = (-0.9, 0.1, 20) if kind.has_sub_scales else (-4.0, 0.125, 41)
    coarse = (-0.9, 0.5, 4)
    yield RANGE, float(kind.top)
    # one weight far from all others, which then are best called the same: that code must stand for about 0
    for span, (first, step, count) in ((RANGE, spread), (ABOVE, coarse), (BELOW, coarse)):
        for candidate in range(count):
            yield span, kind.top + first + step * candidate


def _round_scales(value_NS: Tensor, weight_NS: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """A float16 number [N] and integers [N, S] whose products are near the values."""
    at = value_NS.abs().argmax(1, keepdim=True)
    largest_N = value_NS.gather(1, at).squeeze(1)
    limit = high if low == 0 else low
    best_N, best_NS = torch.zeros_like(largest_N), torch.zeros_like(value_NS)
    error_N = torch.full_like(largest_N, torch.inf)
    for step in range(-4, 5):
        d_N = _half(largest_N / (limit + (0.1 if low == 0 else -0.1) * step))
        whole_NS = _ratio(value_NS, d_N.unsqueeze(1)).round_().clamp_(low, high)
        tried_N = (weight_NS * (value_NS - d_N.unsqueeze(1) * whole_NS).square()).sum(1)
        better_N = tried_N < error_N
        error_N = torch.where(better_N, tried_N, error_N)
        best_N = torch.where(better_N, d_N, best_N)
        best_NS = torch.where(better_N.unsqueeze(1), whole_NS, best_NS)
    return best_N, best_NS


def _neighbours(x_LM: Tensor, w_LM: Tensor, found: Fitted, kind: BlockType) -> Fitted:
    """The same with each sub-block's scale and min moved to the best of their neighbours."""
    d_N, dmin_N, scale_NS, min_NS = found
    moves = [(0, 0), *((a, b) for a in (-1, 0, 1) for b in ((-1, 0, 1) if kind.min_top else (0,)) if (a, b) != (0, 0))]
    tried = [
        ((scale_NS + scale_move).clamp(*kind.scale_range), (min_NS + min_move).clamp(0, kind.min_top))
        for scale_move, min_move in moves
    ]
    scale_CNS, min_CNS = (torch.stack([each[part] for each in tried]) for part in (0, 1))
    step_CNS, less_CNS = d_N.unsqueeze(1) * scale_CNS, dmin_N.unsqueeze(1) * min_CNS
    error_CM = block_errors(x_LM, w_LM, step_CNS.flatten(1), less_CNS.flatten(1), kind.offset, kind.top)
    # on a tie it stays where it is
    best_1NS = error_CM.argmin(0).view_as(scale_NS).unsqueeze(0)
    return d_N, dmin_N, scale_CNS.gather(0, best_1NS)[0], min_CNS.gather(0, best_1NS)[0]


def _refit(x_NSL: Tensor, w_NSL: Tensor, x_LM: Tensor, w_LM: Tensor, found: Fitted, kind: BlockType) -> Fitted:
    """The same with d and dmin fitted to the codes, where that helps once they are float16 again."""
    d_N, dmin_N, scale_NS, min_NS = found
    a_NSL = (_codes(x_NSL, *steps_of(found), kind) - kind.offset) * scale_NS.unsqueeze(2)
    wa_NSL = w_NSL * a_NSL
    aa_N, xa_N = (wa_NSL * a_NSL).sum((1, 2)), (wa_NSL * x_NSL).sum((1, 2))
    if kind.min_top:
        ab_N = (wa_NSL.sum(2) * min_NS).sum(1)
        bb_N = (w_NSL.sum(2) * min_NS.square()).sum(1)
        xb_N = ((w_NSL * x_NSL).sum(2) * min_NS).sum(1)
        determinant_N = aa_N * bb_N - ab_N.square()
        solvable_N = determinant_N > 1e-7 * aa_N * bb_N
        safe_N = torch.where(solvable_N, determinant_N, 1.0)
        fitted = (
            torch.where(solvable_N, (xa_N * bb_N - xb_N * ab_N) / safe_N, d_N),
            torch.where(solvable_N, (xa_N * ab_N - xb_N * aa_N) / safe_N, dmin_N),
        )
    else:
        fitted = torch.where(aa_N > 0, xa_N / aa_N, d_N), dmin_N
    tried = _half(fitted[0]), _half(fitted[1]), scale_NS, min_NS
    step_CNS, less_CNS = (torch.stack(both) for both in zip(steps_of(found), steps_of(tried), strict=True))
    error_CM = block_errors(x_LM, w_LM, step_CNS.flatten(1), less_CNS.flatten(1), kind.offset, kind.top)
    before_N, after_N = error_CM.view_as(step_CNS).sum(2)
    better_N = after_N < before_N
    return torch.where(better_N, tried[0], d_N), torch.where(better_N, tried[1], dmin_N), scale_NS, min_NS


def steps_of(found: Fitted) -> tuple[Tensor, Tensor]:
    """The step between codes and what is subtracted, [N, S] each."""
    d_N, dmin_N, scale_NS, min_NS = found
    return d_N.unsqueeze(1) * scale_NS, dmin_N.unsqueeze(1) * min_NS


def _codes(x_NSL: Tensor, step_NS: Tensor, less_NS: Tensor, kind: BlockType) -> Tensor:
    """The nearest codes, float32 whole numbers 0 .. top; the code of zero where the step is 0."""
    inverse_NS1 = _ratio(torch.ones_like(step_NS), step_NS).unsqueeze(2)
    return ((x_NSL + less_NS.unsqueeze(2)) * inverse_NS1).round_().add_(kind.offset).clamp_(0, kind.top)


def _ratio(value: Tensor, divisor: Tensor) -> Tensor:
    """value / divisor, 0 where the divisor is 0."""
    return torch.where(divisor == 0, 0.0, value / torch.where(divisor == 0, 1.0, divisor))


def _half(value: Tensor) -> Tensor:
    """As float16 holds it; the sum makes -0 a 0."""
    return value.to(torch.float16).float() + 0.0
