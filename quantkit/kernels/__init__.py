"""The inner loops that decide how long a build takes, each as plain torch and compiled; what runs follows the device.

Shape legend: O out features (rows), I in features, of a group where there is one; P channels of a panel, C candidates,
G groups in a row; L weights of each of M small blocks; N codes of each of X streams, W words.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from quantkit.kernels import reference
from quantkit.kernels.levels import CODES_PER_RUN, BlockSearch, Levels

BY_DEVICE = {"cpu": "compiled", "cuda": "gpu"}


def solve_panel(
    weight_PO: Tensor, feedback_PO: Tensor, upper_PP: Tensor, levels: Levels, codes_PO: Tensor, error_PO: Tensor
) -> Tensor:
    """Codes of P channels, one after another, each with the errors of those before it fed into it.

    Args:
        weight_PO: [P, O] the channels' weights; not modified.
        feedback_PO: [P, O] what the errors of earlier panels call for; not modified.
        upper_PP: [P, P] the factor between these channels, upper triangular.
        levels: what codes stand for.
        codes_PO: uint8 [P, O], filled.
        error_PO: [P, O], filled with the weights minus what their codes stand for.

    Returns:
        lost_O [O]: the panel's share of each row's output error, the squares of E R summed over its channels.
    """
    return _fitting(weight_PO).solve_panel(weight_PO, feedback_PO, upper_PP, levels, codes_PO, error_PO)


def rounding_errors(weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, zero_CO: Tensor, top: int) -> Tensor:
    """Weighted squared error [C, O] of rounding one group's weights to each candidate grid.

    Args:
        weight_IO: [I, O], input channels first; not modified.
        importance_I: [I] the weight of each channel's squared error.
        scale_CO, zero_CO: [C, O] the candidates; code q stands for scale * (q - zero).
        top: the largest code.
    """
    return _fitting(weight_IO).rounding_errors(weight_IO, importance_I, scale_CO, zero_CO, top)


def best_scales(
    weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, top: int, *, worth_turning: float = 0.0
) -> Tensor:
    """int64 [O]: the candidate that rounds a group's weights with the least weighted squared error, by column.

    Of several alike it is the first. Codes reach one step further down than up, so a scale's negative rounds otherwise.

    Args:
        weight_IO, importance_I: see `rounding_errors`.
        scale_CO: [C, O] the candidates; code q stands for scale * (q - (top + 1) / 2). A column of zeros is as well off
            with any scale, so one of 0 is taken as 1.
        top: the largest code, odd.
        worth_turning: the negative of candidate c, named C + c, is taken where the least error of all negatives is less
            than so much of the least of the candidates as they are; with 0 there are none.
    """
    return _fitting(weight_IO).best_scales(weight_IO, importance_I, scale_CO, top, worth_turning)


def code_moments(weight_IO: Tensor, importance_I: Tensor, scale_O: Tensor, zero_O: Tensor, top: int) -> Tensor:
    """What the regression of one group's weights on their nearest codes is made of, [5, O].

    The miss of a weight is weight / scale + zero - code. By row: the weighted squared error, as of `rounding_errors`;
    and weighted means: of the codes, of the misses, of the codes' squared distance from their mean (0 exactly where
    all codes are the same), and of their distance times the misses.

    Args:
        weight_IO, importance_I, top: see `rounding_errors`.
        scale_O, zero_O: [O] code q stands for scale * (q - zero).
    """
    return _fitting(weight_IO).code_moments(weight_IO, importance_I, scale_O, zero_O, top)


def round_groups(weight_OI: Tensor, length: int, top: int, codes_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Step and lowest value [O, G] of MLX's grids, whose codes q stand for step * q + low; mlx's `affine_quantize`.

    A group's end of larger magnitude is exact where that end is no less than half a step from 0, and so is 0; the step
    is negative where that end is the upper one.

    Args:
        weight_OI: float32, finite, groups of `length` side by side in a row; not modified.
        length: weights of a group.
        top: the largest code.
        codes_OI: uint8, filled with the nearest codes.
    """
    return _fitting(weight_OI).round_groups(weight_OI, length, top, codes_OI)


def squared_errors(
    weight_OI: Tensor, codes_OI: Tensor, step_OG: Tensor, shift_OG: Tensor, less_OG: Tensor
) -> tuple[Tensor, Tensor]:
    """The squares of what codes miss the weights by, summed, and those of the weights; float64 scalars.

    Args:
        weight_OI: float32; not modified.
        codes_OI: uint8.
        step_OG, shift_OG, less_OG: float32; code q stands for (q - shift) * step - less. Groups are runs of I / G.
    """
    return _fitting(weight_OI).squared_errors(weight_OI, codes_OI, step_OG, shift_OG, less_OG)


