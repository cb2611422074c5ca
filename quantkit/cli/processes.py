"""A command that several processes carry out together."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from quantkit.cli.output import say
from quantkit.errors import QuantkitError, RefusedError, worst

if TYPE_CHECKING:
    from quantkit.ranks import Ranks


def is_one_of(size: int) -> bool:
    """Whether this process is one of so many that were started together already.

    Raises:
        RefusedError: it is one of another number.
    """
    from quantkit.launch import launched

    if launched() not in (1, size):
        raise RefusedError(
            f"--ranks {size}, and torchrun has started {launched()}",
            where="--ranks",
            fix="leave --ranks out under torchrun, or torchrun with --ranks",
        )
    return launched() == size


def start_ranks(size: int) -> None:
    """Run this command as several processes, and end as they do."""
    from quantkit.launch import start

    codes = start(size, [sys.executable, "-m", "quantkit", *sys.argv[1:]])
    for rank, code in codes.items():
        if code < 0:
            say(
                f"error: rank {rank} of {size} was killed by {signal.Signals(-code).name}\n"
                "  fix: see whether the machine has enough memory (`quantkit plan` with --ranks); finished layers are "
                "kept, the same command goes on"
            )
            # whoever waits for this process must learn of a signal as if it had been the build itself
            os.kill(os.getpid(), -code)
    if code := worst(codes.values()):
        raise typer.Exit(code)


@contextmanager
def together(device: str) -> Iterator["Ranks"]:
    """The processes that were started together, if they were; one of them tells of an error, and all end with it."""
    from quantkit.launch import end_with_launcher, launched
    from quantkit.machine import choose_device
    from quantkit.ranks import ALONE, joined

    end_with_launcher()
    if launched() == 1:
        yield ALONE
        return
    with joined(choose_device(device)) as ranks:
        try:
            yield ranks
        except QuantkitError as error:
            if ranks.fails_first():
                say(f"error: {error}" if ranks.is_first else f"error on rank {ranks.rank}: {error}")
            raise typer.Exit(error.exit_code) from None
