"""Rounding to nearest exactly as `mx.quantize` does it, so that its codes can be had here too.

Shape legend: O out features, I in features, G groups.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibration.statistics import Statistics
from quantkit.costs import Cost, StageWork
from quantkit.grids.affine import BiasGrid
from quantkit.qtensor import LinearFacts, QuantizedLinear
from quantkit.solvers.weights import search_cost

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

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def solve(
        self, weights: dict[str, Tensor], statistics: Statistics
    ) -> Iterator[tuple[str, QuantizedLinear, LinearFacts]]:
        """Rounded linears, one by one, with the loss of their weights; see `quantkit.solvers.contract.Solver`."""
        for name, weight in weights.items():
            started = time.perf_counter()
            quantized = self.quantize(weight)
            lost = float((weight - quantized.dequantize()).square().sum() / weight.square().sum().clamp(min=1e-30))
            yield name, quantized, LinearFacts(name, lost, None, time.perf_counter() - started)

    def cost(self, work: StageWork) -> Cost:
        """See `quantkit.solvers.weights.search_cost`."""
        return search_cost(work)

    def quantize(self, weight_OI: Tensor) -> QuantizedLinear:
        """Codes and grid of one matrix [O, I], I in multiples of the group size."""
        highest = 2**self.bits - 1
        weight_OGK = weight_OI.to(self.stored).float().unflatten(1, (-1, self.group_size))
        low_OG, high_OG = weight_OGK.amin(2), weight_OGK.amax(2)
        scale_OG = ((high_OG - low_OG) / highest).clamp(min=SMALLEST_SCALE)
        from_low_OG = low_OG.abs() > high_OG.abs()
        scale_OG = torch.where(from_low_OG, scale_OG, -scale_OG)
        edge_OG = torch.where(from_low_OG, low_OG, high_OG)
        steps_OG = (edge_OG / scale_OG).round()
        scale_OG = torch.where(steps_OG != 0, edge_OG / steps_OG, scale_OG)
        bias_OG = torch.where(steps_OG != 0, edge_OG, 0.0)
        # codes are taken on the grid before it is rounded, as MLX does
        codes_OGK = ((weight_OGK - bias_OG[..., None]) / scale_OG[..., None]).round().clamp(0, highest)
        group_I = torch.arange(weight_OI.shape[1], device=weight_OI.device, dtype=torch.int32) // self.group_size
        grid = BiasGrid.of(self.bits, scale_OG.to(self.stored), bias_OG.to(self.stored), group_I)
        return QuantizedLinear(codes_OGK.flatten(1).to(torch.uint8), grid)
