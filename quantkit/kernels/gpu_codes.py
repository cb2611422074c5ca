"""Codes packed, unpacked and decoded in Triton, for a GPU: one launch for each call."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.gpu_rounding import PLAIN

CODES = 1024  # in one program that packs or decodes


def pack(codes_NX: Tensor, bits: int) -> Tensor:
    """See `quantkit.kernels.pack`."""
    num_codes, width = codes_NX.shape
    words_WX = torch.empty((num_codes * bits // 32, width), dtype=torch.int32, device=codes_NX.device)
    _pack_words[(len(words_WX), triton.cdiv(width, CODES))](
        codes_NX,
        words_WX,
        width,
        *codes_NX.stride(),
        BITS=bits,
        OVERLAP=-(-32 // bits) + (32 % bits > 0),
        WIDTH=CODES,
        **PLAIN,
    )
    return words_WX


def unpack(words_WX: Tensor, bits: int) -> Tensor:
    """See `quantkit.kernels.unpack`."""
    num_words, width = words_WX.shape
    codes_NX = torch.empty((num_words * 32 // bits, width), dtype=torch.uint8, device=words_WX.device)
    _unpack_words[(len(codes_NX), triton.cdiv(width, CODES))](
        words_WX, codes_NX, num_words, width, *words_WX.stride(), BITS=bits, WIDTH=CODES, **PLAIN
    )
    return codes_NX


def dequantize(
    codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See `quantkit.kernels.dequantize`."""
    rows, columns = codes_OI.shape
    weight_OI = torch.empty((rows, columns), dtype=dtype, device=codes_OI.device)
    _decode_rows[(rows, triton.cdiv(columns, CODES))](
        codes_OI,
        scale_OG.contiguous(),
        zero_OG.contiguous(),
        group_I.contiguous(),
        weight_OI,
        columns,
        scale_OG.shape[1],
        *codes_OI.stride(),
        WIDTH=CODES,
        **PLAIN,
    )
    return weight_OI


@triton.jit
def _pack_words(  # type: ignore[no-untyped-def]
    codes, words, width, code_stride, width_stride, BITS: tl.constexpr, OVERLAP: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < width
    run = row // BITS
    # the run's bits that this word begins with, and the code that holds them
    begin = (row % BITS) * 32
    first = begin // BITS
    word = tl.zeros([WIDTH], dtype=tl.int64)
    for step in tl.static_range(OVERLAP):
        place = first + step
        there = at < tl.where(place < 32, width, 0)
        code = tl.load(codes + (run * 32 + place) * code_stride + at * width_stride, mask=there, other=0).to(tl.int64)
        shift = place * BITS - begin
        left, right = tl.maximum(shift, 0), tl.maximum(-shift, 0)
        # what lies beyond the word's 32 bits is the next one's
        word |= tl.where(shift < 32, (code << tl.minimum(left, 31)) >> right, 0)
    tl.store(words + row * width + at, word.to(tl.int32), mask=inside)


@triton.jit
def _unpack_words(  # type: ignore[no-untyped-def]
    words, codes, num_words, width, word_stride, width_stride, BITS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < width
    begin = row * BITS
    word = begin // 32
    place = words + word * word_stride + at * width_stride
    low = tl.load(place, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    there = at < tl.where(word + 1 < num_words, width, 0)
    high = tl.load(place + word_stride, mask=there, other=0).to(tl.int64) & 0xFF
    code = (((high << 32) | low) >> (begin % 32)) & ((1 << BITS) - 1)
    tl.store(codes + row * width + at, code.to(tl.uint8), mask=inside)


@triton.jit
def _decode_rows(  # type: ignore[no-untyped-def]
    codes, scale, zero, group, weight, columns, groups, row_stride, column_stride, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < columns
    own = row * groups + tl.load(group + at, mask=inside, other=0).to(tl.int64)
    code = tl.load(codes + row * row_stride + at * column_stride, mask=inside, other=0).to(tl.float32)
    size = tl.load(scale + own, mask=inside, other=0.0)
    value = (code - tl.load(zero + own, mask=inside, other=0.0)) * size
    tl.store(weight + row * columns + at, value.to(weight.dtype.element_ty), mask=inside)
