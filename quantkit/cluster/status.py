"""What became of jobs that were submitted."""

import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from quantkit.cluster.jobs import LOST, word_of
from quantkit.cluster.slurm import queued
from quantkit.cluster.submit import JOBS
from quantkit.errors import RefusedError

POLL_SECONDS = 5.0
OF_QUANTKIT = re.compile(r"^error: (.*(?:\n  (?!at:|fix:).*)*)", re.MULTILINE)
"""An error without its place and its remedy, which follow indented."""
OF_SLURM = re.compile(r"^slurmstepd(?:-\S+)?: error: [* ]*(.*?)[* ]*$", re.MULTILINE)
RESTART = "Starting with JobEnvironment"  # first line of submitit's in a log, each time that the job begins


def submitted_jobs(folder: Path) -> list[dict[str, Any]]:
    """What was submitted with logs in a folder, the latest of each name, with its `state`, `reason` and `exit_code`.

    `state` is `done`, `gate failed`, `failed`, `lost` (gone from the queue without a word: cancelled, out of memory),
    or Slurm's own word for a job in its queue, in small letters. `reason` says in Slurm's words why it waits, and of
    one that did not end well what its log says of that; None where there is nothing to say.

    Raises:
        RefusedError: nothing was submitted from there.
        UnavailableError: no Slurm here, while something has not ended.
    """
    path = folder / JOBS
    if not path.is_file():
        raise RefusedError("no jobs were submitted from here", where=str(folder), fix="`quantkit submit` makes them")
    latest = {job["name"]: job for job in json.loads(path.read_text(encoding="utf-8"))}
    ended = {name: _ended_with_reason(job) for name, job in latest.items()}
    queue = queued() if None in ended.values() else {}
    # a task may end between the two looks; then it has left its word by now
    states = {name: ended[name] or _ended_with_reason(job) for name, job in latest.items()}
    return [
        job
        | {"exit_code": None, "reason": None}
        | (
            states[name]
            or queue.get(job["id"])
            or {"state": LOST, "reason": _last_error(Path(job["log"]), OF_SLURM, OF_QUANTKIT)}
        )
        for name, job in latest.items()
    ]


def wait(folder: Path, names: Iterable[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Wait until all of the named jobs have ended, and say what becomes of each; returns them as `submitted_jobs`."""
    wanted = set(names)
    said: dict[str, str] = {}
    while True:
        found = [job for job in submitted_jobs(folder) if job["name"] in wanted]
        for job in found:
            if said.get(job["name"]) != job["state"]:
                said[job["name"]] = job["state"]
                say(f"{job['name']}: {job['state']}")
        if all(job["exit_code"] is not None or job["state"] == LOST for job in found):
            return found
        time.sleep(POLL_SECONDS)


def job_lines(jobs: list[dict[str, Any]]) -> list[str]:
    """Jobs for people."""
    width = max(len(job["name"]) for job in jobs) + 2
    return [f"{job['id'] or '-':<12}{job['name']:<{width}}{_standing(job)}" for job in jobs]


def _standing(job: dict[str, Any]) -> str:
    """Where a job stands; of one that was not submitted, or only just, what it asks for."""
    if "state" not in job:
        return " ".join(f"{key}={value}" for key, value in job["resources"].items() if value)
    why = f" ({job['reason']})" if job["reason"] not in (None, "None") else ""
    return f"{job['state']}{why}  {job['log']}"


def _ended_with_reason(job: dict[str, Any]) -> dict[str, Any] | None:
    """The same of a job of the list, and what went wrong in it."""
    log = Path(job["log"])
    ended = word_of(log.parent, job["id"])
    return ended and ended | {"reason": _last_error(log, OF_QUANTKIT) if ended["exit_code"] else None}


def _last_error(log: Path, *patterns: re.Pattern[str]) -> str | None:
    """The last error in a log since its job last began, in one line, of the first of the patterns that has one."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    since = text.rpartition(RESTART)[2]
    found = next(filter(None, (pattern.findall(since) for pattern in patterns)), [])
    return " ".join(found[-1].split()) if found else None
