"""Rows that are bytes of a ggml type already: from ggml's own encoder, or 16-bit floats.

Shape legend: O rows, I columns, Y bytes of a row.
"""

from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from quantkit.errors import RefusedError


@dataclass(frozen=True)
class EncodedGrid:
    """What the bytes of one linear mean; its "codes" are uint8 [O, Y].

    Attributes:
        kind: ggml's type name.
    """

    kind: str

    @property
    def bits(self) -> int:
        """Of one byte."""
        return 8

    def decode(self, codes_OI: Tensor) -> Tensor:
        """float32 [O, I]: the weights, as gguf-py decodes them."""
        dense = gguf.dequantize(codes_OI.cpu().numpy(), gguf.GGMLQuantizationType[self.kind])
        return torch.from_numpy(dense).to(codes_OI.device)


def as_floats(weight_OI: Tensor, kind: str, *, where: str = "") -> tuple[Tensor, EncodedGrid]:
    """Rows in 16-bit floats, as bytes.

    Args:
        weight_OI: any float dtype.
        kind: "F16" or "BF16".
        where: the linear's name, for the error.

    Raises:
        RefusedError: weights too large for float16.
    """
    rounded_OI = weight_OI.to(torch.float16 if kind == "F16" else torch.bfloat16)
    if not torch.isfinite(rounded_OI).all():
        raise RefusedError(
            f"{where} holds weights too large for {kind} (largest: {weight_OI.abs().max():g})",
            where=where,
            fix="store the model as BF16",
        )
    return rounded_OI.contiguous().view(torch.uint8), EncodedGrid(kind)
