"""The inner loops compiled for the CPU by numba: rows side by side in the registers, a block of them in the cache.

Compiled at first use and kept beside the package, or in the user's cache where that cannot be written. Rows are
independent and every sum has one order, so neither the number of threads nor the width of a block changes a bit.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from quantkit.kernels import reference
from quantkit.kernels.levels import SMALLEST_STEP, Levels
from quantkit.machine import rows_together, side_by_side

BLOCK = 128  # rows at a time: a panel of 128 channels then takes 64 kB


def solve_panel(
    weight_PO: Tensor, feedback_PO: Tensor, upper_PP: Tensor, levels: Levels, codes_PO: Tensor, error_PO: Tensor
) -> Tensor:
    """See `quantkit.kernels.solve_panel`."""
    lost_O = torch.empty_like(weight_PO[0])
    grids = (part.expand_as(levels.step_PO) for part in (levels.inverse(), levels.shift_PO, levels.less_PO))
    read = (weight_PO, feedback_PO, upper_PP, levels.step_PO, *grids)
    over_rows(_solve_rows, read, (codes_PO, error_PO, lost_O), levels.top, levels.half)
    return lost_O


def rounding_errors(weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, zero_CO: Tensor, top: int) -> Tensor:
    """See `quantkit.kernels.rounding_errors`."""
    error_CO = torch.empty_like(scale_CO, memory_format=torch.contiguous_format)
    read = (weight_IO, importance_I, scale_CO, scale_CO.reciprocal(), zero_CO)
    over_rows(_round_rows, read, (error_CO,), top)
    return error_CO


def best_scales(weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, top: int, worth_turning: float) -> Tensor:
    """See `quantkit.kernels.best_scales`."""
    index_O = torch.empty(scale_CO.shape[1], dtype=torch.int64, device=weight_IO.device)
    over_rows(_choose_rows, (weight_IO, importance_I, scale_CO), (index_O,), top, worth_turning)
    return index_O


def code_moments(weight_IO: Tensor, importance_I: Tensor, scale_O: Tensor, zero_O: Tensor, top: int) -> Tensor:
    """See `quantkit.kernels.code_moments`."""
    moments_5O = weight_IO.new_empty((5, weight_IO.shape[1]))
    over_rows(_moment_rows, (weight_IO, importance_I, scale_O, scale_O.reciprocal(), zero_O), (moments_5O,), top)
    return moments_5O


def round_groups(weight_OI: Tensor, length: int, top: int, codes_OI: Tensor) -> tuple[Tensor, Tensor]:
    """See `quantkit.kernels.round_groups`; on one thread."""
    step_OG, low_OG = weight_OI.new_empty((2, len(weight_OI), weight_OI.shape[1] // length))
    assert codes_OI.is_contiguous(), "a copy of what is to be filled would be lost"
    arrays = (tensor.contiguous().numpy() for tensor in (weight_OI, step_OG, low_OG, codes_OI))
    _round_groups(*arrays, np.float32(top))
    return step_OG, low_OG


def squared_errors(
    weight_OI: Tensor, codes_OI: Tensor, step_OG: Tensor, shift_OG: Tensor, less_OG: Tensor
) -> tuple[Tensor, Tensor]:
    """See `quantkit.kernels.squared_errors`; on one thread."""
    tensors = (weight_OI, codes_OI, step_OG, shift_OG, less_OG)
    lost, whole = _squared_errors(*(tensor.contiguous().numpy() for tensor in tensors))
    return torch.tensor(lost, dtype=torch.float64), torch.tensor(whole, dtype=torch.float64)


# whole-tensor torch is as fast as memory allows
pack, unpack = reference.pack, reference.unpack


def dequantize(
    codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See `quantkit.kernels.dequantize`."""
    weight_OI = torch.empty(codes_OI.shape, dtype=dtype)

    def fill(weight_RI: Tensor, codes_RI: Tensor, scale_RG: Tensor, zero_RG: Tensor) -> None:
        weight_RI.copy_(reference.dequantize(codes_RI, scale_RG, zero_RG, group_I))

    rows = rows_together(codes_OI)
    parts = (whole.split(rows) for whole in (weight_OI, codes_OI, scale_OG, zero_OG))
    side_by_side(fill, zip(*parts, strict=True), weight_OI.device)
    return weight_OI


