"""Solved items on their way to disk: encoded as they come, written durably while the next ones are solved."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType

from torch import Tensor

from quantkit.formats.contract import Format, LaidOut
from quantkit.formats.shards import read_item, write_item
from quantkit.progress import timed
from quantkit.qtensor import Item, QuantizedLinear
from quantkit.workdir import Workdir


class Behind:
    """One piece of work at a time in a thread of its own, while the caller goes on. A context: leaving it waits."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind")
        self._last: Future[None] | None = None

    def __enter__(self) -> "Behind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            self._thread.shutdown()

    def do(self, work: Callable[[], None]) -> None:
        """Begin once what was begun before is done; an error of that is raised here."""
        self._wait()
        self._last = self._thread.submit(work)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()


class Keeping:
    """The items of one artifact, as its format stores them, in its work folder.

    Args:
        form: how they are stored.
        work: where they are kept.
        places: of tensors that go straight into the artifact's files; None where there are no such.
        behind: does the writing; None where another process of the build does.
    """

    def __init__(self, form: Format, work: Workdir, places: LaidOut | None, behind: Behind | None) -> None:
        self._form, self._work, self._places, self._behind = form, work, places, behind
        self._waiting: dict[str, Tensor] = {}  # of the item at work, for its own file

    def finished(self, name: str) -> dict[str, Tensor] | None:
        """The dense tensors of an item that is kept already, by checkpoint name; None of one that is not."""
        if not self._work.is_finished(name):
            return None
        placed = {} if self._places is None else self._places.read(name)
        return self._form.decode_item(read_item(self._work.path(name)) | placed)

    def keep(self, item: Item | None) -> None:
        """Encode a solved item, if it is one, and have it written."""
        if item is None or self._behind is None:
            return
        # encoded here: another thread would have another number of threads below it
        with timed(item.seconds, "pack"):
            tensors = self._form.encode_item(item)
        facts = {"linears": [asdict(fact) for fact in item.facts], "seconds": item.seconds}
        write = partial(self._write, item.name, tensors, item.seconds)
        self._behind.do(partial(self._work.finish, item.name, write, facts))

    def keep_linear(self, item: Item, full: str, linear: QuantizedLinear) -> None:
        """Encode a solved linear of an item, by its full name, and have it put into its places."""
        if self._behind is None:
            return
        with timed(item.seconds, "pack"):
            tensors = self._form.encode_item(Item(item.name, {full: linear}, {}))
        self._behind.do(partial(self._put, tensors, item.seconds))

    def _put(self, tensors: dict[str, Tensor], seconds: dict[str, float]) -> None:
        """Write what has a place in the artifact's files; the rest waits for the item's own."""
        with timed(seconds, "write"):
            self._waiting |= tensors if self._places is None else self._places.write(tensors)

    def _write(self, name: str, tensors: dict[str, Tensor], seconds: dict[str, float], path: Path) -> None:
        self._put(tensors, seconds)
        with timed(seconds, "write"):
            if self._places is not None:
                self._places.keep(name)
            waiting, self._waiting = self._waiting, {}
            write_item(path, waiting)
