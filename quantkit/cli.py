"""The command line: the only place that prints or exits.

Results go to stdout (a table, or one JSON document with --json), progress and messages to stderr. Stages are imported
inside the commands, so that `quantkit --help` starts without torch.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit import __version__
from quantkit.errors import QuantkitError, worst

if TYPE_CHECKING:
    from quantkit.cluster import BuildJob, Resources
    from quantkit.job import Job
    from quantkit.ranks import Ranks
    from quantkit.recipe import Recipe

INTERRUPTED = "interrupted; finished layers are kept, the same command goes on"

app = typer.Typer(
    name="quantkit",
    help="From a bf16 checkpoint to validated, quantized releases, by recipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="Find, own and check recipes.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")
engines_app = typer.Typer(
    help="The isolated environments of upstream packages.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(engines_app, name="engines")

Name = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe of the default model, <model>/<name>, or a path.")
]
Names = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe of the default model, <model>/<name>, or a path; all or <model>/all for each."
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact.")]
Readable = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact, or a .gguf file.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="DIR_OR_ID", help="Source model instead of the recipe's.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Artifact folder, of several their parent [default: artifacts/<model>-<FORMAT>]."
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cuda|cpu", help="Where to compute.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key; repeatable.")]
Size = Annotated[
    int, typer.Option("--ranks", metavar="N", min=1, help="Processes that make the artifact together, a GPU each.")
]
Junit = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Also write the gates as JUnit XML, for CI systems.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from quantkit.conflicts import warn_of_conflicts
    from quantkit.launch import require_alone

    if not sys.stderr.isatty():
        # read when the Hub's client is imported; progress is plain lines then
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warn_of_conflicts(_say)
    if context.invoked_subcommand not in (None, "build"):
        require_alone(context.invoked_subcommand)


@app.command()
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
    from quantkit.display import Display
    from quantkit.errors import RefusedError
    from quantkit.machine import choose_device
    from quantkit.pipeline import build_all as run
    from quantkit.recipe import require_pinned

    if junit is not None and no_validate:
        raise RefusedError("there are no gates to write without a validation", where="--junit", fix="validate it too")
    if size > 1 and not _is_one_of(size):
        with _errors_in(junit, out.name if out else recipe):
            _start_ranks(size)
        return
    several = _means_several(recipe)
    with _together(device) as ranks, _errors_in(junit if ranks.is_first else None, out.name if out else recipe):
        jobs, errors = _jobs(recipe, changes, model, out)
        if release:
            for job in jobs:
                require_pinned(job.recipe)
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
            _fail(errors, several=False)
    if not ranks.is_first:
        return
    builds = {outcome.name: outcome.build for outcome in outcomes if outcome.build is not None}
    for done in builds.values():
        if done.reused:
            _say(f"{done.out} was complete already")
    for unpinned in {done.unpinned: None for done in builds.values() if done.unpinned}:
        _say(f'the recipe names no revision; this build used:\n  [model]\n  revision = "{unpinned}"')
    records = {name: done.record for name, done in builds.items()}
    judged = {name: record["validation"] for name, record in records.items() if record["validation"] is not None}
    _write_junit(junit, list(judged.values()), errors, several=several)
    if several:
        _results(records, judged, as_json, title=recipe)
    for name, done in () if several else builds.items():
        _result(done.record, as_json, table=judged.get(name), title=str(done.out))
    for name, verdict in judged.items():
        if name not in errors and (failed := _gate_error(verdict, builds[name].out)):
            errors[name] = failed
    _fail(errors, several=several)


@app.command()
def validate(
    artifact: Readable,
    model: Annotated[
        str | None, typer.Option("--model", metavar="REFERENCE", help="Reference model [default: the record's source].")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="NAME_OR_JSONL", help="Text to judge by; repeatable.")
    ] = None,
    runtime: Annotated[
        str, typer.Option("--runtime", metavar="reference|native|both|ENGINE", help="Who runs the artifact.")
    ] = "reference",
    device: Device = "auto",
    junit: Junit = None,
    as_json: Json = False,
) -> None:
    """Judge an artifact of any known format against its reference."""
    from quantkit.display import Display
    from quantkit.judgement import validate as run
    from quantkit.machine import choose_device

    with _errors_in(junit, artifact.name), Display() as display:
        result = run(
            artifact,
            model=model,
            texts=tuple(text or ()),
            runtime=runtime,
            device=choose_device(device),
            progress=display.progress,
            say=_say,
        )
    _write_junit(junit, [result], {}, several=False)
    _result(result, as_json, table=result, title=str(artifact))
    if failed := _gate_error(result, artifact):
        raise failed


@app.command()
def inspect(
    artifact: Readable,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file and compare with the record.")] = False,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", metavar="KEY", help="With --verify: check the signature too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what an artifact is: format, bits per weight, sizes, record."""
    from quantkit.report.inspect import BROKEN, inspect_artifact, inspection_lines

    found = inspect_artifact(artifact, verify=verify, public_key=public_key)
    _print(found if as_json else None, inspection_lines(found))
    if found["changed"] or found["signature"] == BROKEN:
        raise typer.Exit(1)


