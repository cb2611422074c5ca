"""Codes as one little-endian bitstream in 32-bit words: 32 codes of b bits fill b words, the first code lowest.

This is the packing of GPTQ (along either axis) and of MLX; 3-bit codes straddle words.
"""

import torch
from torch import Tensor

CODES_PER_RUN = 32


def pack(codes_NX: Tensor, bits: int) -> Tensor:
    """int32 [N * bits / 32, X]: codes packed along the first dimension, which is a multiple of 32.

    Args:
        codes_NX: integer codes 0 .. 2**bits - 1, [N, X].
        bits: bits per code, 1 to 8.
    """
    num_codes, width = codes_NX.shape
    assert num_codes % CODES_PER_RUN == 0, f"{num_codes} codes are no multiple of {CODES_PER_RUN}"
    runs = codes_NX.to(torch.int32).view(-1, CODES_PER_RUN, width)
    words = torch.zeros((runs.shape[0], bits, width), dtype=torch.int32, device=codes_NX.device)
    for i in range(CODES_PER_RUN):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= runs[:, i] << shift
        if shift + bits > 32:
            words[:, word + 1] |= runs[:, i] >> (32 - shift)
    return words.view(-1, width)


def unpack(words_WX: Tensor, bits: int) -> Tensor:
    """uint8 [W * 32 / bits, X]: the codes that `pack` packed."""
    width = words_WX.shape[1]
    runs = words_WX.view(-1, bits, width)
    codes = torch.empty((runs.shape[0], CODES_PER_RUN, width), dtype=torch.uint8, device=words_WX.device)
    mask = 2**bits - 1
    for i in range(CODES_PER_RUN):
        word, shift = divmod(i * bits, 32)
        # the shift is arithmetic; the mask drops the copied sign bits unless the code straddles words
        code = runs[:, word] >> shift
        if shift + bits > 32:
            low_bits = 32 - shift
            code = (code & (2**low_bits - 1)) | (runs[:, word + 1] << low_bits)
        codes[:, i] = (code & mask).to(torch.uint8)
    return codes.view(-1, width)
