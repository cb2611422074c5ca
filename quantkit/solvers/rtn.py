"""Rounding to nearest exactly as `mx.quantize` does it, so that its codes can be had here too.

Shape legend: O out features, R of them, I in features, G groups of K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.grids.affine import BiasGrid
from quantkit.machine import side_by_side
from quantkit.qtensor import QuantizedLinear
from quantkit.solvers.weights import rows_of

SMALLEST_SCALE = 1e-7


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
        rows = rows_of(weight_OI)
        codes_OI = torch.empty_like(weight_OI, dtype=torch.uint8, memory_format=torch.contiguous_format)
        pieces = zip(weight_OI.split(rows), codes_OI.split(rows), strict=True)
        parts = side_by_side(self._round, pieces, weight_OI.device)
        scale_OG, bias_OG = (torch.cat(values) for values in zip(*parts, strict=True))
        group_I = torch.arange(weight_OI.shape[1], device=weight_OI.device, dtype=torch.int32) // self.group_size
        return QuantizedLinear(codes_OI, BiasGrid.of(self.bits, scale_OG, bias_OG, group_I))

    def _round(self, weight_RI: Tensor, codes_RI: Tensor) -> tuple[Tensor, Tensor]:
        """Fill in the codes of some rows; scale and bias [R, G] as stored."""
        highest = 2**self.bits - 1
        weight_RGK = weight_RI.to(self.stored).float().unflatten(1, (-1, self.group_size))
        # torch goes through either in vectors, but not through both at once
        low_RG, high_RG = weight_RGK.amin(dim=2), weight_RGK.amax(dim=2)
        scale_RG = ((high_RG - low_RG) / highest).clamp(min=SMALLEST_SCALE)
        from_low_RG = low_RG.abs() > high_RG.abs()
        scale_RG = torch.where(from_low_RG, scale_RG, -scale_RG)
        edge_RG = torch.where(from_low_RG, low_RG, high_RG)
        steps_RG = (edge_RG / scale_RG).round()
        scale_RG = torch.where(steps_RG != 0, edge_RG / steps_RG, scale_RG)
        bias_RG = torch.where(steps_RG != 0, edge_RG, 0.0)
        # codes are taken on the grid before it is rounded, as MLX does
        ratio_RGK = weight_RGK.sub_(bias_RG[..., None]).div_(scale_RG[..., None])
        codes_RI.copy_(ratio_RGK.round_().clamp_(0, highest).flatten(1))
        return scale_RG.to(self.stored), bias_RG.to(self.stored)
