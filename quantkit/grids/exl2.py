"""The grid of EXL2: groups of input channels, each with a width of its own and column scales from a quadratic table.

A code q of width b stands for (q - 2^(b-1)) * s with s = c^2 * (m / 256), c in 1 .. 16 per column and group, m per
group. Every product is rounded to float16, subnormals kept, as exllamav2's kernels do: a solver that rounded against
the real-valued scale would see other weights than the reader decodes.

Shape legend: O out features, I in features, G groups.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantkit.channels import by_channel, by_row
from quantkit.kernels import best_scales

WIDTHS = (8, 6, 5, 4, 3, 2)
UNIT = 32  # channels of a group and columns of a matrix come in multiples of it
TOP_CODE = 16
SCALE_BITS = 4
Groups = tuple[tuple[int, int], ...]
"""(bits, channels) of each group."""


@dataclass(frozen=True)
class Part:
    """Consecutive channels of one width.

    Attributes:
        bits: of each code.
        share: of the linear's input channels; unitless.
        group_size: channels per scale.
    """

    bits: int
    share: float
    group_size: int


@dataclass(frozen=True)
class Mixture:
    """How the input channels of a linear, the strongest first, are cut into groups; widths never rise."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        widths = [part.bits for part in self.parts]
        assert widths == sorted(widths, reverse=True), f"readers walk through falling widths, not {widths}"
        assert all(part.bits in WIDTHS and part.group_size % UNIT == 0 for part in self.parts)

    @classmethod
    def of(cls, text: str) -> "Mixture":
        """From "bits:share/group size ...", such as "4:.1/128 3:.9/128"."""
        parts = []
        for word in text.split():
            bits, rest = word.split(":")
            share, size = rest.split("/")
            parts.append(Part(int(bits), float(share), int(size)))
        return cls(tuple(parts))

    def groups(self, columns: int) -> Groups:
        """(bits, channels) of every group of a linear with so many input channels; only the last may be short."""
        left, found = columns, []
        for position, part in enumerate(self.parts):
            wanted = left if position + 1 == len(self.parts) else min(columns * part.share, left)
            for _ in range(math.ceil(wanted / part.group_size)):
                size = min(part.group_size, left)
                found.append((part.bits, size))
                left -= size
        return tuple(found)

    def stored_bits(self, rows: int, columns: int) -> int:
        """Bits that a linear of [rows, columns] takes in the file: codes, scales, group table and permutation."""
        rows = padded(rows)
        groups = self.groups(columns)
        return sum(rows * bits * size for bits, size in groups) + len(groups) * (48 + SCALE_BITS * rows) + 32 * columns


def padded(rows: int) -> int:
    """Out features as the file holds them."""
    return -(-rows // UNIT) * UNIT


def column_scales(code_GO: Tensor, scale_max_G: Tensor) -> Tensor:
    """float32 [G, O], each a float16: what a step of a code is worth, by the reader's own chain of roundings.

    Args:
        code_GO: 1 .. 16.
        scale_max_G: values that float16 holds.
    """
    unit_G = (scale_max_G.half() * (1 / 256)).half()
    return (code_GO.half().square() * unit_G.unsqueeze(1)).float()


@dataclass(frozen=True)
class Exl2Grid:
    """What one linear's codes mean.

    Attributes:
        groups: (bits, channels) of every group, in stored order.
        scale_max_G: float32 [G], every value a float16.
        code_GO: uint8 [G, O], 1 .. 16.
        order_I: int64 [I], the input channel stored at each place.
    """

    groups: Groups
    scale_max_G: Tensor
    code_GO: Tensor
    order_I: Tensor

    @property
    def bits(self) -> int:
        """Bits of the widest codes."""
        return self.groups[0][0]

    def decode(self, codes_OI: Tensor) -> Tensor:
        """float32 [O, I]: the weights that uint8 `codes_OI` stand for."""
        sizes = torch.tensor([size for _, size in self.groups], device=codes_OI.device)
        middle_G = torch.tensor([2.0 ** (bits - 1) for bits, _ in self.groups], device=codes_OI.device)
        scale_IO = column_scales(self.code_GO, self.scale_max_G).repeat_interleave(sizes, dim=0)
        steps_IO = by_channel(codes_OI, self.order_I).float() - middle_G.repeat_interleave(sizes).unsqueeze(1)
        return by_row(rounded_product(steps_IO, scale_IO), self.order_I)


def rounded_product(steps: Tensor, scale: Tensor) -> Tensor:
    """Whole steps times their scale as float16 holds it, in the dtype of `steps`."""
    return (steps * scale).half().to(steps.dtype)


def fit(weight_IO: Tensor, importance_I: Tensor, bits: int, candidates: int) -> tuple[Tensor, Tensor]:
    """Scale codes uint8 [O] and the group's largest scale [] (a float16) that suit the group's weights.

    Each column looks for its own best scale among `candidates` fractions of its full range, from 1.1 down to 0.5; the
    largest sets the group's, and each column takes the best of the three codes around the root of its share.

    Args:
        weight_IO: [I, O] of one group.
        importance_I: [I], weights of the squared errors.
        bits: of the codes.
        candidates: at least 1; with 1 the full range is taken.
    """
    half = (2**bits - 1) / 2
    base_O = weight_IO.abs().amax(0) / half
    fractions = (1.0,) if candidates == 1 else tuple(1.1 - 0.6 * i / (candidates - 1) for i in range(candidates))
    scale_CO = base_O * _column(fractions, base_O.dtype, base_O.device)
    best_O = _least(scale_CO, scale_CO, weight_IO, importance_I, bits)
    scale_max = best_O.amax().clamp(max=torch.finfo(torch.float16).max).half().float()
    share_O = best_O / scale_max.to(best_O.dtype).clamp(min=1e-30)
    middle_O = (TOP_CODE * share_O.sqrt()).round().clamp(1, TOP_CODE)
    code_CO = (middle_O + _column((0, -1, 1), middle_O.dtype, middle_O.device)).clamp(1, TOP_CODE)
    coded_CO = column_scales(code_CO, scale_max.expand(len(code_CO))).to(weight_IO.dtype)
    return _least(code_CO, coded_CO, weight_IO, importance_I, bits).to(torch.uint8), scale_max


@cache
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[C, 1], made once: a copy to a GPU waits for all that is at work there."""
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)


def _least(tried_CO: Tensor, scale_CO: Tensor, weight_IO: Tensor, importance_I: Tensor, bits: int) -> Tensor:
    """[O], of what was tried that whose scale rounds the weights best."""
    index_O = best_scales(weight_IO, importance_I, scale_CO, 2**bits - 1)
    return tried_CO.gather(0, index_O.unsqueeze(0))[0]
