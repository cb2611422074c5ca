"""The inner loops in Triton, for a GPU: one launch for each call, rows side by side, errors in registers.

Every sum has one order and nothing is left to chance, so the same GPU model gives the same bits. Addresses are 64-bit.
No product is fused with a sum: what is fed forward is the error of the value that a reader decodes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels import gpu_codes, reference
from quantkit.kernels.gpu_rounding import MAGIC, PLAIN, columns_whole, inverse, nearest
from quantkit.kernels.levels import Levels

ROWS = 16  # of one program of a panel: 128 channels of them fill the registers of four warps
COLUMNS = 128  # of one program that keeps a candidate or two for each
CHOSEN, CHOSEN_FROM = 16, 64  # rows, and channels at a time, of one program that goes through all candidates
# a few passes through memory
round_groups, squared_errors = reference.round_groups, reference.squared_errors
pack, unpack, dequantize = gpu_codes.pack, gpu_codes.unpack, gpu_codes.dequantize


def solve_panel(
    weight_PO: Tensor, feedback_PO: Tensor, upper_PP: Tensor, levels: Levels, codes_PO: Tensor, error_PO: Tensor
) -> Tensor:
    """See `quantkit.kernels.solve_panel`."""
    channels, rows = weight_PO.shape
    lost_O = torch.empty_like(weight_PO[0])
    parts = (levels.step_PO, levels.shift_PO, levels.less_PO)
    read = [_rows_lie_whole(tensor) for tensor in (weight_PO, feedback_PO, upper_PP, *parts)]
    filled = (codes_PO, error_PO)
    assert all(tensor.stride(1) == 1 or rows == 1 for tensor in filled), "a copy of what is to be filled would be lost"
    # one row of levels serves every channel
    strides = [0 if len(tensor) == 1 else tensor.stride(0) for tensor in (*read, *filled)]
    _solve_rows[(triton.cdiv(rows, ROWS),)](
        *read,
        *filled,
        lost_O,
        channels,
        rows,
        *strides,
        TOP=levels.top,
        HALF=levels.half,
        MAGIC=MAGIC[weight_PO.dtype],
        CHANNELS=triton.next_power_of_2(channels),
        ROWS=ROWS,
        **PLAIN,
    )
    return lost_O


def rounding_errors(weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, zero_CO: Tensor, top: int) -> Tensor:
    """See `quantkit.kernels.rounding_errors`."""
    error_CO = torch.empty_like(scale_CO, memory_format=torch.contiguous_format)
    _over_columns(_round_rows, weight_IO, importance_I, scale_CO, zero_CO, error_CO, top, len(scale_CO))
    return error_CO


def best_scales(weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, top: int, worth_turning: float) -> Tensor:
    """See `quantkit.kernels.best_scales`."""
    weight_IO = weight_IO.contiguous()
    channels, rows = weight_IO.shape
    index_O = torch.empty(rows, dtype=torch.int64, device=weight_IO.device)
    _choose_rows[(triton.cdiv(rows, CHOSEN),)](
        weight_IO,
        importance_I.contiguous(),
        scale_CO.contiguous(),
        index_O,
        channels,
        rows,
        len(scale_CO),
        worth_turning,
        TOP=top,
        TURNED=worth_turning > 0,
        MAGIC=MAGIC[weight_IO.dtype],
        CHANNELS=CHOSEN_FROM,
        ROWS=CHOSEN,
        **PLAIN,
    )
    return index_O


def code_moments(weight_IO: Tensor, importance_I: Tensor, scale_O: Tensor, zero_O: Tensor, top: int) -> Tensor:
    """See `quantkit.kernels.code_moments`."""
    moments_5O = weight_IO.new_empty((5, weight_IO.shape[1]))
    _over_columns(_moment_rows, weight_IO, importance_I, scale_O, zero_O, moments_5O, top)
    return moments_5O


def _over_columns(
    kernel: Any,
    weight_IO: Tensor,
    importance_I: Tensor,
    scale: Tensor,
    zero: Tensor,
    filled: Tensor,
    top: int,
    grids: int = 1,
) -> None:
    """Launch a kernel that goes through one group's channels, for every row and each of several grids."""
    # how threads share a tile follows the strides, and with it the order of sums
    weight_IO = weight_IO.contiguous()
    channels, rows = weight_IO.shape
    kernel[(triton.cdiv(rows, COLUMNS), grids)](
        weight_IO,
        importance_I.contiguous(),
        scale.contiguous(),
        zero.contiguous(),
        filled,
        channels,
        rows,
        *weight_IO.stride(),
        TOP=top,
        MAGIC=MAGIC[weight_IO.dtype],
        CHANNELS=8,
        ROWS=COLUMNS,
        **PLAIN,
    )


