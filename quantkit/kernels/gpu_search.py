"""The search for K-quants in Triton as a whole: one launch, each thread with a sub-block's weights in its registers.

Its steps are those of `quantkit.kernels.compiled_search`, and so are its sums: float32 over a sub-block and float64
over a block, each in one order.

Shape legend of the kernel: L weights of a sub-block, M sub-blocks of a program, B blocks of S of them.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.gpu import COLUMNS, codes_of, error_of, line_through, without_negative
from quantkit.kernels.gpu_rounding import MAGIC, PLAIN, columns_whole, inverse, nearest
from quantkit.kernels.levels import ABOVE, BELOW, BlockSearch

ROUNDINGS = tl.constexpr(9)  # of the largest scale, see `quantkit.grids.blocks`
SPAN_ABOVE, SPAN_BELOW = tl.constexpr(ABOVE), tl.constexpr(BELOW)  # a kernel reads no other globals


def search_blocks(x_NSL: Tensor, w_NSL: Tensor, search: BlockSearch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `quantkit.kernels.search_blocks`."""
    num_blocks, num_subs, length = x_NSL.shape
    # what errors weigh in all blocks alike lies there once
    all_alike = w_NSL.stride(0) == 0
    x_LM, w_LM = (part_NSL.flatten(0, 1).t().contiguous() for part_NSL in (x_NSL, w_NSL[:1] if all_alike else w_NSL))
    d_N, dmin_N = (x_NSL.new_empty(num_blocks) for _ in range(2))
    scale_NS, min_NS = (x_NSL.new_empty((num_blocks, num_subs)) for _ in range(2))
    codes_LM = torch.empty(x_LM.shape, dtype=torch.uint8, device=x_NSL.device)
    low, high = search.scale_range
    _search[(triton.cdiv(num_blocks * num_subs, COLUMNS),)](
        x_LM,
        w_LM,
        *_starts(search, x_NSL.device),
        d_N,
        dmin_N,
        scale_NS,
        min_NS,
        codes_LM,
        x_LM.shape[1],
        w_LM.shape[1],
        len(search.starts),
        search.refinements,
        TOP=search.top,
        OFFSET=search.offset,
        LOW=low,
        HIGH=high,
        MIN_TOP=search.min_top,
        MAGIC=MAGIC[torch.float32],
        SUBS=num_subs,
        COLUMNS=COLUMNS,
        LENGTH=length,
        **PLAIN,
    )
    return d_N, dmin_N, scale_NS, min_NS, codes_LM.t().unflatten(0, (num_blocks, num_subs))


