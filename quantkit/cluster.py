"""Builds as Slurm jobs: arrays with one task per artifact, then one job that reports and publishes.

A job that is preempted or reaches its time limit goes back into the queue, and `quantkit build` there continues from
its last finished layer. Every task runs the same command that a user would type, and leaves its exit code beside its
log; what the queue says is asked only of tasks that have left none.
"""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.errors import GateError, RefusedError, UnavailableError, worst
from quantkit.files import disk_errors, write_json
from quantkit.workdir import RECORD

LOGS = "slurm"  # folder beside the artifacts
JOBS = "jobs.json"
MEMORY_SLACK = 1.25  # allocator and page cache beside what a plan counts
RESTARTS = 100  # after time-outs; each continues where the last one stopped
POLL_SECONDS = 5.0
ANNOUNCED_S = 90  # how long before its time limit a job is told of it
ANNOUNCED_S_PER_MINUTE = 15  # of a short limit, which would else be announced before the job can hear it

DONE, GATE, LOST = "done", "gate failed", "lost"
STATES = {0: DONE, GateError.exit_code: GATE}
"""What an exit code means; any other is `failed`."""
OF_QUANTKIT = re.compile(r"^error: (.*(?:\n  (?!at:|fix:).*)*)", re.MULTILINE)
"""An error without its place and its remedy, which follow indented."""
OF_SLURM = re.compile(r"^slurmstepd(?:-\S+)?: error: [* ]*(.*?)[* ]*$", re.MULTILINE)
RESTART = "Starting with JobEnvironment"  # first line of submitit's in a log, each time that the job begins
OF_SBATCH = re.compile(r"^sbatch: error: (?:Batch job submission failed: )?")
REFUSED_OPTIONS = {
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "time limit": "--time",
    "cpu": "--cpus",
    "memory": "--memory",
    "gres": "--gpus",
}
"""What a word in sbatch's refusal has to do with."""
DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+)(?::(?P<minutes>[0-5]?\d))?(?::(?P<seconds>[0-5]?\d))?")


@dataclass(frozen=True)
class Resources:
    """What one task asks of Slurm.

    Attributes:
        partition, account, qos: by name; None leaves them to the cluster.
        minutes: time limit.
        gpus, cpus, memory_gb: of one node.
        ranks: processes that share them, a GPU each where there are GPUs.
    """

    minutes: int
    cpus: int
    memory_gb: int
    gpus: int = 0
    ranks: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None


@dataclass(frozen=True)
class Partition:
    """A cluster's rules for one of its partitions.

    Attributes:
        account_suffix: that account names have there; empty where it is not known.
        cpus, memory_gb: that come with one GPU; more is billed as more GPUs.
        minutes: longest job; None where it is not known.
        gpu_memory_gb: of one GPU.
    """

    account_suffix: str
    cpus: int
    memory_gb: int
    minutes: int | None
    gpu_memory_gb: int


PARTITIONS = {
    # Athena, ACK Cyfronet AGH
    "plgrid-gpu-a100": Partition("-gpu-a100", cpus=16, memory_gb=128, minutes=48 * 60, gpu_memory_gb=40),
    # Helios, likewise; one GH200 is 72 cores, 120 GB and a GPU of 96 GB
    "plgrid-gpu-gh200": Partition("", cpus=72, memory_gb=120, minutes=None, gpu_memory_gb=96),
}


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
        made = [folder for folder in self.artifacts if _made(_ended(logs, jobs[folder.name]))]
        for folder in self.artifacts:
            if folder not in made:
                print(f"{folder.name} is left out: its build made no artifact", flush=True)
        there = [str(folder) for folder in made if (folder / RECORD).is_file()]
        commands: list[tuple[str, ...]] = [("report", *there, "--out", str(self.report))] if there else []
        return commands + ([("publish", folder) for folder in there] if self.publishes else [])

    checkpoint = BuildJob.checkpoint


Job = BuildJob | ReleaseJob


