"""Progress and tables for people: live where stderr is a terminal, plain lines where it is not."""

import math
import sys
import time
from datetime import timedelta
from types import TracebackType

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from quantkit.progress import Progress as Listener
from quantkit.qtensor import LinearFacts
from quantkit.report.table import COLUMNS

PLAIN_SECONDS = 5.0  # between two plain lines of the same task


class Display:
    """A context in which `progress` shows what a run reports."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said_at: dict[str, float] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._current: str | None = None
        self.progress = Listener(stage=self._stage, steps=self._steps, linear=self._linear)

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _stage(self, name: str) -> None:
        self._current = None
        if self._live:
            self._bars.console.print(name, style="dim")
        else:
            _line(name)

    def _steps(self, what: str, done: int, total: int) -> None:
        self._current = what
        if self._live:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total, detail="")
            self._bars.update(self._tasks[what], completed=done, total=total)
            return
        now = time.monotonic()
        begun, first = self._begun.setdefault(what, (now, done))
        if done == total or now - self._said_at.get(what, -math.inf) >= PLAIN_SECONDS:
            self._said_at[what] = now
            left = f"  ETA {_duration((now - begun) / (done - first) * (total - done))}" if first < done < total else ""
            _line(f"{what} {done}/{total}  memory {_memory()}{left}")

    def _linear(self, facts: LinearFacts) -> None:
        loss = "" if facts.loss is None else f"  loss {facts.loss:.2e}"
        detail = f"{facts.name.removeprefix('model.')}{loss}  {facts.elapsed_s:.1f} s"
        if self._live and self._current in self._tasks:
            self._bars.update(self._tasks[self._current], detail=f"{detail}  {_memory()}")
        elif not self._live:
            _line(f"  {detail}")


def print_table(title: str, rows: list[list[str]]) -> None:
    """A table of results on stdout; wide enough for every column where stdout is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(160, console.width))
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("format", "gate") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """As H:MM:SS."""
    return str(timedelta(seconds=round(seconds)))


def _memory() -> str:
    return f"{psutil.Process().memory_info().rss / 1e9:.2f} GB"
