"""Whether what a folder holds fits together and the model, and the error that says where it does not.

Everything is told from the files' headers and config.json; nothing is decoded before it is known to fit.

Shape legend: I in features.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from quantkit.checkpoint.families import Family, weight_shapes, weight_sides
from quantkit.checkpoint.index import TensorFolder, TensorInfo
from quantkit.errors import RefusedError
from quantkit.formats.parts import AGAIN, FLOATS, Layout, Shape


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
    shapes = weight_shapes(config, family, where=where)
    modules = layout.modules(infos)
    if not modules:
        raise RefusedError("no linear is quantized there", where=where, fix=AGAIN)
    for module in modules:
        layout.require(module, infos, where)
        shape = shapes.pop(f"{module}.weight", ())
        if len(shape) != 2:
            raise RefusedError(f"{module} is no linear of a {family.architecture}", where=where, fix=AGAIN)
        wanted = expected(module, *shape)
        found = {part: infos[f"{module}.{part}"] for part in layout.parts if f"{module}.{part}" in infos}
        for part, info in found.items():
            _require_one(info, wanted.get(part, info.shape), layout.dtypes.get(part, (info.dtype,)), where)
    for name, shape in shapes.items():
        if name in infos:
            _require_one(infos[name], shape, FLOATS, where)


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
