"""What formats with several tensors per linear share: how these are named, gathered, encoded and read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantkit.checkpoint.families import Family, in_layer, item_of, weight_shapes
from quantkit.checkpoint.index import TensorFolder, TensorInfo
from quantkit.errors import RefusedError
from quantkit.qtensor import Item, QuantizedLinear

FLOATS = ("F32", "F16", "BF16")
WORDS = ("I32", "U32")
AGAIN = "download the artifact again"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The tensors of a quantized linear, by the last part of their names.

    Attributes:
        needed: always there.
        mark: the one of these that ends no dense tensor's name.
        dtypes: what each may be stored in, in safetensors' spelling; a part that is not named may be anything.
        optional: those that may be.
        notes: those among both that tell how to read the others; a linear's size is told without them.
    """

    needed: tuple[str, ...]
    mark: str
    dtypes: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.needed, *self.optional)

    def modules(self, infos: Mapping[str, TensorInfo]) -> list[str]:
        """Full names of the linears that are stored in parts, whole or not, sorted."""
        found = {name.rpartition(".")[0] for name, info in infos.items() if self._is_part(info)}
        return sorted(found)

    def _is_part(self, info: TensorInfo) -> bool:
        part = info.name.rpartition(".")[2]
        # a dense matrix has the name of packed codes where a format calls them "weight"
        return part in self.parts and (part != "weight" or info.dtype in self.dtypes[part])

    def weights(self, infos: Mapping[str, TensorInfo]) -> frozenset[str]:
        """Checkpoint names of what reading the folder gives."""
        dense = {name for name, info in infos.items() if not self._is_part(info)}
        return frozenset(dense | {f"{module}.weight" for module in self.modules(infos)})

    def stored_bits(self, infos: Mapping[str, TensorInfo]) -> int:
        """What all linears take together, scales and all but notes."""
        names = (f"{module}.{part}" for module in self.modules(infos) for part in self.parts if part not in self.notes)
        return 8 * sum(infos[name].size_bytes for name in names if name in infos)

    def require(self, module: str, infos: Mapping[str, TensorInfo], where: str) -> None:
        """Stop where a part of a linear is missing.

        Raises:
            RefusedError: naming the first.
        """
        for part in self.needed:
            if f"{module}.{part}" not in infos:
                raise RefusedError(f"{module}.{part} is missing", where=where, fix=AGAIN)

    def decoded(self, tensors: dict[str, Tensor], decode: Callable[[str], QuantizedLinear]) -> dict[str, Tensor]:
        """Dense tensors by checkpoint name: decoded linears in float32, everything else as stored.

        Args:
            tensors: of one item.
            decode: a linear by its full name.
        """
        modules = [name.removesuffix(f".{self.mark}") for name in tensors if name.endswith(f".{self.mark}")]
        parts = {f"{module}.{part}" for module in modules for part in self.parts}
        dense = {name: tensor for name, tensor in tensors.items() if name not in parts}
        return dense | {f"{module}.weight": decode(module).dequantize() for module in modules}


@dataclass(frozen=True)
class PartsArtifact:
    """A folder with several tensors per linear as dense weights by item, ours or anybody's.

    Attributes:
        tensors: the stored tensors.
        config: config.json.
        settings: the format's own, as the folder states them.
        family: the architecture's row.
        layout: of its linears.
        decode: dense tensors by checkpoint name, from the stored ones of an item.
    """

    tensors: TensorFolder
    config: dict[str, Any]
    settings: dict[str, Any]
    family: Family
    layout: Layout
    decode: Callable[[dict[str, Tensor]], dict[str, Tensor]]

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized linears, scales and all, over their number of weights."""
        infos, where = self.tensors.tensors, str(self.tensors.folder)
        shapes = weight_shapes(self.config, self.family, where=where)
        weights = sum(math.prod(shapes[f"{module}.weight"]) for module in self.layout.modules(infos))
        return self.layout.stored_bits(infos) / weights

    @property
    def weights(self) -> frozenset[str]:
        """Checkpoint names of what `read` gives."""
        return self.layout.weights(self.tensors.tensors)

    def read(self, item: str) -> dict[str, Tensor]:
        """Dense tensors of an item by checkpoint name, on the CPU."""
        return self.decode(self.tensors.read([name for name in self.tensors.tensors if item_of(name) == item]))


def encoded(item: Item, encode: Callable[[str, QuantizedLinear], dict[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors of an item as they stand in the file: dense ones as they are, linears in parts.

    Args:
        item: what was quantized and what stays dense.
        encode: the tensors of a linear by (full name, linear).
    """
    tensors = {name: tensor.contiguous() for name, tensor in item.tensors.items()}
    for name, linear in item.linears.items():
        tensors |= encode(name, linear)
    return tensors


def unstorable(
    shapes: list[tuple[str, int, int]], skip: tuple[str, ...], reason: Callable[[int, int], str | None]
) -> list[str]:
    """One line for each linear that cannot be stored, with what mends it.

    Args:
        shapes: (full name, out features, in features) of all.
        skip: name endings of those that stay dense.
        reason: why a linear of (out features, in features) cannot be; None where it can.
    """
    return [
        f'{name}: {why}; leave it in 16 bits with quantize.skip = ["{in_layer(name)}"]'
        for name, rows, columns in shapes
        if not name.endswith(skip) and (why := reason(rows, columns))
    ]


def groups_of(columns: int, group_size: int) -> int:
    """How many groups a row has; -1 is one for the whole row."""
    return 1 if group_size == -1 else -(-columns // group_size)
