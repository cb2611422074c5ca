"""HQQ's half-quadratic search: grids with float zeros from the weights alone.

HQQ (Badri and Shaji, mobiusml.github.io/hqq_blog) fixes each group's scale by its range and moves the zero: the
residual is shrunk by the proximal operator of the l_p norm, p < 1, so that a few large errors are let go, and the zero
becomes the mean of what is left. The hqq package keeps the last zero, and stops once the mean error grows. Here the
same iterates are gone through, each is judged as the file would hold it, and every group keeps the one with the least
squared error: no group ends above hqq's. Judged by the l_p error that proposes them, iterates make a worse model: it
lets large errors go. Shrunken ranges can be searched too. Least squares (`FloatZeroRule.fit`) is the other choice
(docs/formats/hqq.md).

Shape legend: K weights of one group, N groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.grids.affine import LARGEST_ZERO, SMALLEST_SCALE, FloatZeroRule, where
from quantkit.kernels import rounding_errors

WHOLE_START_BITS = 4  # hqq rounds the zero it starts from at this width


@dataclass(frozen=True)
class HalfQuadratic:
    """The search for one grid per group.

    Attributes:
        rule: bits, stored dtype and the ranges that are tried.
        norm: p of the l_p error whose proximal operator makes the iterates.
        iterations: zero updates for each range; hqq makes as many at most.
        strength: beta of the proximal operator; hqq's default solver leaves it as it is.
    """

    rule: FloatZeroRule
    norm: float = 0.7
    iterations: int = 20
    strength: float = 10.0

    def fit(self, weight_KN: Tensor) -> tuple[Tensor, Tensor]:
        """Scale [N] and zero [N], both as the file will hold them.

        Args:
            weight_KN: [K, N], float32 or float64; not modified.
        """
        highest_code, stored = self.rule.highest_code, self.rule.stored
        best: tuple[Tensor, Tensor] | None = None
        best_error_N = torch.full_like(weight_KN[0], torch.inf)
        equal_K = torch.ones_like(weight_KN[:, 0])
        for density_N, zero_N in self._starts(weight_KN):
            scale_N = density_N.reciprocal().clamp(min=SMALLEST_SCALE).to(stored).to(weight_KN.dtype)
            for _ in range(self.iterations + 1):
                tried = (scale_N, zero_N.to(stored).to(weight_KN.dtype))
                candidate = (tried[0].unsqueeze(0), tried[1].unsqueeze(0))
                error_N = rounding_errors(weight_KN, equal_K, *candidate, highest_code)[0]
                better_N = error_N < best_error_N
                best_error_N = torch.where(better_N, error_N, best_error_N)
                best = tried if best is None else where(better_N, tried, best)
                # on from what was not rounded, as hqq goes: its iterates are then all among these
                code_KN = (weight_KN * density_N + zero_N).round_().clamp_(0, highest_code)
                residual_KN = weight_KN - (code_KN - zero_N) / density_N
                kept_KN = shrunk(residual_KN, self.strength, self.norm)
                zero_N = (code_KN - (weight_KN - kept_KN) * density_N).mean(0)
        assert best is not None, "the full range was tried"
        return best

    def _starts(self, weight_KN: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes per unit of weight [N], and the zero [N] that the lowest weight asks for; the full range first."""
        rule = self.rule
        low_N, high_N = weight_KN.amin(0), weight_KN.amax(0)
        middle_N, span_N = (low_N + high_N) / 2, high_N - low_N
        # weights that are all but equal and far from 0 would need a zero beyond float16
        narrowest_N = rule.highest_code * (low_N.abs() / LARGEST_ZERO).clamp(min=SMALLEST_SCALE)
        for step in range(rule.candidates + 1):
            fraction = 1 - (1 - rule.shrink) * step / max(rule.candidates, 1)
            density_N = rule.highest_code / torch.maximum(span_N * fraction, narrowest_N)
            lowest_N = low_N if step == 0 else middle_N - span_N * fraction / 2
            zero_N = -lowest_N * density_N
            yield density_N, zero_N
            if step == 0 and rule.bits == WHOLE_START_BITS:
                yield density_N, zero_N.round()


def shrunk(residual: Tensor, beta: float, norm: float) -> Tensor:
    """The l_p norm's proximal operator as HQQ approximates it: sign(x) max(|x| - |x|^(p-1) / beta, 0)."""
    size = residual.abs()
    return torch.sign(residual) * (size - size.pow(norm - 1) / beta).clamp_(min=0)
