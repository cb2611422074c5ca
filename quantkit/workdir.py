"""The work folder of a build: a lock, finished items, and an output that appears whole or not at all.

Everything lies in `<out>.work/`: `journal.json` names what the build is made of and which items are finished,
`items/` holds one file each, `artifact/` is filled at the end and renamed to `<out>`; an artifact that was there before
waits in `replaced/` until then. An item counts as finished only once its file is complete on disk and the journal says
so; a kill between the two repeats that item. The lock is `<out>.lock`, while somebody holds it.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from safetensors import SafetensorError

from quantkit.errors import RefusedError, RunFailedError

JOURNAL = "journal.json"
RECORD = "quantkit.json"
REPLACED = "replaced"
# what `replacing` leaves when it is killed
PARTIAL = re.compile(r"\..+\.\d+\.partial")
# safetensors wraps what the system said into text
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EROFS, errno.EPERM)
T = TypeVar("T")
P = ParamSpec("P")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
def disk_errors(where: Path, fix: str = "choose a writable folder with --out") -> Iterator[None]:
    """Turn a full disk or a refused write into an error that says what was kept.

    Args:
        where: what is written.
        fix: what to do where it may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _system_error(error)
        if number in FULL:
            raise RunFailedError(
                "the disk is full; finished layers are kept",
                where=str(where),
                fix="free some space and run the same command again: it goes on where it stopped",
            ) from error
        if number in FORBIDDEN:
            raise RunFailedError(f"cannot write: {os.strerror(number)}", where=str(where), fix=fix) from error
        raise


def _system_error(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    said = SYSTEM_ERROR.search(str(error))
    return int(said[1]) if said else None


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
        """Put the finished artifact in place of `out`, then drop the work files and what was there before.

        A kill between the two renames leaves the earlier artifact in the work folder: `locked` brings it back.
        """
        with disk_errors(self.out):
            if self.out.exists():
                self.out.replace(self.folder / REPLACED)
            self.artifact.replace(self.out)
        discard_work(self.out)


def work_folder(out: Path) -> Path:
    """`<out>.work`."""
    return _beside(out, ".work")


def lock_file(out: Path) -> Path:
    """`<out>.lock`, the same for every name of the folder."""
    return _beside(Path(os.path.realpath(out)), ".lock")


def _beside(out: Path, suffix: str) -> Path:
    # "." has no name
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + suffix)


def discard_work(out: Path) -> None:
    """Drop the work files of an artifact that is in place; a kill may have left them."""
    folder = work_folder(out)
    if (folder / REPLACED).exists():
        # half deleted it must not look like an artifact to bring back
        shutil.rmtree(folder / "dropped", ignore_errors=True)
        (folder / REPLACED).replace(folder / "dropped")
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(out: Path, *, needed: bool = True) -> Iterator[None]:
    """Hold the lock of an artifact's folder: one command at a time makes, judges or publishes it, on any machine.

    What a killed command left half-done in the folder is put right first.

    Args:
        out: the artifact's folder, there or not.
        needed: False goes on without the lock where its file cannot be made: for who does not write into the folder.

    Raises:
        RunFailedError: somebody else holds it, or the disk cannot lock.
    """
    path = lock_file(out)
    made = [folder for folder in path.parents if not folder.exists()] if needed else []
    try:
        with disk_errors(path):
            descriptor = _take(path, makes_folder=needed)
    except (RunFailedError, FileNotFoundError):
        if needed:
            raise
        yield
        return
    if descriptor is None:
        raise RunFailedError(
            f"another quantkit is at work on {path.stem}{_holder(path)}",
            where=str(out),
            fix="wait for it to end, or choose another folder with --out",
        )
    try:
        with disk_errors(out):
            _put_right(out)
        yield
    finally:
        with suppress(OSError):  # who may not remove it leaves it, which harms nobody
            path.unlink()
        os.close(descriptor)
        with suppress(OSError):  # folders made for the lock go if nothing came of it
            for folder in made:
                folder.rmdir()


def alone(*, writes: bool) -> Callable[[Callable[Concatenate[Path, P], T]], Callable[Concatenate[Path, P], T]]:
    """Run a command on an artifact's folder, its first argument, with the lock of it held; see `locked`.

    A folder without a record is somebody else's, and is only read.

    Args:
        writes: whether the command writes into a folder with a record.
    """

    def decorate(command: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
        @wraps(command)
        def run(folder: Path, *arguments: P.args, **options: P.kwargs) -> T:
            if not (folder / RECORD).exists():
                return command(folder, *arguments, **options)
            with locked(folder, needed=writes):
                return command(folder, *arguments, **options)

        return run

    return decorate


def _take(path: Path, *, makes_folder: bool) -> int | None:
    """An open descriptor that holds a file's lock; None if somebody else does.

    A holder removes the file, so that two could hold what was one name; who gets the lock looks whether its file is
    still the one of that name, and else begins anew.
    """
    while True:
        if makes_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # for writing: network file systems lock exclusively only then
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            if not makes_folder:
                raise
            continue  # another's end removed the folder again
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                _sign(descriptor, path)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise RunFailedError(
                f"the disk cannot lock files: {error.strerror}",
                where=str(path.parent),
                fix="mount it with locks (Lustre: flock), or choose a folder on another disk",
            ) from error
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name; asked with the lock held, which refreshes what a network disk cached."""
    try:
        held, there = os.fstat(descriptor), path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno == errno.ESTALE:
            return False
        raise
    return held.st_nlink > 0 and os.path.samestat(held, there)


def _sign(descriptor: int, path: Path) -> None:
    """Say in the lock's file who holds it, and let everybody lock it who may write beside it."""
    with suppress(OSError):  # another user's file, a full disk: it is only for the message
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        os.fchmod(descriptor, path.parent.stat().st_mode & 0o666)


def _holder(path: Path) -> str:
    with suppress(OSError):
        if said := path.read_text(encoding="utf-8", errors="replace"):
            return f" ({said})"
    return ""


def _put_right(out: Path) -> None:
    """Bring back an artifact that was to be replaced, and remove files that were being replaced, when a kill came."""
    if (work_folder(out) / REPLACED).exists():
        if out.exists():
            discard_work(out)
        else:
            (work_folder(out) / REPLACED).replace(out)
    if (out / RECORD).exists():
        remove_partials(out)


def remove_partials(folder: Path) -> None:
    """Remove what killed commands were writing in a folder, and below; call it while nobody writes there."""
    for path in folder.rglob(".*.partial"):
        if PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Write into a folder that several commands write into at once, each file by `replacing`.

    What killed commands left there is removed when nobody else writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        # busy, or a disk that cannot lock: then nothing is removed
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_partials(folder)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


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
        journal_path = folder / JOURNAL
        if journal_path.exists():
            journal = json.loads(journal_path.read_text(encoding="utf-8"))
            refuse_other(journal["identity"], identity, where=folder)
            remove_partials(folder)
        else:
            # a kill may have come while another build's work was being thrown away
            discard_work(out)
            folder.mkdir(parents=True, exist_ok=True)
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
