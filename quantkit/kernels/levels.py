"""What the codes of a panel stand for, as data: one form for every grid that error feedback is solved on."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CODES_PER_RUN = 32  # codes of b bits that fill b whole 32-bit words
SMALLEST_STEP = 1e-7  # of MLX's grids, in size


@dataclass(frozen=True)
class Levels:
    """Code q, a whole number from 0 to `top`, stands for (q - shift) * step - less.

    GPTQ, AWQ, HQQ and MLX have a zero point, which is the shift; ggml's blocks have a fixed shift and a minimum; EXL2
    has a fixed shift and a reader that multiplies in float16. The tensors are [1, O], or [P, O] where channels of the
    panel differ, in the dtype of the weights.

    Attributes:
        step_PO: of either sign; a row of step 0 has but one level.
        shift_PO, less_PO: see above.
        top: the largest code.
        half: the product is rounded to float16; then steps are float16 values, and products stay below its largest.
    """

    step_PO: Tensor
    shift_PO: Tensor
    less_PO: Tensor
    top: int
    half: bool = False

    @classmethod
    def of_zeros(cls, scale_O: Tensor, zero_O: Tensor, top: int) -> "Levels":
        """One scale and zero per row: scale * (q - zero)."""
        return cls(scale_O.unsqueeze(0), zero_O.unsqueeze(0), torch.zeros_like(scale_O).unsqueeze(0), top)

    def part(self, channels: slice) -> "Levels":
        """Those of some of the panel's channels."""
        step, shift, less = (
            each[channels] if len(each) > 1 else each for each in (self.step_PO, self.shift_PO, self.less_PO)
        )
        return replace(self, step_PO=step, shift_PO=shift, less_PO=less)

    def inverse(self) -> Tensor:
        """1 / step, and 0 where the step is."""
        one_PO = torch.ones_like(self.step_PO)
        return torch.where(self.step_PO == 0, 0.0, one_PO / torch.where(self.step_PO == 0, one_PO, self.step_PO))

    def encode(self, wanted_O: Tensor, i: int) -> Tensor:
        """The nearest code of each weight of the panel's channel i, in the weights' dtype."""
        step_O, shift_O, less_O = (part[i % len(part)] for part in (self.step_PO, self.shift_PO, self.less_PO))
        ratio_O = torch.where(step_O == 0, 0.0, (wanted_O + less_O) / torch.where(step_O == 0, 1.0, step_O))
        return ratio_O.add_(shift_O).round_().clamp_(0, self.top)

    def decode(self, code_O: Tensor, i: int) -> Tensor:
        """The weights that codes of the panel's channel i stand for."""
        step_O, shift_O, less_O = (part[i % len(part)] for part in (self.step_PO, self.shift_PO, self.less_PO))
        product_O = (code_O - shift_O) * step_O
        return (product_O.half().to(product_O.dtype) if self.half else product_O) - less_O


RANGE, ABOVE, BELOW = range(3)  # what a start spans: all weights and 0, from 0 up, up to 0


@dataclass(frozen=True)
class BlockSearch:
    """How the scales and mins of a K-quant are searched, see `quantkit.grids.blocks`.

    Attributes:
        top, offset: code q, from 0 to `top`, stands for step * (q - offset) - less.
        scale_range: lowest and highest integer scale.
        min_top: the highest integer min; 0 where the type has none.
        starts: what is tried first, as (span, number). Without an offset the span over the number is a step; the first
            is taken as it is, of others the codes are fitted. With an offset the number is tried as the code, less the
            offset, of a sub-block's largest weight, and the span means nothing.
        refinements: how often neighbours are tried and the float16 numbers fitted again.
    """

    top: int
    offset: int
    scale_range: tuple[int, int]
    min_top: int
    starts: tuple[tuple[int, float], ...]
    refinements: int
