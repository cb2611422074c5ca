"""Files that appear whole or not at all, what they hash to, and one error for a disk that does not take them."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from quantkit.errors import RunFailedError

PIECE_BYTES = 1 << 23  # hashed at a time
READ_AT_ONCE = 4, 16  # files: where a disk is slower than a core, and where cores are many, for each holds a piece
# what `replacing` leaves when it is killed
PARTIAL = re.compile(r"\..+\.\d+\.partial")
# safetensors wraps what the system said into text
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
# what a system refuses by its numbers: what is said of it, and how to mend it where that is not for the caller to say
REFUSALS: tuple[tuple[tuple[int, ...], str, str | None], ...] = (
    (
        (errno.ENOSPC, errno.EDQUOT),
        "the disk is full; what was finished is kept",
        "free some space and run the same command again: it goes on where it stopped",
    ),
    (
        (errno.EFBIG,),
        "a file may not become as large as it has to; what was finished is kept",
        "raise the limit (ulimit -f) and run the same command again",
    ),
    (
        (errno.EIO,),
        "the disk fails: {reason}",
        "look into the system's log (dmesg), or choose a folder on another disk",
    ),
    # a name that cannot be a file's, or is something else's already
    (
        (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
        "cannot be written there: {reason}",
        None,
    ),
    ((errno.EACCES, errno.EROFS, errno.EPERM), "cannot write: {reason}", None),
)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces: large ones, for beside a busy interpreter each is waited for."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(PIECE_BYTES, max(path.stat().st_size, 1))))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(piece):
            digest.update(piece[:read])
    return digest.hexdigest()


def hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files of a folder by name; many are read at once (hashing releases the interpreter)."""
    fewest, most = READ_AT_ONCE
    return hash_beside(folder, names, threads=min(max(os.cpu_count() or 1, fewest), most))()


def hash_beside(folder: Path, names: list[str], *, threads: int) -> Callable[[], dict[str, str]]:
    """Begin to hash files of a folder, and go on with other work: what is returned waits for the hashes by name.

    A process that ends before does not wait.
    """
    pool = ThreadPool(max(min(threads, len(names)), 1))
    found = pool.map_async(lambda name: sha256_of(folder / name), names, chunksize=1)
    pool.close()
    return lambda: dict(zip(names, found.get(), strict=True))


def json_text(content: Any) -> str:
    """JSON for people and programs, which has no NaN and no infinity: `finite` first."""
    return json.dumps(finite(content), ensure_ascii=False, indent=2, allow_nan=False)


def finite(content: Any) -> Any:
    """The same with null for numbers that JSON cannot hold."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of either."""
    write_text(path, json_text(content) + "\n")


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
    """Turn a full or failing disk, or a refused write, into an error that says what was kept.

    Args:
        where: what is written.
        fix: what to do where it may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _system_error(error)
        for numbers, said, remedy in REFUSALS:
            if number is not None and number in numbers:
                raise RunFailedError(
                    said.format(reason=os.strerror(number)), where=str(where), fix=remedy or fix
                ) from error
        raise


def _system_error(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    said = SYSTEM_ERROR.search(str(error))
    return int(said[1]) if said else None


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