@app.command()
def report(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Folders of artifacts of one model.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the report goes.")] = Path("report"),
    as_json: Json = False,
) -> None:
    """Draw all artifacts of a model: one page that needs nothing else, its data, and plots as pictures."""
    from quantkit.report.page import DATA, write_report

    written = write_report(artifacts, out)
    for path in written:
        _say(f"wrote {path}")
    if as_json:
        _print(json.loads((out / DATA).read_text(encoding="utf-8")), [])


@app.command()
def publish(
    artifact: Folder,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="ORG/NAME", help="Hub repository [default: the recipe's].")
    ] = None,
    revision: Annotated[str, typer.Option("--revision", metavar="BRANCH", help="Branch to commit to.")] = "main",
    private: Annotated[bool, typer.Option("--private/--public", help="Of a repository that is made now.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be uploaded, and upload nothing.")
    ] = False,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign what goes up with this private key (PEM).")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Report whose plots the card is to show.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload the variants of an artifact that passed their gates to the Hub, in one commit for each branch."""
    from quantkit.publish import publication_lines
    from quantkit.publish import publish as run

    found = run(
        artifact,
        repo=repo,
        revision=revision,
        private=private,
        dry_run=dry_run,
        key=sign,
        report=report,
        say=_say,
    )
    _print(found if as_json else None, publication_lines(found))


@app.command()
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
    from quantkit.display import Display
    from quantkit.machine import choose_device
    from quantkit.pipeline import plan_all as run
    from quantkit.plan import plan_lines, together_lines

    jobs, errors = _jobs(recipe, changes, model, out)
    with Display() as display:
        found = run(jobs, device=choose_device(device), progress=display.progress, ranks=size)
    several = _means_several(recipe)
    for name, each in found.plans.items():
        lines = [f"{name}:", *(f"  {line}" for line in plan_lines(each))] if several else plan_lines(each)
        _print(each.facts() if as_json and not several else None, [] if as_json else lines)
    errors |= found.errors
    if several:
        document = found.facts() | {"errors": {name: error.what for name, error in errors.items()}}
        _print(document if as_json else None, together_lines(found.passes, found.memory_bytes, found.disk_bytes))
    _fail(errors, several=several)


