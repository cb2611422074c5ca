"""Commands about this machine and the upstream packages on it."""

from typing import Annotated

import typer

from quantkit.cli.options import Json
from quantkit.cli.output import print_document, say


def doctor(as_json: Json = False) -> None:
    """Show what this machine can run, and how to get the rest."""
    from quantkit.doctor import diagnose, diagnosis_lines

    found = diagnose()
    print_document(found if as_json else None, diagnosis_lines(found))
    if found["problems"]:
        raise typer.Exit(4)


def engines(as_json: Json = False) -> None:
    """Upstream packages that can read artifacts, and whether they run here."""
    from quantkit.engines.env import describe, engine_lines, list_engines

    found = [describe(engine) for engine in list_engines()]
    print_document(found if as_json else None, engine_lines(found))


def install(engine: Annotated[str, typer.Argument(metavar="ENGINE", help="Name of an engine.")]) -> None:
    """Install an engine into an environment of its own; says the download size first."""
    from quantkit.engines.env import find_engine
    from quantkit.engines.env import install as run

    run(find_engine(engine), say)


def check(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="Name of an engine.")], as_json: Json = False
) -> None:
    """Let an engine quantize bielik-nano and read the result back; one that only reads gets an artifact of ours."""
    from quantkit.display import Display
    from quantkit.engine_check import check_engine
    from quantkit.engines.env import find_engine
    from quantkit.nano import NAME

    with Display() as display:
        found = check_engine(find_engine(engine), NAME, display.progress)
    print_document(found if as_json else None, [f"{key:<20}{value}" for key, value in found.items()])
