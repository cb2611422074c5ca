"""What a solver wants to know about the inputs of a linear, summed over calibration tokens.

Shape legend: N tokens, I in features.
"""

import torch
from torch import Tensor

HESSIAN = "hessian"
DEVIATION = "deviation"
ACTIVATIONS = "activations"  # no sum: the forward pass itself


class Statistics:
    """Running sums over the inputs of linears that read the same tensor.

    Args:
        needs: which sums to keep: "hessian" (sum of x x^T, float32 [I, I]), "deviation" (sum of (x' - x) x^T with
            x' the same token's input in the unquantized stream, float32 [I, I]). Float64 inputs are summed in float64.
    """

    def __init__(self, needs: frozenset[str]) -> None:
        self.needs = needs
        self.sums: dict[str, Tensor] = {}
        self.num_tokens = 0

    def add(self, inputs: Tensor, exact_inputs: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            inputs: [..., I], what the linear reads in the stream being quantized.
            exact_inputs: the same tokens in the unquantized stream; needed for "deviation" only.
        """
        x_NI = inputs.flatten(0, -2)
        self.num_tokens += x_NI.shape[0]
        if HESSIAN in self.needs:
            self._accumulate(HESSIAN, x_NI, x_NI)
        if DEVIATION in self.needs:
            assert exact_inputs is not None, "the unquantized stream was not run"
            exact_NI = exact_inputs.flatten(0, -2)
            self._accumulate(DEVIATION, exact_NI - x_NI, x_NI)

    def _accumulate(self, name: str, left_NI: Tensor, right_NI: Tensor) -> None:
        if name not in self.sums:
            width = right_NI.shape[1]
            dtype = torch.promote_types(right_NI.dtype, torch.float32)
            self.sums[name] = torch.zeros((width, width), dtype=dtype, device=right_NI.device)
        total_II = self.sums[name]
        if left_NI.dtype == total_II.dtype:
            total_II.addmm_(left_NI.t(), right_NI)
        elif left_NI.is_cuda:
            # tensor cores multiply bf16 exactly; only the sum is rounded, in float32
            total_II += torch.mm(left_NI.t(), right_NI, out_dtype=torch.float32)
        else:
            total_II.addmm_(left_NI.t().float(), right_NI.float())
