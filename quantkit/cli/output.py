"""What commands leave behind them: lines and tables, one JSON document, JUnit XML, an exit code."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from quantkit.errors import GateError, QuantkitError, RefusedError, worst

if TYPE_CHECKING:
    from quantkit.job import Build

# as a shell has it for SIGINT
INTERRUPTED_CODE = 130


def print_document(document: Any, lines: list[str]) -> None:
    """One JSON document if there is one, else lines."""
    from quantkit.files import json_text

    if document is not None:
        lines = [json_text(document)]
    for line in lines:
        typer.echo(line)


def interrupted() -> str:
    """What an interrupt leaves; `--fresh`, given again, would throw it away."""
    again = "the same command without --fresh" if "--fresh" in sys.argv else "the same command"
    return f"interrupted; finished layers are kept, {again} goes on"


def say(message: str) -> None:
    """A message, to stderr."""
    typer.echo(message, err=True)


def escape_unencodable() -> None:
    """Let streams of fewer letters than Unicode's (a code page) show the others by their numbers."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Drop what stdout does not take: Python would try again at its end, and end with another error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_result(document: dict[str, Any], as_json: bool, *, table: dict[str, Any] | None, title: str) -> None:
    """What became of one artifact: as JSON, as the table of its validation, or that there was none."""
    from quantkit.display import print_table
    from quantkit.report.table import rows

    if as_json:
        print_document(document, [])
    elif table is not None:
        print_table(title, rows(table["format"], table))
    else:
        print_document(None, [f"{title}: built, not validated"])


def print_results(
    builds: dict[str, "Build"],
    judged: dict[str, dict[str, Any]],
    errors: dict[str, QuantkitError],
    as_json: bool,
    *,
    title: str,
) -> None:
    """Several artifacts in one table, or with their records, folders and errors as JSON, by the recipes' names."""
    from quantkit.display import print_table
    from quantkit.report.table import rows_of_several

    if as_json:
        artifacts = {name: {"folder": str(done.out), "record": done.record} for name, done in builds.items()}
        print_document({"artifacts": artifacts, "errors": {name: error.what for name, error in errors.items()}}, [])
        return
    if judged:
        print_table(title, rows_of_several({name: (verdict, None) for name, verdict in judged.items()}))
    print_document(None, [f"{name}: built, not validated" for name in builds if name not in judged])


def write_junit(
    path: Path | None, validations: list[dict[str, Any]], errors: dict[str, QuantkitError], *, several: bool
) -> None:
    """Gates, and of several builds the errors too, if a file was asked for and there is something to say."""
    from quantkit.report.junit import junit, junit_of_several

    if path is None or not (validations or errors):
        return
    said = {name: str(error) for name, error in errors.items()}
    _write_below(path, junit_of_several(validations, said) if several else junit(validations[0]))


@contextmanager
def errors_in(path: Path | None, name: str) -> Iterator[None]:
    """Write JUnit XML with one error for what ends before there are gates: a CI system shows no missing file.

    Raises:
        RefusedError: it could not be written, before the work.
    """
    from quantkit.report.junit import junit_error

    if path is not None:
        _require_place(path)
    try:
        yield
    except (QuantkitError, KeyboardInterrupt) as error:
        if path is not None:
            _write_below(path, junit_error(name, str(error) or interrupted()))
        raise


def _require_place(path: Path) -> None:
    """Stop where a file cannot be; the folder it goes into is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = path.is_dir() or not os.access(path.parent, os.W_OK)
    except OSError:
        taken = True
    if taken:
        raise RefusedError(f"{path} cannot be written", where="--junit", fix="choose another file")


def _write_below(path: Path, text: str) -> None:
    """Write a file into a folder that is made if it is not there."""
    from quantkit.files import disk_errors, write_text

    with disk_errors(path, "choose another file with --junit"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def gate_error(validation: dict[str, Any], where: Path) -> QuantkitError | None:
    """The error that a gate which failed ends with; None if all passed."""
    if validation["gate"]["passed"]:
        return None
    return GateError(
        "the artifact is kept but may not be published:\n  " + "\n  ".join(validation["gate"]["failures"]),
        where=str(where),
        fix="more bits, a smaller group, more calibration text, or other gates in the recipe",
    )


def fail(errors: dict[str, QuantkitError], *, several: bool) -> None:
    """End with the error there is; of several, say each once with the names it is of, and exit as the worst would."""
    named: dict[str, list[str]] = {}
    for name, error in errors.items():
        if not several:
            raise error
        named.setdefault(str(error), []).append(name)
    for said, names in named.items():
        say(f"error: {', '.join(names)}: {said}")
    if errors:
        raise typer.Exit(worst(error.exit_code for error in errors.values()))
