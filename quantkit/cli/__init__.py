"""The command line: the only place that prints or exits.

Results go to stdout (a table, or one JSON document with --json), progress and messages to stderr. Stages are imported
inside the commands, so that `quantkit --help` starts without torch.
"""

import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quantkit import __version__
from quantkit.cli import artifacts, builds, cluster, machine, recipes
from quantkit.cli.output import INTERRUPTED_CODE, discard_output, escape_unencodable, interrupted, say
from quantkit.errors import QuantkitError, RunFailedError

OBJECTS_BETWEEN_COLLECTIONS = 1_000_000  # that are new; imports make less


class _Interruptible(TyperGroup):
    """Commands that say what an interrupt leaves; typer itself ends without a word, and `main` never sees it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say(interrupted())
            raise typer.Exit(INTERRUPTED_CODE) from None


app = typer.Typer(
    name="quantkit",
    cls=_Interruptible,
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

# in the order of --help
COMMANDS: dict[typer.Typer, dict[str, Callable[..., None]]] = {
    app: {
        "build": builds.build,
        "validate": artifacts.validate,
        "inspect": artifacts.inspect,
        "report": artifacts.report,
        "publish": artifacts.publish,
        "plan": builds.plan,
        "submit": cluster.submit,
        "jobs": cluster.jobs,
        "demo": builds.demo,
        "doctor": machine.doctor,
    },
    recipes_app: {
        "list": recipes.names,
        "show": recipes.show,
        "copy": recipes.copy,
        "check": recipes.check,
        "pin": recipes.pin,
        "schema": recipes.schema,
    },
    engines_app: {
        "list": machine.engines,
        "install": machine.install,
        "check": machine.check,
    },
}
for group, commands in COMMANDS.items():
    for name, command in commands.items():
        group.command(name)(command)


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
    warn_of_conflicts(say)
    if context.invoked_subcommand not in (None, "build"):
        require_alone(context.invoked_subcommand)


def main() -> None:
    """Entry point: run a command, and turn a known failure into its message and exit code."""
    for stream in ("stdout", "stderr"):
        # closed by whoever started us: what is opened next would be written to in its place
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
    escape_unencodable()
    try:
        app()
    except QuantkitError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        known = RunFailedError(
            error.strerror or str(error) or type(error).__name__,
            where=_place(error),
            fix="see that it can be read or written, and run the same command again",
        )
        say(f"error: {known}")
        sys.exit(known.exit_code)
    except KeyboardInterrupt:
        say(interrupted())
        sys.exit(INTERRUPTED_CODE)


def run() -> None:
    """What the installed command starts: `main`, and after a success the end at once.

    Looking for cycles among all that is imported takes most of a second, taking it apart at the end another, and
    nothing of ours waits for either: no weights are in cycles.
    """
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    # what cannot be written is told by the ordinary end
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _place(error: OSError) -> str:
    return "" if error.filename is None else str(error.filename)