def fit_ranges(
    x_LM: Tensor, w_LM: Tensor, step_CM: Tensor, less_CM: Tensor, top: int, *, signed: bool, refits: int
) -> tuple[Tensor, Tensor]:
    """See `quantkit.kernels.fit_ranges`."""
    best = torch.empty_like(x_LM[0]), torch.empty_like(x_LM[0])
    over_rows(_fit_ranges, (x_LM, w_LM, step_CM, less_CM), best, top, signed, refits)
    return best


def fit_offset(x_LM: Tensor, w_LM: Tensor, largest_M: Tensor, code_C: Tensor, offset: int, top: int) -> Tensor:
    """See `quantkit.kernels.fit_offset`."""
    step_M = torch.empty_like(largest_M)
    over_rows(_fit_offset, (x_LM, w_LM, largest_M, code_C), (step_M,), top, offset)
    return step_M


def over_rows(
    kernel: Callable[..., None], read: tuple[Tensor, ...], filled: tuple[Tensor, ...], top: int, *further: float
) -> None:
    """Run a kernel on all rows, which are the last dimension of what it fills; some in each thread."""
    # one layout, so one compilation; a copy of what is to be filled would be lost
    assert all(tensor.is_contiguous() for tensor in filled), "the rows to be filled are contiguous"
    arrays: list[Any] = [tensor.contiguous().numpy() for tensor in (*read, *filled)]
    highest = arrays[0].dtype.type(top)
    rows = filled[0].shape[-1]
    blocks = -(-rows // BLOCK)
    threads = min(torch.get_num_threads(), blocks)
    if threads == 1:
        kernel(*arrays, highest, *further, 0, rows)
        return
    edges = [min(rows, blocks * part // threads * BLOCK) for part in range(threads + 1)]
    for done in [_pool(threads).submit(kernel, *arrays, highest, *further, *span) for span in pairwise(edges)]:
        done.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernel")


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _solve_rows(  # type: ignore[no-untyped-def]
    weight, feedback, upper, step, inverse, shift, less, codes, error, lost, top, half, first, last
):
    channels = weight.shape[0]
    bottom = weight.dtype.type(0)  # a plain 0 would turn all into float64
    # loops over all of a block, in memory of its own, are those that fill the registers
    pull, own = np.zeros(BLOCK, weight.dtype), np.zeros(BLOCK, weight.dtype)
    code, product = np.zeros(BLOCK, weight.dtype), np.zeros(BLOCK, weight.dtype)
    size, times = np.zeros(BLOCK, weight.dtype), np.zeros(BLOCK, weight.dtype)
    zero, minus = np.zeros(BLOCK, weight.dtype), np.zeros(BLOCK, weight.dtype)
    total = np.zeros(BLOCK, weight.dtype)
    single = np.zeros(BLOCK, np.float32)
    word = single.view(np.int32)
    near = np.zeros((channels, BLOCK), weight.dtype)  # the block's errors, one after another in memory
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        width = stop - start
        total[:] = 0
        for i in range(channels):
            if i < step.shape[0]:
                size[:width], times[:width] = step[i, start:stop], inverse[i, start:stop]
                zero[:width], minus[:width] = shift[i, start:stop], less[i, start:stop]
            pull[:width], own[:width] = feedback[i, start:stop], weight[i, start:stop]
            j = 0
            while j + 4 <= i:
                a, b, c, d = upper[j, i], upper[j + 1, i], upper[j + 2, i], upper[j + 3, i]
                for o in range(BLOCK):
                    pull[o] += (a * near[j, o] + b * near[j + 1, o]) + (c * near[j + 2, o] + d * near[j + 3, o])
                j += 4
            while j < i:
                a = upper[j, i]
                for o in range(BLOCK):
                    pull[o] += a * near[j, o]
                j += 1
            pivot = upper[i, i]
            inverse_pivot = weight.dtype.type(1) / pivot
            for o in range(BLOCK):
                wanted = own[o] + pull[o] * inverse_pivot
                code[o] = min(max(np.rint((wanted + minus[o]) * times[o] + zero[o]), bottom), top)
                product[o] = (code[o] - zero[o]) * size[o]
            for o in range(width):
                codes[i, start + o] = np.uint8(code[o])
            if half:
                single[:] = product
                round_to_half(single, word)
                product[:] = single
            for o in range(BLOCK):
                near[i, o] = own[o] - (product[o] - minus[o])
                image = pull[o] + near[i, o] * pivot
                total[o] += image * image
            error[i, start:stop] = near[i, :width]
        lost[start:stop] = total[:width]


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def round_to_half(single, word):  # type: ignore[no-untyped-def]
    """Round to what float16 holds, to even where two are as near; `word` is the memory of `single` as int32.

    Normal numbers keep 10 bits of their mantissa; below them values lie 2^-24 apart, as those of float32 near 0.75 do.
    """
    for o in range(len(single)):
        value = single[o]
        small = (value + np.float32(0.75)) - np.float32(0.75)
        word[o] = (word[o] + 0xFFF + ((word[o] >> 13) & 1)) & ~0x1FFF
        if abs(value) < np.float32(2.0**-14):
            single[o] = small


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _round_rows(  # type: ignore[no-untyped-def]
    weight, importance, scale, inverse, zero, error, top, first, last
):
    total = np.empty(BLOCK, weight.dtype)
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        near = weight[:, start:stop].copy()
        for candidate in range(scale.shape[0]):
            times, zeros = inverse[candidate, start:stop], zero[candidate, start:stop]
            _round_block(near, importance, scale[candidate, start:stop], times, zeros, top, total)
            error[candidate, start:stop] = total[: stop - start]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _round_groups(weight, step, low, codes, top):  # type: ignore[no-untyped-def]
    groups = step.shape[1]
    length = weight.shape[1] // groups
    bottom, smallest = np.float32(0), np.float32(SMALLEST_STEP)
    for o in range(len(weight)):
        for g in range(groups):
            near, code = weight[o, g * length : (g + 1) * length], codes[o, g * length : (g + 1) * length]
            least, most = _ends(near)
            size, edge = max((most - least) / top, smallest), least
            if not abs(least) > abs(most):
                size, edge = -size, most
            steps = np.rint(edge / size)
            size, edge = (edge / steps, edge) if steps != bottom else (size, bottom)
            step[o, g], low[o, g] = size, edge
            for i in range(length):
                code[i] = np.uint8(np.int32(min(max(np.rint((near[i] - edge) / size), bottom), top)))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _squared_errors(weight, codes, step, shift, less):  # type: ignore[no-untyped-def]
    groups = step.shape[1]
    length = weight.shape[1] // groups
    # one sum for each place in a group: loops over all of them fill the registers
    lost, whole = np.zeros(length, np.float32), np.zeros(length, np.float32)
    all_lost, all_whole = 0.0, 0.0
    for o in range(len(weight)):
        lost[:] = 0
        whole[:] = 0
        for g in range(groups):
            near, code = weight[o, g * length : (g + 1) * length], codes[o, g * length : (g + 1) * length]
            size, zero, minus = step[o, g], shift[o, g], less[o, g]
            for i in range(length):
                off = ((np.float32(code[i]) - zero) * size - minus) - near[i]
                lost[i] += off * off
                whole[i] += near[i] * near[i]
        for i in range(length):
            all_lost += lost[i]
            all_whole += whole[i]
    return all_lost, all_whole


# vectors of comparisons want to know that nothing is NaN, and that either zero will do
@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _ends(values):  # type: ignore[no-untyped-def]
    least, most = values[0], values[0]
    for value in values:
        least = value if value < least else least
        most = value if value > most else most
    return least, most


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _choose_rows(weight, importance, scale, index, top, worth_turning, first, last):  # type: ignore[no-untyped-def]
    one, worth = weight.dtype.type(1), weight.dtype.type(worth_turning)
    middle = (top + one) / weight.dtype.type(2)
    signs = 2 if worth > 0 else 1
    least, total = np.zeros((2, BLOCK), weight.dtype), np.zeros((2, BLOCK), weight.dtype)
    times, steps = np.zeros(BLOCK, weight.dtype), np.zeros(BLOCK, weight.dtype)
    chosen = np.zeros((2, BLOCK), np.int64)
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        width = stop - start
        near = weight[:, start:stop].copy()
        for candidate in range(scale.shape[0]):
            for o in range(width):
                step = scale[candidate, start + o]
                steps[o] = one if step == 0 else step
                times[o] = one / steps[o]
            total[:] = 0
            for i in range(near.shape[0]):
                share = importance[i]
                for o in range(width):
                    # one code for both signs: the ends alone differ
                    ratio = near[i, o] * times[o]
                    code = np.rint(ratio)
                    miss = ratio - min(max(code, -middle), middle - one)
                    total[0, o] += share * (miss * miss)
                    if signs == 2:
                        miss = ratio - min(max(code, one - middle), middle)
                        total[1, o] += share * (miss * miss)
            for sign in range(signs):
                for o in range(width):
                    error = total[sign, o] * (steps[o] * steps[o])
                    if candidate == 0 or error < least[sign, o]:
                        least[sign, o] = error
                        chosen[sign, o] = candidate
        for o in range(width):
            turns = signs == 2 and least[1, o] < least[0, o] * worth
            index[start + o] = scale.shape[0] + chosen[1, o] if turns else chosen[0, o]


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _round_block(near, importance, scale, inverse, zero, top, total):  # type: ignore[no-untyped-def]
    """Weighted squared errors of rounding a block of rows, into `total`."""
    bottom = near.dtype.type(0)  # as above
    total[:] = 0
    for i in range(near.shape[0]):
        share = importance[i]
        for o in range(near.shape[1]):
            ratio = near[i, o] * inverse[o] + zero[o]
            miss = ratio - min(max(np.rint(ratio), bottom), top)
            total[o] += share * (miss * miss)
    for o in range(near.shape[1]):
        total[o] *= scale[o] * scale[o]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _moment_rows(  # type: ignore[no-untyped-def]
    weight, importance, scale, inverse, zero, moments, top, first, last
):
    bottom = weight.dtype.type(0)  # as above
    times, zeros, base = np.zeros(BLOCK, weight.dtype), np.zeros(BLOCK, weight.dtype), np.zeros(BLOCK, weight.dtype)
    lost, far, miss = np.empty(BLOCK, weight.dtype), np.empty(BLOCK, weight.dtype), np.empty(BLOCK, weight.dtype)
    spread, together = np.empty(BLOCK, weight.dtype), np.empty(BLOCK, weight.dtype)
    near = np.zeros((weight.shape[0], BLOCK), weight.dtype)
    whole = bottom
    for i in range(len(importance)):
        whole += importance[i]
    share = weight.dtype.type(1) / whole
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        width = stop - start
        near[:, :width] = weight[:, start:stop]
        times[:width], zeros[:width] = inverse[start:stop], zero[start:stop]
        for o in range(BLOCK):
            base[o] = min(max(np.rint(near[0, o] * times[o] + zeros[o]), bottom), top)
            lost[o] = far[o] = miss[o] = spread[o] = together[o] = bottom
        for i in range(near.shape[0]):
            weigh = importance[i]
            for o in range(BLOCK):
                ratio = near[i, o] * times[o] + zeros[o]
                code = min(max(np.rint(ratio), bottom), top)
                off, apart = ratio - code, code - base[o]
                lost[o] += weigh * (off * off)
                far[o] += weigh * apart
                miss[o] += weigh * off
                spread[o] += weigh * (apart * apart)
                together[o] += weigh * (apart * off)
        for o in range(width):
            size, off, apart = scale[start + o], miss[o] * share, far[o] * share
            moments[0, start + o] = lost[o] * (size * size)
            moments[1, start + o] = base[o] + apart
            moments[2, start + o] = off
            moments[3, start + o] = max(spread[o] * share - apart * apart, bottom)
            moments[4, start + o] = together[o] * share - apart * off


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _grid_error(near, weigh, step, less, inverse, bottom, highest, error):  # type: ignore[no-untyped-def]
    """Weighted squared error of the nearest codes; `inverse` is filled with that of the steps."""
    for o in range(BLOCK):
        inverse[o] = np.float32(0) if step[o] == 0 else np.float32(1) / step[o]
        error[o] = 0
    for i in range(near.shape[0]):
        for o in range(BLOCK):
            code = min(max(np.rint((near[i, o] + less[o]) * inverse[o]), bottom), highest)
            off = code * step[o] - less[o] - near[i, o]
            error[o] += off * off * weigh[i, o]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fit_ranges(  # type: ignore[no-untyped-def]
    x, w, step, less, best_step, best_less, top, signed, refits, first, last
):
    length, candidates = x.shape[0], step.shape[0]
    bottom, zero, one, few = np.float32(0), np.float32(0), np.float32(1), np.float32(1e-7)
    near, weigh = np.zeros((length, BLOCK), np.float32), np.zeros((length, BLOCK), np.float32)
    best, under = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    size, minus = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    inverse, found, least = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sum_w, sum_x = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sum_l, sum_ll, sum_xl = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(first, last, BLOCK):
        width = min(BLOCK, last - start)
        near[:, :width] = x[:, start : start + width]
        weigh[:, :width] = w[:, start : start + width]
        best[:width] = step[0, start : start + width]
        under[:width] = less[0, start : start + width]
        _grid_error(near, weigh, best, under, inverse, bottom, top, least)
        sum_w[:] = 0
        sum_x[:] = 0
        for i in range(length):
            for o in range(BLOCK):
                sum_w[o] += weigh[i, o]
                sum_x[o] += near[i, o] * weigh[i, o]
        for candidate in range(1, candidates + refits):
            if candidate < candidates:
                size[:width] = step[candidate, start : start + width]
                minus[:width] = less[candidate, start : start + width]
            else:
                size[:] = best
                minus[:] = under
            for o in range(BLOCK):
                inverse[o] = zero if size[o] == 0 else one / size[o]
                sum_l[o] = 0
                sum_ll[o] = 0
                sum_xl[o] = 0
            for i in range(length):
                for o in range(BLOCK):
                    code = min(max(np.rint((near[i, o] + minus[o]) * inverse[o]), bottom), top)
                    weighted = weigh[i, o] * code
                    sum_l[o] += weighted
                    sum_ll[o] += weighted * code
                    sum_xl[o] += near[i, o] * weigh[i, o] * code
            for o in range(BLOCK):
                determinant = sum_w[o] * sum_ll[o] - sum_l[o] * sum_l[o]
                solvable = determinant > few * sum_w[o] * sum_ll[o]
                safe = determinant if solvable else one
                slope = (sum_w[o] * sum_xl[o] - sum_x[o] * sum_l[o]) / safe
                shift = (sum_l[o] * sum_xl[o] - sum_ll[o] * sum_x[o]) / safe
                if signed:
                    slope = slope if solvable else zero
                    shift = shift if solvable else -sum_x[o] / sum_w[o]
                elif shift < 0 or not solvable:
                    # the min that the type cannot hold is left out, and the step fitted alone
                    slope = max(sum_xl[o] / sum_ll[o], zero) if sum_ll[o] > 0 else zero
                    shift = zero
                size[o], minus[o] = slope, shift
            _grid_error(near, weigh, size, minus, inverse, bottom, top, found)
            for o in range(BLOCK):
                if found[o] < least[o]:
                    least[o], best[o], under[o] = found[o], size[o], minus[o]
        best_step[start : start + width] = best[:width]
        best_less[start : start + width] = under[:width]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fit_offset(x, w, largest, codes, best_step, top, offset, first, last):  # type: ignore[no-untyped-def]
    length = x.shape[0]
    bottom, highest, zero = np.float32(-offset), np.float32(top - offset), np.float32(0)
    near, weigh = np.zeros((length, BLOCK), np.float32), np.zeros((length, BLOCK), np.float32)
    most, times = np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    along, squares = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    best, gain = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(first, last, BLOCK):
        width = min(BLOCK, last - start)
        near[:, :width] = x[:, start : start + width]
        weigh[:, :width] = w[:, start : start + width]
        most[:width] = largest[start : start + width]
        best[:] = 0
        gain[:] = 0
        for candidate in range(len(codes)):
            for o in range(BLOCK):
                times[o] = zero if most[o] == 0 else codes[candidate] / most[o]
                along[o] = 0
                squares[o] = 0
            for i in range(length):
                for o in range(BLOCK):
                    code = min(max(np.rint(near[i, o] * times[o]), bottom), highest)
                    along[o] += near[i, o] * weigh[i, o] * code
                    squares[o] += code * code * weigh[i, o]
            for o in range(BLOCK):
                if squares[o] > 0:
                    found = along[o] * along[o] / squares[o]
                    if found > gain[o]:
                        gain[o], best[o] = found, along[o] / squares[o]
        best_step[start : start + width] = best[:width]
