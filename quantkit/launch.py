"""Processes that make one artifact together: starting them, and how many there are.

Every command asks, so torch is imported only where something is started.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from quantkit.errors import RefusedError

LAUNCHED = "TORCHELASTIC_RUN_ID"  # what torchrun sets, `start` too, and nobody else
OWN = "quantkit"  # its value in processes that `start` has started
TOGETHER = "--ranks, or torchrun"  # where errors are that have to do with the number of processes
POLL_S = 0.05
GRACE_S = 5.0  # in which processes notice that another has failed, and one of them tells of it


def launched() -> int:
    """How many processes were started together; 1 for one alone."""
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


def start(size: int, command: Sequence[str]) -> dict[int, int]:
    """Run a command as several processes on this machine, with the variables that torchrun would give them.

    When one of them fails, the others are stopped. Each is to call `end_with_launcher`; then none outlives this
    process, however it ends.

    Args:
        size: how many.
        command: program and arguments.

    Returns:
        By rank, the exit code of every process that ended by itself; negative for a signal, as `subprocess` has it.
    """
    from torch.distributed import TCPStore

    # kept here, so that all can ask it when one of them has ended
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        LAUNCHED: OWN,
        "TORCHELASTIC_USE_AGENT_STORE": str(True),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # an interrupt is for this process, which then stops them
            processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | common | own, start_new_session=True)
            )
        codes = _ended(processes)
        while len(codes) < size and not any(codes.values()):
            time.sleep(POLL_S)
            codes = _ended(processes)
        give_up = time.monotonic() + GRACE_S
        while len(codes) < size and time.monotonic() < give_up:
            time.sleep(POLL_S)
            codes = _ended(processes)
        return codes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _ended(processes: Sequence["subprocess.Popen[bytes]"]) -> dict[int, int]:
    codes = {rank: process.poll() for rank, process in enumerate(processes)}
    return {rank: code for rank, code in codes.items() if code is not None}


def end_with_launcher() -> None:
    """Let this process end at once when the one that started it with `start` ends, killed or not."""
    if os.environ.get(LAUNCHED) == OWN:
        threading.Thread(target=_end_with_input, name="launcher", daemon=True).start()


def _end_with_input() -> None:
    # nothing is ever written there; the descriptor itself, for a lock on the file object would be held at the exit
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