def minutes_of(text: str) -> int:
    """Slurm's own notation of a time limit in minutes, rounded up: `90` (minutes), `H:MM:SS`, `D-HH`, `D-HH:MM`.

    Raises:
        RefusedError: something else.
    """
    if text.isdecimal() and int(text):
        return int(text)
    found = DURATION.fullmatch(text)
    if found is None or ("-" not in text and text.count(":") != 2):
        raise RefusedError(f"no time limit: {text!r}", where="--time", fix="say minutes, H:MM:SS or D-HH:MM")
    days, hours, minutes, seconds = (int(part or 0) for part in found.group("days", "hours", "minutes", "seconds"))
    if total := math.ceil((days * 24 + hours) * 60 + minutes + seconds / 60):
        return total
    raise RefusedError("a time limit of nothing", where="--time", fix="say minutes, H:MM:SS or D-HH:MM")


def ranks_of(asked: Resources, *, divisible: bool) -> int:
    """How many processes make a build: what was asked, else one for each GPU.

    Args:
        asked: 0 for `ranks` means not asked.
        divisible: several processes can make it; an engine is one, whatever it does with several GPUs.

    Raises:
        RefusedError: there are fewer GPUs than processes.
    """
    ranks = asked.ranks or (max(asked.gpus, 1) if divisible else 1)
    if asked.gpus and ranks > asked.gpus:
        raise RefusedError(
            f"{ranks} ranks want a GPU each, and {asked.gpus} are asked for",
            where="--ranks",
            fix="leave --ranks out, or ask for more --gpus",
        )
    return ranks


def resources(asked: Resources, *, threads: int, rank_bytes: int, waiting_bytes: int = 0) -> Resources:
    """What a build gets: what was asked, else what its partition gives with a GPU, else what its plan needs.

    Args:
        asked: 0 for `cpus` and `memory_gb` means not asked.
        threads: of the recipe, each rank's.
        rank_bytes: of the plan, each rank's.
        waiting_bytes: of them, what can wait in the host's memory.

    Raises:
        RefusedError: it does not agree with the rules of the partition.
    """
    needed_gb = math.ceil(asked.ranks * rank_bytes * MEMORY_SLACK / 1e9)
    rules = PARTITIONS.get(asked.partition or "")
    if rules is None:
        return replace(asked, cpus=asked.cpus or asked.ranks * threads, memory_gb=asked.memory_gb or needed_gb)
    if not (asked.account or "").endswith(rules.account_suffix):
        raise RefusedError(
            f"accounts of the partition {asked.partition} end in {rules.account_suffix}, not as in {asked.account}",
            where="--account",
            fix=f"give --account GRANT{rules.account_suffix}",
        )
    if rules.minutes is not None and asked.minutes > rules.minutes:
        raise RefusedError(
            f"{asked.partition} lets no job run for more than {rules.minutes // 60} hours",
            where="--time",
            fix="ask for less: a build that reaches its limit is queued again and goes on",
        )
    least_bytes = rank_bytes - waiting_bytes
    if least_bytes > rules.gpu_memory_gb * 1e9:
        each = f"each of {asked.ranks} GPUs" if asked.ranks > 1 else "the GPU"
        raise RefusedError(
            f"the build needs about {least_bytes / 1e9:.0f} GB on {each}; those of {asked.partition} have "
            f"{rules.gpu_memory_gb}",
            where="--partition",
            fix="use more GPUs (--gpus), fewer or shorter windows (--set calibration.window_tokens=...), or a "
            "partition of larger GPUs",
        )
    gpus = asked.gpus or asked.ranks
    return replace(
        asked,
        gpus=gpus,
        cpus=asked.cpus or gpus * rules.cpus,
        memory_gb=asked.memory_gb or max(needed_gb, gpus * rules.memory_gb),
    )


def requests(jobs: list[tuple[BuildJob, Resources]]) -> list[dict[str, Any]]:
    """What `submit` would ask for, in its shape."""
    return [
        {"name": job.name, "id": None, "log": None, "recipe": job.recipe, "resources": asdict(asked)}
        for job, asked in jobs
    ]


