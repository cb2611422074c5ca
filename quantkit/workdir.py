"""The work folder of a build: finished items, and an output that appears whole or not at all.

Everything lies in `<out>.work/`: `journal.json` names what the build is made of and which items are finished,
`items/` holds one file each, `artifact/` is filled at the end and renamed to `<out>`; an artifact that was there before
waits in `replaced/` until then. An item counts as finished only once its file is complete on disk and the journal says
so; a kill between the two repeats that item. Whoever works there holds the lock, see `quantkit.lock`.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from quantkit.errors import RefusedError, RunFailedError
from quantkit.files import disk_errors, remove_partials, replacing, write_json

JOURNAL = "journal.json"
RECORD = "quantkit.json"
REPLACED = "replaced"
SHOWN = 10  # names of files in an error
T = TypeVar("T")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines "key: old -> new" for every leaf in which two nested tables differ, in key order."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {_shown(before)} -> {_shown(after)}")
    return lines


def _shown(value: Any) -> str:
    return "(absent)" if value is None else json.dumps(value, ensure_ascii=False)


class Workdir:
    """Finished items of one build, kept until the artifact is complete. Use `open_workdir`.

    Args:
        out: the artifact's final folder.
        identity: gives everything that decides the artifact's bytes, as a nested table; may take its time the first
            time. Asked whenever something is to be kept, so that it can refuse: what it names may have changed.
        journal: what an earlier run left, or an empty journal.
    """

    def __init__(self, out: Path, identity: Callable[[], dict[str, Any]], journal: dict[str, Any]) -> None:
        self.out = real(out)
        self.folder = work_folder(out)
        self._identity = identity
        self._journal = journal
        self._opened = time.perf_counter()
        self._there = _names(self.out)
        self.earlier_seconds = float(journal.get("seconds", 0.0))
        """Wall time of earlier runs, up to the last that they kept."""

    def __getstate__(self) -> dict[str, Any]:
        """For other processes of the build, which keep nothing."""
        return self.__dict__ | {"_identity": None}

    @property
    def artifact(self) -> Path:
        """Where the artifact is put together before it is renamed."""
        return self.folder / "artifact"

    @property
    def facts(self) -> dict[str, Any]:
        """What each finished item left for the record, by item name, in the order they were finished."""
        return {name: entry["facts"] for name, entry in self._journal["items"].items()}

    def path(self, item: str) -> Path:
        """The file of a finished item."""
        return self.folder / "items" / f"{item}.safetensors"

    def is_finished(self, item: str) -> bool:
        return item in self._journal["items"]

    def finish(self, item: str, write: Callable[[Path], None], facts: dict[str, Any]) -> None:
        """Keep one item: `write` fills the file it is given, then the journal names it."""
        self._name_build()
        with disk_errors(self.folder):
            path = self.path(item)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                write(temporary)
            self._journal["items"][item] = {"size_bytes": path.stat().st_size, "facts": facts}
            self._write_journal()

    def note(self, name: str, content: Any) -> None:
        """Keep something for JSON beside the items."""
        self._name_build()
        with disk_errors(self.folder):
            path = self.folder / "notes" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
            self._write_journal()

    def _name_build(self) -> None:
        self._journal = {"identity": self._identity()} | self._journal

    def _write_journal(self) -> None:
        self._journal["seconds"] = self.earlier_seconds + time.perf_counter() - self._opened
        write_json(self.folder / JOURNAL, self._journal)

    def noted(self, name: str) -> Any:
        """What `note` kept under the name; None if nothing was."""
        path = self.folder / "notes" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def lay_out(self, write: Callable[[Path], T]) -> T:
        """Let `write` make or open files in the `artifact` folder before the items; returns what it returns."""
        with disk_errors(self.folder):
            self.artifact.mkdir(parents=True, exist_ok=True)
            return write(self.artifact)

    def forget_items(self) -> None:
        """Count no item as finished."""
        self._journal["items"].clear()

    def assemble(self, write: Callable[[Path], T], *, kept: frozenset[str] = frozenset()) -> T:
        """Fill the `artifact` folder, empty but for files that were laid out; returns what `write` returns.

        Args:
            write: is given the folder.
            kept: names of the files that were laid out.
        """
        with disk_errors(self.folder):
            self.artifact.mkdir(parents=True, exist_ok=True)
            for path in self.artifact.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in kept:
                    path.unlink()
            return write(self.artifact)

    def publish(self) -> None:
        """Put the finished artifact in place of `out`, then drop the work files and what was there before.

        A kill between the two renames leaves the earlier artifact in the work folder: `locked` brings it back.

        Raises:
            RunFailedError: files appeared in `out` since the work folder was opened.
        """
        if appeared := sorted(_names(self.out) - self._there):
            raise RunFailedError(
                f"while the artifact was made there appeared in its place: {', '.join(appeared[:SHOWN])}",
                where=str(self.out),
                fix="move it elsewhere and run the same command again: what was finished is kept",
            )
        with disk_errors(self.out):
            if self.out.exists():
                self.out.replace(self.folder / REPLACED)
            self.artifact.replace(self.out)
        discard_work(self.out)


def _names(folder: Path) -> set[str]:
    """Of all that lies in a folder and below, from there; none where there is no folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def work_folder(out: Path) -> Path:
    """`<out>.work`."""
    return beside(out, ".work")


