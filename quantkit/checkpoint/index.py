"""A folder of safetensors shards seen as named tensors; nothing is read before it is asked for."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.checkpoint.families import (
    EMBEDDING,
    END_MODULES,
    HEAD,
    IGNORED,
    Family,
    family_of,
    item_names,
    item_of,
    length_of,
    side_lengths,
    weight_sides,
)
from quantkit.checkpoint.numbers import require_computable
from quantkit.errors import RefusedError

STEM = "model"
INDEX_NAME = f"{STEM}.safetensors.index.json"
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # config.json's words for dtypes
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "U32": torch.uint32,
}
DENSE_DTYPES = ("F32", "F16", "BF16")  # of a source's weights
SILU = ("silu", "swish")  # transformers' names for it


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `file` is a name within the folder, `dtype` safetensors' own spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.num_elements * DTYPES[self.dtype].itemsize


Header = Callable[[str], dict[str, TensorInfo] | None]
"""What a weight file holds, given its name: its tensors by name, or None where there is no such file."""


@dataclass(frozen=True)
class TensorFolder:
    """The tensors of a folder by name, read on demand."""

    folder: Path
    tensors: dict[str, TensorInfo]

    @property
    def files(self) -> list[str]:
        """Names of the weight files, in order."""
        return sorted({info.file for info in self.tensors.values()})

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU, in the dtype they are stored in; files are closed before returning."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        found = {}
        for file, wanted in by_file.items():
            with safe_open(self.folder / file, framework="pt") as shard:
                for name in wanted:
                    found[name] = shard.get_tensor(name)
        return found


@dataclass(frozen=True)
class Checkpoint:
    """A dense source model.

    Attributes:
        tensors: the weights.
        config: config.json as it stands.
        family: its row of the table.
        described: there are no weights; tensors are those that config.json calls for.
    """

    tensors: TensorFolder
    config: dict
    family: Family
    described: bool = False

    @property
    def folder(self) -> Path:
        return self.tensors.folder

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def items(self) -> list[str]:
        return item_names(self.num_layers)

    def names(self, item: str) -> list[str]:
        """Checkpoint names of an item's tensors; `layers.3` names those of the fourth decoder layer."""
        return [name for name in self.tensors.tensors if item_of(name) == item]

    def read(self, item: str) -> dict[str, Tensor]:
        """An item's dense tensors by checkpoint name, on the CPU, in stored dtype.

        Raises:
            RefusedError: a weight is not finite.
        """
        tensors = self.tensors.read(self.names(item))
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                bad = int((~torch.isfinite(tensor)).sum())
                raise RefusedError(
                    f"{name} holds {bad} value(s) that are NaN or infinite",
                    where=str(self.folder / self.tensors.tensors[name].file),
                    fix="download the checkpoint again, or ask its authors; quantizing it would spread the NaN",
                )
        return tensors

    def linear_shapes(self, *, ends: bool = False) -> Iterator[tuple[str, int, int]]:
        """(full module name, out features, in features) of every linear of the decoder layers.

        Args:
            ends: also the embedding, and the head where it is not tied to it.
        """
        modules = [
            f"model.layers.{index}.{linear}" for index in range(self.num_layers) for linear in self.family.linears
        ]
        infos = self.tensors.tensors
        for module in [*modules, *(END_MODULES.values() if ends else ())]:
            if f"{module}.weight" in infos:
                rows, columns = infos[f"{module}.weight"].shape
                yield module, rows, columns