def submit(
    jobs: list[tuple[BuildJob, Resources]],
    after: ReleaseJob | None,
    *,
    folder: Path,
    at_once: int | None = None,
) -> list[dict[str, Any]]:
    """Put builds into Slurm's queue, those of equal resources as one array, and what follows behind them.

    Args:
        jobs: builds and what each asks for.
        after: runs when all have ended.
        folder: of logs, on a disk that the nodes share; lists what was submitted.
        at_once: most tasks of an array that run at a time.

    Returns:
        [{"name", "id", "log", "recipe", "resources"}], also added to the folder's list; `recipe` is None for `after`.

    Raises:
        UnavailableError: no Slurm here, or submitit is not installed.
        RefusedError: Slurm does not take them.
    """
    submitit = _submitit()
    logs = folder.absolute()
    with disk_errors(logs):
        logs.mkdir(parents=True, exist_ok=True)
    submitted: list[dict[str, Any]] = []

    def put(group: list[Job], asked: Resources, **further: str) -> list[str]:
        executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=RESTARTS)
        executor.update_parameters(**_parameters(group, asked, at_once, further))
        said = io.StringIO()
        try:
            # submitit repeats what sbatch says; of a refusal it would stand in front of our error
            with redirect_stderr(said), executor.batch() if len(group) > 1 else nullcontext():
                placed = [executor.submit(job) for job in group]
        except submitit.core.utils.FailedJobError as error:
            raise _refused(str(error)) from None
        sys.stderr.write(said.getvalue())
        submitted.extend(
            {
                "name": job.name,
                "id": each.job_id,
                "log": str(each.paths.stdout),
                "recipe": getattr(job, "recipe", None),
                "resources": asdict(asked),
            }
            for job, each in zip(group, placed, strict=True)
        )
        _keep(logs / JOBS, submitted)
        return [each.job_id.split("_")[0] for each in placed]

    groups: dict[Resources, list[Job]] = {}
    for job, asked in jobs:
        groups.setdefault(asked, []).append(job)
    ids = [found for asked, group in groups.items() for found in put(group, asked)]
    if after is not None:
        after = replace(after, builds=tuple((job["name"], job["id"]) for job in submitted))
        awaited = ":".join(dict.fromkeys(ids))
        put([after], _beside([asked for _, asked in jobs]), dependency=f"afterany:{awaited}")
    return submitted


def _refused(said: str) -> RefusedError:
    """The error for what sbatch says of a job that it does not take."""
    lines = [OF_SBATCH.sub("", line) for line in said.splitlines() if OF_SBATCH.match(line)]
    reason = "; ".join(lines) or " ".join(said.split())
    named = [option for word, option in REFUSED_OPTIONS.items() if word in reason.lower()]
    return RefusedError(
        f"Slurm does not take it: {reason}",
        where=", ".join(named) or "sbatch",
        fix=f"compare {', '.join(named) or 'what is asked (--dry-run shows it)'} with what the cluster allows",
    )


def _beside(asked: list[Resources]) -> Resources:
    """For what solves nothing: no GPU, and the least memory that a build was given."""
    return replace(min(asked, key=lambda each: each.memory_gb), gpus=0, ranks=1)


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
    queue = _queue() if None in ended.values() else {}
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


def exit_code(jobs: list[dict[str, Any]]) -> int:
    """Of a command that stands for all of them; one that left none counts as failed."""
    return worst(1 if job["exit_code"] is None else job["exit_code"] for job in jobs)


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


def _parameters(group: list[Job], asked: Resources, at_once: int | None, further: dict[str, str]) -> dict[str, Any]:
    """As submitit names them."""
    given: dict[str, Any] = {
        "job_name": f"quantkit-{group[0].name}" if len(group) == 1 else "quantkit",
        "time": asked.minutes,
        "signal_delay_s": min(ANNOUNCED_S, asked.minutes * ANNOUNCED_S_PER_MINUTE),
        "cpus_per_task": asked.cpus,
        "mem": f"{asked.memory_gb}G",
        "gpus_per_node": asked.gpus or None,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "array_parallelism": (at_once or len(group)) if len(group) > 1 else None,
        "stderr_to_stdout": True,
        "additional_parameters": further or None,
    }
    return {key: value for key, value in given.items() if value is not None}


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UnavailableError(
            "submitting jobs needs submitit", fix="pip install 'quantkit[cluster]'", where=sys.executable
        ) from None
    _require_slurm("sbatch")
    return submitit


