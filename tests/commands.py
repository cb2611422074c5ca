"""quantkit and programs around it, each as a process of its own, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = "from quantkit.cli import main; main()"


def run(program: str, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """The text of a Python program with its arguments.

    Args:
        cwd: where it runs; this checkout's package is the one it imports.
        variables: of its environment, beside those of the tests' own.
    """
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=surroundings)


def quantkit(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """The real command."""
    return run(COMMAND, *arguments, cwd=cwd, **variables)
