"""The work folder of a build: a lock, finished items, and an output that appears whole or not at all.

Everything lies in `<out>.work/`: `journal.json` names what the build is made of and which items are finished,
`items/` holds one file each, `artifact/` is filled at the end and renamed to `<out>`. An item counts as finished
only once its file is complete on disk and the journal says so; a kill between the two repeats that item.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from quantkit.errors import RefusedError, RunFailedError
from quantkit.home import quantkit_home

JOURNAL = "journal.json"
RECORD = "quantkit.json"
CHUNK_BYTES = 1 << 22
T = TypeVar("T")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files of a folder by name; several are read at once (hashing releases the interpreter)."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of(folder / name), names), strict=True))


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of either."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write text so that a reader sees the old file or the new one, never half of either."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block ends well; durable before it is visible."""
    # named by the process: two builds may write the same cached reference at once
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or a refused write into an error that says what was kept."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailedError(
                "the disk is full; finished layers are kept",
                where=str(where),
                fix="free some space and run the same command again: it goes on where it stopped",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise RunFailedError(
                f"cannot write: {error.strerror}", where=str(where), fix="choose a writable folder with --out"
            ) from error
        raise


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
        identity: everything that decides the artifact's bytes, as a nested table.
        journal: what an earlier run left, or an empty journal.
    """

    def __init__(self, out: Path, identity: dict[str, Any], journal: dict[str, Any]) -> None:
        self.out = out
        self.folder = work_folder(out)
        self.identity = identity
        self._journal = journal
        self._opened = time.perf_counter()
        self.earlier_seconds = float(journal.get("seconds", 0.0))
        """Wall time of earlier runs, up to the last that they kept."""

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
        with disk_errors(self.folder):
            path = self.path(item)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                write(temporary)
            self._journal["items"][item] = {"size_bytes": path.stat().st_size, "facts": facts}
            self._write_journal()

    def note(self, name: str, content: Any) -> None:
        """Keep something for JSON beside the items."""
        with disk_errors(self.folder):
            path = self.folder / "notes" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
            self._write_journal()

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
        """Put the finished artifact in place of `out`, then drop the work files."""
        with disk_errors(self.out):
            if self.out.exists():
                shutil.rmtree(self.out)
            self.artifact.replace(self.out)
        discard_work(self.out)


def work_folder(out: Path) -> Path:
    """`<out>.work`."""
    return out.with_name(out.name + ".work")


def discard_work(out: Path) -> None:
    """Drop the work files of an artifact that is in place; a kill may have left them."""
    shutil.rmtree(work_folder(out), ignore_errors=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the build lock of an output folder.

    The lock file lies under QUANTKIT_HOME and stays there: a lock file that is removed can be locked twice.

    Raises:
        RunFailedError: another build holds it.
    """
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    lock_path = quantkit_home() / "locks" / f"{name}.lock"
    with disk_errors(lock_path):
        lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path)
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise RunFailedError(
            f"another build is writing {out.name}",
            where=str(out),
            fix="wait for it to end, or choose another folder with --out",
        ) from None


def open_workdir(out: Path, identity: dict[str, Any], *, fresh: bool) -> Workdir:
    """The work folder of a build, new or continued. Hold `locked(out)` around its whole use.

    Args:
        out: the artifact's final folder.
        identity: everything that decides the artifact's bytes.
        fresh: throw away what an earlier run left.

    Raises:
        RefusedError: an earlier run of another recipe, model or version left work there.
    """
    folder = work_folder(out)
    if fresh:
        discard_work(out)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        journal_path = folder / JOURNAL
        if journal_path.exists():
            journal = json.loads(journal_path.read_text(encoding="utf-8"))
            refuse_other(journal["identity"], identity, where=folder)
        else:
            journal = {"identity": identity, "items": {}}
            write_json(journal_path, journal)
        work = Workdir(out, identity, journal)
        for item, entry in list(journal["items"].items()):
            path = work.path(item)
            if not path.exists() or path.stat().st_size != entry["size_bytes"]:
                del journal["items"][item]
    return work


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
            fix="choose another --out, or --fresh to throw the earlier build away",
        )
