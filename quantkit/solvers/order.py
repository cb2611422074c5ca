"""The order in which a linear's input channels are solved.

Shape legend: I in features.
"""

import torch
from torch import Tensor


def visiting_order(diagonal_I: Tensor, order: str, group_size: int) -> Tensor:
    """int64 [I]: channels in the order they are solved.

    Args:
        diagonal_I: the Hessian's diagonal.
        order: "natural"; "activation" (decreasing diagonal over all channels, needs g_idx); or "group-aware"
            (arXiv 2505.14638: decreasing inside each group, groups by their largest, a short tail group last), which
            keeps groups contiguous in the file.
        group_size: channels per group, -1 for one group.
    """
    num_channels = diagonal_I.numel()
    if order == "natural":
        return torch.arange(num_channels, device=diagonal_I.device)
    size = num_channels if group_size == -1 else group_size
    if order == "activation" or size >= num_channels:
        return torch.argsort(diagonal_I, descending=True, stable=True)
    full = num_channels // size * size
    grouped = diagonal_I[:full].view(-1, size)
    inside = torch.argsort(grouped, dim=1, descending=True, stable=True)
    inside += torch.arange(0, full, size, device=inside.device).unsqueeze(1)
    groups = torch.argsort(grouped.amax(1), descending=True, stable=True)
    tail = full + torch.argsort(diagonal_I[full:], descending=True, stable=True)
    return torch.cat([inside[groups].flatten(), tail])