def fit_ranges(
    x_LM: Tensor, w_LM: Tensor, step_CM: Tensor, less_CM: Tensor, top: int, *, signed: bool, refits: int
) -> tuple[Tensor, Tensor]:
    """See `quantkit.kernels.fit_ranges`."""
    length, blocks = x_LM.shape
    step_M, less_M = torch.empty_like(x_LM[0]), torch.empty_like(x_LM[0])
    _fit_ranges[(triton.cdiv(blocks, COLUMNS),)](
        x_LM.contiguous(),
        w_LM.contiguous(),
        step_CM.contiguous(),
        less_CM.contiguous(),
        step_M,
        less_M,
        length,
        blocks,
        len(step_CM),
        refits,
        SIGNED=signed,
        **_block_constants(length, top),
    )
    return step_M, less_M


def fit_offset(x_LM: Tensor, w_LM: Tensor, largest_M: Tensor, code_C: Tensor, offset: int, top: int) -> Tensor:
    """See `quantkit.kernels.fit_offset`."""
    length, blocks = x_LM.shape
    step_M = torch.empty_like(largest_M)
    _fit_offset[(triton.cdiv(blocks, COLUMNS),)](
        x_LM.contiguous(),
        w_LM.contiguous(),
        largest_M.contiguous(),
        code_C.contiguous(),
        step_M,
        length,
        blocks,
        len(code_C),
        OFFSET=offset,
        **_block_constants(length, top),
    )
    return step_M


def _block_constants(length: int, top: int) -> dict[str, Any]:
    return {
        "TOP": top,
        "MAGIC": MAGIC[torch.float32],
        "LENGTH": triton.next_power_of_2(length),
        "BLOCKS": COLUMNS,
        **PLAIN,
    }


