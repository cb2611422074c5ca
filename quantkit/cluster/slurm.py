"""What Slurm's own programs say."""

import os
import shutil
import subprocess

from quantkit.errors import UnavailableError

RUNNING = ("RUNNING", "SIGNALING")  # the second while a signal is on its way to the job


def require_slurm(program: str) -> None:
    """Stop where one of its programs is not.

    Raises:
        UnavailableError: it is not on the PATH.
    """
    if shutil.which(program) is None:
        raise UnavailableError(
            f"no Slurm here: {program} is not on the PATH",
            where=os.uname().nodename,
            fix="log in to the cluster, and install quantkit on a disk that its nodes share",
        )


def queued() -> dict[str, dict[str, str]]:
    """Slurm's `state` and `reason` of every job of this user that is in the queue."""
    require_slurm("squeue")
    listed = subprocess.run(["squeue", "-h", "-r", "--me", "-o", "%i %T %r"], capture_output=True, text=True)
    if listed.returncode:
        raise UnavailableError(
            f"squeue does not answer: {listed.stderr.strip()}", where="squeue", fix="try again when Slurm is back"
        )
    rows = (line.split(maxsplit=2) for line in listed.stdout.splitlines())
    return {identifier: {"state": state.lower(), "reason": reason} for identifier, state, reason in rows}


def is_running(identifier: str) -> bool:
    """Whether Slurm lets a job go on, as far as it answers; one that it ends or has requeued is in another state."""
    listed = subprocess.run(["squeue", "-h", "-j", identifier, "-o", "%T"], capture_output=True, text=True)
    return listed.stdout.strip() in RUNNING
