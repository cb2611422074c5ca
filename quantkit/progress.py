"""Who hears of a run while it goes on."""

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.qtensor import LinearFacts


@dataclass(frozen=True)
class Progress:
    """Who wants to hear of a run; all calls come from the thread that runs it."""

    stage: Callable[[str], None] = lambda name: None
    steps: Callable[[str, int, int], None] = lambda what, done, total: None
    linear: Callable[[LinearFacts], None] = lambda facts: None