def is_finite(tensor: Tensor) -> bool:
    """Whether all values, one at least, are finite; told by the extremes, which need no copy and pass a NaN on."""
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def read_json(path: Path) -> dict:
    """A JSON object from a checkpoint's file.

    Raises:
        RefusedError: the file is missing, cannot be read, is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RefusedError(
            f"{path.name} is missing", where=str(path.parent), fix="point to a complete checkpoint folder"
        ) from None
    except NotADirectoryError:
        raise RefusedError(
            f"not a folder: {path.parent}", where=str(path), fix="give the folder that the file is in"
        ) from None
    except OSError as error:
        raise RefusedError(
            f"{path.name} cannot be read: {error.strerror}",
            where=str(path),
            fix="point to a complete checkpoint folder",
        ) from None
    # a number of thousands of digits is a ValueError, too
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{path.name} is not JSON: {error}", where=str(path), fix="download it again") from None
    if not isinstance(content, dict):
        raise RefusedError(f"{path.name} is not a JSON object", where=str(path), fix="download it again")
    return content


def open_tensors(folder: Path, stem: str = STEM, *, header: Header | None = None) -> TensorFolder:
    """The tensors of a safetensors folder, sharded or single; only headers are read.

    Args:
        folder: where they lie.
        stem: what their file names start with.
        header: reads them, for weights that are elsewhere; None takes the files of the folder.

    Raises:
        RefusedError: no weights, pickles only, a missing or truncated shard, an index that names an absent tensor.
    """
    if not folder.is_dir():
        raise RefusedError(f"no such folder: {folder}", fix="give a folder with config.json and *.safetensors")
    header = header or partial(read_header, folder)
    single = f"{stem}.safetensors"
    index_path = folder / f"{single}.index.json"
    if not index_path.exists():
        if (held := header(single)) is not None:
            return TensorFolder(folder, held)
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise RefusedError(
                f"the checkpoint holds only pickles ({pickles[0]}), which can run code when opened",
                where=str(folder),
                fix="convert it to safetensors first (transformers: save_pretrained(..., safe_serialization=True))",
            )
        raise RefusedError(
            f"neither {single} nor {index_path.name} is there",
            where=str(folder),
            fix="give a complete checkpoint",
        )
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise RefusedError(
            f"{index_path.name} has no weight_map from names of tensors to names of files",
            where=str(index_path),
            fix="download it again",
        )
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        held = header(file)
        if held is None:
            raise RefusedError(
                f"shard {file} is missing", where=str(folder), fix=f"download it again; {index_path.name} names it"
            )
        tensors |= held
    absent = sorted(name for name, file in weight_map.items() if name not in tensors or tensors[name].file != file)
    if absent:
        raise RefusedError(
            f"{index_path.name} names {absent[0]} in {weight_map[absent[0]]}, but it is not there",
            where=str(index_path),
            fix="download the checkpoint again: index and shards are of different versions",
        )
    return TensorFolder(folder, {name: tensors[name] for name in sorted(weight_map)})


def weights_stem(folder: Path) -> str:
    """What the names of a folder's weight files start with: `model`, or the name that a tool has given its own.

    AutoGPTQ, for one, writes gptq_model-4bit-128g.safetensors.

    Raises:
        RefusedError: several files of other names, and no index that says which tensor is where.
    """
    indexes = {path.name.removesuffix(".safetensors.index.json") for path in folder.glob("*.safetensors.index.json")}
    files = {path.stem for path in folder.glob("*.safetensors")}
    stems = sorted(indexes or files)
    if STEM in indexes | files or not stems:
        return STEM
    if len(stems) > 1:
        raise RefusedError(
            f"{len(stems)} files could be the weights: {', '.join(stems)}",
            where=str(folder),
            fix=f"keep those of one conversion, or add {INDEX_NAME}",
        )
    return stems[0]


def open_every_file(folder: Path, below: str = ".") -> TensorFolder:
    """The tensors of all safetensors files of a folder, whatever they are called and without an index.

    Args:
        folder: what file names are given from.
        below: where in it the files lie.

    Raises:
        RefusedError: no weights, a truncated file, a tensor that two files hold.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in sorted((folder / below).glob("*.safetensors")):
        file = path.relative_to(folder).as_posix()
        found = read_header(folder, file) or {}
        if twice := sorted(found.keys() & tensors.keys()):
            raise RefusedError(
                f"{twice[0]} is in {tensors[twice[0]].file} and in {file}",
                where=str(folder),
                fix="remove the files of another conversion",
            )
        tensors |= found
    if not tensors:
        raise RefusedError("no *.safetensors is there", where=str(folder / below), fix="give a complete folder")
    return TensorFolder(folder, tensors)


