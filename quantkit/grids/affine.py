"""The affine grid: code q stands for scale * (q - zero), one scale and zero per row and group.

GPTQ, AWQ, HQQ and MLX all store this grid; they differ in which zeros they allow and in the dtype they
keep the scale in. A scale is rounded to its stored dtype before anything is encoded with it, so that what
a solver saw is what a reader decodes.

Shape legend: O out features, I in features of one group, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: a group of zeros still needs a scale


@dataclass(frozen=True)
class AffineGrid:
    """What one linear's codes mean.

    Attributes:
        bits: bits per code; codes are 0 .. 2**bits - 1.
        scale_OG: float32 [O, G], every value exactly representable in the format's stored dtype.
        zero_OG: float32 [O, G], in units of codes; whole numbers where the format stores integers.
        group_I: int32 [I], the group of every input channel, in the checkpoint's channel order.
    """

    bits: int
    scale_OG: Tensor
    zero_OG: Tensor
    group_I: Tensor

    def decode(self, codes_OI: Tensor) -> Tensor:
        """float32 [O, I]: the weights that uint8 `codes_OI` stand for."""
        group_I = self.group_I.long()
        return (codes_OI.float() - self.zero_OG[:, group_I]) * self.scale_OG[:, group_I]

    def to(self, device: torch.device | str) -> "AffineGrid":
        return AffineGrid(self.bits, self.scale_OG.to(device), self.zero_OG.to(device), self.group_I.to(device))


@dataclass(frozen=True)
class AffineRule:
    """How a group's scale and zero are chosen.

    Attributes:
        bits: bits per code.
        symmetric: the zero is fixed at 2**(bits-1); else it is a whole number that keeps 0 representable.
        candidates: how many shrunken ranges the scale search tries besides the full one; 0 takes the full range.
        shrink: the smallest fraction of the full range that is tried.
        lowest_zero: smallest allowed zero (1 where a reader cannot decode a stored zero of 0).
        stored: dtype the scale is kept in.
    """

    bits: int
    symmetric: bool = True
    candidates: int = 0
    shrink: float = 0.5
    lowest_zero: int = 0
    stored: torch.dtype = torch.float16

    @property
    def highest_code(self) -> int:
        return 2**self.bits - 1

    def fit(self, weight_IO: Tensor, importance_I: Tensor) -> tuple[Tensor, Tensor]:
        """Scale [O] and zero [O] of one group, in the dtype of the weights.

        The range always holds 0. With `candidates`, ranges shrunk evenly down to `shrink` are tried and the one
        with the smallest importance-weighted squared rounding error is kept per row, the widest on a tie.

        Args:
            weight_IO: [I, O], one group's weights, input channels first; not modified.
            importance_I: [I], non-negative weight of each channel's squared error (the Hessian's diagonal).
        """
        low_O = weight_IO.amin(0).clamp(max=0)
        high_O = weight_IO.amax(0).clamp(min=0)
        best = self._grid(low_O, high_O)
        if self.candidates == 0:
            return best
        importance_1I = importance_I.unsqueeze(0)
        scratch = (torch.empty_like(weight_IO), torch.empty_like(weight_IO))
        best_error_O = self._error(weight_IO, importance_1I, *best, scratch)
        for step in range(1, self.candidates + 1):
            fraction = 1 - (1 - self.shrink) * step / self.candidates
            tried = self._grid(low_O * fraction, high_O * fraction)
            error_O = self._error(weight_IO, importance_1I, *tried, scratch)
            better_O = error_O < best_error_O
            best_error_O = torch.where(better_O, error_O, best_error_O)
            best = (torch.where(better_O, tried[0], best[0]), torch.where(better_O, tried[1], best[1]))
        return best

    def encode(self, weight_IO: Tensor, scale_O: Tensor, zero_O: Tensor) -> Tensor:
        """The nearest code of each weight, still in the weights' dtype (whole numbers)."""
        return weight_IO.div(scale_O).round_().add_(zero_O).clamp_(0, self.highest_code)

    def _grid(self, low_O: Tensor, high_O: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            scale_O = self._stored(torch.maximum(-low_O, high_O) * 2 / self.highest_code)
            return scale_O, torch.full_like(scale_O, 2 ** (self.bits - 1))
        # a zero that may not fall below `lowest_zero` leaves fewer codes for the positive side
        widest = torch.maximum((high_O - low_O) / self.highest_code, high_O / (self.highest_code - self.lowest_zero))
        scale_O = self._stored(widest)
        return scale_O, (-low_O / scale_O).round_().clamp_(self.lowest_zero, self.highest_code)

    def _stored(self, scale_O: Tensor) -> Tensor:
        return scale_O.clamp(min=SMALLEST_SCALE).to(self.stored).to(scale_O.dtype)

    def _error(
        self,
        weight_IO: Tensor,
        importance_1I: Tensor,
        scale_O: Tensor,
        zero_O: Tensor,
        scratch: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Weighted squared rounding error [O]; `scratch` is twice the weights' shape, for this runs per candidate."""
        ratio_IO = torch.div(weight_IO, scale_O, out=scratch[0])
        nearest_IO = torch.round(ratio_IO, out=scratch[1]).clamp_(-zero_O, self.highest_code - zero_O)
        return (importance_1I @ ratio_IO.sub_(nearest_IO).square_()).squeeze(0) * scale_O.square()
