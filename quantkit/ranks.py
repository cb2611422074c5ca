"""Several processes that make one artifact, a GPU each: who one is among them, and how they hand over what they made.

Each has the batches of calibration windows whose number is its own, counted in turns; the others are handed what it
computes of them in the recipe's order, so that every sum adds up the same terms in the same order as one process would.
A process alone is the case of one, and torch.distributed is not touched then.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from quantkit.errors import RefusedError, RunFailedError
from quantkit.launch import TOGETHER

T = TypeVar("T")
# a process that waits so long for one that lives and says nothing gives up
PATIENCE = timedelta(hours=1)
FAILED = "quantkit-failed"


@dataclass(frozen=True)
class Ranks:
    """One's place among the processes of a build.

    Attributes:
        rank: from 0, who alone writes and speaks.
        size: how many there are.
        device: where tensors of others are put; None for one alone.
        store: what all of them can ask, also when one has ended; None for one alone.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    store: Any = None

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def dealt(self, parts: Sequence[T]) -> Sequence[T]:
        """One's own of what is dealt in turn."""
        return parts[self.rank :: self.size]

    def in_order(self, own: Iterator[tuple[Tensor, ...]], total: int) -> Iterator[tuple[Tensor, ...]]:
        """What all have, in the order it was dealt; the processes make theirs side by side, one each in a round.

        Args:
            own: makes one's own, one by one.
            total: how many all have together.
        """
        if self.size == 1:
            yield from own
            return
        for first in range(0, total, self.size):
            mine = next(own, None)
            for owner in range(min(self.size, total - first)):
                yield self._handed(mine, owner)
            del mine
        # what is made lazily comes to its end here
        more = next(own, None)
        assert more is None, "there is more than was counted"

    def share(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor, of the same shape everywhere, with that of one process."""
        if self.size > 1:
            tensor.copy_(self._sent(tensor.contiguous(), owner))

    def exchange(self, own: T) -> list[T]:
        """What every process gives, by rank; tensors in it are put on one's own device."""
        if self.size == 1:
            return [own]
        written = io.BytesIO()
        torch.save(own, written)
        mine = torch.frombuffer(written.getbuffer(), dtype=torch.uint8).to(self.device)
        found = []
        # one after another, so that what travels is held of one at a time
        for owner in range(self.size):
            (content,) = self._handed((mine,), owner)
            found.append(own if owner == self.rank else self._read(content))
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes; the others make nothing."""
        made: list[Any] = [make() if self.is_first else None]
        if self.size > 1:
            with self._others():
                distributed.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        found: T = made[0]
        return found

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process does what is inside before the others do: what it fetches or makes is there then."""
        if not self.is_first:
            self.exchange(None)
        yield
        if self.is_first:
            self.exchange(None)

    def require_alike(self, what: dict[str, Any]) -> None:
        """Stop unless all processes say the same.

        Raises:
            RefusedError: naming what differs.
        """
        first, *others = self.exchange(what)
        for rank, other in enumerate(others, 1):
            if other != first:
                differing = ", ".join(sorted(key for key in first | other if first.get(key) != other.get(key)))
                raise RefusedError(
                    f"rank {rank} would build something else than rank 0: {differing} differ",
                    where=TOGETHER,
                    fix="use GPUs of one model, and the same versions and files for all ranks",
                )

    def fails_first(self) -> bool:
        """Whether no other has failed before: the one who says so tells of the error."""
        return self.store is None or self.store.add(FAILED, 1) == 1

    def _read(self, content: Tensor) -> Any:
        """What another process of the same build has saved; tensors in it are put on one's own device."""
        written = io.BytesIO(content.cpu().numpy().data)
        return torch.load(written, map_location=self.device, weights_only=False)

    def _handed(self, mine: tuple[Tensor, ...] | None, owner: int) -> tuple[Tensor, ...]:
        known = None if mine is None else [(each.shape, each.dtype) for each in mine]
        shapes: list[Any] = [known]
        with self._others():
            distributed.broadcast_object_list(shapes, src=owner, device=torch.device("cpu"))
        if owner == self.rank:
            assert mine is not None, "it was dealt one"
            return tuple(self._sent(each.contiguous(), owner) for each in mine)
        return tuple(
            self._sent(torch.empty(shape, dtype=dtype, device=self.device), owner) for shape, dtype in shapes[0]
        )

    def _sent(self, tensor: Tensor, owner: int) -> Tensor:
        """A contiguous tensor with the owner's values; as bytes, so that every dtype arrives as it was."""
        with self._others():
            distributed.broadcast(tensor.view(-1).view(torch.uint8), src=owner)
        return tensor

    @contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RunFailedError(
                "another process of the build has ended",
                where=f"rank {self.rank} of {self.size}",
                fix="see what it said, or who killed it; the same command goes on from the last finished layer",
            ) from error


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """One's place among the processes that were started together, by `quantkit.launch.start` or torchrun.

    On GPUs the process uses the one of its local rank; tensors go through NCCL there, and through gloo elsewhere.

    Raises:
        RefusedError: there are fewer GPUs than processes.
    """
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise RefusedError(
                f"rank {local} has no GPU: {torch.cuda.device_count()} are there",
                where=TOGETHER,
                fix="start as many processes as there are GPUs",
            )
        torch.cuda.set_device(local)
    store, rank, size = next(iter(distributed.rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    yield Ranks(rank, size, device, store)
    # after an error others are at work in their own place: who ends is noticed
    distributed.destroy_process_group()


def owners(costs: Sequence[float], size: int) -> list[int]:
    """Who does each piece of work: the largest first, each to who has least to do."""
    load = [0.0] * size
    found = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least = min(range(size), key=load.__getitem__)
        found[place] = least
        load[least] += costs[place]
    return found
