"""HQQ's half-quadratic search: grids with float zeros from the weights alone.

HQQ (Badri and Shaji, mobiusml.github.io/hqq_blog) fixes each group's scale by its range and moves the zero: the
residual is shrunk by the proximal operator of the l_p norm, p < 1, so that a few large errors are let go, and the zero
becomes the mean of what is left. Here the scale is searched too, over shrunken ranges, and of all iterates the one
with the smallest l_p error after rounding to the stored dtype is kept, not the last. Least squares
(`FloatZeroRule.fit`) is the other choice, and the better one at equal size (docs/formats/hqq.md).

Shape legend: K weights of one group, N groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.grids.affine import FloatZeroRule, where


@dataclass(frozen=True)
class HalfQuadratic:
    """The search for one grid per group.

    Attributes:
        rule: bits, stored dtype and the ranges that are tried.
        norm: p of the l_p error that is minimized.
        iterations: zero updates for each range.
        strength: beta of the proximal operator.
        growth: what beta is multiplied with in each iteration (kappa).
    """

    rule: FloatZeroRule
    norm: float = 0.7
    iterations: int = 10
    strength: float = 10.0
    growth: float = 1.01

    def fit(self, weight_KN: Tensor) -> tuple[Tensor, Tensor]:
        """Scale [N] and zero [N], both as the file will hold them.

        Args:
            weight_KN: [K, N], float32 or float64; not modified.
        """
        rule = self.rule
        low_N, high_N = weight_KN.amin(0), weight_KN.amax(0)
        middle_N, span_N = (low_N + high_N) / 2, high_N - low_N
        best: tuple[Tensor, Tensor] | None = None
        best_error_N = torch.full_like(low_N, torch.inf)
        for step in range(rule.candidates + 1):
            width_N = span_N * (1 - (1 - rule.shrink) * step / max(rule.candidates, 1))
            scale_N, zero_N = rule.as_stored(width_N / rule.highest_code, middle_N - width_N / 2)
            beta = self.strength
            for _ in range(self.iterations + 1):
                residual_KN = weight_KN - (rule.encode(weight_KN, scale_N, zero_N) - zero_N) * scale_N
                error_N = residual_KN.abs().pow_(self.norm).sum(0)
                better_N = error_N < best_error_N
                best_error_N = torch.where(better_N, error_N, best_error_N)
                tried = (scale_N, zero_N)
                best = tried if best is None else where(better_N, tried, best)
                kept_KN = shrunk(residual_KN, beta, self.norm)
                # zero = mean(code - (weight - kept) / scale), of which code - weight / scale = zero - residual / scale
                zero_N = zero_N - ((residual_KN - kept_KN).mean(0) / scale_N)
                zero_N = zero_N.to(rule.stored).to(weight_KN.dtype)
                beta *= self.growth
        assert best is not None, "the full range was tried"
        return best


def shrunk(residual: Tensor, beta: float, norm: float) -> Tensor:
    """The l_p norm's proximal operator as HQQ approximates it: sign(x) max(|x| - |x|^(p-1) / beta, 0)."""
    size = residual.abs()
    return torch.sign(residual) * (size - size.pow(norm - 1) / beta).clamp_(min=0)