@cache
def _starts(search: BlockSearch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Spans and numbers of a search, on the device once: a copy waits for all that is at work there."""
    spans, numbers = zip(*search.starts, strict=True)
    return torch.tensor(spans, device=device, dtype=torch.int32), torch.tensor(numbers, device=device)


@columns_whole("columns", "weights", "starts", "refinements")
def _search(  # type: ignore[no-untyped-def]
    x, w, span, divisor, d, dmin, scale, less, codes, columns, weights, starts, refinements,
    TOP: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, MIN_TOP: tl.constexpr,
    MAGIC: tl.constexpr, SUBS: tl.constexpr, LENGTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    place = tl.arange(0, LENGTH).to(tl.int64)[:, None]
    value = tl.load(x + place * columns + at[None, :], mask=inside[None, :], other=0.0)
    weigh = tl.load(w + place * weights + (at % weights)[None, :], mask=inside[None, :], other=0.0)
    # a sub-block whose errors weigh nothing would have no best scale
    mean = _of_block(tl.sum(weigh, axis=0), SUBS) / (SUBS * LENGTH)
    weigh = weigh + _of_subs(1e-6 * mean.to(tl.float32), SUBS)[None, :] + 1e-30
    sum_w = tl.sum(weigh, axis=0)
    sum_x = tl.sum(value * weigh, axis=0)
    if OFFSET > 0:
        size = _fit_offset(value, weigh, divisor, starts, OFFSET, TOP, MAGIC)
        minus = tl.zeros_like(size)
    else:
        size, minus = _fit_ranges(value, weigh, sum_w, sum_x, span, divisor, starts, TOP, MAGIC)
    number, whole = _round_scales(size, sum_w, LOW, HIGH, MAGIC, SUBS)
    if MIN_TOP > 0:
        under, under_whole = _round_scales(minus, sum_w, 0, MIN_TOP, MAGIC, SUBS)
    else:
        under, under_whole = tl.zeros_like(number), tl.zeros_like(whole)
    least = error_of(value, weigh, number * whole, under * under_whole, OFFSET, TOP, MAGIC)
    for _ in range(refinements):
        whole, under_whole, least = _move(
            value, weigh, number, under, whole, under_whole, least, OFFSET, TOP, LOW, HIGH, MIN_TOP, MAGIC
        )
        number, under, least = _refit(
            value, weigh, sum_w, sum_x, number, under, whole, under_whole, least, OFFSET, TOP, MIN_TOP, MAGIC, SUBS
        )
    code = codes_of(value, number * whole, under * under_whole, OFFSET, TOP, MAGIC) + OFFSET
    tl.store(codes + place * columns + at[None, :], code.to(tl.int32).to(tl.uint8), mask=inside[None, :])
    tl.store(scale + at, whole, mask=inside)
    tl.store(less + at, under_whole, mask=inside)
    first = inside & (at % SUBS == 0)
    tl.store(d + at // SUBS, number, mask=first)
    tl.store(dmin + at // SUBS, under, mask=first)


@triton.jit
def _of_block(values, SUBS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums over blocks [B], float64, of a value [M] of each sub-block."""
    return tl.sum(tl.reshape(values, [values.shape[0] // SUBS, SUBS]).to(tl.float64), axis=1)


@triton.jit
def _of_subs(values, SUBS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A value of each block [B] for each of its sub-blocks [M]."""
    spread = tl.broadcast_to(values[:, None], [values.shape[0], SUBS])
    return tl.reshape(spread, [values.shape[0] * SUBS])


@triton.jit
def _farthest(values, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The value of the largest size; of two as large the positive one."""
    high, low = tl.max(values, axis=AXIS), tl.min(values, axis=AXIS)
    return tl.where(high >= -low, high, low)


@triton.jit
def _half(value):  # type: ignore[no-untyped-def]
    """As float16 holds it; the sum makes -0 a 0."""
    return value.to(tl.float16).to(tl.float32) + 0.0


@triton.jit
def _fit_offset(  # type: ignore[no-untyped-def]
    value, weigh, tries, starts, OFFSET: tl.constexpr, TOP: tl.constexpr, MAGIC: tl.constexpr
):
    """Steps [M], fitted to the codes that each sub-block's largest weight has when it is called one of the tries."""
    shrunk = inverse(_farthest(value, 0))
    best = tl.zeros_like(shrunk)
    most = tl.zeros_like(shrunk)
    for candidate in range(starts):
        times = tl.load(tries + candidate) * shrunk
        code = nearest(value * times[None, :], -OFFSET, TOP - OFFSET, MAGIC)
        along = tl.sum(value * weigh * code, axis=0)
        squares = tl.sum(code * code * weigh, axis=0)
        step = tl.where(squares > 0, along / tl.where(squares > 0, squares, 1.0), 0.0)
        better = along * step > most
        most = tl.where(better, along * step, most)
        best = tl.where(better, step, best)
    return best


@triton.jit
def _fit_ranges(  # type: ignore[no-untyped-def]
    value, weigh, sum_w, sum_x, span, divisor, starts, TOP: tl.constexpr, MAGIC: tl.constexpr
):
    """Steps and what is subtracted [M] of the ranges whose codes, once fitted, have the least error."""
    low, high = tl.minimum(tl.min(value, axis=0), 0.0), tl.max(value, axis=0)
    size, minus = (high - low) / tl.load(divisor), 0.0 - low
    least = error_of(value, weigh, size, minus, 0, TOP, MAGIC)
    for candidate in range(1, starts):
        where = tl.load(span + candidate)
        bottom = tl.where(where == SPAN_ABOVE, 0.0, low)
        top = tl.where(where == SPAN_BELOW, 0.0, tl.where(where == SPAN_ABOVE, tl.maximum(high, 0.0), high))
        code = codes_of(value, (top - bottom) / tl.load(divisor + candidate), 0.0 - bottom, 0, TOP, MAGIC)
        sum_l = tl.sum(weigh * code, axis=0)
        sum_ll = tl.sum(weigh * code * code, axis=0)
        sum_xl = tl.sum(value * weigh * code, axis=0)
        solvable, slope, below = line_through(sum_w, sum_x, sum_l, sum_ll, sum_xl)
        slope, below = without_negative(solvable, slope, below, sum_ll, sum_xl)
        found = error_of(value, weigh, slope, below, 0, TOP, MAGIC)
        better = found < least
        least = tl.where(better, found, least)
        size = tl.where(better, slope, size)
        minus = tl.where(better, below, minus)
    return size, minus


@triton.jit
def _round_scales(  # type: ignore[no-untyped-def]
    values, weigh, LOW: tl.constexpr, HIGH: tl.constexpr, MAGIC: tl.constexpr, SUBS: tl.constexpr
):
    """A float16 number for each block, and whole numbers whose products with it are near the values; [M] both."""
    LIMIT: tl.constexpr = HIGH if LOW == 0 else LOW
    AWAY: tl.constexpr = 0.1 if LOW == 0 else -0.1
    largest = _farthest(tl.reshape(values, [values.shape[0] // SUBS, SUBS]), 1)
    best, best_whole = tl.zeros_like(values), tl.zeros_like(values)
    least = tl.full(largest.shape, float("inf"), tl.float64)
    for step in range(ROUNDINGS):
        size = _of_subs(_half(largest / (LIMIT + AWAY * (step - ROUNDINGS // 2))), SUBS)
        whole = nearest(values * inverse(size), LOW, HIGH, MAGIC)
        off = values - size * whole
        found = _of_block(off * off * weigh, SUBS)
        better = _of_subs(found < least, SUBS)
        least = tl.minimum(least, found)
        best = tl.where(better, size, best)
        best_whole = tl.where(better, whole, best_whole)
    return best, best_whole


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    value, weigh, number, under, whole, under_whole, least, OFFSET: tl.constexpr, TOP: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, MIN_TOP: tl.constexpr, MAGIC: tl.constexpr,
):  # fmt: skip
    """Each sub-block's scale and min become the best of their neighbours; with their error."""
    ASIDE: tl.constexpr = 3 if MIN_TOP > 0 else 1
    best, best_under = whole, under_whole
    for move in range(3 * ASIDE):
        tried = tl.minimum(tl.maximum(whole + (move // ASIDE - 1), LOW * 1.0), HIGH * 1.0)
        tried_under = tl.minimum(tl.maximum(under_whole + (move % ASIDE - ASIDE // 2), 0.0), MIN_TOP * 1.0)
        found = error_of(value, weigh, number * tried, under * tried_under, OFFSET, TOP, MAGIC)
        better = found < least
        least = tl.where(better, found, least)
        best = tl.where(better, tried, best)
        best_under = tl.where(better, tried_under, best_under)
    return best, best_under, least


@triton.jit
def _refit(  # type: ignore[no-untyped-def]
    value, weigh, sum_w, sum_x, number, under, whole, under_whole, least,
    OFFSET: tl.constexpr, TOP: tl.constexpr, MIN_TOP: tl.constexpr, MAGIC: tl.constexpr, SUBS: tl.constexpr,
):  # fmt: skip
    """The blocks' numbers fitted to the codes, where that helps once they are float16 again; with the error."""
    code = codes_of(value, number * whole, under * under_whole, OFFSET, TOP, MAGIC)
    scale, minus = whole.to(tl.float64), under_whole.to(tl.float64)
    aa = _of_block(scale * scale * tl.sum(weigh * code * code, axis=0), SUBS)
    xa = _of_block(scale * tl.sum(value * weigh * code, axis=0), SUBS)
    fitted, fitted_under = number, under
    if MIN_TOP > 0:
        ab = _of_block(scale * minus * tl.sum(weigh * code, axis=0), SUBS)
        bb = _of_block(minus * minus * sum_w, SUBS)
        xb = _of_block(minus * sum_x, SUBS)
        determinant = aa * bb - ab * ab
        solvable = determinant > 1e-7 * aa * bb
        safe = tl.where(solvable, determinant, 1.0)
        can_be = _of_subs(solvable, SUBS)
        fitted = tl.where(can_be, _of_subs(((xa * bb - xb * ab) / safe).to(tl.float32), SUBS), number)
        fitted_under = tl.where(can_be, _of_subs(((xa * ab - xb * aa) / safe).to(tl.float32), SUBS), under)
    else:
        step = (xa / tl.where(aa > 0, aa, 1.0)).to(tl.float32)
        fitted = tl.where(_of_subs(aa > 0, SUBS), _of_subs(step, SUBS), number)
    fitted, fitted_under = _half(fitted), _half(fitted_under)
    found = error_of(value, weigh, fitted * whole, fitted_under * under_whole, OFFSET, TOP, MAGIC)
    better = _of_subs(_of_block(found, SUBS) < _of_block(least, SUBS), SUBS)
    number = tl.where(better, fitted, number)
    under = tl.where(better, fitted_under, under)
    return number, under, tl.where(better, found, least)
