"""The lock of an artifact's folder, `<out>.lock` while somebody holds it."""

import errno
import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from quantkit.errors import RunFailedError
from quantkit.files import disk_errors
from quantkit.workdir import RECORD, beside, put_right

T = TypeVar("T")
P = ParamSpec("P")
# another command's end takes the file or its folder away once, or a few times; not always
ATTEMPTS = 100


def lock_file(out: Path) -> Path:
    """`<out>.lock`, the same for every name of the folder."""
    return beside(out, ".lock")


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
    made: list[Path] = []
    try:
        with disk_errors(path):
            made += [folder for folder in path.parents if not folder.exists()] if needed else []
            descriptor = _take(path, makes_folder=needed)
    except (RunFailedError, FileNotFoundError):
        if needed:
            _remove_empty(made)
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
            put_right(out)
        yield
    finally:
        with suppress(OSError):  # who may not remove it leaves it, which harms nobody
            path.unlink()
        os.close(descriptor)
        _remove_empty(made)


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
    for _ in range(ATTEMPTS):
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
    # /proc takes no file and says that there is none
    raise RunFailedError(
        f"the lock's file was not there after {ATTEMPTS} attempts to make it",
        where=str(path),
        fix="choose a folder on another disk with --out",
    )


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


def _remove_empty(made: list[Path]) -> None:
    """Folders made for the lock go if nothing came of it; the innermost is the first."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


def _holder(path: Path) -> str:
    with suppress(OSError):
        if said := path.read_text(encoding="utf-8", errors="replace"):
            return f" ({said})"
    return ""
