"""How many processes were started together; asked of every command, so before torch is imported."""

import os

from quantkit.errors import RefusedError

LAUNCHED = "TORCHELASTIC_RUN_ID"  # what torchrun sets, and nobody else


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if LAUNCHED in os.environ else 1


def require_alone(command: str) -> None:
    """Stop where each of several processes would do all of a command's work.

    Raises:
        RefusedError: torchrun has started several.
    """
    if launched() > 1:
        raise RefusedError(
            f"{command} is the work of one process, and torchrun has started {launched()}",
            where="torchrun",
            fix=f"start quantkit {command} without torchrun; only build is divided",
        )
