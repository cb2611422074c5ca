"""Where quantkit keeps what outlives a run: bielik-nano, cached reference states, engines."""

import os
from pathlib import Path

import platformdirs


def quantkit_home() -> Path:
    """The folder named by QUANTKIT_HOME, else the user's data folder for quantkit (not created)."""
    chosen = os.environ.get("QUANTKIT_HOME")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("quantkit"))


def shipped(kind: str) -> Path:
    """The folder of shipped `recipes` or `calibration` text: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "_data" / kind
    return packaged if packaged.is_dir() else package.parent / kind
