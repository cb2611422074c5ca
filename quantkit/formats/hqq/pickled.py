"""`qmodel.pt`, the pickle that hqq itself saves and loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.index import TensorFolder, TensorInfo
from quantkit.errors import RefusedError
from quantkit.formats.hqq.linear import COMPUTE, FLAGS, GRIDS, LAYOUT, NUMBERS, TEXTS
from quantkit.formats.parts import AGAIN

PICKLE = "qmodel.pt"


def write_pickle(tensors: TensorFolder, path: Path) -> None:
    """`qmodel.pt` as hqq saves it: a table of modules, the values of a quantized one as plain Python."""
    modules: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.read(tensors.tensors).items():
        module, part = name.rsplit(".", 1)
        if part != "encoded_state_dict":
            modules.setdefault(module, {})[part] = _plain(part, tensor)
    torch.save(modules, path)


def _plain(part: str, tensor: Tensor) -> Any:
    if part in FLAGS:
        return bool(tensor)
    if part in NUMBERS:
        return int(tensor)
    if part == "shape":
        return torch.Size(tensor.tolist())
    if part in TEXTS:
        text = bytes(tensor.tolist()).decode("ascii")
        return {"torch.uint8": torch.uint8, "torch.int32": torch.int32, **COMPUTE}.get(text, text)
    return tensor


def _encoded(value: Any) -> Tensor:
    """A value of `qmodel.pt` as the safetensors form holds it."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    if isinstance(value, torch.Size):
        return torch.tensor(value, dtype=torch.int64)
    return torch.tensor(list(str(value).encode()), dtype=torch.uint8)


@dataclass(frozen=True)
class PickledFolder(TensorFolder):
    """The tensors of a `qmodel.pt`, opened without running code from it; they stay mapped to the file."""

    loaded: dict[str, Tensor]

    def read(self, names: Any) -> dict[str, Tensor]:
        """The named tensors; see `TensorFolder.read`."""
        return {name: self.loaded[name] for name in names}


def open_pickle(folder: Path) -> PickledFolder:
    """The modules of a `qmodel.pt` as named tensors.

    Raises:
        RefusedError: it holds something else than tensors and plain values, or cannot be read.
    """
    path = folder / PICKLE
    try:
        modules = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 (the unpickler raises whatever the file makes it raise)
        raise RefusedError(
            f"{PICKLE} cannot be read: {str(error).splitlines()[0]}",
            where=str(path),
            fix="only tensors and plain values are read from a pickle; ask for a safetensors version",
        ) from None
    if not isinstance(modules, dict) or not all(isinstance(parts, dict) for parts in modules.values()):
        raise RefusedError(f"{PICKLE} is no table of modules", where=str(path), fix=AGAIN)
    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    dtypes |= {torch.int32: "I32", torch.uint8: "U8"}
    loaded = {
        f"{module}.{part}": _encoded(value)
        for module, parts in modules.items()
        for part, value in _flat(parts).items()
        if isinstance(value, Tensor) or (part in LAYOUT.parts and value is not None)
    }
    infos = {
        name: TensorInfo(name, dtypes[tensor.dtype], tuple(tensor.shape), PICKLE)
        for name, tensor in sorted(loaded.items())
    }
    return PickledFolder(folder, infos, loaded)


def _flat(parts: dict[str, Any]) -> dict[str, Any]:
    """A module of a `qmodel.pt` without tables in it, as releases before 0.2 and those with quantized zeros nest them.

    "meta_zero:scale" is the scale of a zero that is quantized itself.
    """
    found = {key: value for key, value in parts.items() if key != "meta"} | (parts.get("meta") or {})
    if (stacked := found.pop("zero_scale", None)) is not None:
        names = [f"{which}_q" if found.get(f"quant_{which}") else which for which in ("zero", "scale")]
        found |= dict(zip(names, stacked, strict=True))
    for which in GRIDS:
        nested = found.pop(f"meta_{which}", None) or {}
        found |= {f"meta_{which}:{key}": value for key, value in nested.items()}
    return found
