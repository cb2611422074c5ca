"""Who hears of a run while it goes on."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from quantkit.qtensor import LinearFacts

T = TypeVar("T")
# a generator's end
END = object()


@dataclass(frozen=True)
class Progress:
    """Who wants to hear of a run; all calls come from the thread that runs it."""

    stage: Callable[[str], None] = lambda name: None
    steps: Callable[[str, int, int], None] = lambda what, done, total: None
    linear: Callable[[LinearFacts], None] = lambda facts: None


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of what is done inside to a stage's seconds.

    A GPU is waited for before and after, so that its work counts where it belongs.
    """
    _wait_for_gpu()
    started = time.perf_counter()
    yield
    _wait_for_gpu()
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def timed_steps(seconds: dict[str, float], stage: str, steps: Iterator[T]) -> Iterator[T]:
    """The same steps, the wall time of each added to a stage's seconds; what is done between them is not."""
    while True:
        with timed(seconds, stage):
            found = next(steps, END)
        if found is END:
            return
        yield found  # type: ignore[misc]
        del found


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
