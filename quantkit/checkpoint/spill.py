"""Where activations wait that are not at work: on the device while there is room, in the host's memory otherwise.

Where they wait changes no byte: what goes through the model together, and in which order it is summed up, the
recipe says.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quantkit.machine import host_free_bytes


def free_bytes(device: torch.device) -> int:
    """Memory that is free for new tensors on a device right now, of other programs' and torch's own."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        # as counted: torch.cuda.memory_reserved flattens and sorts all statistics first, and every tensor asks for this
        counts = torch.cuda.memory_stats_as_nested_dict(device)
        reserved, allocated = (counts[f"{kind}_bytes"]["all"]["current"] for kind in ("reserved", "allocated"))
        return free + int(reserved - allocated)
    return host_free_bytes()


@dataclass(frozen=True)
class Kept:
    """A tensor that waits.

    Attributes:
        held: where it waits.
        device: where it is wanted.
    """

    held: Tensor
    device: torch.device

    def tensor(self) -> Tensor:
        """The tensor on its device: itself if it stayed there."""
        # from page-locked memory; what is launched after the copy on the same stream runs after it
        return self.held.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Spill:
    """Decides where a tensor waits.

    Attributes:
        reserve_bytes: that are to stay free on the device for what is at work; 0 lets everything stay on it.
    """

    reserve_bytes: int = 0
    # of tensors that are still on the device: one that waits for two has one copy
    _copies: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, repr=False, compare=False)

    def keep(self, tensor: Tensor) -> Kept:
        """Have it wait; the caller lets go of its own."""
        device = tensor.device
        if not self.reserve_bytes or free_bytes(device) >= self.reserve_bytes:
            return Kept(tensor, device)
        if tensor not in self._copies:
            # page-locked, so that the GPU fetches it by itself; its own copy is reused by what is launched after this
            host = torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda")
            self._copies[tensor] = host.copy_(tensor, non_blocking=True)
        return Kept(self._copies[tensor], device)


STAY = Spill()