def real(out: Path) -> Path:
    """The folder itself where `out` is a link to it: what is renamed is the folder, and the link stays."""
    return Path(os.path.realpath(out))


def beside(out: Path, suffix: str) -> Path:
    """The neighbour of a folder that is called as it is, and a suffix.

    Raises:
        RefusedError: the folder is the root, which has no neighbours.
    """
    # "." has no name
    out = real(out)
    if not out.name:
        raise RefusedError(
            f"{out} is no place for an artifact", where=str(out), fix="name a folder below it with --out"
        )
    return out.with_name(out.name + suffix)


def discard_work(out: Path) -> None:
    """Drop the work files of an artifact that is in place; a kill may have left them."""
    folder = work_folder(out)
    if (folder / REPLACED).exists():
        # half deleted it must not look like an artifact to bring back
        shutil.rmtree(folder / "dropped", ignore_errors=True)
        (folder / REPLACED).replace(folder / "dropped")
    shutil.rmtree(folder, ignore_errors=True)


def put_right(out: Path) -> None:
    """Bring back an artifact that was to be replaced, and remove files that were being replaced, when a kill came."""
    out = real(out)
    if (work_folder(out) / REPLACED).exists():
        if out.exists():
            discard_work(out)
        else:
            (work_folder(out) / REPLACED).replace(out)
    if (out / RECORD).exists():
        remove_partials(out)


def open_workdir(out: Path, identity: Callable[[], dict[str, Any]], *, fresh: bool) -> Workdir:
    """The work folder of a build, new or continued. Hold `locked(out)` around its whole use.

    Args:
        out: the artifact's final folder.
        identity: gives everything that decides the artifact's bytes; see `Workdir`.
        fresh: throw away what an earlier run left.

    Raises:
        RefusedError: an earlier run of another recipe, model or version left work there.
        RunFailedError: its journal is damaged.
    """
    folder = work_folder(out)
    if fresh:
        discard_work(out)
    with disk_errors(folder):
        journal_path = folder / JOURNAL
        if journal_path.exists():
            journal = _read_journal(journal_path)
            refuse_other(journal["identity"], identity(), where=folder)
            remove_partials(folder)
        else:
            # a kill may have come while another build's work was being thrown away
            discard_work(out)
            folder.mkdir(parents=True, exist_ok=True)
            # an artifact that is there is made anew, and is not what an interrupted run had been asked for
            journal = {"items": {}, "replaces": fresh and (out / RECORD).exists()}
        work = Workdir(out, identity, journal)
        for item, entry in list(journal["items"].items()):
            path = work.path(item)
            if not path.exists() or path.stat().st_size != entry["size_bytes"]:
                del journal["items"][item]
    return work


def is_being_replaced(out: Path, identity: Callable[[], dict[str, Any]]) -> bool:
    """Whether an interrupted run was making anew, as this very build, the artifact that is there."""
    path = work_folder(out) / JOURNAL
    if not path.exists():
        return False
    journal = _read_journal(path)
    return bool(journal.get("replaces")) and journal["identity"] == identity()


def _read_journal(path: Path) -> dict[str, Any]:
    """What an earlier run left.

    Raises:
        RunFailedError: it is not what a run writes.
    """
    try:
        journal: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # all that is read of it later
        journal["identity"].keys(), float(journal["seconds"])
        [(entry["size_bytes"], entry["facts"]) for entry in journal["items"].values()]
    # what is neither UTF-8 nor JSON is a ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RunFailedError(
            "the journal of an earlier run is damaged",
            where=str(path),
            fix="--fresh to throw that run's work away and begin again",
        ) from None
    return journal


def refuse_other(old: dict[str, Any], new: dict[str, Any], *, where: Path) -> None:
    """Stop when a folder belongs to another build.

    Raises:
        RefusedError: naming every key that differs.
    """
    changed = differences(old, new)
    if changed:
        raise RefusedError(
            "the folder belongs to another build:\n  " + "\n  ".join(changed),
            where=str(where),
            fix="choose another --out, or build with --fresh, which throws the earlier build away",
        )
