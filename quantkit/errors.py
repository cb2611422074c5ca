"""Every failure a user can cause or meet: what is wrong, where, and how to mend it.

Library code raises these; only the command line turns them into text and an exit code.
`assert` is for this project's own invariants.
"""

from collections.abc import Iterable


class QuantkitError(Exception):
    """A failure with a remedy.

    Args:
        what: one line, what is wrong, with the offending value.
        where: the file, tensor, layer or recipe key it was found in.
        fix: what to change or run.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at:  {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


def worst(codes: Iterable[int]) -> int:
    """The exit code that stands for several: 0, a gate's if nothing worse came of any, else the largest."""
    bad = set(codes) - {0}
    return max(bad - {GateError.exit_code}, default=max(bad, default=0))


class RunFailedError(QuantkitError):
    """Exit 1: the run itself failed (disk full, lock held, hashes that do not match)."""

    exit_code = 1


class RefusedError(QuantkitError):
    """Exit 2: the recipe, the command line, the checkpoint or the plan was refused before work began."""

    exit_code = 2


class GateError(QuantkitError):
    """Exit 3: a validation gate failed, or something wanted to publish without a pass."""

    exit_code = 3


class UnavailableError(QuantkitError):
    """Exit 4: something needed is not installed or not reachable."""

    exit_code = 4
