"""Where quantkit keeps what outlives a run: bielik-nano, cached reference states, engines."""

import errno
import os
from pathlib import Path

import platformdirs

from quantkit.errors import RefusedError


def quantkit_home() -> Path:
    """The folder named by QUANTKIT_HOME, else the user's data folder for quantkit (not created).

    Raises:
        RefusedError: it names the home of a user who is not there.
    """
    chosen = os.environ.get("QUANTKIT_HOME")
    try:
        return Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("quantkit"))
    except RuntimeError as error:
        raise RefusedError(
            f"{chosen} is no folder: {error}", where="QUANTKIT_HOME", fix="set it to a folder, or unset it"
        ) from None


def require_home() -> None:
    """Make quantkit's folder, where everything that is judged leaves something.

    Raises:
        RefusedError: it cannot be made, or not be written into.
    """
    home = quantkit_home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise RefusedError(
            f"quantkit's own folder cannot be written: {error.strerror}",
            where=str(home),
            fix="set QUANTKIT_HOME to a folder that can be: the reference's states are kept there",
        ) from None


def shipped(kind: str) -> Path:
    """The folder of shipped `recipes` or `calibration` text: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "_data" / kind
    return packaged if packaged.is_dir() else package.parent / kind
