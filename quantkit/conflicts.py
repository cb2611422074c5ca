"""Another distribution that installs the same command and package name."""

from collections.abc import Callable
from importlib import metadata

RIVAL = "llm-quantkit"
REMEDY = f"pip uninstall {RIVAL}, then install quantkit again: both write the `quantkit` command and package"


def rival_version() -> str | None:
    """Version of the other distribution if it is installed beside this one."""
    try:
        return metadata.version(RIVAL)
    except metadata.PackageNotFoundError:
        return None


def warn_of_conflicts(say: Callable[[str], None]) -> None:
    """Say how to remove the other distribution, if it is there."""
    if version := rival_version():
        say(f"warning: {RIVAL} {version} is installed too\n  fix: {REMEDY}")
