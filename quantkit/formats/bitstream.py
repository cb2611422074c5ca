"""Codes as one little-endian bitstream in 32-bit words: 32 codes of b bits fill b words, the first code lowest.

This is the packing of GPTQ (along either axis), of MLX and of compressed-tensors; 3-bit codes straddle words.
"""

import torch
from torch import Tensor

from quantkit.kernels import pack, unpack
from quantkit.kernels.levels import CODES_PER_RUN

__all__ = ["CODES_PER_RUN", "pack", "pack_rows", "unpack", "unpack_rows"]
WITHIN_BYTES = (2, 4, 8)
"""Widths whose codes fill whole bytes, which can be put together without words of 32 bits for each code."""


def pack_rows(codes_OI: Tensor, bits: int) -> Tensor:
    """int32 [O, I * bits / 32]: a bitstream for each row.

    Args:
        codes_OI: uint8 [O, I], I a multiple of 32; not modified.
        bits: bits per code, 1 to 8.
    """
    if bits not in WITHIN_BYTES:
        return pack(codes_OI.t().contiguous(), bits).t().contiguous()
    bytes_OB, *higher = codes_OI.unflatten(1, (-1, 8 // bits)).unbind(2)
    bytes_OB = bytes_OB.clone(memory_format=torch.contiguous_format)
    for place, codes_OB in enumerate(higher, 1):
        bytes_OB |= codes_OB << bits * place
    return bytes_OB.view(torch.int32)


def unpack_rows(words_OW: Tensor, bits: int) -> Tensor:
    """uint8 [O, W * 32 / bits]: the codes that `pack_rows` packed."""
    if bits not in WITHIN_BYTES:
        return unpack(words_OW.t().contiguous(), bits).t().contiguous()
    bytes_OB = words_OW.contiguous().view(torch.uint8)
    places = range(0, 8, bits)
    return torch.stack([(bytes_OB >> place) & (2**bits - 1) for place in places], dim=2).flatten(1)
