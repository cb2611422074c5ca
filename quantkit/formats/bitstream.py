"""Codes as one little-endian bitstream in 32-bit words: 32 codes of b bits fill b words, the first code lowest.

This is the packing of GPTQ (along either axis), of MLX and of compressed-tensors; 3-bit codes straddle words.
"""

from functools import partial, reduce

import torch
from torch import Tensor

from quantkit.kernels import pack, unpack
from quantkit.kernels.levels import CODES_PER_RUN
from quantkit.machine import rows_together, side_by_side

__all__ = ["CODES_PER_RUN", "pack", "pack_rows", "unpack", "unpack_rows"]
WITHIN_BYTES = (2, 4, 8)
"""Widths whose codes fill whole bytes, which can be put together without words of 32 bits for each code."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""What holds as many codes of a byte each."""


def pack_rows(codes_OI: Tensor, bits: int) -> Tensor:
    """int32 [O, I * bits / 32]: a bitstream for each row.

    Args:
        codes_OI: uint8 [O, I], I a multiple of 32; not modified.
        bits: bits per code, 1 to 8.
    """
    if bits not in WITHIN_BYTES:
        return pack(codes_OI.t().contiguous(), bits).t().contiguous()
    rows, columns = codes_OI.shape
    bytes_OB = torch.empty((rows, columns * bits // 8), dtype=torch.uint8, device=codes_OI.device)
    together = rows_together(codes_OI)
    pieces = zip(codes_OI.split(together), bytes_OB.split(together), strict=True)
    side_by_side(partial(_pack_bytes, bits), pieces, codes_OI.device)
    return bytes_OB.view(torch.int32)


def _pack_bytes(bits: int, codes_RI: Tensor, bytes_RB: Tensor) -> None:
    """Fill in bytes of two codes or four: those of a word moved together, its lowest byte is what is wanted."""
    together = 8 // bits
    words_RB = codes_RI.contiguous().view(WORDS[together])
    moved = [words_RB >> place * (8 - bits) for place in range(1, together)]
    bytes_RB.copy_(reduce(torch.bitwise_or, moved, words_RB))


def unpack_rows(words_OW: Tensor, bits: int) -> Tensor:
    """uint8 [O, W * 32 / bits]: the codes that `pack_rows` packed."""
    if bits not in WITHIN_BYTES:
        return unpack(words_OW.t().contiguous(), bits).t().contiguous()
    bytes_OB = words_OW.contiguous().view(torch.uint8)
    places = range(0, 8, bits)
    return torch.stack([(bytes_OB >> place) & (2**bits - 1) for place in places], dim=2).flatten(1)
