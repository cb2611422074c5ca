"""Recipes to artifacts: planned, then taken through their checkpoints side by side.

Several recipes are built as one: `build_all` lets them go through the checkpoint side by side, an item each in turn,
and what is the same for them is done once. A single build is the case of one.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.spill import free_bytes
from quantkit.errors import QuantkitError, RefusedError
from quantkit.footprint import in_passes, together_bytes
from quantkit.job import Build, Job, Once, Outcome
from quantkit.launch import TOGETHER
from quantkit.lock import locked
from quantkit.making import Making
from quantkit.plan import Plan
from quantkit.progress import Progress
from quantkit.ranks import ALONE, Ranks
from quantkit.recipe import OWN_ENGINE, Recipe
from quantkit.source_pass import SourcePass

# a generator's end
END = object()


@dataclass(frozen=True)
class Planned:
    """What building several recipes will need.

    Attributes:
        plans: by the job's name.
        errors: why those that are not among them cannot be built here.
        passes: names of those that go through the checkpoint together; as many as memory allows.
        memory_bytes: peak of the largest pass, or of judging where that takes more.
        disk_bytes: of all.
    """

    plans: dict[str, Plan]
    errors: dict[str, QuantkitError]
    passes: list[list[str]]
    memory_bytes: int
    disk_bytes: int

    def facts(self) -> dict[str, Any]:
        """As a table for JSON."""
        return asdict(self) | {
            "plans": {name: found.facts() for name, found in self.plans.items()},
            "errors": {name: error.what for name, error in self.errors.items()},
        }


def plan(
    recipe: Recipe, *, out: Path, device: torch.device, progress: Progress, here: bool = True, ranks: int = 1
) -> Plan:
    """What building a recipe will need; see `quantkit.plan`.

    Args:
        recipe: what would be built.
        out: where.
        device: what would compute it.
        progress: told what is going on.
        here: on this machine, so refuse what it cannot run or fetch.
        ranks: how many processes would make it together.
    """
    job = Job("", recipe, out)
    _require_divisible([job], ranks)
    artifact = Making(job, device, progress, Ranks(size=ranks))
    artifact.plan(Once(), here=here)
    return artifact.needed


def plan_all(jobs: Sequence[Job], *, device: torch.device, progress: Progress, ranks: int = 1) -> Planned:
    """What building recipes together will need here, and which of them cannot be built.

    Args:
        jobs, device, progress: as for `build_all`.
        ranks: how many processes would make a single one together.
    """
    _require_divisible(jobs, ranks)
    once, reserved_bytes = Once(), 0
    artifacts = [Making(job, device, progress, Ranks(size=ranks)) for job in jobs]
    for artifact in artifacts:
        with artifact.turn():
            artifact.plan(once, reserved_bytes=reserved_bytes)
            reserved_bytes += artifact.needed.disk_bytes
    good = [artifact for artifact in artifacts if artifact.error is None]
    passes = _passes(good, device)
    built = [together_bytes([artifact.needed.footprint for artifact in taking]) for taking in passes]
    return Planned(
        {artifact.job.name: artifact.needed for artifact in good},
        {artifact.job.name: artifact.error for artifact in artifacts if artifact.error is not None},
        [[artifact.job.name for artifact in taking] for taking in passes],
        max((*built, *(artifact.needed.judging_bytes for artifact in good)), default=0),
        reserved_bytes,
    )


def build(
    recipe: Recipe,
    *,
    out: Path,
    device: torch.device,
    fresh: bool = False,
    validated: bool = True,
    progress: Progress | None = None,
) -> Build:
    """Take a checkpoint to an artifact with its record and card; finished layers survive an interruption.

    Args:
        recipe: what to build.
        out: the artifact's folder; appears whole or not at all.
        device: where to compute.
        fresh: throw away what an earlier run left.
        validated: judge the artifact against its source afterwards.
        progress: told what is going on.

    Raises:
        QuantkitError: whatever is wrong; nothing is left half-written.
    """
    job = Job(out.name, recipe, out)
    (outcome,) = build_all([job], device=device, fresh=fresh, validated=validated, progress=progress)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.build is not None, "neither built nor failed"
    return outcome.build


def build_all(
    jobs: Sequence[Job],
    *,
    device: torch.device,
    fresh: bool = False,
    validated: bool = True,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> list[Outcome]:
    """Build recipes side by side: every artifact is to the byte what `build` makes of its recipe alone.

    One that is refused or fails is left behind, and the others go on; each has its own work folder, so that the same
    call continues all of them after an interruption. Recipes that do not fit into memory together go one after another.

    Args:
        jobs: what to build, each into a folder of its own.
        device, fresh, validated, progress: as for `build`.
        ranks: the processes that make a single artifact together; the first alone writes, judges and has its record.
    """
    _require_divisible(jobs, ranks.size)
    validated = validated and ranks.is_first
    progress, once, reserved_bytes = progress or Progress(), Once(), 0
    artifacts = [Making(job, device, _named(progress, job) if len(jobs) > 1 else progress, ranks) for job in jobs]
    with ExitStack() as locks:
        for artifact in artifacts:
            with artifact.turn():
                if ranks.is_first:
                    locks.enter_context(locked(artifact.job.out))
                artifact.open(once, fresh=fresh, validated=validated, reserved_bytes=reserved_bytes)
                reserved_bytes += artifact.needed.disk_bytes if artifact.record is None else 0
        for taking in _passes([each for each in artifacts if each.error is None and each.record is None], device):
            _make(taking, once, fresh=fresh)
        for artifact in artifacts:
            if validated and artifact.record is not None:
                with artifact.turn():
                    artifact.judge()
    return [artifact.outcome for artifact in artifacts]


def _require_divisible(jobs: Sequence[Job], ranks: int) -> None:
    """Stop at what several processes cannot make together."""
    if ranks == 1:
        return
    if len(jobs) > 1:
        raise RefusedError(
            f"{ranks} processes make one artifact together, not {len(jobs)}",
            where=TOGETHER,
            fix="name one recipe, or build all of them with one process",
        )
    for job in jobs:
        if job.recipe.upstream is not None:
            raise RefusedError(
                f"the engine {job.recipe.engine} is one process",
                where=TOGETHER,
                fix=f'build it with one process, or with engine = "{OWN_ENGINE}"',
            )


def _named(progress: Progress, job: Job) -> Progress:
    """Progress in which a job's linears and stages bear its name."""
    return replace(
        progress,
        stage=lambda name: progress.stage(f"{job.name}: {name}"),
        linear=lambda facts: progress.linear(replace(facts, name=f"{job.name} {facts.name.removeprefix('model.')}")),
    )


