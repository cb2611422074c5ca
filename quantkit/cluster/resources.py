"""What a build asks of Slurm, and the rules of partitions that are known."""

import math
import re
from dataclasses import dataclass, replace

from quantkit.errors import RefusedError

MEMORY_SLACK = 1.25  # allocator and page cache beside what a plan counts
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


def resources(
    asked: Resources, *, threads: int, rank_bytes: int, waiting_bytes: int = 0, judging_bytes: int = 0
) -> Resources:
    """What a build gets: what was asked, else what its partition gives with a GPU, else what its plan needs.

    Args:
        asked: 0 for `cpus` and `memory_gb` means not asked.
        threads: of the recipe, each rank's.
        rank_bytes: of the plan, each rank's.
        waiting_bytes: of them, what can wait in the host's memory.
        judging_bytes: of the plan, one process's.

    Raises:
        RefusedError: it does not agree with the rules of the partition.
    """
    needed_gb = math.ceil(max(asked.ranks * rank_bytes, judging_bytes) * MEMORY_SLACK / 1e9)
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
    least_bytes = max(rank_bytes - waiting_bytes, judging_bytes)
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
