"""The inner loops as plain torch, on any device: what the compiled ones are held against."""

import torch
from torch import Tensor

from quantkit.kernels.levels import Levels


def solve_panel(
    weight_PO: Tensor, feedback_PO: Tensor, upper_PP: Tensor, levels: Levels, codes_PO: Tensor, error_PO: Tensor
) -> Tensor:
    """See `quantkit.kernels.solve_panel`."""
    lost_O = torch.zeros_like(weight_PO[0])
    for i, weight_O in enumerate(weight_PO):
        pull_O = feedback_PO[i] + error_PO[:i].t() @ upper_PP[:i, i]
        code_O = levels.encode(torch.addcdiv(weight_O, pull_O, upper_PP[i, i]), i)
        codes_PO[i] = code_O
        torch.sub(weight_O, levels.decode(code_O, i), out=error_PO[i])
        lost_O += torch.addcmul(pull_O, error_PO[i], upper_PP[i, i]).square_()
    return lost_O


def rounding_errors(weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, zero_CO: Tensor, top: int) -> Tensor:
    """See `quantkit.kernels.rounding_errors`."""
    error_CO = torch.empty_like(scale_CO)
    ratio_IO, nearest_IO = torch.empty_like(weight_IO), torch.empty_like(weight_IO)
    for scale_O, zero_O, error_O in zip(scale_CO, zero_CO, error_CO, strict=True):
        torch.div(weight_IO, scale_O, out=ratio_IO).add_(zero_O)
        torch.round(ratio_IO, out=nearest_IO).clamp_(0, top)
        torch.mv(ratio_IO.sub_(nearest_IO).square_().t(), importance_I, out=error_O)
    return error_CO.mul_(scale_CO.square())
