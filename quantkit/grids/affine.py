"""The affine grid: code q stands for scale * (q - zero), one scale and zero per row and group.

GPTQ, AWQ, HQQ and MLX all store this grid; they differ in which zeros they allow and in the dtype they
keep the scale in. A scale is rounded to its stored dtype before anything is encoded with it, so that what
a solver saw is what a reader decodes.

Shape legend: O out features, I in features of one group, G groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from quantkit.kernels import best_scales, code_moments, dequantize, rounding_errors
from quantkit.kernels.reference import per_channel

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: a group of zeros still needs a scale
LARGEST_ZERO = 1024
# of the error left by a positive scale: where no code is the lowest both signs leave the same, but for the last bits
WORTH_TURNING = 1 - 2.0**-10
SMALLEST_AREA = 1e-5  # of a regression's determinant over its largest possible: float32 tells no less


LevelsOfRows = tuple[Tensor, Tensor, Tensor]
"""Step, shift and what is subtracted, [R, G] of R rows; see `quantkit.kernels.squared_errors`."""


class Grid(Protocol):
    """What the codes of one linear mean."""

    @property
    def bits(self) -> int:
        """Bits per code."""
        ...

    def decode(self, codes_OI: Tensor) -> Tensor:
        """float32 [O, I]: the weights that uint8 codes stand for."""
        ...


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
        return dequantize(codes_OI, self.scale_OG, self.zero_OG, self.group_I)

    def levels(self, of: int, rows: int) -> Iterator[LevelsOfRows]:
        """What codes stand for, of so many rows after so many, `of` in all."""
        assert of == len(self.scale_OG), f"the grid has {len(self.scale_OG)} rows"
        return zip(*(part_OG.split(rows) for part_OG in self._levels()), strict=True)

    def _levels(self) -> LevelsOfRows:
        return self.scale_OG, self.zero_OG, torch.zeros_like(self.scale_OG)


@dataclass(frozen=True)
class BiasGrid(AffineGrid):
    """An affine grid as MLX stores it: code q stands for scale * q + bias, with bias = -scale * zero as it is stored.

    Attributes:
        stored: dtype that the bias is rounded to.
    """

    stored: torch.dtype = torch.float16

    @classmethod
    def of(cls, bits: int, scale_OG: Tensor, bias_OG: Tensor, group_I: Tensor) -> "BiasGrid":
        """The grid of stored scales and biases [O, G]; the bias's dtype is the stored one."""
        scale_OG = scale_OG.float()
        return cls(bits, scale_OG, -bias_OG.float() / scale_OG, group_I, bias_OG.dtype)

    def biases(self) -> Tensor:
        """float32 [O, G], exactly representable in the stored dtype."""
        return -(self.zero_OG * self.scale_OG).to(self.stored).float()

    def _levels(self) -> LevelsOfRows:
        return self.scale_OG, torch.zeros_like(self.scale_OG), -self.biases()

    def decode(self, codes_OI: Tensor) -> Tensor:
        """float32 [O, I]: the weights that uint8 `codes_OI` stand for."""
        scale, bias = (per_channel(values_OG, self.group_I) for values_OG in (self.scale_OG, self.biases()))
        weight_OI = codes_OI.to(torch.float32, memory_format=torch.contiguous_format)
        weight_OI.view(scale.shape).mul_(scale).add_(bias)
        return weight_OI


@dataclass(frozen=True)
class StridedGrid:
    """An affine grid whose groups run over rows: HQQ's axis 0, one scale and zero per column and group.

    Row r of O belongs to the group r mod G of its column, G = O / group_size.

    Attributes:
        bits: bits per code.
        scale_GI: float32 [G, I], every value exactly representable in the format's stored dtype.
        zero_GI: float32 [G, I], in units of codes.
    """

    bits: int
    scale_GI: Tensor
    zero_GI: Tensor

    def decode(self, codes_OI: Tensor) -> Tensor:
        """float32 [O, I]: the weights that uint8 `codes_OI` stand for."""
        codes_KGI = codes_OI.float().view(-1, *self.scale_GI.shape)
        return ((codes_KGI - self.zero_GI) * self.scale_GI).view(codes_OI.shape)

    def levels(self, of: int, rows: int) -> Iterator[LevelsOfRows]:
        """What codes stand for, each channel a group of its own, of so many rows after so many, `of` in all."""
        groups_O = torch.arange(of, device=self.scale_GI.device) % len(self.scale_GI)
        for groups_R in groups_O.split(rows):
            scale_RI = self.scale_GI[groups_R]
            yield scale_RI, self.zero_GI[groups_R], torch.zeros_like(scale_RI)


