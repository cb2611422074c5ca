"""The inner loops that decide how long a build takes, each as plain torch and compiled; what runs follows the device.

Shape legend: O out features (rows), I in features of a group, P channels of a panel, C candidates.
"""

from types import ModuleType

from torch import Tensor

from quantkit.kernels import reference
from quantkit.kernels.levels import Levels


def solve_panel(
    weight_PO: Tensor, feedback_PO: Tensor, upper_PP: Tensor, levels: Levels, codes_PO: Tensor, error_PO: Tensor
) -> Tensor:
    """Codes of P channels, one after another, each with the errors of those before it fed into it.

    Args:
        weight_PO: [P, O] the channels' weights; not modified.
        feedback_PO: [P, O] what the errors of earlier panels call for; not modified.
        upper_PP: [P, P] the factor between these channels, upper triangular.
        levels: what codes stand for.
        codes_PO: uint8 [P, O], filled.
        error_PO: [P, O], filled with the weights minus what their codes stand for.

    Returns:
        lost_O [O]: the panel's share of each row's output error, the squares of E R summed over its channels.
    """
    return _fitting(weight_PO).solve_panel(weight_PO, feedback_PO, upper_PP, levels, codes_PO, error_PO)


def rounding_errors(weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, zero_CO: Tensor, top: int) -> Tensor:
    """Weighted squared error [C, O] of rounding one group's weights to each candidate grid.

    Args:
        weight_IO: [I, O], input channels first; not modified.
        importance_I: [I] the weight of each channel's squared error.
        scale_CO, zero_CO: [C, O] the candidates; code q stands for scale * (q - zero).
        top: the largest code.
    """
    return _fitting(weight_IO).rounding_errors(weight_IO, importance_I, scale_CO, zero_CO, top)


def _fitting(tensor: Tensor) -> ModuleType:
    if tensor.device.type != "cpu":
        return reference
    from quantkit.kernels import compiled

    return compiled