@app.command()
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
    from quantkit import cluster
    from quantkit.errors import RefusedError
    from quantkit.recipe import recipes_named, require_pinned

    named = [each for recipe in recipes for each in recipes_named(recipe)]
    if publish:
        for each in named:
            require_pinned(_recipe(each, changes, model)[0])
    limit = cluster.minutes_of(time_limit)
    asked = cluster.Resources(limit, cpus, memory, gpus, size, partition=partition, account=account, qos=qos)
    jobs = [_job(each, out, changes, model, asked) for each in named]
    artifacts = tuple(job.out for job, _ in jobs)
    if len(set(artifacts)) < len(artifacts):
        raise RefusedError("a recipe is named twice", where=" ".join(recipes), fix="name each once")
    after = cluster.ReleaseJob(artifacts, (out / "report").absolute(), publish)
    if dry_run:
        found = cluster.requests(jobs)
    else:
        found = cluster.submit(jobs, after, folder=out / cluster.LOGS, at_once=at_once)
    if wait and not dry_run:
        found = cluster.wait(out / cluster.LOGS, (job["name"] for job in found), _say)
    _print(found if as_json else None, cluster.job_lines(found))
    if wait and (code := cluster.exit_code(found)):
        raise typer.Exit(code)


@app.command()
def jobs(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Where the artifacts of `quantkit submit` go.")] = Path(
        "artifacts"
    ),
    as_json: Json = False,
) -> None:
    """What became of the jobs of `quantkit submit`, and where their logs are."""
    from quantkit import cluster

    found = cluster.submitted_jobs(out / cluster.LOGS)
    _print(found if as_json else None, cluster.job_lines(found))


@app.command()
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
        _print(found.document(), [])
    else:
        print_table("bielik-nano on held-out Polish text", found.rows)
        _print(None, found.remarks)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine can run, and how to get the rest."""
    from quantkit.doctor import diagnose, diagnosis_lines

    found = diagnose()
    _print(found if as_json else None, diagnosis_lines(found))
    if found["problems"]:
        raise typer.Exit(4)


@recipes_app.command("list")
def recipes_list(as_json: Json = False) -> None:
    """Names of all shipped recipes."""
    from quantkit.recipe import list_recipes

    names = list_recipes()
    _print(names if as_json else None, names)


@recipes_app.command("show")
def recipes_show(recipe: Name, changes: Set = None, as_json: Json = False) -> None:
    """A recipe with every key resolved."""
    from quantkit.recipe import as_toml

    resolved = _recipe(recipe, changes, None)[0].resolved()
    _print(resolved if as_json else None, [as_toml(resolved)])


@recipes_app.command("copy")
def recipes_copy(
    recipe: Name, target: Annotated[Path, typer.Argument(metavar="FILE", help="New recipe file; must not exist.")]
) -> None:
    """Write a shipped recipe, resolved, as a file of your own."""
    from quantkit.recipe import copy_recipe

    copy_recipe(recipe, target)
    _say(f"wrote {target}")


@recipes_app.command("check")
def recipes_check(recipe: Name, changes: Set = None) -> None:
    """Check a recipe and print every problem at once."""
    _recipe(recipe, changes, None)
    _say(f"{recipe} is a good recipe")


@recipes_app.command("pin")
def recipes_pin(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe file, or base.toml, to write into.")],
) -> None:
    """Write the commit hash that the model's main branch has now into a recipe file, or one that recipes extend."""
    from quantkit.hub import resolve_revision
    from quantkit.recipe import model_named_in, pin_recipe

    revision = resolve_revision(model_named_in(path))
    pin_recipe(path, revision)
    _say(f"{path}: model.revision = {revision}")


@recipes_app.command("schema")
def recipes_schema() -> None:
    """The JSON Schema of a recipe."""
    from quantkit.recipe import schema

    _print(schema(), [])


@engines_app.command("list")
def engines_list(as_json: Json = False) -> None:
    """Upstream packages that can read artifacts, and whether they run here."""
    from quantkit.engines.env import describe, engine_lines, list_engines

    found = [describe(engine) for engine in list_engines()]
    _print(found if as_json else None, engine_lines(found))


@engines_app.command("install")
def engines_install(engine: Annotated[str, typer.Argument(metavar="ENGINE", help="Name of an engine.")]) -> None:
    """Install an engine into an environment of its own; says the download size first."""
    from quantkit.engines.env import find_engine, install

    install(find_engine(engine), _say)


