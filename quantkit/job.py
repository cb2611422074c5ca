"""What is to be built, what became of it, and what several builds have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quantkit.errors import QuantkitError
from quantkit.recipe import Recipe, public_name

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A recipe to be built.

    Attributes:
        name: what it is called in messages.
        recipe: what to build.
        out: the artifact's folder; appears whole or not at all.
    """

    name: str
    recipe: Recipe
    out: Path


def default_out(recipe: Recipe, name: str) -> Path:
    """`artifacts/<model>-<FORMAT>`, or with the recipe's own name where a model has several of a format.

    Args:
        name: the recipe file's stem.
    """
    model = public_name(recipe.model.id).rsplit("/")[-1]
    return Path("artifacts") / f"{model}-{name.upper()}"


@dataclass(frozen=True)
class Build:
    """What `build` did.

    Attributes:
        out: the artifact's folder.
        record: its record.
        reused: it was there already, complete and unchanged.
        unpinned: commit that the recipe's model was resolved to, if the recipe names none.
        seconds: it took just now, what it shared with others counted where it was done first.
    """

    out: Path
    record: dict[str, Any]
    reused: bool
    unpinned: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a build, or an error; an artifact that could not be judged is kept and has both."""

    name: str
    build: Build | None
    error: QuantkitError | None


class Once:
    """What recipes have in common is made once; so is an error."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def __call__(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._made:
            try:
                self._made[key] = make()
            except QuantkitError as error:
                self._made[key] = error
        found = self._made[key]
        if isinstance(found, QuantkitError):
            raise found
        return found
