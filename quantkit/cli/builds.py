"""Commands that make an artifact, or say what that would take."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.named import jobs_named, means_several
from quantkit.cli.options import Device, Json, Junit, Model, Names, Out, Set, Size
from quantkit.cli.output import (
    errors_in,
    fail,
    gate_error,
    print_document,
    print_result,
    print_results,
    say,
    write_junit,
)
from quantkit.cli.processes import is_one_of, start_ranks, together
from quantkit.errors import RefusedError

if TYPE_CHECKING:
    from quantkit.job import Build


def build(
    recipe: Names,
    model: Model = None,
    out: Out = None,
    device: Device = "auto",
    changes: Set = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what an earlier run left.")] = False,
    no_validate: Annotated[bool, typer.Option("--no-validate", help="Do not judge the artifact.")] = False,
    release: Annotated[
        bool, typer.Option("--release", help="To be published: refuse now what `publish` would refuse then.")
    ] = False,
    size: Size = 1,
    junit: Junit = None,
    as_json: Json = False,
) -> None:
    """Build an artifact by recipe, or all of a model in one pass, then judge it on Polish text."""
    from quantkit.recipe import require_pinned

    if junit is not None and no_validate:
        raise RefusedError("there are no gates to write without a validation", where="--junit", fix="validate it too")
    if release and no_validate:
        raise RefusedError("only what passed its gates is published", where="--release", fix="validate it too")
    title = out.name if out else recipe
    # recipes are read before torch is imported, which takes seconds
    with errors_in(junit, title):
        jobs, errors = jobs_named(recipe, changes, model, out)
        if release:
            for job in jobs:
                require_pinned(job.recipe)
        if size > 1 and not is_one_of(size):
            start_ranks(size)
            return
    several = means_several(recipe)
    with together(device) as ranks, errors_in(junit if ranks.is_first else None, title):
        from quantkit.display import Display
        from quantkit.machine import choose_device
        from quantkit.pipeline import build_all as run

        with Display() if ranks.is_first else nullcontext() as display:
            outcomes = run(
                jobs,
                device=choose_device(device),
                fresh=fresh,
                validated=not no_validate,
                progress=display.progress if display else None,
                ranks=ranks,
            )
        errors |= {outcome.name: outcome.error for outcome in outcomes if outcome.error is not None}
        if not several:
            fail(errors, several=False)
    if not ranks.is_first:
        return
    builds = {outcome.name: outcome.build for outcome in outcomes if outcome.build is not None}
    _say_what_was_found(builds.values())
    judged = {name: done.record["validation"] for name, done in builds.items() if done.record["validation"] is not None}
    write_junit(junit, list(judged.values()), errors, several=several)
    for name, verdict in judged.items():
        if name not in errors and (failed := gate_error(verdict, builds[name].out)):
            errors[name] = failed
    if several:
        print_results(builds, judged, errors, as_json, title=recipe)
    for name, done in () if several else builds.items():
        print_result(done.record, as_json, table=judged.get(name), title=str(done.out))
    fail(errors, several=several)


def _say_what_was_found(builds: "Iterable[Build]") -> None:
    """Of artifacts that were there already, and of models that a recipe does not pin."""
    for done in builds:
        if done.reused:
            say(f"{done.out} was complete already")
    for unpinned in {done.unpinned: None for done in builds if done.unpinned}:
        say(f'the recipe names no revision; this build used:\n  [model]\n  revision = "{unpinned}"')


def plan(
    recipe: Names,
    model: Model = None,
    out: Out = None,
    device: Device = "auto",
    changes: Set = None,
    size: Size = 1,
    as_json: Json = False,
) -> None:
    """Show what a build will need, and refuse now what would fail later."""
    # before what imports torch, as in `build`
    jobs, errors = jobs_named(recipe, changes, model, out)
    from quantkit.display import Display
    from quantkit.machine import choose_device
    from quantkit.pipeline import plan_all as run
    from quantkit.plan import plan_lines, together_lines

    with Display() as display:
        found = run(jobs, device=choose_device(device), progress=display.progress, ranks=size)
    several = means_several(recipe)
    for name, each in found.plans.items():
        lines = [f"{name}:", *(f"  {line}" for line in plan_lines(each))] if several else plan_lines(each)
        print_document(each.facts() if as_json and not several else None, [] if as_json else lines)
    errors |= found.errors
    if several:
        document = found.facts() | {"errors": {name: error.what for name, error in errors.items()}}
        print_document(
            document if as_json else None, together_lines(found.passes, found.memory_bytes, found.disk_bytes)
        )
    fail(errors, several=several)


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the artifacts go.")] = Path("artifacts"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Make bielik-nano, build every recipe of it, judge them, and print the table."""
    from quantkit.demo import run_demo
    from quantkit.display import Display, print_table
    from quantkit.machine import choose_device

    with Display() as display:
        found = run_demo(out, device=choose_device(device), progress=display.progress)
    if as_json:
        print_document(found.document(), [])
    else:
        print_table("bielik-nano on held-out Polish text", found.rows)
        print_document(None, found.remarks)
