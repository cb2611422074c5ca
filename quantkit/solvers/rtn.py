"""Rounding to nearest exactly as `mx.quantize` does it, so that its codes can be had here too.

Shape legend: O out features, R of them, I in features, G groups of K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.grids.affine import BiasGrid
from quantkit.kernels import round_groups
from quantkit.machine import rows_together, side_by_side
from quantkit.qtensor import QuantizedLinear


@dataclass(frozen=True)
class RoundToNearest:
    """MLX's grid and rounding: the end of larger magnitude is exact, 0 is representable, the scale may be negative.

    Attributes:
        bits: bits per code.
        group_size: input channels per scale and bias.
        stored: dtype of the weights as MLX sees them, and of scales and biases.
    """

    bits: int
    group_size: int
    stored: torch.dtype

    def quantize(self, weight_OI: Tensor) -> QuantizedLinear:
        """Codes and grid of one matrix [O, I], I in multiples of the group size."""
        rows = rows_together(weight_OI)
        codes_OI = torch.empty_like(weight_OI, dtype=torch.uint8, memory_format=torch.contiguous_format)
        pieces = zip(weight_OI.split(rows), codes_OI.split(rows), strict=True)
        parts = side_by_side(self._round, pieces, weight_OI.device)
        scale_OG, bias_OG = (torch.cat(values) for values in zip(*parts, strict=True))
        group_I = torch.arange(weight_OI.shape[1], device=weight_OI.device, dtype=torch.int32) // self.group_size
        return QuantizedLinear(codes_OI, BiasGrid.of(self.bits, scale_OG, bias_OG, group_I))

    def _round(self, weight_RI: Tensor, codes_RI: Tensor) -> tuple[Tensor, Tensor]:
        """Fill in the codes of some rows; scale and bias [R, G] as stored."""
        # codes are taken on the grid before it is rounded, as MLX does
        weight_RI = weight_RI.to(self.stored).float()
        scale_RG, bias_RG = round_groups(weight_RI, self.group_size, 2**self.bits - 1, codes_RI)
        return scale_RG.to(self.stored), bias_RG.to(self.stored)
