"""What readers of folders with several tensors per linear share: which are there, and whether they fit the model.

Everything is told from the files' headers and config.json; nothing is decoded before it is known to fit.

Shape legend: I in features.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantkit.checkpoint.families import Family, side_lengths, weight_sides
from quantkit.checkpoint.index import TensorFolder, TensorInfo
from quantkit.errors import RefusedError
from quantkit.qtensor import QuantizedLinear

FLOATS = ("F32", "F16", "BF16")
WORDS = ("I32", "U32")
AGAIN = "download the artifact again"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The tensors of a quantized linear, by the last part of their names.

    Attributes:
        needed: always there; the second is in no dense tensor's name.
        optional: those that may be.
        dtypes: what each may be stored in, in safetensors' spelling; a part that is not named may be anything.
    """

    needed: tuple[str, ...]
    dtypes: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()

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
        modules = [name.removesuffix(f".{self.needed[1]}") for name in tensors if name.endswith(f".{self.needed[1]}")]
        parts = {f"{module}.{part}" for module in modules for part in self.parts}
        dense = {name: tensor for name, tensor in tensors.items() if name not in parts}
        return dense | {f"{module}.weight": decode(module).dequantize() for module in modules}


def require_fit(
    layout: Layout,
    tensors: TensorFolder,
    config: dict[str, Any],
    family: Family,
    expected: Callable[[str, int, int], Mapping[str, Shape]],
) -> None:
    """Stop at a folder whose tensors do not fit each other, their settings or the model.

    Args:
        layout: of its linears.
        tensors: the folder's.
        config: its config.json, with the model's sizes.
        family: the architecture's row.
        expected: the shape of each part of a linear by its (full name, out features, in features); parts that it does
            not name may have any.

    Raises:
        RefusedError: a part of a linear is missing or of another shape or dtype, a dense tensor of the model is, or
            nothing is quantized.
    """
    infos, where = tensors.tensors, str(tensors.folder)
    lengths = side_lengths(config, family, where=where)
    modules = layout.modules(infos)
    if not modules:
        raise RefusedError("no linear is quantized there", where=where, fix=AGAIN)
    sides = weight_sides(config, family, where=where)
    # a head that is stored though it is tied
    sides.setdefault("lm_head.weight", ("vocabulary", "hidden"))
    for module in modules:
        layout.require(module, infos, where)
        shape = tuple(lengths[side] for side in sides.pop(f"{module}.weight", ()))
        if len(shape) != 2:
            raise RefusedError(f"{module} is no linear of a {family.architecture}", where=where, fix=AGAIN)
        wanted = expected(module, *shape)
        found = {part: infos[f"{module}.{part}"] for part in layout.parts if f"{module}.{part}" in infos}
        for part, info in found.items():
            _require_one(info, wanted.get(part, info.shape), layout.dtypes.get(part, (info.dtype,)), where)
    for name, named in sides.items():
        if name in infos:
            _require_one(infos[name], tuple(lengths[side] for side in named), FLOATS, where)


def _require_one(info: TensorInfo, shape: Shape, dtypes: tuple[str, ...], where: str) -> None:
    if info.shape != shape or info.dtype not in dtypes:
        raise RefusedError(
            f"{info.name} is {info.dtype} {list(info.shape)}, where {' or '.join(dtypes)} {list(shape)} belongs",
            where=where,
            fix="config.json and weights are of different conversions; download both again",
        )


def number_of(settings: Mapping[str, Any], key: str, possible: Iterable[int], *, where: str) -> int:
    """A whole number of an artifact's settings.

    Args:
        settings: what the folder says.
        key: of the number.
        possible: what it may be.
        where: for the error.

    Raises:
        RefusedError: it is missing or anything else.
    """
    value, allowed = settings.get(key), tuple(possible)
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise RefusedError(
            f"the settings say {key} = {value!r}, which is none of {', '.join(map(str, allowed))}",
            where=where,
            fix="take config.json from the artifact's own repository",
        )
    return value


def groups_of(columns: int, group_size: int) -> int:
    """How many groups a row has; -1 is one for the whole row."""
    return 1 if group_size == -1 else -(-columns // group_size)


def require_groups(name: str, group_I: Tensor, groups: int) -> None:
    """Stop at input channels that belong to groups that are not there.

    Raises:
        RefusedError: some do.
    """
    if int(group_I.min()) < 0 or int(group_I.max()) >= groups:
        raise RefusedError(f"{name} puts input channels into groups beyond its {groups}", where=name, fix=AGAIN)


def require_weights(given: Iterable[str], config: dict[str, Any], family: Family, *, where: str) -> None:
    """Stop where a folder lacks tensors that the model needs.

    Args:
        given: checkpoint names of what reading it gives.
        config: its config.json, or what its metadata says in the same keys.
        family: the architecture's row.
        where: for the error.

    Raises:
        RefusedError: naming the first that is missing.
    """
    needed = weight_sides(config, family, where=where)
    missing = sorted(needed.keys() - set(given))
    if missing:
        raise RefusedError(
            f"{missing[0]} is missing ({len(missing)} of the model's {len(needed)} tensors are)",
            where=where,
            fix=f"the folder is incomplete: {AGAIN}",
        )
