"""The search for K-quants compiled for the CPU as a whole, so that a tile of sub-blocks stays in the cache.

Sums over a sub-block are float32 and over a block float64, each in one order, so bytes depend neither on the number of
threads nor on the processor. `data` is a tile's weights and what their errors weigh, in turn, [2 L, TILE]; `lane` has a
row of one value for each sub-block of the tile for each of the names below.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.compiled import over_rows, round_to_half
from quantkit.kernels.levels import ABOVE, BELOW, BlockSearch

TILE = 64  # sub-blocks at a time: whole blocks of 8 or 16
TOGETHER = 4  # weights of a sub-block that are summed before the sums go back to memory
(
    SIZE, LESS, INVERSE, FOUND, LEAST, BEST, UNDER, LOW, HIGH, SUM_W, SUM_X, SUM_L, SUM_LL, SUM_XL, D, DMIN, SCALE, MIN,
    WHOLE, BEST_WHOLE, TRIED_SCALE, TRIED_MIN, OFF,
) = range(23)  # fmt: skip
LANES = 23
ROUNDINGS = 9  # of the largest scale, see `quantkit.grids.blocks`


def search_blocks(x_NSL: Tensor, w_NSL: Tensor, search: BlockSearch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `quantkit.kernels.search_blocks`."""
    num_blocks, num_subs, length = x_NSL.shape
    assert length % TOGETHER == 0, f"{length} weights of a sub-block are summed {TOGETHER} at a time"
    assert TILE % num_subs == 0, "a tile holds whole blocks"
    x_ML, w_ML = (part.reshape(-1, length) for part in (x_NSL, w_NSL))
    starts = torch.tensor([span for span, _ in search.starts]), torch.tensor([number for _, number in search.starts])
    scale_M, min_M = (torch.empty(num_blocks * num_subs) for _ in range(2))
    d_N, dmin_N = (torch.empty(num_blocks) for _ in range(2))
    codes_ML = torch.empty((num_blocks * num_subs, length), dtype=torch.uint8)
    over_rows(
        _search, (x_ML, w_ML, *starts), (scale_M, min_M, d_N, dmin_N, codes_ML), search.top,
        search.offset, *search.scale_range, search.min_top, search.refinements,
    )  # fmt: skip
    shape = (num_blocks, num_subs)
    return d_N, dmin_N, scale_M.view(shape), min_M.view(shape), codes_ML.view(x_NSL.shape)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _search(  # type: ignore[no-untyped-def]
    x, w, span, divisor, scale, less, d, dmin, codes, top, offset, low, high, min_top, refinements, first, last
):
    length, subs = x.shape[1], len(scale) // len(d)
    data, lane = np.zeros((2 * length, TILE), np.float32), np.zeros((LANES, TILE), np.float32)
    bottom, highest = np.float32(-offset), np.float32(top - offset)
    half = np.zeros(TILE // subs, np.float32)
    word = half.view(np.int32)
    for start in range(first, last, TILE):
        width = min(TILE, last - start)
        _load(x, w, start, width, subs, data)
        if offset:
            _fit_offset(data, lane, divisor, bottom, highest)
        else:
            _fit_ranges(data, lane, span, divisor, highest)
        _sum_weights(data, lane)
        _round_scales(lane, BEST, D, SCALE, subs, low, high, half, word)
        if min_top:
            _round_scales(lane, UNDER, DMIN, MIN, subs, 0, min_top, half, word)
        else:
            lane[DMIN] = 0
            lane[MIN] = 0
        _grid(lane, D, DMIN, SCALE, MIN)
        _errors(data, lane, LEAST, bottom, highest)
        for _ in range(refinements):
            _move(data, lane, low, high, min_top, bottom, highest)
            _refit(data, lane, subs, min_top, bottom, highest, half, word)
        _grid(lane, D, DMIN, SCALE, MIN)
        for o in range(width):
            scale[start + o], less[start + o] = lane[SCALE, o], lane[MIN, o]
            if o % subs == 0:
                d[(start + o) // subs], dmin[(start + o) // subs] = lane[D, o], lane[DMIN, o]
        _encode(data, lane, codes, start, width, bottom, highest, np.float32(offset))


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _load(x, w, start, width, subs, data):  # type: ignore[no-untyped-def]
    """A tile, with errors that weigh a little at least: a sub-block whose errors weigh nothing has no best scale."""
    length = x.shape[1]
    if width < TILE:
        data[:] = 0
    for block in range(0, width, subs):
        total = 0.0
        for o in range(start + block, start + block + subs):
            for i in range(length):
                total += w[o, i]
        floor = np.float32(1e-6) * np.float32(total / (subs * length))
        for o in range(block, block + subs):
            for i in range(length):
                data[2 * i, o] = x[start + o, i]
                data[2 * i + 1, o] = w[start + o, i] + floor + np.float32(1e-30)


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _invert(lane):  # type: ignore[no-untyped-def]
    for o in range(TILE):
        size = lane[SIZE, o]
        lane[INVERSE, o] = np.float32(0) if size == 0 else np.float32(1) / size


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _errors(data, lane, out, bottom, highest):  # type: ignore[no-untyped-def]
    """Weighted squared errors of the nearest codes on the grid of SIZE and LESS."""
    _invert(lane)
    lane[out] = 0
    for i in range(0, len(data), 2 * TOGETHER):
        for o in range(TILE):
            size, less, inverse, total = lane[SIZE, o], lane[LESS, o], lane[INVERSE, o], lane[out, o]
            for k in range(TOGETHER):
                value = data[i + 2 * k, o]
                code = min(max(np.rint((value + less) * inverse), bottom), highest)
                off = code * size - less - value
                total += off * off * data[i + 2 * k + 1, o]
            lane[out, o] = total


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _sums(data, lane, bottom, highest):  # type: ignore[no-untyped-def]
    """Sums of the nearest codes on the grid of SIZE and LESS, of their squares and their products with weights."""
    _invert(lane)
    lane[SUM_L] = 0
    lane[SUM_LL] = 0
    lane[SUM_XL] = 0
    for i in range(0, len(data), 2 * TOGETHER):
        for o in range(TILE):
            less, inverse = lane[LESS, o], lane[INVERSE, o]
            sum_l, sum_ll, sum_xl = lane[SUM_L, o], lane[SUM_LL, o], lane[SUM_XL, o]
            for k in range(TOGETHER):
                value, weigh = data[i + 2 * k, o], data[i + 2 * k + 1, o]
                code = min(max(np.rint((value + less) * inverse), bottom), highest)
                weighted = weigh * code
                sum_l += weighted
                sum_ll += weighted * code
                sum_xl += value * weigh * code
            lane[SUM_L, o], lane[SUM_LL, o], lane[SUM_XL, o] = sum_l, sum_ll, sum_xl


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _sum_weights(data, lane):  # type: ignore[no-untyped-def]
    lane[SUM_W] = 0
    lane[SUM_X] = 0
    for i in range(0, len(data), 2):
        for o in range(TILE):
            lane[SUM_W, o] += data[i + 1, o]
            lane[SUM_X, o] += data[i, o] * data[i + 1, o]


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _keep_better(lane, first, second):  # type: ignore[no-untyped-def]
    """BEST and UNDER become two rows where the error that was FOUND with them is below the LEAST."""
    for o in range(TILE):
        better = lane[FOUND, o] < lane[LEAST, o]
        lane[LEAST, o] = lane[FOUND, o] if better else lane[LEAST, o]
        lane[BEST, o] = lane[first, o] if better else lane[BEST, o]
        lane[UNDER, o] = lane[second, o] if better else lane[UNDER, o]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fit_ranges(data, lane, span, divisor, highest):  # type: ignore[no-untyped-def]
    """BEST and UNDER of the ranges whose codes, once fitted, have the least error; the first is as it is."""
    zero, one, few = np.float32(0), np.float32(1), np.float32(1e-7)
    _sum_weights(data, lane)
    lane[LOW] = 0
    lane[HIGH] = data[0]
    for i in range(0, len(data), 2):
        for o in range(TILE):
            lane[LOW, o] = min(lane[LOW, o], data[i, o])
            lane[HIGH, o] = max(lane[HIGH, o], data[i, o])
    for candidate in range(len(divisor)):
        where = span[candidate]
        for o in range(TILE):
            low = zero if where == ABOVE else lane[LOW, o]
            top = zero if where == BELOW else max(lane[HIGH, o], zero) if where == ABOVE else lane[HIGH, o]
            lane[SIZE, o] = (top - low) / divisor[candidate]
            lane[LESS, o] = zero - low
        if candidate == 0:
            lane[BEST] = lane[SIZE]
            lane[UNDER] = lane[LESS]
            _errors(data, lane, LEAST, zero, highest)
            continue
        _sums(data, lane, zero, highest)
        for o in range(TILE):
            sum_w, sum_x, sum_l = lane[SUM_W, o], lane[SUM_X, o], lane[SUM_L, o]
            sum_ll, sum_xl = lane[SUM_LL, o], lane[SUM_XL, o]
            determinant = sum_w * sum_ll - sum_l * sum_l
            solvable = determinant > few * sum_w * sum_ll
            safe = determinant if solvable else one
            slope = (sum_w * sum_xl - sum_x * sum_l) / safe
            under = (sum_l * sum_xl - sum_ll * sum_x) / safe
            # the min that the type cannot hold is left out, and the step fitted alone
            alone = max(sum_xl / sum_ll, zero) if sum_ll > 0 else zero
            kept = solvable and under >= 0
            lane[SIZE, o] = slope if kept else alone
            lane[LESS, o] = under if kept else zero
        _errors(data, lane, FOUND, zero, highest)
        _keep_better(lane, SIZE, LESS)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fit_offset(data, lane, tries, bottom, highest):  # type: ignore[no-untyped-def]
    """BEST steps, fitted to the codes that each sub-block's largest weight has when it is called one of the tries."""
    zero = np.float32(0)
    lane[HIGH] = 0
    lane[BEST] = 0
    lane[UNDER] = 0
    lane[LEAST] = 0
    lane[LESS] = 0
    for i in range(0, len(data), 2):
        for o in range(TILE):
            value, most = data[i, o], lane[HIGH, o]
            lane[HIGH, o] = value if abs(value) > abs(most) else most
    for candidate in range(len(tries)):
        for o in range(TILE):
            most = lane[HIGH, o]
            lane[INVERSE, o] = zero if most == 0 else tries[candidate] / most
        lane[SUM_LL] = 0
        lane[SUM_XL] = 0
        for i in range(0, len(data), 2 * TOGETHER):
            for o in range(TILE):
                inverse, sum_ll, sum_xl = lane[INVERSE, o], lane[SUM_LL, o], lane[SUM_XL, o]
                for k in range(TOGETHER):
                    value, weigh = data[i + 2 * k, o], data[i + 2 * k + 1, o]
                    code = min(max(np.rint(value * inverse), bottom), highest)
                    sum_xl += value * weigh * code
                    sum_ll += code * code * weigh
                lane[SUM_LL, o], lane[SUM_XL, o] = sum_ll, sum_xl
        for o in range(TILE):
            along, squares = lane[SUM_XL, o], lane[SUM_LL, o]
            step = along / squares if squares > 0 else zero
            gain = along * step
            better = gain > lane[LEAST, o]
            lane[LEAST, o] = gain if better else lane[LEAST, o]
            lane[BEST, o] = step if better else lane[BEST, o]


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _to_half(half, word):  # type: ignore[no-untyped-def]
    """As float16 holds them; the sum makes -0 a 0."""
    round_to_half(half, word)
    for block in range(len(half)):
        value = half[block] + np.float32(0)
        half[block] = value if abs(value) < np.float32(65536) else value * np.float32(np.inf)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _round_scales(lane, values, number, wholes, subs, low, high, half, word):  # type: ignore[no-untyped-def]
    """A float16 number for each block, and whole numbers whose products with it are near the values."""
    limit = np.float32(high if low == 0 else low)
    away = np.float32(0.1 if low == 0 else -0.1)
    least, largest, whole_low, whole_high = np.empty(len(half)), np.empty_like(half), np.float32(low), np.float32(high)
    for block in range(len(half)):
        least[block] = np.inf
        most = lane[values, block * subs]
        for o in range(block * subs, (block + 1) * subs):
            if abs(lane[values, o]) > abs(most):
                most = lane[values, o]
        largest[block] = most
    lane[number] = 0
    lane[wholes] = 0
    for step in range(ROUNDINGS):
        for block in range(len(half)):
            half[block] = largest[block] / (limit + away * np.float32(step - ROUNDINGS // 2))
        _to_half(half, word)
        for block in range(len(half)):
            size = half[block]
            inverse = np.float32(0) if size == 0 else np.float32(1) / size
            for o in range(block * subs, (block + 1) * subs):
                whole = min(max(np.rint(lane[values, o] * inverse), whole_low), whole_high)
                off = lane[values, o] - size * whole
                lane[WHOLE, o] = whole
                lane[OFF, o] = off * off * lane[SUM_W, o]
            total = 0.0
            for o in range(block * subs, (block + 1) * subs):
                total += lane[OFF, o]
            if total < least[block]:
                least[block] = total
                for o in range(block * subs, (block + 1) * subs):
                    lane[number, o] = size
                    lane[wholes, o] = lane[WHOLE, o]


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _grid(lane, d, dmin, scale, less):  # type: ignore[no-untyped-def]
    for o in range(TILE):
        lane[SIZE, o] = lane[d, o] * lane[scale, o]
        lane[LESS, o] = lane[dmin, o] * lane[less, o]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _move(data, lane, low, high, min_top, bottom, highest):  # type: ignore[no-untyped-def]
    """Each sub-block's SCALE and MIN become the best of their neighbours; LEAST is the error where they are."""
    whole_low, whole_high, min_high = np.float32(low), np.float32(high), np.float32(min_top)
    lane[BEST] = lane[SCALE]
    lane[UNDER] = lane[MIN]
    aside = 1 if min_top else 0
    for scale_move in range(-1, 2):
        for min_move in range(-aside, aside + 1):
            if scale_move == 0 and min_move == 0:
                continue
            for o in range(TILE):
                lane[TRIED_SCALE, o] = min(max(lane[SCALE, o] + np.float32(scale_move), whole_low), whole_high)
                lane[TRIED_MIN, o] = min(max(lane[MIN, o] + np.float32(min_move), np.float32(0)), min_high)
            _grid(lane, D, DMIN, TRIED_SCALE, TRIED_MIN)
            _errors(data, lane, FOUND, bottom, highest)
            _keep_better(lane, TRIED_SCALE, TRIED_MIN)
    lane[SCALE] = lane[BEST]
    lane[MIN] = lane[UNDER]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _refit(data, lane, subs, min_top, bottom, highest, half, word):  # type: ignore[no-untyped-def]
    """D and DMIN fitted to the codes, where that helps once they are float16 again; LEAST follows."""
    _grid(lane, D, DMIN, SCALE, MIN)
    _sums(data, lane, bottom, highest)
    second = np.zeros_like(half)
    for block in range(len(half)):
        aa, xa, ab, bb, xb = 0.0, 0.0, 0.0, 0.0, 0.0
        for o in range(block * subs, (block + 1) * subs):
            scale, less = np.float64(lane[SCALE, o]), np.float64(lane[MIN, o])
            aa += scale * scale * lane[SUM_LL, o]
            xa += scale * lane[SUM_XL, o]
            ab += scale * less * lane[SUM_L, o]
            bb += less * less * lane[SUM_W, o]
            xb += less * lane[SUM_X, o]
        half[block], second[block] = lane[D, block * subs], lane[DMIN, block * subs]
        determinant = aa * bb - ab * ab
        if min_top == 0 and aa > 0:
            half[block] = np.float32(xa / aa)
        elif min_top and determinant > 1e-7 * aa * bb:
            half[block] = np.float32((xa * bb - xb * ab) / determinant)
            second[block] = np.float32((xa * ab - xb * aa) / determinant)
    _to_half(half, word)
    for o in range(TILE):
        lane[BEST, o] = half[o // subs]
    half[:] = second
    _to_half(half, word)
    for o in range(TILE):
        lane[UNDER, o] = half[o // subs]
    _grid(lane, BEST, UNDER, SCALE, MIN)
    _errors(data, lane, FOUND, bottom, highest)
    for block in range(len(half)):
        before, after = 0.0, 0.0
        for o in range(block * subs, (block + 1) * subs):
            before += lane[LEAST, o]
            after += lane[FOUND, o]
        if after < before:
            for o in range(block * subs, (block + 1) * subs):
                lane[D, o], lane[DMIN, o], lane[LEAST, o] = lane[BEST, o], lane[UNDER, o], lane[FOUND, o]


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _encode(data, lane, codes, start, width, bottom, highest, offset):  # type: ignore[no-untyped-def]
    _invert(lane)
    for o in range(width):
        less, inverse = lane[LESS, o], lane[INVERSE, o]
        for i in range(codes.shape[1]):
            code = min(max(np.rint((data[2 * i, o] + less) * inverse), bottom), highest)
            codes[start + o, i] = np.uint8(code + offset)
