"""How kernels for a GPU round, and are compiled: what all of them share."""

from typing import Any

import torch
import triton
import triton.language as tl

# x + MAGIC - MAGIC rounds to even what lies between -2^22 and 2^22, or 2^51
MAGIC = {torch.float32: 1.5 * 2.0**23, torch.float64: 1.5 * 2.0**52}
PLAIN: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def columns_whole(*sizes: str) -> Any:
    """`triton.jit` of a kernel whose threads keep whole columns, whatever the sizes and strides of these names are.

    From multiples of 16 Triton would make wider loads, and a layout that splits a column among threads: sums in another
    order, columns handed from thread to thread, and in the search for K-quants registers that spill.
    """
    return triton.jit(do_not_specialize_on_alignment=list(sizes))


@triton.jit
def nearest(ratio, LOW: tl.constexpr, HIGH: tl.constexpr, MAGIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest whole number from LOW to HIGH."""
    return (tl.minimum(tl.maximum(ratio, LOW * 1.0), HIGH * 1.0) + MAGIC) - MAGIC


@triton.jit
def inverse(step):  # type: ignore[no-untyped-def]
    """1 / step, and 0 where the step is."""
    return tl.where(step == 0, 0.0, 1.0 / tl.where(step == 0, 1.0, step))
