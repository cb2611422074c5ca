"""Codes as one little-endian bitstream in 32-bit words: 32 codes of b bits fill b words, the first code lowest.

This is the packing of GPTQ (along either axis) and of MLX; 3-bit codes straddle words.
"""

from quantkit.kernels import pack, unpack
from quantkit.kernels.levels import CODES_PER_RUN

__all__ = ["CODES_PER_RUN", "pack", "unpack"]