@engines_app.command("check")
def engines_check(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="Name of an engine.")], as_json: Json = False
) -> None:
    """Let an engine quantize bielik-nano and read the result back; one that only reads gets an artifact of ours."""
    from quantkit.display import Display
    from quantkit.engine_check import check_engine
    from quantkit.engines.env import find_engine
    from quantkit.nano import NAME

    with Display() as display:
        found = check_engine(find_engine(engine), NAME, display.progress)
    _print(found if as_json else None, [f"{key:<20}{value}" for key, value in found.items()])


def _recipe(name: str, changes: list[str] | None, model: str | None) -> "tuple[Recipe, str]":
    from quantkit.recipe import find_recipe, load_recipe

    path = find_recipe(name)
    return load_recipe(path, tuple(changes or ()), model=model), path.stem


def _means_several(name: str) -> bool:
    """Whether a name on the command line stands for several recipes, even if they are one."""
    from quantkit.recipe import recipes_named

    return recipes_named(name) != [name]


def _jobs(
    name: str, changes: list[str] | None, model: str | None, out: Path | None
) -> "tuple[list[Job], dict[str, QuantkitError]]":
    """The builds that a name means, and of several those that their recipes rule out."""
    from quantkit.job import Job
    from quantkit.pipeline import default_out
    from quantkit.recipe import recipes_named

    if not _means_several(name):
        chosen, stem = _recipe(name, changes, model)
        return [Job(name, chosen, out or default_out(chosen, stem))], {}
    jobs, errors = [], {}
    for each in recipes_named(name):
        try:
            chosen, stem = _recipe(each, changes, model)
        except QuantkitError as error:
            errors[each.rpartition("/")[2]] = error
            continue
        target = default_out(chosen, stem)
        jobs.append(Job(stem, chosen, target if out is None else out / target.name))
    return jobs, errors


def _job(
    name: str, out: Path, changes: list[str] | None, model: str | None, asked: "Resources"
) -> "tuple[BuildJob, Resources]":
    """A build of `quantkit submit` and what it asks for."""
    import torch

    from quantkit import cluster
    from quantkit.display import Display
    from quantkit.pipeline import default_out
    from quantkit.pipeline import plan as run

    chosen, stem = _recipe(name, changes, model)
    asked = replace(asked, ranks=cluster.ranks_of(asked, divisible=chosen.upstream is None))
    target = (out / default_out(chosen, stem).name).absolute()
    with Display() as display:
        # this machine only submits: what it has itself does not matter
        found = run(
            chosen, out=target, device=torch.device("cpu"), progress=display.progress, here=False, ranks=asked.ranks
        )
    granted = cluster.resources(
        asked,
        threads=chosen.compute.threads,
        rank_bytes=found.rank_bytes,
        waiting_bytes=found.waiting_bytes,
    )
    given: tuple[str, ...] = ("--device", "cuda" if granted.gpus else "cpu")
    given += ("--ranks", str(granted.ranks)) if granted.ranks > 1 else ()
    given += tuple(part for change in changes or () for part in ("--set", change))
    given += ("--model", model) if model is not None else ()
    return cluster.BuildJob(name, target, given), granted


def _result(document: dict[str, Any], as_json: bool, *, table: dict[str, Any] | None, title: str) -> None:
    from quantkit.display import print_table
    from quantkit.report.table import rows

    if as_json:
        _print(document, [])
    elif table is not None:
        print_table(title, rows(table["format"], table))
    else:
        _print(None, [f"{title}: built, not validated"])


def _results(
    records: dict[str, dict[str, Any]], judged: dict[str, dict[str, Any]], as_json: bool, *, title: str
) -> None:
    """Several artifacts in one table, or their records as a list."""
    from quantkit.display import print_table
    from quantkit.report.table import rows_of_several

    if as_json:
        _print(list(records.values()), [])
        return
    if judged:
        print_table(title, rows_of_several({name: (verdict, None) for name, verdict in judged.items()}))
    _print(None, [f"{name}: built, not validated" for name in records if name not in judged])


