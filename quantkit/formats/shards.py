"""Safetensors files put together from the files of single items, by copying bytes: memory does not grow with the model.

Tensors are laid out by falling alignment and then by name, so the same items always give the same file. Metadata
holds one key, because the library writes several in random order.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from quantkit.checkpoint.index import DTYPES, STEM

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
        stem: what the file names start with.
        metadata: of every file; one key, because the library writes several in random order.
        index: written for a single file too, with these facts in its metadata; None only indexes shards.
        renamed: a tensor's name in the files written, or None to leave it out.
        max_shard_bytes: a shard is closed before it would grow beyond this.
    """
    shards: list[list[Extent]] = [[]]
    size = 0
    for path in items:
        found = [replace(each, name=name) for each in extents(path) if (name := renamed(each.name)) is not None]
        item_bytes = sum(extent.size_bytes for extent in found)
        if shards[-1] and size + item_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += found
        size += item_bytes
    written = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{stem}{part}.safetensors"
        written.append(_write(folder / name, shard, metadata))
        weight_map |= {extent.name: name for extent in shard}
    if len(shards) == 1 and index is None:
        return written
    total = sum(extent.size_bytes for shard in shards for extent in shard)
    content = {"metadata": {"total_size": total} | (index or {}), "weight_map": dict(sorted(weight_map.items()))}
    index_path = folder / f"{stem}.safetensors.index.json"
    index_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [*written, index_path]


def _write(path: Path, tensors: list[Extent], metadata: dict[str, str]) -> Path:
    ordered = sorted(tensors, key=lambda extent: (-DTYPES[extent.dtype].itemsize, extent.name))
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for extent in ordered:
        expected = math.prod(extent.shape) * DTYPES[extent.dtype].itemsize
        assert extent.size_bytes == expected, f"{extent.name} has {extent.size_bytes} bytes instead of {expected}"
        header[extent.name] = {
            "dtype": extent.dtype,
            "shape": list(extent.shape),
            "data_offsets": [offset, offset + extent.size_bytes],
        }
        offset += extent.size_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        piece = memoryview(bytearray(PIECE_BYTES))
        for extent in ordered:
            _append(extent, file, piece)
    return path


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