def _rows_lie_whole(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


@columns_whole(
    "channels",
    "rows",
    "weight_stride",
    "feedback_stride",
    "upper_stride",
    "step_stride",
    "shift_stride",
    "less_stride",
    "codes_stride",
    "error_stride",
)
def _solve_rows(  # type: ignore[no-untyped-def]
    weight, feedback, upper, step, shift, less, codes, error, lost, channels, rows,
    weight_stride, feedback_stride, upper_stride, step_stride, shift_stride, less_stride, codes_stride, error_stride,
    TOP: tl.constexpr, HALF: tl.constexpr, MAGIC: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at < rows
    channel = tl.arange(0, CHANNELS)
    here = channel < channels
    tile = channel.to(tl.int64)[:, None] * feedback_stride + at[None, :]
    pull = tl.load(feedback + tile, mask=here[:, None] & inside[None, :], other=0.0)
    image = tl.zeros([ROWS], dtype=pull.dtype)
    total = image
    weight_at, step_at, shift_at, less_at, codes_at, error_at = at, at, at, at, at, at
    upper_at = channel.to(tl.int64)
    for i in range(channels):
        # all loads before the first sum: none is moved over the barriers of one, and memory is waited for once
        factor = tl.load(upper + upper_at, mask=here, other=0.0)
        own = tl.load(weight + weight_at, mask=inside, other=0.0)
        size = tl.load(step + step_at, mask=inside, other=0.0)
        zero = tl.load(shift + shift_at, mask=inside, other=0.0)
        minus = tl.load(less + less_at, mask=inside, other=0.0)
        pivot = tl.sum(tl.where(channel == i, factor, 0.0), axis=0)
        pulled = tl.sum(tl.where(channel[:, None] == i, pull, 0.0), axis=0)
        wanted = own + pulled / pivot
        code = nearest(
            tl.where(size == 0, 0.0, (wanted + minus) / tl.where(size == 0, 1.0, size)) + zero, 0, TOP, MAGIC
        )
        product = (code - zero) * size
        if HALF:
            product = product.to(tl.float16).to(pull.dtype)
        missed = own - (product - minus)
        tl.store(codes + codes_at, code.to(tl.int32).to(tl.uint8), mask=inside)
        tl.store(error + error_at, missed, mask=inside)
        image = pulled + missed * pivot
        total += image * image
        pull += factor[:, None] * missed[None, :]
        weight_at += weight_stride
        step_at += step_stride
        shift_at += shift_stride
        less_at += less_stride
        codes_at += codes_stride
        error_at += error_stride
        upper_at += upper_stride
    tl.store(lost + at, total, mask=inside)


@columns_whole("channels", "rows", "channel_stride", "row_stride")
def _round_rows(  # type: ignore[no-untyped-def]
    weight, importance, scale, zero, error, channels, rows, channel_stride, row_stride,
    TOP: tl.constexpr, MAGIC: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at < rows
    tried = tl.program_id(1).to(tl.int64) * rows + at
    size = tl.load(scale + tried, mask=inside, other=1.0)
    shift = tl.load(zero + tried, mask=inside, other=0.0)
    times = 1.0 / size
    total = tl.zeros([ROWS], dtype=size.dtype)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        here = channel < channels
        tile = channel.to(tl.int64)[:, None] * channel_stride + at[None, :] * row_stride
        values = tl.load(weight + tile, mask=here[:, None] & inside[None, :], other=0.0)
        share = tl.load(importance + channel, mask=here, other=0.0)
        ratio = values * times[None, :] + shift[None, :]
        miss = ratio - nearest(ratio, 0, TOP, MAGIC)
        total += tl.sum(share[:, None] * (miss * miss), axis=0)
    tl.store(error + tried, total * (size * size), mask=inside)


@columns_whole("channels", "rows", "candidates")
def _choose_rows(  # type: ignore[no-untyped-def]
    weight, importance, scale, index, channels, rows, candidates, worth_turning,
    TOP: tl.constexpr, TURNED: tl.constexpr, MAGIC: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at < rows
    none = tl.zeros([ROWS], dtype=weight.dtype.element_ty)
    least, turned_least = none, none
    chosen, turned_chosen = at * 0, at * 0
    tried = at
    for candidate in range(candidates):
        size = tl.load(scale + tried, mask=inside, other=1.0)
        tried += rows
        size = tl.where(size == 0, 1.0, size)
        times = 1.0 / size
        # threads meet for a sum once per candidate
        errors = tl.zeros([CHANNELS, ROWS], dtype=none.dtype)
        turned_errors = errors
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            here = channel < channels
            tile = channel.to(tl.int64)[:, None] * rows + at[None, :]
            values = tl.load(weight + tile, mask=here[:, None] & inside[None, :], other=0.0)
            share = tl.load(importance + channel, mask=here, other=0.0)
            ratio = values * times[None, :]
            miss = ratio - nearest(ratio, -(TOP + 1) // 2, TOP // 2, MAGIC)
            errors += share[:, None] * (miss * miss)
            if TURNED:
                miss = ratio - nearest(ratio, -(TOP // 2), (TOP + 1) // 2, MAGIC)
                turned_errors += share[:, None] * (miss * miss)
        total = tl.sum(errors, axis=0) * (size * size)
        better = (candidate == 0) | (total < least)
        least, chosen = tl.where(better, total, least), tl.where(better, candidate, chosen)
        if TURNED:
            turned_total = tl.sum(turned_errors, axis=0) * (size * size)
            better = (candidate == 0) | (turned_total < turned_least)
            turned_least = tl.where(better, turned_total, turned_least)
            turned_chosen = tl.where(better, candidate, turned_chosen)
    if TURNED:
        chosen = tl.where(turned_least < least * worth_turning, candidates + turned_chosen, chosen)
    tl.store(index + at, chosen, mask=inside)


@columns_whole("channels", "rows", "channel_stride", "row_stride")
def _moment_rows(  # type: ignore[no-untyped-def]
    weight, importance, scale, zero, moments, channels, rows, channel_stride, row_stride,
    TOP: tl.constexpr, MAGIC: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at < rows
    size = tl.load(scale + at, mask=inside, other=1.0)
    shift = tl.load(zero + at, mask=inside, other=0.0)
    times = 1.0 / size
    base = nearest(tl.load(weight + at * row_stride, mask=inside, other=0.0) * times + shift, 0, TOP, MAGIC)
    lost = tl.zeros([ROWS], dtype=size.dtype)
    far, miss, spread, together, whole = lost, lost, lost, lost, lost
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        here = channel < channels
        tile = channel.to(tl.int64)[:, None] * channel_stride + at[None, :] * row_stride
        values = tl.load(weight + tile, mask=here[:, None] & inside[None, :], other=0.0)
        weigh = tl.load(importance + channel, mask=here, other=0.0)
        ratio = values * times[None, :] + shift[None, :]
        code = nearest(ratio, 0, TOP, MAGIC)
        off, apart = ratio - code, code - base[None, :]
        lost += tl.sum(weigh[:, None] * (off * off), axis=0)
        far += tl.sum(weigh[:, None] * apart, axis=0)
        miss += tl.sum(weigh[:, None] * off, axis=0)
        spread += tl.sum(weigh[:, None] * (apart * apart), axis=0)
        together += tl.sum(weigh[:, None] * (apart * off), axis=0)
        whole += tl.sum(weigh, axis=0)
    far, miss = far / whole, miss / whole
    tl.store(moments + at, lost * (size * size), mask=inside)
    tl.store(moments + rows + at, base + far, mask=inside)
    tl.store(moments + 2 * rows + at, miss, mask=inside)
    tl.store(moments + 3 * rows + at, tl.maximum(spread / whole - far * far, 0.0), mask=inside)
    tl.store(moments + 4 * rows + at, together / whole - far * miss, mask=inside)


@triton.jit
def _tile(x, length, blocks, LENGTH: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's columns of [L, M], and 0 beyond them."""
    at = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = tl.arange(0, LENGTH)
    mask = (place < length)[:, None] & (at < blocks)[None, :]
    return tl.load(x + place.to(tl.int64)[:, None] * blocks + at[None, :], mask=mask, other=0.0)


@triton.jit
def error_of(x, w, step, less, OFFSET: tl.constexpr, TOP: tl.constexpr, MAGIC: tl.constexpr):  # type: ignore[no-untyped-def]
    code = codes_of(x, step, less, OFFSET, TOP, MAGIC)
    off = code * step[None, :] - less[None, :] - x
    return tl.sum(off * off * w, axis=0)


@triton.jit
def codes_of(x, step, less, OFFSET: tl.constexpr, TOP: tl.constexpr, MAGIC: tl.constexpr):  # type: ignore[no-untyped-def]
    return nearest((x + less[None, :]) * inverse(step)[None, :], -OFFSET, TOP - OFFSET, MAGIC)


@triton.jit
def line_through(sum_w, sum_x, sum_l, sum_ll, sum_xl):  # type: ignore[no-untyped-def]
    """Slope and offset of the weighted regression x = slope * code - offset; and where there is one."""
    determinant = sum_w * sum_ll - sum_l * sum_l
    solvable = determinant > 1e-7 * sum_w * sum_ll
    safe = tl.where(solvable, determinant, 1.0)
    return solvable, (sum_w * sum_xl - sum_x * sum_l) / safe, (sum_l * sum_xl - sum_ll * sum_x) / safe


@triton.jit
def without_negative(solvable, slope, offset, sum_ll, sum_xl):  # type: ignore[no-untyped-def]
    """The line, but where it is none or its offset one that no min can say: there a slope alone."""
    alone = tl.where(sum_ll > 0, tl.maximum(sum_xl / tl.where(sum_ll > 0, sum_ll, 1.0), 0.0), 0.0)
    kept = solvable & (offset >= 0)
    return tl.where(kept, slope, alone), tl.where(kept, offset, 0.0)


@columns_whole("length", "blocks", "candidates", "refits")
def _fit_ranges(  # type: ignore[no-untyped-def]
    x, w, step, less, best_step, best_less, length, blocks, candidates, refits,
    SIGNED: tl.constexpr, TOP: tl.constexpr, MAGIC: tl.constexpr, LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = at < blocks
    own = _tile(x, length, blocks, LENGTH, BLOCKS)
    weigh = _tile(w, length, blocks, LENGTH, BLOCKS)
    sum_w = tl.sum(weigh, axis=0)
    sum_x = tl.sum(own * weigh, axis=0)
    size = tl.load(step + at, mask=inside, other=0.0)
    minus = tl.load(less + at, mask=inside, other=0.0)
    least = error_of(own, weigh, size, minus, 0, TOP, MAGIC)
    tried = at
    for candidate in range(1, candidates + refits):
        # codes that a fit gives may call for another fit
        tried += blocks
        from_list = at < tl.where(candidate < candidates, blocks, 0)
        start = tl.where(candidate < candidates, tl.load(step + tried, mask=from_list, other=0.0), size)
        below = tl.where(candidate < candidates, tl.load(less + tried, mask=from_list, other=0.0), minus)
        code = codes_of(own, start, below, 0, TOP, MAGIC)
        sum_l = tl.sum(weigh * code, axis=0)
        sum_ll = tl.sum(weigh * code * code, axis=0)
        sum_xl = tl.sum(own * weigh * code, axis=0)
        solvable, slope, offset = line_through(sum_w, sum_x, sum_l, sum_ll, sum_xl)
        if SIGNED:
            slope = tl.where(solvable, slope, 0.0)
            offset = tl.where(solvable, offset, -sum_x / tl.where(sum_w == 0, 1.0, sum_w))
        else:
            slope, offset = without_negative(solvable, slope, offset, sum_ll, sum_xl)
        found = error_of(own, weigh, slope, offset, 0, TOP, MAGIC)
        better = found < least
        least = tl.where(better, found, least)
        size = tl.where(better, slope, size)
        minus = tl.where(better, offset, minus)
    tl.store(best_step + at, size, mask=inside)
    tl.store(best_less + at, minus, mask=inside)


@columns_whole("length", "blocks", "candidates")
def _fit_offset(  # type: ignore[no-untyped-def]
    x, w, largest, codes, best_step, length, blocks, candidates,
    OFFSET: tl.constexpr, TOP: tl.constexpr, MAGIC: tl.constexpr, LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = at < blocks
    own = _tile(x, length, blocks, LENGTH, BLOCKS)
    weigh = _tile(w, length, blocks, LENGTH, BLOCKS)
    divisor = inverse(tl.load(largest + at, mask=inside, other=0.0))
    best = tl.zeros([BLOCKS], dtype=tl.float32)
    gain = tl.zeros([BLOCKS], dtype=tl.float32)
    for candidate in range(candidates):
        times = tl.load(codes + candidate) * divisor
        code = nearest(own * times[None, :], -OFFSET, TOP - OFFSET, MAGIC)
        along = tl.sum(own * weigh * code, axis=0)
        squares = tl.sum(code * code * weigh, axis=0)
        safe = tl.where(squares > 0, squares, 1.0)
        found = along * along / safe
        better = (squares > 0) & (found > gain)
        gain = tl.where(better, found, gain)
        best = tl.where(better, along / safe, best)
    tl.store(best_step + at, best, mask=inside)
