"""The head of a GGUF file, read with bounds: whatever the file says, no more is taken in than it holds."""

import mmap
import re
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import gguf

from quantkit.errors import RefusedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
ALIGNMENT = "general.alignment"
# a vocabulary of a million pieces with its merges takes less, and as Python values it grows tenfold
MAX_HEAD_BYTES = 1 << 26
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: in GGUF.
        shape: rows first, as PyTorch has it.
        kind: ggml's type name.
        start: offset of its bytes from the start of the file.
        size_bytes: of its data.
        file: name of the file it is in.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    size_bytes: int
    file: str = ""


@dataclass(frozen=True)
class Header:
    """Metadata by key, and tensors by name, of one file, or of the files that one was split into."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Entry]


class _DamageError(Exception):
    """Why a file cannot be a GGUF file."""


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, number: int) -> bytes:
        if number > len(self.data) - self.at:
            raise _DamageError(f"it ends within its head, at byte {len(self.data)}")
        if self.at + number > MAX_HEAD_BYTES:
            raise _DamageError(f"its head is longer than {MAX_HEAD_BYTES} bytes")
        self.at += number
        return self.data[self.at - number : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise _DamageError(f"a string before byte {self.at} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in SCALARS:
                code = SCALARS[inner]
                raw = self.take(count * struct.calcsize(code))
                return list(struct.unpack(f"<{count}{code}", raw))
            # every element takes at least the eight bytes of a length
            if inner != STRING or count > (len(self.data) - self.at) // 8:
                raise _DamageError(f"an array before byte {self.at} has {count} elements of kind {inner}")
            return [self.text() for _ in range(count)]
        if kind not in SCALARS:
            raise _DamageError(f"a value before byte {self.at} is of kind {kind}")
        return self.number(SCALARS[kind])


def read_header(path: Path) -> Header:
    """The head of a file.

    Raises:
        RefusedError: it is no GGUF file, is cut short, or contradicts itself.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(path, _Cursor(data))
    except (_DamageError, ValueError, OSError) as error:
        raise RefusedError(
            f"{path.name} is not a GGUF file that can be read: {error}",
            where=str(path.parent),
            fix="it is truncated or damaged; download it again",
        ) from None


def split_name(stem: str, number: int, count: int) -> str:
    """The name of one of the files that a file was split into, as llama.cpp expects it; `number` counts from 0."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def read_split(path: Path) -> Header:
    """The head of a file that may be split: metadata of the first file, tensors of all.

    Args:
        path: the file, or the first of those that it was split into.

    Raises:
        RefusedError: as `read_header`, or a file is missing or belongs to something else.
    """
    first = read_header(path)
    count = first.metadata.get(SPLIT_COUNT, 1)
    match = SPLIT_NAME.match(path.name)
    if count in (0, 1) and match is None:
        return first
    tensors: dict[str, Entry] = {}
    problem = (
        None if match and int(match[3]) == count and int(match[2]) == 1 else "its name is not that of a first file"
    )
    for number in range(count if match and problem is None else 0):
        part = path.with_name(split_name(match[1], number, count)) if match else path
        if not part.is_file():
            problem = f"{part.name} is missing"
            break
        header = read_header(part)
        if (header.metadata.get(SPLIT_NO), header.metadata.get(SPLIT_COUNT)) != (number, count):
            problem = f"{part.name} says that it is another part"
            break
        if tensors.keys() & header.tensors.keys():
            problem = f"{part.name} repeats tensors of the files before it"
            break
        tensors |= header.tensors
    if problem is None and first.metadata.get(SPLIT_TENSORS) != len(tensors):
        problem = f"the parts hold {len(tensors)} of {first.metadata.get(SPLIT_TENSORS)} tensors"
    if problem:
        raise RefusedError(
            f"{path.name} is part of a split file, but {problem}",
            where=str(path.parent),
            fix="put all parts into the folder under the names that they were made with",
        )
    return replace(first, tensors=tensors)


def _header(path: Path, cursor: _Cursor) -> Header:
    if cursor.take(4) != MAGIC:
        raise _DamageError("it does not begin with GGUF")
    if (version := cursor.number("I")) not in VERSIONS:
        raise _DamageError(f"its version is {version}")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    found = []
    for _ in range(num_tensors):
        name, dimensions = cursor.text(), cursor.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _DamageError(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
        found.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get(ALIGNMENT, 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _DamageError(f"its alignment is {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    tensors = {name: _entry(name, shape, kind, base + offset, path.name) for name, shape, kind, offset in found}
    if len(tensors) != num_tensors:
        raise _DamageError("it names a tensor twice")
    for entry in tensors.values():
        if entry.start + entry.size_bytes > len(cursor.data):
            raise _DamageError(f"{entry.name} lies beyond the file's end, at byte {len(cursor.data)}")
    return Header(path, metadata, tensors)


def _entry(name: str, shape: tuple[int, ...], number: int, start: int, file: str) -> Entry:
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise _DamageError(f"{name} is of the unknown type {number}") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape:
        raise _DamageError(f"{name} is empty")
    if shape[-1] % block:
        raise _DamageError(f"{name} has rows of {shape[-1]}, no multiple of {block}")
    return Entry(name, shape, kind.name, start, prod(shape) // block * block_bytes, file)
