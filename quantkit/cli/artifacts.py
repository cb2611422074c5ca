"""Commands about artifacts that are there: judged, looked at, drawn, published."""

import json
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.options import Device, Folder, Json, Junit, Readable
from quantkit.cli.output import errors_in, fail, gate_error, print_document, print_result, say, write_junit
from quantkit.errors import QuantkitError


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

    with errors_in(junit, artifact.name), Display() as display:
        result = run(
            artifact,
            model=model,
            texts=tuple(text or ()),
            runtime=runtime,
            device=choose_device(device),
            progress=display.progress,
            say=say,
        )
    write_junit(junit, [result], {}, several=False)
    print_result(result, as_json, table=result, title=str(artifact))
    if failed := gate_error(result, artifact):
        raise failed


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
    print_document(found if as_json else None, inspection_lines(found))
    if found["changed"] or found["signature"] == BROKEN:
        raise typer.Exit(1)


def report(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Folders of artifacts of one model.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the report goes.")] = Path("report"),
    as_json: Json = False,
) -> None:
    """Draw all artifacts of a model: one page that needs nothing else, its data, and plots as pictures."""
    from quantkit.lock import lock_file
    from quantkit.report.page import DATA, write_report
    from quantkit.report.record import built_record
    from quantkit.workdir import real, work_folder

    good, errors = [], {}
    # of `artifacts/*`, what a build that is at work or was stopped has beside its artifact
    beside = {lock_file(folder) for folder in artifacts} | {work_folder(folder) for folder in artifacts}
    for folder in artifacts:
        if real(folder) in beside:
            continue
        try:
            built_record(folder)
        except QuantkitError as error:
            errors[str(folder)] = error
        else:
            good.append(folder)
    if not good:
        fail(errors, several=len(errors) > 1)
    written = write_report(good, out)
    for path in written:
        say(f"wrote {path}")
    if as_json:
        print_document(json.loads((out / DATA).read_text(encoding="utf-8")), [])
    # of what is left out
    fail(errors, several=True)


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
        say=say,
    )
    print_document(found if as_json else None, publication_lines(found))
