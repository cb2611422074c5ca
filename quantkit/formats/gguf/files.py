"""The files of all types, laid out before anything is solved: heads first, then room for every tensor.

Where a tensor goes is known from the checkpoint's shapes, so what is solved is written to its place in every file that
has its type, once.
"""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from quantkit.formats.gguf.header import Entry, read_split
from quantkit.formats.gguf.mixtures import block_of
from quantkit.formats.placed import Place, PlacedFiles

DENSE = "F32"
ALIGNMENT = 32


@dataclass(frozen=True)
class Planned:
    """A tensor to be: its name, ggml's type, and its shape in weights."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of what is stored: bytes of rows, or float32 values."""
        if self.kind == DENSE:
            return self.shape
        block, block_bytes = block_of(self.kind)
        return (*self.shape[:-1], self.shape[-1] // block * block_bytes)

    @property
    def size_bytes(self) -> int:
        return prod(self.stored) * (4 if self.kind == DENSE else 1)


def parts_of(tensors: list[Planned], most_bytes: int) -> list[list[Planned]]:
    """Tensors in runs of no more than so many bytes, or of one tensor."""
    parts: list[list[Planned]] = [[]]
    held = 0
    for tensor in tensors:
        if parts[-1] and held + tensor.size_bytes > most_bytes:
            parts.append([])
            held = 0
        parts[-1].append(tensor)
        held += tensor.size_bytes
    return parts


def lay_out(path: Path, writer: gguf.GGUFWriter, tensors: list[Planned]) -> None:
    """Write a file's head and give it its final size; appears under its name only then.

    Args:
        path: of the file.
        writer: made for `head_of(path)`, with all metadata.
        tensors: in the order of the file.
    """
    write_head(writer, tensors)
    partial = head_of(path)
    start = _aligned(partial.stat().st_size)
    os.truncate(partial, start + sum(_aligned(tensor.size_bytes) for tensor in tensors))
    partial.replace(path)


def head_of(path: Path) -> Path:
    """The name of a file before it has its final size."""
    return path.with_name(f".{path.name}.partial")


def write_head(writer: gguf.GGUFWriter, tensors: list[Planned]) -> None:
    """Write what stands in front of the data, and close the file."""
    for tensor in tensors:
        kind = None if tensor.kind == DENSE else gguf.GGMLQuantizationType[tensor.kind]
        dtype = np.dtype(np.float32 if kind is None else np.uint8)
        writer.add_tensor_info(tensor.name, tensor.stored, dtype, tensor.size_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


class TypedFiles(PlacedFiles):
    """The files of all types, see `quantkit.formats.contract.LaidOut`.

    Args:
        firsts: the (first) file of each type, all in one folder.
        names: the tensors of each item by their names in the files.
        fresh: whether the files hold nothing yet.
    """

    def __init__(self, firsts: list[Path], names: dict[str, list[str]], *, fresh: bool) -> None:
        super().__init__(firsts[0].parent)
        self.fresh = fresh
        self._names = names
        self._types = [read_split(path).tensors for path in firsts]

    @property
    def files(self) -> frozenset[str]:
        return frozenset(entry.file for entries in self._types for entry in entries.values())

    def write(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put tensors by "<name>|<type>" into every file that has them so; returns those that none has."""
        rest = dict(tensors)
        placed: list[tuple[Place, Tensor]] = []
        for entries in self._types:
            for key, tensor in tensors.items():
                name, kind = key.split("|")
                entry = entries.get(name)
                if entry is not None and entry.kind == kind:
                    placed.append((_place(entry), tensor))
                    rest.pop(key, None)
        self.put(placed)
        return rest

    def read(self, item: str) -> dict[str, Tensor]:
        """An item's tensors of the first type by "<name>|<type>", as they were written."""
        found = {}
        for name in self._names[item]:
            entry = self._types[0][name]
            dtype = torch.float32 if entry.kind == DENSE else torch.uint8
            stored = Planned(name, entry.kind, entry.shape).stored
            found[f"{name}|{entry.kind}"] = self.get(_place(entry), dtype, stored)
        return found


def _place(entry: Entry) -> Place:
    return Place(entry.file, entry.start, entry.size_bytes)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
