"""Files of an artifact that have their size before anything is solved: what is solved is written to its place, once.

Here the writing itself, which all such files share, and safetensors files. Where a tensor of these goes is known from
the checkpoint's shapes and from what the format makes of a linear's; within a file tensors lie as
`quantkit.formats.shards` lays them.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantkit.checkpoint.index import DTYPES, STEM, Checkpoint, TensorInfo
from quantkit.formats.parts import Shape
from quantkit.formats.shards import METADATA, Extent, extents, head, in_file_order, runs, shard_name

SPELLED = {dtype: name for name, dtype in DTYPES.items()}
Parts = Mapping[str, tuple[torch.dtype, Shape]]


class InParts(Protocol):
    """A format that stores a quantized linear as several tensors, and every other tensor as it is."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of every tensor that is not quantized."""
        ...

    @property
    def skip(self) -> tuple[str, ...]:
        """Name endings of linears that stay dense."""
        ...

    def parts(self, name: str, rows: int, columns: int) -> Parts:
        """Dtype and shape of each part of a quantized linear, given its full name, out and in features."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes belong: the file's name, the offset in it, and how many there are."""

    file: str
    start: int
    size_bytes: int


class PlacedFiles:
    """Files of a folder that are written in places, in any order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: set[str] = set()

    def put(self, tensors: Iterable[tuple[Place, Tensor]]) -> None:
        """Write tensors, from wherever they are, to their places; see `keep`."""
        by_file: dict[str, list[tuple[Place, Tensor]]] = {}
        for place, tensor in tensors:
            by_file.setdefault(place.file, []).append((place, tensor))
        for file, wanted in by_file.items():
            with (self._folder / file).open("rb+") as target:
                for place, tensor in wanted:
                    values = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                    assert values.nbytes == place.size_bytes, f"{values.nbytes} bytes for {place}"
                    target.seek(place.start)
                    target.write(values.data)
            self._written.add(file)

    def get(self, place: Place, dtype: torch.dtype, shape: Shape) -> Tensor:
        """A tensor as it was written, on the CPU."""
        flat = torch.empty(prod(shape), dtype=dtype)
        with (self._folder / place.file).open("rb") as file:
            file.seek(place.start)
            read = file.readinto(flat.view(torch.uint8).numpy().data)
        assert read == place.size_bytes, f"{read} bytes of {place}"
        return flat.reshape(shape)

    def keep(self, item: str) -> None:
        """Make durable what was written, an item's last tensors among it."""
        while self._written:
            with (self._folder / self._written.pop()).open("rb+") as target:
                os.fsync(target.fileno())


class Shards(PlacedFiles):
    """Safetensors files, see `quantkit.formats.contract.LaidOut`.

    Args:
        folder: that they are in.
        files: their names.
        names: the tensors of each item.
        fresh: whether the files hold nothing yet.
    """

    def __init__(self, folder: Path, files: Iterable[str], names: dict[str, list[str]], *, fresh: bool) -> None:
        super().__init__(folder)
        self.fresh = fresh
        self.files = frozenset(files)
        self._names = names
        self._done: set[str] = set()
        self._extents = {extent.name: extent for file in self.files for extent in extents(folder / file)}

    def write(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put tensors into their places; nothing is left over."""
        for name, tensor in tensors.items():
            place = self._extents[name]
            found = (SPELLED[tensor.dtype], tuple(tensor.shape))
            assert found == (place.dtype, place.shape), f"{name} is {found} and was planned as {place}"
        self.put((_place(self._extents[name]), tensor) for name, tensor in tensors.items())
        self._done |= tensors.keys()
        return {}

    def keep(self, item: str) -> None:
        """Make durable what was written; an item's tensors are all among it."""
        missing = set(self._names[item]) - self._done
        assert not missing, f"never written: {sorted(missing)}"
        self._done -= set(self._names[item])
        super().keep(item)

    def read(self, item: str) -> dict[str, Tensor]:
        """An item's tensors as they were written."""
        found = {name: self._extents[name] for name in self._names[item]}
        return {name: self.get(_place(each), DTYPES[each.dtype], each.shape) for name, each in found.items()}


def _place(extent: Extent) -> Place:
    return Place(extent.path.name, extent.start, extent.size_bytes)


def size_bits(parts: Parts) -> int:
    """Bits that tensors of these dtypes and shapes take."""
    return 8 * sum(dtype.itemsize * prod(shape) for dtype, shape in parts.values())


def planned(checkpoint: Checkpoint, form: InParts, *, ends: bool = False) -> dict[str, list[TensorInfo]]:
    """The tensors of each item as they will be stored, in stream order.

    Args:
        checkpoint: the source.
        form: the format.
        ends: embedding and head are quantized, too.
    """
    infos = checkpoint.tensors.tensors
    solved = {name for name, _, _ in checkpoint.linear_shapes(ends=ends) if not name.endswith(form.skip)}
    found: dict[str, list[TensorInfo]] = {}
    for item in checkpoint.items:
        stored: dict[str, tuple[torch.dtype, Shape]] = {}
        for name in checkpoint.names(item):
            module, _, last = name.rpartition(".")
            if last == "weight" and module in solved:
                stored |= {f"{module}.{part}": each for part, each in form.parts(module, *infos[name].shape).items()}
            else:
                stored[name] = (form.stored_dtype, infos[name].shape)
        found[item] = [TensorInfo(name, SPELLED[each], shape, "") for name, (each, shape) in stored.items()]
    return found


def lay_out(
    folder: Path,
    items: dict[str, list[TensorInfo]],
    *,
    max_shard_bytes: int,
    stem: str = STEM,
    metadata: dict[str, str] = METADATA,
) -> Shards:
    """Make the files in a folder, each with its head and its final size, or open those of an earlier run.

    Args:
        folder: of the artifact to be.
        items: what `planned` gave; an item is never split between shards.
        max_shard_bytes: a shard is closed before it would grow beyond this.
        stem: what the file names start with.
        metadata: of every file.
    """
    shards = runs(items.values(), max_shard_bytes)
    files = [shard_name(stem, number, len(shards)) for number in range(len(shards))]
    fresh = not all((folder / file).is_file() for file in files)
    for file, shard in zip(files, shards, strict=True) if fresh else ():
        begun = head(in_file_order(shard), metadata)
        partial = folder / f".{file}.partial"
        partial.write_bytes(begun)
        os.truncate(partial, len(begun) + sum(info.size_bytes for info in shard))
        # under its name only once it has its size
        partial.replace(folder / file)
    return Shards(folder, files, {item: [info.name for info in infos] for item, infos in items.items()}, fresh=fresh)
