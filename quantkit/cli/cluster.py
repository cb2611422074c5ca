"""Commands for a Slurm cluster."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.named import recipe_of
from quantkit.cli.options import Json, Model, Set
from quantkit.cli.output import print_document, say
from quantkit.errors import RefusedError

if TYPE_CHECKING:
    from quantkit.cluster.jobs import BuildJob
    from quantkit.cluster.resources import Resources
    from quantkit.recipe import Recipe


def submit(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...", help="Recipes of the default model, <model>/<name>, paths, or all."),
    ],
    model: Model = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the artifacts go.")] = Path("artifacts"),
    changes: Set = None,
    partition: Annotated[str | None, typer.Option("--partition", metavar="NAME", help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="NAME", help="Slurm account, a grant's.")] = None,
    qos: Annotated[str | None, typer.Option("--qos", metavar="NAME", help="Slurm quality of service.")] = None,
    time_limit: Annotated[
        str,
        typer.Option("--time", metavar="LIMIT", help="Minutes, H:MM:SS or D-HH:MM; a build that reaches it goes on."),
    ] = "4:00:00",
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="Of each build [default: the partition's rule].")] = 0,
    size: Annotated[
        int, typer.Option("--ranks", metavar="N", min=0, help="Processes of each build [default: one for each GPU].")
    ] = 0,
    cpus: Annotated[
        int,
        typer.Option("--cpus", min=0, help="Of each build [default: the partition's rule, or each rank's threads]."),
    ] = 0,
    memory: Annotated[
        int, typer.Option("--memory", metavar="GB", min=0, help="Of each build [default: as its plan says].")
    ] = 0,
    at_once: Annotated[
        int | None, typer.Option("--at-once", metavar="N", min=1, help="Most builds that run at a time.")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Publish the artifacts that pass, when all builds have ended.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the end of all, and exit as the worst of them did.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be asked of Slurm, and submit nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build artifacts as Slurm jobs, one each, and report on them when all have ended."""
    from quantkit.cluster.jobs import ReleaseJob, exit_code
    from quantkit.cluster.resources import Resources, minutes_of
    from quantkit.cluster.status import job_lines
    from quantkit.cluster.status import wait as ended
    from quantkit.cluster.submit import LOGS, requests
    from quantkit.cluster.submit import submit as run
    from quantkit.recipe_files import recipes_named

    named = [each for recipe in recipes for each in recipes_named(recipe)]
    chosen = [recipe_of(each, changes, model) for each in named]
    _refuse_what_the_last_job_would([recipe for recipe, _ in chosen], publish=publish)
    asked = Resources(minutes_of(time_limit), cpus, memory, gpus, size, partition=partition, account=account, qos=qos)
    jobs = [job_of(name, *each, out, changes, model, asked) for name, each in zip(named, chosen, strict=True)]
    artifacts = tuple(job.out for job, _ in jobs)
    if len(set(artifacts)) < len(artifacts):
        raise RefusedError("a recipe is named twice", where=" ".join(recipes), fix="name each once")
    after = ReleaseJob(artifacts, (out / "report").absolute(), publish)
    found = requests(jobs) if dry_run else run(jobs, after, folder=out / LOGS, at_once=at_once)
    if wait and not dry_run:
        found = ended(out / LOGS, (job["name"] for job in found), say)
    print_document(found if as_json else None, job_lines(found))
    if wait and (code := exit_code(found)):
        raise typer.Exit(code)


def _refuse_what_the_last_job_would(recipes: "list[Recipe]", *, publish: bool) -> None:
    """It reports on all artifacts together, and publishes to where the recipes say."""
    from quantkit.recipe import require_pinned, require_repository

    if len(models := dict.fromkeys(each.model.id for each in recipes)) > 1:
        raise RefusedError(
            f"these are recipes of several models, and a report is of one: {', '.join(models)}",
            where="RECIPE...",
            fix="submit those of each by themselves, into folders of their own with --out",
        )
    for each in recipes if publish else ():
        require_pinned(each)
        require_repository(each)


def jobs(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Where the artifacts of `quantkit submit` go.")] = Path(
        "artifacts"
    ),
    as_json: Json = False,
) -> None:
    """What became of the jobs of `quantkit submit`, and where their logs are."""
    from quantkit.cluster.status import job_lines, submitted_jobs
    from quantkit.cluster.submit import LOGS

    found = submitted_jobs(out / LOGS)
    print_document(found if as_json else None, job_lines(found))


def job_of(
    name: str,
    recipe: "Recipe",
    stem: str,
    out: Path,
    changes: list[str] | None,
    model: str | None,
    asked: "Resources",
) -> "tuple[BuildJob, Resources]":
    """A build of `quantkit submit` and what it asks for.

    Args:
        name: of the recipe, as a user gives it.
        recipe: what it says, with changes and model; `stem` as `quantkit.cli.named.recipe_of` gives it.
        out: the folder that the artifact's is in.
        changes: of `--set`, and `model` of `--model`, which the job's own command repeats.
        asked: by the user for every build.
    """
    import torch

    from quantkit.cluster.jobs import BuildJob
    from quantkit.cluster.resources import ranks_of, resources
    from quantkit.display import Display
    from quantkit.job import default_out
    from quantkit.pipeline import plan as run

    asked = replace(asked, ranks=ranks_of(asked, divisible=recipe.upstream is None))
    target = (out / default_out(recipe, stem).name).absolute()
    with Display() as display:
        # this machine only submits: what it has itself does not matter
        found = run(
            recipe, out=target, device=torch.device("cpu"), progress=display.progress, here=False, ranks=asked.ranks
        )
    granted = resources(
        asked,
        threads=recipe.compute.threads,
        rank_bytes=found.rank_bytes,
        waiting_bytes=found.waiting_bytes,
        judging_bytes=found.judging_bytes,
    )
    given: tuple[str, ...] = ("--device", "cuda" if granted.gpus else "cpu")
    given += ("--ranks", str(granted.ranks)) if granted.ranks > 1 else ()
    given += tuple(part for change in changes or () for part in ("--set", change))
    given += ("--model", model) if model is not None else ()
    return BuildJob(name, target, given), granted
