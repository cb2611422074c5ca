"""A build that its user interrupts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


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
