"""Builds put into Slurm's queue, and the list of what was."""

import io
import json
import re
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quantkit.cluster.jobs import BuildJob, Job, ReleaseJob
from quantkit.cluster.resources import Resources
from quantkit.cluster.slurm import require_slurm
from quantkit.errors import RefusedError, UnavailableError
from quantkit.files import disk_errors, write_json

LOGS = "slurm"  # folder beside the artifacts
JOBS = "jobs.json"
RESTARTS = 100  # after time-outs; each continues where the last one stopped
ANNOUNCED_S = 90  # how long before its time limit a job is told of it
ANNOUNCED_S_PER_MINUTE = 15  # of a short limit, which would else be announced before the job can hear it
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
        # a cluster need not let jobs be requeued that do not ask for it
        "additional_parameters": {"requeue": True, **further},
    }
    return {key: value for key, value in given.items() if value is not None}


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UnavailableError(
            "submitting jobs needs submitit", fix="pip install 'quantkit[cluster]'", where=sys.executable
        ) from None
    require_slurm("sbatch")
    return submitit


def _keep(path: Path, submitted: list[dict[str, Any]]) -> None:
    """Add jobs to the list of what was submitted."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    ids = {job["id"] for job in submitted}
    with disk_errors(path):
        write_json(path, [job for job in known if job["id"] not in ids] + submitted)
