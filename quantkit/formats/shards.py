"""Safetensors files put together from the files of single items, by copying bytes: memory does not grow with the model.

Tensors are laid out by falling alignment and then by name, so the same items always give the same file. Metadata
holds one key, because the library writes several in random order.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from torch import Tensor

from quantkit.checkpoint.index import DTYPES, STEM, TensorInfo

METADATA = {"format": "pt"}
PIECE_BYTES = 1 << 18  # copied at a time


@dataclass(frozen=True)
class Extent:
    """One tensor's bytes in a file: dtype in safetensors' spelling, offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start


Stored = TypeVar("Stored", Extent, TensorInfo)


def write_item(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one item's tensors as a safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata=METADATA)


def read_item(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that `write_item` wrote, on the CPU."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def extents(path: Path) -> list[Extent]:
    """Where every tensor of a safetensors file lies."""
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    base = 8 + header_bytes
    return [
        Extent(name, entry["dtype"], tuple(entry["shape"]), path, *(base + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    ]


def merge(
    items: Iterable[Path],
    folder: Path,
    *,
    max_shard_bytes: int,
    stem: str = STEM,
    metadata: dict[str, str] = METADATA,
    index: dict[str, Any] | None = None,
    renamed: Callable[[str], str | None] = lambda name: name,
) -> list[Path]:
    """Join item files into `<stem>.safetensors`, or into shards with an index; returns the files written.

    Args:
        items: files in stream order; an item is never split between shards.
        folder: where to write; must exist.
        stem, index: see `indexed`.
        metadata: of every file; one key, because the library writes several in random order.
        renamed: a tensor's name in the files written, or None to leave it out.
        max_shard_bytes: a shard is closed before it would grow beyond this.
    """
    found = (
        [replace(each, name=name) for each in extents(path) if (name := renamed(each.name)) is not None]
        for path in items
    )
    shards = runs(found, max_shard_bytes)
    for number, shard in enumerate(shards):
        ordered = in_file_order(shard)
        with (folder / shard_name(stem, number, len(shards))).open("wb") as file:
            file.write(head(ordered, metadata))
            piece = memoryview(bytearray(PIECE_BYTES))
            for extent in ordered:
                _append(extent, file, piece)
    return indexed(folder, stem=stem, index=index)


def runs(items: Iterable[list[Stored]], max_bytes: int) -> list[list[Stored]]:
    """The tensors of items, together as long as they take no more than so many bytes; no item is split."""
    found: list[list[Stored]] = [[]]
    size = 0
    for tensors in items:
        item_bytes = sum(tensor.size_bytes for tensor in tensors)
        if found[-1] and size + item_bytes > max_bytes:
            found.append([])
            size = 0
        found[-1] += tensors
        size += item_bytes
    return found


def shard_name(stem: str, number: int, count: int) -> str:
    """The name of the n-th of so many files, counted from 0."""
    part = f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"{stem}{part}.safetensors"


def in_file_order(tensors: Iterable[Stored]) -> list[Stored]:
    """By falling alignment, then by name."""
    return sorted(tensors, key=lambda tensor: (-DTYPES[tensor.dtype].itemsize, tensor.name))


def head(ordered: Sequence[Stored], metadata: dict[str, str]) -> bytes:
    """What stands in front of the tensors: names, dtypes, shapes and places."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for tensor in ordered:
        expected = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        assert tensor.size_bytes == expected, f"{tensor.name} has {tensor.size_bytes} bytes instead of {expected}"
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size_bytes],
        }
        offset += tensor.size_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def indexed(folder: Path, *, stem: str = STEM, index: dict[str, Any] | None = None) -> list[Path]:
    """The weight files of a folder, and the index that is written for several of them.

    Args:
        folder: that they are in; nothing else there starts with the stem.
        stem: what the file names start with.
        index: written for a single file too, with these facts in its metadata; None only indexes shards.
    """
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if len(files) == 1 and index is None:
        return files
    found = [extent for path in files for extent in extents(path)]
    total = sum(extent.size_bytes for extent in found)
    places = dict(sorted((extent.name, extent.path.name) for extent in found))
    index_path = folder / f"{stem}.safetensors.index.json"
    content = {"metadata": {"total_size": total} | (index or {}), "weight_map": places}
    index_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [*files, index_path]


def _append(extent: Extent, target: BinaryIO, piece: memoryview) -> None:
    """Append a tensor's bytes, so many at a time as the piece has room for.

    The piece is used again and again: it stays in the cache, where new memory for each would have to be cleared first.
    """
    with extent.path.open("rb", buffering=0) as source:
        source.seek(extent.start)
        left = extent.size_bytes
        while left:
            read = source.readinto(piece[: min(left, len(piece))])
            assert read, f"{extent.path} ends before {extent.name} does"
            target.write(piece[:read])
            left -= read


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes and nothing else of it."""
    shutil.copyfile(source, target)