def read_header(folder: Path, file: str) -> dict[str, TensorInfo] | None:
    """The tensors of one file of a folder by name; None if it is not there.

    Raises:
        RefusedError: it is truncated or no safetensors file.
    """
    if not (folder / file).is_file():
        return None
    try:
        with safe_open(folder / file, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: TensorInfo(name, part.get_dtype(), tuple(part.get_shape()), file) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise RefusedError(
            f"shard {file} cannot be read: {error}",
            where=str(folder),
            fix="it is truncated or damaged; download it again",
        ) from None


def open_checkpoint(folder: Path, *, header: Header | None = None) -> Checkpoint:
    """A dense checkpoint that holds what its config.json describes; only headers are read.

    Args:
        folder: where it lies.
        header: see `open_tensors`; nothing but names, dtypes and shapes is known of weights that are elsewhere.

    Raises:
        RefusedError: see `open_tensors`, `family_of`; also a quantized source, a size that config.json does not give,
            a tensor that is missing, of another shape or dtype than it should be, or no part of the model.
    """
    config, family, sides, lengths = _description(folder)
    held = open_tensors(folder, header=header).tensors
    tensors = {name: info for name, info in held.items() if not name.endswith(IGNORED)}
    _require_described(tensors, sides, lengths, family, folder)
    return Checkpoint(TensorFolder(folder, tensors), config, family)


def describe_model(folder: Path) -> Checkpoint:
    """The model that a folder with nothing but config.json describes, for whoever asks only for shapes.

    Raises:
        RefusedError: as `open_checkpoint`, as far as config.json goes.
    """
    config, family, sides, lengths = _description(folder)
    dtype = STORED.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    infos = {
        name: TensorInfo(name, dtype, tuple(lengths[side] for side in found), "config.json")
        for name, found in sides.items()
    }
    return Checkpoint(TensorFolder(folder, infos), config, family, described=True)


def require_one_head(checkpoint: Checkpoint) -> None:
    """Stop where a head is tied to the embedding, and another than that is stored: readers take either.

    Raises:
        RefusedError: it is so.
    """
    embedding, head = (f"{END_MODULES[end]}.weight" for end in (EMBEDDING, HEAD))
    if not checkpoint.config.get("tie_word_embeddings") or head not in checkpoint.tensors.tensors:
        return
    stored = checkpoint.tensors.read([embedding, head])
    if not torch.equal(stored[embedding], stored[head]):
        raise RefusedError(
            f"config.json says tie_word_embeddings, but {head} is stored and another than {embedding}",
            where=str(checkpoint.folder / checkpoint.tensors.tensors[head].file),
            fix="set tie_word_embeddings to false if the stored one is meant, or take it out of the weights",
        )


def holds_weights(folder: Path) -> bool:
    """Whether there is anything in a folder that could be a model's weights."""
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.safetensors.index.json", *PICKLES))


def _description(folder: Path) -> tuple[dict, Family, dict[str, tuple[str, ...]], dict[str, int]]:
    """What config.json says: itself, the family, and the sides of every tensor with their lengths."""
    config = read_json(folder / "config.json")
    where = str(folder / "config.json")
    if "quantization_config" in config or "quantization" in config:
        raise RefusedError("the source model is quantized already", where=where, fix="start from the bf16 checkpoint")
    family = family_of(config, where=where)
    length_of(config, "max_position_embeddings", where=where)
    require_computable(config, where=where)
    # transformers would compute another one, but llama.cpp, MLX and others do not look and take SiLU
    if (activation := config.get("hidden_act", SILU[0])) not in SILU:
        raise RefusedError(
            f"config.json says hidden_act = {activation!r}; a {family.architecture} has {SILU[0]} in every engine",
            where=where,
            fix="take config.json from the model's own repository; a model of another activation cannot be quantized",
        )
    return config, family, weight_sides(config, family, where=where), side_lengths(config, family, where=where)


def _require_described(
    tensors: dict[str, TensorInfo],
    sides: dict[str, tuple[str, ...]],
    lengths: dict[str, int],
    family: Family,
    folder: Path,
) -> None:
    """Stop unless the tensors are those that config.json describes, every one."""
    missing = [name for name in sides if name not in tensors]
    if missing:
        raise RefusedError(
            f"{missing[0]} is missing ({len(missing)} of {len(sides)} expected tensors are)",
            where=str(folder),
            fix="the weights do not belong to this config.json; download the checkpoint again",
        )
    # a tied model may hold its head a second time
    known = {f"{END_MODULES[HEAD]}.weight": sides[f"{END_MODULES[EMBEDDING]}.weight"]} | sides
    for name, info in tensors.items():
        where = str(folder / info.file)
        if name not in known:
            raise RefusedError(
                f"{name} is no part of a {family.architecture} as config.json describes it",
                where=where,
                fix="the weights and config.json are of different models; download both again",
            )
        shape = tuple(lengths[side] for side in known[name])
        if info.shape != shape:
            raise RefusedError(
                f"{name} has shape {list(info.shape)}; config.json calls for {list(shape)} ({', '.join(known[name])})",
                where=where,
                fix="the weights and config.json are of different models; download both again",
            )
        if info.dtype not in DENSE_DTYPES:
            raise RefusedError(
                f"{name} is stored as {info.dtype}; a source's weights are {' or '.join(DENSE_DTYPES)}",
                where=where,
                fix="start from the bf16 checkpoint",
            )