def pack(codes_NX: Tensor, bits: int) -> Tensor:
    """int32 [N * bits / 32, X]: codes as one little-endian bitstream along the first dimension, the first lowest.

    Args:
        codes_NX: integer codes 0 .. 2**bits - 1, [N, X], N a multiple of 32; not modified.
        bits: bits per code, 1 to 8; codes of 3, 5, 6 and 7 straddle words.
    """
    assert len(codes_NX) % CODES_PER_RUN == 0, f"{len(codes_NX)} codes are no multiple of {CODES_PER_RUN}"
    return _fitting(codes_NX).pack(codes_NX, bits)


def unpack(words_WX: Tensor, bits: int) -> Tensor:
    """uint8 [W * 32 / bits, X]: the codes that `pack` packed."""
    return _fitting(words_WX).unpack(words_WX, bits)


def dequantize(
    codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """scale * (code - zero) [O, I], taken in float32.

    Args:
        codes_OI: uint8 [O, I].
        scale_OG, zero_OG: float32 [O, G].
        group_I: integers [I], the group of every channel.
        dtype: of the result: float32, float16 or bfloat16.
    """
    return _fitting(codes_OI).dequantize(codes_OI, scale_OG, zero_OG, group_I, dtype)


def fit_ranges(
    x_LM: Tensor, w_LM: Tensor, step_CM: Tensor, less_CM: Tensor, top: int, *, signed: bool, refits: int
) -> tuple[Tensor, Tensor]:
    """Step and subtrahend [M] of small blocks whose codes q stand for step * q - less: the best that was seen.

    The first candidate is taken as it is. Of each other the codes are taken, and step and subtrahend fitted to them by
    least squares; at last to the codes of the best, several times.

    Args:
        x_LM: [L, M] the weights of M small blocks, the first of all blocks first; float32, not modified.
        w_LM: [L, M] the weight of each squared error.
        step_CM, less_CM: candidates.
        top: the largest code.
        signed: what is subtracted may be negative.
        refits: how many times at last.
    """
    return _fitting(x_LM).fit_ranges(x_LM, w_LM, step_CM, less_CM, top, signed=signed, refits=refits)


def fit_offset(x_LM: Tensor, w_LM: Tensor, largest_M: Tensor, code_C: Tensor, offset: int, top: int) -> Tensor:
    """Step [M], of either sign, of small blocks whose codes q stand for step * (q - offset): the best that was seen.

    Args:
        x_LM, w_LM: see `fit_ranges`.
        largest_M: each block's weight of the largest size.
        code_C: what that weight's code less the offset is tried as; fractions too. Steps are fitted to the codes.
        offset, top: see above; the largest code.
    """
    return _fitting(x_LM).fit_offset(x_LM, w_LM, largest_M, code_C, offset, top)


def search_blocks(
    x_NSL: Tensor, w_NSL: Tensor, search: BlockSearch
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """The whole search for N blocks of a K-quant in one kernel; None on a device that has none.

    Args:
        x_NSL: float32, the weights of N blocks of S sub-blocks; not modified.
        w_NSL: float32, the weight of each squared error, non-negative.
        search: what is searched.

    Returns:
        d [N], dmin [N], scale [N, S] and min [N, S], float32, the last two whole numbers; codes uint8 [N, S, L].
    """
    module = _searching(x_NSL.device.type)
    if module is None:
        return None
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = module.search_blocks(x_NSL, w_NSL, search)
    return found


@cache
def _implementation(device: str) -> ModuleType:
    """Compiled by numba on a CPU, by Triton on CUDA where it is installed, as it is with torch on Linux."""
    if device == "cuda" and find_spec("triton") is None:
        return reference
    return import_module(f"quantkit.kernels.{BY_DEVICE[device]}") if device in BY_DEVICE else reference


@cache
def _searching(device: str) -> ModuleType | None:
    """Apart from the other loops, which most formats do with; None where plain torch does them."""
    plain = _implementation(device) is reference
    return None if plain else import_module(f"quantkit.kernels.{BY_DEVICE[device]}_search")


def _fitting(tensor: Tensor) -> ModuleType:
    return _implementation(tensor.device.type)