class Rule(Protocol):
    """How a group's grid is chosen; solvers call `fit` once per group, then `encode` as they go."""

    @property
    def bits(self) -> int: ...

    def fit(self, weight_IO: Tensor, importance_I: Tensor) -> tuple[Tensor, Tensor]:
        """Scale [O] and zero [O] of one group, in the dtype of the weights.

        Args:
            weight_IO: [I, O], one group's weights, input channels first; not modified.
            importance_I: [I], non-negative weight of each channel's squared error (the Hessian's diagonal).
        """
        ...

    def encode(self, weight_IO: Tensor, scale_O: Tensor, zero_O: Tensor) -> Tensor:
        """The nearest code of each weight, still in the weights' dtype (whole numbers)."""
        ...

    def refit(
        self, codes_IO: Tensor, scale_O: Tensor, zero_O: Tensor, curvature_II: Tensor, slope_IO: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scale [O] and zero [O] that lose least if the codes stay: never more than those given, row by row.

        Args:
            codes_IO: uint8 [I, O], one group's.
            scale_O, zero_O: what the codes mean so far.
            curvature_II: [I, I] A, and
            slope_IO: [I, O] b of the loss d^T A d - 2 d^T b of changing a row's decoded weights by d.
        """
        ...

    def grid(self, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor) -> AffineGrid:
        """What the codes of a whole linear mean."""
        ...


@dataclass(frozen=True)
class AffineRule:
    """How a group's scale and zero are chosen.

    Attributes:
        bits: bits per code.
        symmetric: the zero is fixed at 2**(bits-1), and a scale that is searched may be negative; else the zero is a
            whole number that keeps 0 representable.
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

    @property
    def _middle(self) -> int:
        """The zero of a symmetric grid."""
        return 2 ** (self.bits - 1)

    def fit(self, weight_IO: Tensor, importance_I: Tensor) -> tuple[Tensor, Tensor]:
        """Scale [O] and zero [O] of one group, in the dtype of the weights.

        The range always holds 0. With `candidates`, ranges shrunk evenly down to `shrink` are tried and the one
        with the smallest importance-weighted squared rounding error is kept per row, the widest on a tie. Symmetric
        codes reach one step further down than up: the scale is negative where they had better reach up.

        Args:
            weight_IO: [I, O], one group's weights, input channels first; not modified.
            importance_I: [I], non-negative weight of each channel's squared error (the Hessian's diagonal).
        """
        if self.symmetric and self.candidates:
            return self._fit_symmetric(weight_IO, importance_I)
        low_O = weight_IO.amin(0).clamp(max=0)
        high_O = weight_IO.amax(0).clamp(min=0)
        if self.candidates == 0:
            return self.within(low_O, high_O)
        fraction_C1 = fractions(self.candidates, self.shrink, like=low_O)
        tried = self.within(low_O * fraction_C1, high_O * fraction_C1)
        return best_of(tried, rounding_errors(weight_IO, importance_I, *tried, self.highest_code))

    def _fit_symmetric(self, weight_IO: Tensor, importance_I: Tensor) -> tuple[Tensor, Tensor]:
        largest_O = weight_IO.abs().amax(0)
        tried_CO = self._reaching(largest_O * fractions(self.candidates, self.shrink, like=largest_O))
        both_CO = torch.cat([tried_CO, -tried_CO])
        best_O = best_scales(weight_IO, importance_I, tried_CO, self.highest_code, worth_turning=WORTH_TURNING)
        scale_O = both_CO.gather(0, best_O.unsqueeze(0)).squeeze(0)
        return scale_O, torch.full_like(scale_O, self._middle)

    def grid(self, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor) -> AffineGrid:
        """What the codes of a whole linear mean."""
        return AffineGrid(self.bits, scale_OG.float(), zero_OG.float(), group_I)

    def encode(self, weight_IO: Tensor, scale_O: Tensor, zero_O: Tensor) -> Tensor:
        """The nearest code of each weight, still in the weights' dtype (whole numbers)."""
        return weight_IO.div(scale_O).round_().add_(zero_O).clamp_(0, self.highest_code)

    def refit(
        self, codes_IO: Tensor, scale_O: Tensor, zero_O: Tensor, curvature_II: Tensor, slope_IO: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The scale that loses least; the zero stays, being a whole number. See `Rule.refit`."""
        step_IO = codes_IO - zero_O
        bend_O, along_O = (step_IO * (curvature_II @ step_IO)).sum(0), (step_IO * slope_IO).sum(0)
        # rows without codes off zero have no scale to choose
        wanted_O = self._stored(scale_O + torch.where(bend_O > 0, along_O / bend_O, 0.0))
        change_O = wanted_O - scale_O
        return torch.where(change_O * (change_O * bend_O - 2 * along_O) < 0, wanted_O, scale_O), zero_O

    def within(self, low_O: Tensor, high_O: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of grids that reach from `low_O`, at most 0, to `high_O`, at least 0; of any shape."""
        if self.symmetric:
            scale_O = self._reaching(torch.maximum(-low_O, high_O))
            return scale_O, torch.full_like(scale_O, self._middle)
        # a zero that may not fall below `lowest_zero` leaves fewer codes for the positive side
        widest = torch.maximum((high_O - low_O) / self.highest_code, high_O / (self.highest_code - self.lowest_zero))
        scale_O = self._stored(widest)
        return scale_O, (-low_O / scale_O).round_().clamp_(self.lowest_zero, self.highest_code)

    def _reaching(self, largest_O: Tensor) -> Tensor:
        """Scales of symmetric grids whose lowest code lies half a step beyond the largest magnitude."""
        return self._stored(largest_O * (2 / self.highest_code))

    def _stored(self, scale_O: Tensor) -> Tensor:
        return scale_O.abs().clamp_(min=SMALLEST_SCALE).copysign_(scale_O).to(self.stored).to(scale_O.dtype)


@dataclass(frozen=True)
class FloatZeroRule:
    """A grid with a zero that need not be a whole number (HQQ, MLX), fitted by weighted least squares.

    Starting from the group's range and from shrunken ranges, scale and zero are refitted to the codes they give
    (weighted linear regression of the weights on their codes) and codes taken again; the best of all that was seen,
    after rounding to what the file stores, is kept per row.

    Attributes:
        bits: bits per code.
        candidates: how many shrunken ranges are tried besides the full one.
        refits: regressions after the search.
        shrink: the smallest fraction of the full range that is tried.
        stored: dtype of scale and zero in the file.
    """

    bits: int
    candidates: int = 0
    refits: int = 2
    shrink: float = 0.5
    stored: torch.dtype = torch.float16

    @property
    def highest_code(self) -> int:
        return 2**self.bits - 1

    def fit(self, weight_IO: Tensor, importance_I: Tensor) -> tuple[Tensor, Tensor]:
        """Scale [O] and zero [O] of one group; see `Rule.fit`."""
        low_O, high_O = weight_IO.amin(0), weight_IO.amax(0)
        middle_O, span_O = (low_O + high_O) / 2, high_O - low_O
        fraction_C1 = fractions(self.candidates, self.shrink, like=low_O)
        tried = self.as_stored(span_O * fraction_C1 / self.highest_code, middle_O - span_O * fraction_C1 / 2)
        best = tried[0][0], tried[1][0]
        if self.candidates:
            best = best_of(tried, rounding_errors(weight_IO, importance_I, *tried, self.highest_code))
        moments_5O = code_moments(weight_IO, importance_I, *best, self.highest_code)
        for _ in range(self.refits):
            refitted = self._refitted(moments_5O, *best)
            refitted_5O = code_moments(weight_IO, importance_I, *refitted, self.highest_code)
            better_O = refitted_5O[0] < moments_5O[0]
            best = where(better_O, refitted, best)
            moments_5O = torch.where(better_O, refitted_5O, moments_5O)
        return best

    def encode(self, weight_IO: Tensor, scale_O: Tensor, zero_O: Tensor) -> Tensor:
        """The nearest code of each weight, still in the weights' dtype (whole numbers)."""
        return weight_IO.div(scale_O).add_(zero_O).round_().clamp_(0, self.highest_code)

    def refit(
        self, codes_IO: Tensor, scale_O: Tensor, zero_O: Tensor, curvature_II: Tensor, slope_IO: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The scale and the zero that lose least together; see `Rule.refit`."""
        code_IO = codes_IO.to(scale_O.dtype)
        bent_IO, bent_I = curvature_II @ code_IO, curvature_II.sum(1)
        # the loss of changing scale and lowest value by (s, l): a s^2 + 2 c s l + d l^2 - 2 (g s + h l)
        a_O, c_O, d = (code_IO * bent_IO).sum(0), (code_IO * bent_I.unsqueeze(1)).sum(0), bent_I.sum()
        g_O, h_O = (code_IO * slope_IO).sum(0), slope_IO.sum(0)
        area_O = a_O * d - c_O.square()
        # rows whose codes are all but the same fix one number, not two
        apart_O = area_O > SMALLEST_AREA * a_O * d
        scale_change_O = torch.where(apart_O, (d * g_O - c_O * h_O) / area_O, 0.0)
        low_change_O = torch.where(apart_O, (a_O * h_O - c_O * g_O) / area_O, 0.0)
        low_O = -scale_O * zero_O
        wanted = self.as_stored(scale_O + scale_change_O, low_O + low_change_O)
        s_O, l_O = wanted[0] - scale_O, -wanted[0] * wanted[1] - low_O
        gain_O = a_O * s_O.square() + 2 * c_O * s_O * l_O + d * l_O.square() - 2 * (g_O * s_O + h_O * l_O)
        return where(apart_O & (gain_O < 0), wanted, (scale_O, zero_O))

    def grid(self, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor) -> AffineGrid:
        """What the codes of a whole linear mean."""
        return AffineGrid(self.bits, scale_OG.float(), zero_OG.float(), group_I)

    def as_stored(self, scale_O: Tensor, low_O: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero as the file will hold them, of a grid whose code 0 stands for `low_O`."""
        # weights that are all but equal and far from 0 would need a zero beyond float16
        wide_O = torch.maximum(scale_O, low_O.abs() / LARGEST_ZERO)
        rounded_O = wide_O.clamp(min=SMALLEST_SCALE).to(self.stored).to(scale_O.dtype)
        return rounded_O, (-low_O / rounded_O).to(self.stored).to(scale_O.dtype)

    def _refitted(self, moments_5O: Tensor, scale_O: Tensor, zero_O: Tensor) -> tuple[Tensor, Tensor]:
        """The grid that fits the weights best if their codes stay as they are; see `quantkit.kernels.code_moments`."""
        _, code_O, miss_O, spread_O, together_O = moments_5O
        # a row whose codes are all the same has nothing to fit a slope on
        slope_O = scale_O * (1 + torch.where(spread_O > 0, together_O / spread_O, 0.0))
        slope_O = torch.where(slope_O > 0, slope_O, scale_O)
        return self.as_stored(slope_O, scale_O * (code_O + miss_O - zero_O) - slope_O * code_O)


@dataclass(frozen=True)
class BiasRule(FloatZeroRule):
    """The same search where the file stores scale and bias instead of scale and zero (MLX)."""

    def grid(self, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor) -> AffineGrid:
        """What the codes of a whole linear mean."""
        return BiasGrid(self.bits, scale_OG.float(), zero_OG.float(), group_I, self.stored)

    def as_stored(self, scale_O: Tensor, low_O: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of a grid whose code 0 stands for `low_O`, both after rounding scale and bias."""
        rounded_O = scale_O.clamp(min=SMALLEST_SCALE).to(self.stored).to(scale_O.dtype)
        return rounded_O, -low_O.to(self.stored).to(scale_O.dtype) / rounded_O


def where(chosen_O: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and zero of the first grid for chosen rows, of the second for all others."""
    return torch.where(chosen_O, first[0], second[0]), torch.where(chosen_O, first[1], second[1])


def fractions(candidates: int, shrink: float, *, like: Tensor) -> Tensor:
    """[candidates + 1, 1]: shares of the full range that are tried, from it down to `shrink`; not to be modified."""
    return _fractions(candidates, shrink, like.dtype, like.device)


@cache
def _fractions(candidates: int, shrink: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: for a group of few weights a GPU takes longer to be told than to compute."""
    steps_C = torch.arange(candidates + 1, device=device, dtype=dtype)
    return (1 - (1 - shrink) * steps_C / max(candidates, 1)).unsqueeze(1)


def best_of(tried: tuple[Tensor, Tensor], error_CO: Tensor) -> tuple[Tensor, Tensor]:
    """Of candidate scales and zeros [C, O] those of the smallest error per row, the first on a tie."""
    # argmin takes a CPU ten times as long
    best_1O = error_CO.min(0, keepdim=True).indices
    scale_O, zero_O = (values.gather(0, best_1O).squeeze(0) for values in tried)
    return scale_O, zero_O
