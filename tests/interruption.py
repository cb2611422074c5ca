"""Commands that are interrupted while they are at work, and waiting until they are."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 150


def until(happened: Callable[[], object], log: str = "") -> None:
    """Wait for what another process does; in vain its log is shown."""
    give_up = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < give_up, Path(log).read_text() if log else "in vain"
        time.sleep(0.05)


@contextmanager
def interrupted(owner: Any, name: str, *, after: int) -> Iterator[None]:
    """What runs inside is interrupted when it calls the owner's function of that name once more than so often."""
    plain, left = getattr(owner, name), after

    def give_up(*arguments: Any) -> Any:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return plain(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, give_up)
        with pytest.raises(KeyboardInterrupt):
            yield
