"""HQQ's half-quadratic search: grids with float zeros from the weights alone.

HQQ (Badri and Shaji, mobiusml.github.io/hqq_blog) fixes each group's scale by its range and moves the zero: the
residual is shrunk by the proximal operator of the l_p norm, p < 1, so that a few large errors are let go, and the zero
becomes the mean of what is left. The hqq package keeps the last zero, and stops once the mean error grows. Here the
same iterates are gone through, until the zero stands still, each is judged as the file would hold it, and every group
keeps the one with the least squared error: no group ends above hqq's. Judged by the l_p error that proposes them,
iterates make a worse model: it lets large errors go. Shrunken ranges can be searched too. Least squares
(`FloatZeroRule.fit`) is the other choice (docs/formats/hqq.md).

Shape legend: K weights of one group, N groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.grids.affine import LARGEST_ZERO, SMALLEST_SCALE, FloatZeroRule
from quantkit.kernels import rounding_errors

CHUNK_GROUPS = 1 << 12  # groups gone through together: 64 weights of each are 1 MB, which stays in the cache
SIDE_BY_SIDE = 32  # of so many groups, or a multiple, each has the same sums to the bit whatever the others are
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
        # a GPU has no such cache, and the host, which asks at every step what still moves, waits for it each time
        chunk = CHUNK_GROUPS if weight_KN.device.type == "cpu" else weight_KN.shape[1]
        parts = [self._fitted(part.contiguous()) for part in weight_KN.split(chunk, dim=1)]
        scale_N, zero_N = (torch.cat(values) for values in zip(*parts, strict=True))
        return scale_N, zero_N

    def _fitted(self, weight_KN: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.full_like(weight_KN[:3], torch.inf)
        for density_N, zero_N in self._starts(weight_KN):
            self._improve(found, weight_KN, density_N, zero_N)
        return found[0], found[1]

    def _improve(self, found_3N: Tensor, weight_KN: Tensor, density_N: Tensor, zero_N: Tensor) -> None:
        """Go through the iterates from a start, and keep what loses less than what was found.

        Args:
            found_3N: scale, zero and squared error of each group; changed.
            weight_KN: the groups.
            density_N, zero_N: codes per unit of weight, and the start.
        """
        stored, dtype = self.rule.stored, weight_KN.dtype
        equal_K = torch.ones_like(weight_KN[:, 0])
        scale_N = density_N.reciprocal().clamp(min=SMALLEST_SCALE).to(stored).to(dtype)
        place_N = torch.arange(len(zero_N), device=zero_N.device)
        for _ in range(self.iterations + 1):
            tried_2N = torch.stack([scale_N, zero_N.to(stored).to(dtype)])
            error_1N = rounding_errors(weight_KN, equal_K, tried_2N[:1], tried_2N[1:], self.rule.highest_code)
            best_3N = found_3N[:, place_N]
            tried_3N = torch.cat([tried_2N, error_1N])
            found_3N[:, place_N] = torch.where(error_1N < best_3N[2], tried_3N, best_3N)
            moved_N = self._moved(weight_KN, density_N, zero_N)
            moving_N, zero_N = moved_N != zero_N, moved_N
            kept_N = _still_moving(moving_N)
            if len(kept_N) == 0:
                return
            if len(kept_N) < len(zero_N):
                weight_KN = weight_KN[:, kept_N]
                density_N, scale_N, zero_N, place_N = (
                    each_N[kept_N] for each_N in (density_N, scale_N, zero_N, place_N)
                )

    def _moved(self, weight_KN: Tensor, density_N: Tensor, zero_N: Tensor) -> Tensor:
        """The zero [N] that follows; it goes on from what was not rounded, so hqq's are among the iterates."""
        code_KN = (weight_KN * density_N).add_(zero_N).round_().clamp_(0, self.rule.highest_code)
        residual_KN = weight_KN - (code_KN - zero_N).div_(density_N)
        low, high = residual_KN.aminmax()
        # what the operator keeps nothing of, with a margin for rounding: all residuals of weights of a usual size
        if max(-low, high) > 0.99 * self.strength ** (1 / (self.norm - 2)):
            weight_KN = weight_KN - shrunk(residual_KN, self.strength, self.norm)
        return (code_KN - weight_KN * density_N).mean(0)

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


def _still_moving(moving_N: Tensor) -> Tensor:
    """Places of groups to go on with: those whose zero still moves, and others up to a half, a quarter, ... of all."""
    width, count = len(moving_N), int(moving_N.count_nonzero())
    while width % (2 * SIDE_BY_SIDE) == 0 and width // 2 >= count:
        width //= 2
    return moving_N.to(torch.uint8).argsort(descending=True, stable=True)[: width if count else 0]


def shrunk(residual: Tensor, beta: float, norm: float) -> Tensor:
    """The l_p norm's proximal operator as HQQ approximates it: sign(x) max(|x| - |x|^(p-1) / beta, 0)."""
    size = residual.abs()
    return (size - size.pow(norm - 1).div_(beta)).clamp_(min=0).copysign_(residual)