def _require_slurm(program: str) -> None:
    if shutil.which(program) is None:
        raise UnavailableError(
            f"no Slurm here: {program} is not on the PATH",
            where=os.uname().nodename,
            fix="log in to the cluster, and install quantkit on a disk that its nodes share",
        )


def _keep(path: Path, submitted: list[dict[str, Any]]) -> None:
    """Add jobs to the list of what was submitted."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    ids = {job["id"] for job in submitted}
    with disk_errors(path):
        write_json(path, [job for job in known if job["id"] not in ids] + submitted)


def _ended(logs: Path, identifier: str) -> dict[str, Any] | None:
    """How a task ended; None if it has not, or could not say so."""
    path = _word(logs, identifier)
    if not path.is_file():
        return None
    word = json.loads(path.read_text(encoding="utf-8"))
    return {"state": STATES.get(word["exit_code"], "failed")} | word


def _ended_with_reason(job: dict[str, Any]) -> dict[str, Any] | None:
    """The same of a job of the list, and what went wrong in it."""
    log = Path(job["log"])
    ended = _ended(log.parent, job["id"])
    return ended and ended | {"reason": _last_error(log, OF_QUANTKIT) if ended["exit_code"] else None}


def _last_error(log: Path, *patterns: re.Pattern[str]) -> str | None:
    """The last error in a log since its job last began, in one line, of the first of the patterns that has one."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    since = text.rpartition(RESTART)[2]
    found = next(filter(None, (pattern.findall(since) for pattern in patterns)), [])
    return " ".join(found[-1].split()) if found else None


def _made(ended: dict[str, Any] | None) -> bool:
    """Whether a build ended with an artifact, judged well or not."""
    return ended is not None and ended["exit_code"] in STATES


def _word(logs: Path, identifier: str) -> Path:
    return logs / f"{identifier}_ended.json"


def _queue() -> dict[str, dict[str, str]]:
    """Slurm's `state` and `reason` of every job of this user that is in the queue."""
    _require_slurm("squeue")
    listed = subprocess.run(["squeue", "-h", "-r", "--me", "-o", "%i %T %r"], capture_output=True, text=True)
    if listed.returncode:
        raise UnavailableError(
            f"squeue does not answer: {listed.stderr.strip()}", where="squeue", fix="try again when Slurm is back"
        )
    rows = (line.split(maxsplit=2) for line in listed.stdout.splitlines())
    return {identifier: {"state": state.lower(), "reason": reason} for identifier, state, reason in rows}


def _run_in_job(commands: Iterable[tuple[str, ...]]) -> None:
    """Run commands of quantkit inside a job, every one of them, and leave word of how the job ended.

    The signal that announces a time limit goes to every process of the job. A build must not die of it before the job
    has put itself back into the queue. One that was killed leaves no word: the queue knows what comes next.

    Raises:
        SystemExit: a command failed, and Slurm is to know; its own message is in the log.
    """
    from submitit import JobEnvironment

    environment = JobEnvironment()
    word = _word(environment.paths.folder, environment.job_id)
    word.unlink(missing_ok=True)
    codes = []
    for arguments in commands:
        print("quantkit", *arguments, flush=True)
        # a job's process has no other thread that could hold a lock while it forks
        done = subprocess.run([sys.executable, "-m", "quantkit", *arguments], preexec_fn=_ignore_announcement)
        if done.returncode < 0:
            sys.exit(f"error: {arguments[0]} was killed by {signal.Signals(-done.returncode).name}")
        codes.append({"exit_code": done.returncode})
    worst = exit_code(codes)
    write_json(word, {"exit_code": worst, "host": environment.hostname})
    if worst:
        sys.exit(worst)


def _ignore_announcement() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