def _write_junit(
    path: Path | None, validations: list[dict[str, Any]], errors: dict[str, QuantkitError], *, several: bool
) -> None:
    from quantkit.report.junit import junit, junit_of_several

    if path is None or not (validations or errors):
        return
    said = {name: str(error) for name, error in errors.items()}
    _write_below(path, junit_of_several(validations, said) if several else junit(validations[0]))


@contextmanager
def _errors_in(path: Path | None, name: str) -> Iterator[None]:
    """Write JUnit XML with one error for what ends before there are gates: a CI system shows no missing file."""
    from quantkit.report.junit import junit_error

    try:
        yield
    except (QuantkitError, KeyboardInterrupt) as error:
        if path is not None:
            _write_below(path, junit_error(name, str(error) or INTERRUPTED))
        raise


def _write_below(path: Path, text: str) -> None:
    """Write a file into a folder that is made if it is not there."""
    from quantkit.workdir import disk_errors, write_text

    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _is_one_of(size: int) -> bool:
    """Whether this process is one of so many that were started together already.

    Raises:
        RefusedError: it is one of another number.
    """
    from quantkit.errors import RefusedError
    from quantkit.launch import launched

    if launched() not in (1, size):
        raise RefusedError(
            f"--ranks {size}, and torchrun has started {launched()}",
            where="--ranks",
            fix="leave --ranks out under torchrun, or torchrun with --ranks",
        )
    return launched() == size


def _start_ranks(size: int) -> None:
    """Run this command as several processes, and end as they do."""
    from quantkit.launch import start

    codes = start(size, [sys.executable, "-m", "quantkit", *sys.argv[1:]])
    for rank, code in codes.items():
        if code < 0:
            _say(
                f"error: rank {rank} of {size} was killed by {signal.Signals(-code).name}\n"
                "  fix: see whether the machine has enough memory (`quantkit plan` with --ranks); finished layers are "
                "kept, the same command goes on"
            )
            # whoever waits for this process must learn of a signal as if it had been the build itself
            os.kill(os.getpid(), -code)
    if code := worst(codes.values()):
        raise typer.Exit(code)


@contextmanager
def _together(device: str) -> Iterator["Ranks"]:
    """The processes that were started together, if they were; one of them tells of an error, and all end with it."""
    from quantkit.launch import end_with_launcher, launched
    from quantkit.machine import choose_device
    from quantkit.ranks import ALONE, joined

    end_with_launcher()
    if launched() == 1:
        yield ALONE
        return
    with joined(choose_device(device)) as ranks:
        try:
            yield ranks
        except QuantkitError as error:
            if ranks.fails_first():
                _say(f"error: {error}" if ranks.is_first else f"error on rank {ranks.rank}: {error}")
            raise typer.Exit(error.exit_code) from None


def _gate_error(validation: dict[str, Any], where: Path) -> QuantkitError | None:
    from quantkit.errors import GateError

    if validation["gate"]["passed"]:
        return None
    return GateError(
        "the artifact is kept but may not be published:\n  " + "\n  ".join(validation["gate"]["failures"]),
        where=str(where),
        fix="more bits, a smaller group, more calibration text, or other gates in the recipe",
    )


def _fail(errors: dict[str, QuantkitError], *, several: bool) -> None:
    """End with the error there is; of several, name each and exit as the worst of them would."""
    for name, error in errors.items():
        if not several:
            raise error
        _say(f"error: {name}: {error}")
    if errors:
        raise typer.Exit(worst(error.exit_code for error in errors.values()))


def _print(document: Any, lines: list[str]) -> None:
    """One JSON document if there is one, else lines."""
    if document is not None:
        lines = [json.dumps(document, ensure_ascii=False, indent=2)]
    for line in lines:
        typer.echo(line)


def _say(message: str) -> None:
    typer.echo(message, err=True)


def main() -> None:
    """Entry point: run a command, and turn a known failure into its message and exit code."""
    try:
        app()
    except QuantkitError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say(INTERRUPTED)
        sys.exit(1)