def _passes(artifacts: list[Making], device: torch.device) -> list[list[Making]]:
    """Artifacts that go through a checkpoint together, as many as memory allows."""
    found = in_passes([artifact.needed.footprint for artifact in artifacts], free_bytes(device))
    return [[artifacts[place] for place in places] for places in found]


def _make(artifacts: list[Making], once: Once, *, fresh: bool) -> None:
    """Take artifacts through their passes side by side, an item each in turn; one that fails stays behind."""
    for artifact in artifacts:
        with artifact.turn("prepare"):
            artifact.begin(once, fresh=fresh)
    for number in range(max(len(artifact.passes) for artifact in artifacts)):
        taking = [each for each in artifacts if each.error is None and number < len(each.passes)]
        if not taking:
            break
        with SourcePass(taking[0].source.checkpoint) as shared:
            walks: dict[Making, Iterator[None]] = {}
            for artifact in taking:
                stage, walk = artifact.passes[number]
                with artifact.turn(stage):
                    walks[artifact] = walk(shared)
            while walks:
                for artifact in list(walks):
                    with artifact.turn(artifact.passes[number][0]):
                        if next(walks[artifact], END) is not END:
                            continue
                    del walks[artifact]
        for artifact in taking:
            if artifact.error is None and number + 1 == len(artifact.passes) and artifact.ranks.is_first:
                with artifact.turn():
                    artifact.assemble()
