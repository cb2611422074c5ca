"""bfloat16 on processors without fast instructions for it: products of widened numbers, rounded once at their end.

There torch multiplies bfloat16 slower than float32, many times so without any instructions. Widening loses nothing; a
linear sums in float32 in either case, so what it gives is the same to the order of summation.

Shape legend: F in features.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

WIDENED_ATTENTION = "sdpa-widened"  # how transformers finds it


class WidenedLinear(nn.Linear):
    """A linear whose product is taken in float32; weights and results keep their dtype."""

    def forward(self, inputs: Tensor) -> Tensor:
        """What [..., F] gives, in the dtype of the input."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(inputs.float(), self.weight.float(), bias).to(inputs.dtype)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """Transformers' sdpa in float32."""
    attended, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **others)
    return attended.to(query.dtype), None


AttentionInterface.register(WIDENED_ATTENTION, _attend)


def widen(model: nn.Module) -> None:
    """Take every linear of a skeleton on the meta device as one that widens."""
    for name, linear in [found for found in model.named_modules() if type(found[1]) is nn.Linear]:
        model.set_submodule(
            name,
            WidenedLinear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            ),
        )
