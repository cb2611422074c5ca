"""Rounding to nearest on clipped ranges: what AWQ does after it has scaled the channels (Lin et al., arXiv 2306.00978).

A group's largest magnitudes cost it resolution. Its range is clipped to a share of the largest magnitude, and that
share is kept whose rounded weights change what the group adds to the output least, over all calibration tokens: with
X_g the group's input channels and e its weight error, the sum over tokens of (x e)^2 is e^T (X_g^T X_g) e, with a
diagonal block of the Hessian. So every token counts, at the price of one small product per share.

Shape legend: O out features, I in features, G groups, K channels of a group.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibration.statistics import HESSIAN, Statistics
from quantkit.costs import FLOAT_BYTES, Cost, StageWork
from quantkit.grids.affine import AffineRule, fractions
from quantkit.qtensor import LinearFacts, QuantizedLinear

WORKING_COPIES = 6  # float32 numbers for each weight of the linear that is being solved


@dataclass(frozen=True)
class ClippedRounding:
    """The search as the stream's solver.

    Attributes:
        rule: makes grids of ranges; its `candidates` are the clipped ranges that are tried beside the full one.
        group_size: K.
    """

    rule: AffineRule
    group_size: int

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN})

    def solve(
        self, weights: dict[str, Tensor], statistics: Statistics
    ) -> Iterator[tuple[str, QuantizedLinear, LinearFacts]]:
        """Rounded linears, one by one; see `quantkit.solvers.contract.Solver`."""
        if not weights:
            return
        hessian_II = statistics.hessian()
        for name, weight in weights.items():
            started = time.perf_counter()
            weight_OI = weight.to(hessian_II.dtype)
            quantized = self.quantize(weight_OI, hessian_II)
            error_OI = weight_OI - quantized.dequantize()
            energy = float(((weight_OI @ hessian_II) * weight_OI).sum())
            lost = float(((error_OI @ hessian_II) * error_OI).sum())
            facts = LinearFacts(name, lost / energy if energy else 0.0, None, time.perf_counter() - started)
            yield name, quantized, facts

    def cost(self, work: StageWork) -> Cost:
        """A product with the group's block for each range, and two with the whole Hessian for the record."""
        size = sum(shape.size for shape in work.shapes)
        ranges = self.rule.candidates + 1
        return Cost(
            {"solve": 2.0 * size * (ranges * self.group_size + 2 * work.columns)},
            WORKING_COPIES * work.largest * FLOAT_BYTES,
        )

    def quantize(self, weight_OI: Tensor, hessian_II: Tensor) -> QuantizedLinear:
        """Codes and grid of one linear.

        Args:
            weight_OI: [O, I], float32 or wider; I in multiples of the group size.
            hessian_II: sum of x x^T over the inputs, in the same dtype.
        """
        size = self.group_size
        weight_GOK = weight_OI.unflatten(1, (-1, size)).transpose(0, 1).contiguous()
        block_GKK = (
            hessian_II.unflatten(1, (-1, size)).unflatten(0, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        )
        scale_GO1, zero_GO1 = self._clipped(weight_GOK, block_GKK.contiguous())
        codes_GOK = self.rule.encode(weight_GOK, scale_GO1, zero_GO1)
        group_I = torch.arange(weight_OI.shape[1], device=weight_OI.device, dtype=torch.int32) // size
        grid = self.rule.grid(scale_GO1.squeeze(2).t(), zero_GO1.squeeze(2).t(), group_I)
        return QuantizedLinear(codes_GOK.transpose(0, 1).flatten(1).to(torch.uint8), grid)

    def _clipped(self, weight_GOK: Tensor, block_GKK: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [G, O, 1] of the range with the smallest change of the group's output, the widest on a tie."""
        rule = self.rule
        low_GO1, high_GO1 = weight_GOK.amin(2, keepdim=True), weight_GOK.amax(2, keepdim=True)
        largest_GO1 = torch.maximum(low_GO1.abs(), high_GO1.abs())
        best = rule.within(low_GO1.clamp(max=0), high_GO1.clamp(min=0))
        least_GO1 = torch.full_like(largest_GO1, torch.inf)
        for fraction in fractions(rule.candidates, rule.shrink, like=weight_GOK).flatten().tolist():
            edge_GO1 = largest_GO1 * fraction
            tried = rule.within(
                torch.maximum(low_GO1, -edge_GO1).clamp(max=0), torch.minimum(high_GO1, edge_GO1).clamp(min=0)
            )
            error_GOK = rule.encode(weight_GOK, *tried).sub_(tried[1]).mul_(tried[0]).sub_(weight_GOK)
            lost_GO1 = (error_GOK @ block_GKK).mul_(error_GOK).sum(2, keepdim=True)
            better = lost_GO1 < least_GO1
            least_GO1 = torch.where(better, lost_GO1, least_GO1)
            best = (torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1]))
        return best
