"""What runs inside a job, and the word that it leaves of how it ended."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from quantkit.cluster.slurm import is_running
from quantkit.errors import GateError, worst
from quantkit.files import write_json
from quantkit.workdir import RECORD

DONE, GATE, LOST = "done", "gate failed", "lost"
STATES = {0: DONE, GateError.exit_code: GATE}
"""What an exit code means; any other is `failed`."""
ANNOUNCEMENTS = (signal.SIGUSR2, signal.SIGTERM)
"""What Slurm sends a job whose time or place it is about to take: the first where it sends what the job asked for."""


@dataclass(frozen=True)
class BuildJob:
    """One artifact: `quantkit build` with these arguments.

    Attributes:
        recipe: as on the command line.
        out: the artifact's folder.
        options: further arguments.
    """

    recipe: str
    out: Path
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.out.name

    def __call__(self) -> None:
        """Run it inside a job."""
        _run_in_job([("build", self.recipe, "--out", str(self.out), *self.options)])

    def checkpoint(self) -> Any:
        """What goes back into the queue: the same, for the build finds its finished layers.

        By this name, for submitit 1.5.4 lets a job that has no `checkpoint` end at its time limit.
        """
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class ReleaseJob:
    """What follows when all builds have ended, well or not: a report of the artifacts they made, and their publication.

    Attributes:
        artifacts: folders; one whose build did not end with an artifact is left out, for what lies there is older.
        report: folder of the report.
        publishes: whether they are published, each into its recipe's repository.
        builds: (artifact's name, job) of the builds that went before.
    """

    artifacts: tuple[Path, ...]
    report: Path
    publishes: bool = False
    builds: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return self.report.name

    def __call__(self) -> None:
        """Run it inside a job."""
        from submitit import JobEnvironment

        _run_in_job(self.commands(JobEnvironment().paths.folder))

    def commands(self, logs: Path) -> list[tuple[str, ...]]:
        """What is to be run, given the folder where builds leave word of how they ended."""
        jobs = dict(self.builds)
        made = [folder for folder in self.artifacts if _made(word_of(logs, jobs[folder.name]))]
        for folder in self.artifacts:
            if folder not in made:
                print(f"{folder.name} is left out: its build made no artifact", flush=True)
        there = [str(folder) for folder in made if (folder / RECORD).is_file()]
        commands: list[tuple[str, ...]] = [("report", *there, "--out", str(self.report))] if there else []
        return commands + ([("publish", folder) for folder in there] if self.publishes else [])

    checkpoint = BuildJob.checkpoint


Job = BuildJob | ReleaseJob


def exit_code(jobs: list[dict[str, Any]]) -> int:
    """Of a command that stands for all of them; one that left none counts as failed."""
    return worst(1 if job["exit_code"] is None else job["exit_code"] for job in jobs)


def word_of(logs: Path, identifier: str) -> dict[str, Any] | None:
    """How a task ended; None if it has not, or could not say so."""
    path = _word(logs, identifier)
    if not path.is_file():
        return None
    word = json.loads(path.read_text(encoding="utf-8"))
    return {"state": STATES.get(word["exit_code"], "failed")} | word


def _made(ended: dict[str, Any] | None) -> bool:
    """Whether a build ended with an artifact, judged well or not."""
    return ended is not None and ended["exit_code"] in STATES


def _word(logs: Path, identifier: str) -> Path:
    return logs / f"{identifier}_ended.json"


def _run_in_job(commands: Iterable[tuple[str, ...]]) -> None:
    """Run commands of quantkit inside a job, every one of them, and leave word of how the job ended.

    A signal that announces the end goes to every process of the job. A build must not die of it before the job has put
    itself back into the queue. One that was killed leaves no word: the queue knows what comes next.

    Raises:
        SystemExit: a command failed, and Slurm is to know; its own message is in the log.
    """
    from submitit import JobEnvironment

    environment = JobEnvironment()
    word = _word(environment.paths.folder, environment.job_id)
    word.unlink(missing_ok=True)
    _heed_announcements(environment.job_id)
    codes = []
    for arguments in commands:
        print("quantkit", *arguments, flush=True)
        # a job's process has no other thread that could hold a lock while it forks
        done = subprocess.run([sys.executable, "-m", "quantkit", *arguments], preexec_fn=_ignore_announcements)
        if done.returncode < 0:
            sys.exit(f"error: {arguments[0]} was killed by {signal.Signals(-done.returncode).name}")
        codes.append({"exit_code": done.returncode})
    code = exit_code(codes)
    write_json(word, {"exit_code": code, "host": environment.hostname})
    if code:
        sys.exit(code)


def _heed_announcements(identifier: str) -> None:
    """Let this process, and what it has started, end when Slurm announces that; first the job goes back into the queue.

    submitit does so at SIGUSR2 alone, and ends with a traceback where Slurm has requeued the job already. A job that
    Slurm preempts with a time of grace has SIGTERM, unless the cluster is set up to send the other; so has one that is
    cancelled, but that one Slurm does not call running any more.
    """
    put_back = signal.getsignal(signal.SIGUSR2)

    def heed(number: int, frame: FrameType | None) -> None:
        # going back into the queue brings another
        _ignore_announcements()
        if callable(put_back) and (number == signal.SIGUSR2 or is_running(identifier)):
            try:
                put_back(number, frame)
            except subprocess.SubprocessError:
                # Slurm's reason is in the log: most often, that it has done so itself
                sys.exit("error: the job could not put itself back into the queue")
        sys.exit(f"ended by Slurm with {signal.Signals(number).name}")

    for announcement in ANNOUNCEMENTS:
        signal.signal(announcement, heed)


def _ignore_announcements() -> None:
    for announcement in ANNOUNCEMENTS:
        signal.signal(announcement, signal.SIG_IGN)
