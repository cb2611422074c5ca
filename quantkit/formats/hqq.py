"""HQQ folders: safetensors in the hqq package's encoded form, read without evaluating a string (docs/formats/hqq.md).

transformers 5 cannot read HQQ; given a folder with `model.safetensors` it makes random weights without an error. So
the weights are in files of another name here, which it refuses.

Shape legend: O out features, I in features, R rows of the grouped matrix, C its columns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.families import Family, family_of, in_layer, item_of
from quantkit.checkpoint.index import Checkpoint, TensorFolder, TensorInfo, open_tensors, read_json
from quantkit.errors import RefusedError
from quantkit.formats.contract import MAX_SHARD_BYTES, Reading
from quantkit.formats.parts import AGAIN, FLOATS, Layout, Shape, require_fit
from quantkit.formats.shards import merge
from quantkit.formats.sidecars import quantized_config, write_sidecars
from quantkit.grids.affine import AffineGrid, Grid, StridedGrid
from quantkit.qtensor import Item, QuantizedLinear

NAME = "hqq"
NATIVE_ENGINE = "hqq"
STEM = "hqq_model"
PICKLE = "qmodel.pt"
STORED = torch.float16
CODES_PER_WORD = 10  # of 3-bit codes; the two highest bits of a word stay empty
COMPUTE = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16, "torch.float32": torch.float32}
PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
# what a stored word holds: codes, and bits of each
WORDS = {"8bit_u8": (1, 8), "4bit_u8": (2, 4), "3bit_32": (CODES_PER_WORD, 3), "2bit_u8": (4, 2)}
STORED_AS = {"8bit_u8": torch.uint8, "4bit_u8": torch.uint8, "3bit_32": torch.int32, "2bit_u8": torch.uint8}
TEXTS = ("packing", "unpack_view_dtype", "compute_dtype")
NUMBERS = ("nbits", "group_size", "axis")
FLAGS = (
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)
GRIDS = ("scale", "zero")
# what old releases of hqq made of a scale or a zero that was quantized itself, with settings of its own
OF_GRIDS = ("scale", "zero", "shape", "packing", "view_as_float")
NESTED = tuple(f"meta_{which}:{key}" for which in GRIDS for key in OF_GRIDS)
# what a linear's weights take, but for a few numbers
WEIGHING = (
    "W_q",
    *(f"{which}{end}" for which in GRIDS for end in ("", "_q")),
    *(f"meta_{which}:{key}" for which in GRIDS for key in GRIDS),
)
RAISED = ("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize")
LAYOUT = Layout(
    ("W_q", "shape", "packing", *NUMBERS),
    {"scale": FLOATS, "zero": FLOATS},
    optional=(*GRIDS, "scale_q", "zero_q", *TEXTS[1:], *FLAGS, *NESTED),
)
USE = """transformers cannot load this folder; the [hqq](https://github.com/mobiusml/hqq) package can, once it is told
to read safetensors instead of a pickle:

```python
# pip install hqq transformers safetensors
import glob, os
import torch
from hqq.models.hf.base import AutoHQQHFModel
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoTokenizer

class SafeHQQ(AutoHQQHFModel):
    @classmethod
    def get_weight_file(cls, folder):
        return sorted(glob.glob(os.path.join(folder, "{stem}*.safetensors")))[0]

    @classmethod
    def load_weights(cls, folder, map_location=None):
        modules = {{}}
        for path in sorted(glob.glob(os.path.join(folder, "{stem}*.safetensors"))):
            for name, tensor in load_file(path).items():
                module, part = name.rsplit(".", 1)
                modules.setdefault(module, {{}})[part] = tensor
        modules.setdefault("lm_head", modules["model.embed_tokens"])
        return modules

folder = "{repo}"
if not os.path.isdir(folder):
    folder = snapshot_download(folder)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = SafeHQQ.from_quantized(folder, compute_dtype=torch.float16, device=device)
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{{"role": "user", "content": "Jakie mamy pory roku w Polsce?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs.to(device), max_new_tokens=200)[0]))
```
"""
PICKLE_NOTE = f"""
`{PICKLE}` holds the same weights for hqq's own `AutoHQQHFModel.from_quantized`. It is a pickle: load it with
`weights_only=True` (as hqq does), or take the safetensors.
"""


def pack(codes_RC: Tensor, packing: str) -> Tensor:
    """Codes [R, C] packed along rows, the first block of rows in the highest bits.

    Args:
        codes_RC: uint8; R in multiples of 2 for 4bit_u8, of 4 for 2bit_u8.
        packing: as hqq names it.
    """
    codes_in_word, bits = WORDS[packing]
    step = -(-len(codes_RC) // codes_in_word)
    if missing := step * codes_in_word - len(codes_RC):
        codes_RC = torch.cat([codes_RC, codes_RC.new_zeros((missing, codes_RC.shape[1]))])
    blocks_PRC = codes_RC.view(codes_in_word, step, -1)
    words_RC = blocks_PRC.new_zeros(blocks_PRC.shape[1:], dtype=STORED_AS[packing])
    for place, block_RC in enumerate(blocks_PRC):
        words_RC |= block_RC.to(words_RC.dtype) << bits * (codes_in_word - 1 - place)
    return words_RC


def unpack(packed: Tensor, packing: str, rows: int) -> Tensor:
    """uint8 codes [rows, C]: what `pack` packed."""
    codes_in_word, bits = WORDS[packing]
    if codes_in_word == 1:
        return packed
    shifts = range(bits * (codes_in_word - 1), -1, -bits)
    return torch.cat([((packed >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts])[:rows]


def encode_linear(name: str, linear: QuantizedLinear, group_size: int) -> dict[str, Tensor]:
    """The tensors of one quantized linear by their names in the file."""
    grid, codes_OI = linear.grid, linear.codes_OI
    packing = PACKINGS[grid.bits]
    if isinstance(grid, StridedGrid):
        axis, codes_RC = 0, codes_OI.view(group_size, -1)
        scale, zero = grid.scale_GI.view(1, -1), grid.zero_GI.view(1, -1)
    else:
        assert isinstance(grid, AffineGrid), "HQQ codes are on an affine grid"
        # a group as long as a row leaves codes as the solver laid them
        axis, codes_RC = 1, codes_OI.reshape(-1, group_size).contiguous()
        scale, zero = grid.scale_OG.reshape(-1, 1), grid.zero_OG.reshape(-1, 1)
    texts = (packing, str(STORED_AS[packing]), str(STORED))
    found = {
        "W_q": pack(codes_RC, packing),
        "scale": scale.to(STORED).contiguous(),
        "zero": zero.to(STORED).contiguous(),
        "shape": torch.tensor(codes_OI.shape, dtype=torch.int64),
        **{key: torch.tensor(list(text.encode()), dtype=torch.uint8) for key, text in zip(TEXTS, texts, strict=True)},
        **{
            key: torch.tensor(value, dtype=torch.int32)
            for key, value in zip(NUMBERS, (grid.bits, group_size, axis), strict=True)
        },
        **{key: torch.tensor(int(key in RAISED), dtype=torch.uint8) for key in FLAGS},
    }
    if linear.bias_O is not None:
        found["bias"] = linear.bias_O.to(STORED).contiguous()
    return {f"{name}.{part}": tensor for part, tensor in found.items()}


def decode_linear(name: str, tensors: dict[str, Tensor]) -> QuantizedLinear:
    """One quantized linear from its tensors, ours or hqq's.

    Raises:
        RefusedError: a packing that is not known, or tensors that are missing or contradict each other; nothing in the
            file is evaluated.
    """
    part = {key: tensors[f"{name}.{key}"] for key in LAYOUT.parts if f"{name}.{key}" in tensors}
    packing = _known_packing(name, part)
    for which in GRIDS:
        if f"{which}_q" in part:
            part[which] = _grid_part(name, part, which)
    if contradiction := _contradiction(part, packing):
        raise RefusedError(f"{name}: {contradiction}", where=name, fix=AGAIN)
    bits, size, axis = (int(part[key]) for key in NUMBERS)
    rows, columns = part["shape"].tolist()
    scale, zero = part["scale"].float(), part["zero"].float()
    bias = tensors.get(f"{name}.bias")
    if axis == 0:
        codes_OI = unpack(part["W_q"], packing, size).reshape(rows, columns)
        shape = (rows // size, columns)
        grid: Grid = StridedGrid(bits, scale.view(shape), zero.view(shape))
    else:
        codes_OI = unpack(part["W_q"], packing, rows * columns // size).reshape(rows, columns)
        shape = (rows, columns // size)
        group_I = torch.arange(columns, dtype=torch.int32) // size
        grid = AffineGrid(bits, scale.view(shape), zero.view(shape), group_I)
    return QuantizedLinear(codes_OI, grid, bias)


def _known_packing(name: str, part: dict[str, Tensor]) -> str:
    """The packing of codes, if it and everything beside it is known.

    Raises:
        RefusedError: it is not.
    """
    packing = bytes(part["packing"].flatten().tolist()).decode("ascii", errors="replace")
    flags = {key for key in ("view_as_float", "quant_scale", "quant_zero") if key in part and bool(part[key].any())}
    flags -= {f"quant_{which}" for which in GRIDS if f"{which}_q" in part}
    if packing not in WORDS or flags:
        found = f"the packing {packing!r}" if packing not in WORDS else " and ".join(sorted(flags))
        raise RefusedError(
            f"{name} uses {found}, which quantkit does not read",
            where=name,
            fix=f"known packings: {', '.join(WORDS)}",
        )
    return packing


def _grid_part(name: str, part: dict[str, Tensor], which: str) -> Tensor:
    """Scales or zeros that are quantized themselves, float32: codes of one group or of several, as weights are.

    Raises:
        RefusedError: a packing that is not known, or tensors that are missing or contradict each other.
    """
    own = {key: part[f"meta_{which}:{key}"] for key in OF_GRIDS if f"meta_{which}:{key}" in part}
    if missing := [key for key in OF_GRIDS[:4] if key not in own]:
        raise RefusedError(f"{name}.meta_{which} has no {missing[0]}", where=name, fix=AGAIN)
    packing = _known_packing(f"{name}.{which}_q", own)
    words, shape = part[f"{which}_q"], own["shape"].tolist()
    words = words if words.dim() == 2 else words.view(-1, 1)
    high = math.prod(shape) // words.shape[1]
    codes = unpack(words, packing, high).float()
    scale, zero = own["scale"].float(), own["zero"].float()
    fits = codes.shape[0] * codes.shape[1] == math.prod(shape) and scale.shape == zero.shape
    if not fits or (scale.numel() > 1 and tuple(scale.shape) not in ((high, 1), (1, codes.shape[1]))):
        raise RefusedError(
            f"{name}: {which}_q is {list(part[f'{which}_q'].shape)} with scales {list(scale.shape)}, which do not make "
            f"{shape}",
            where=name,
            fix=AGAIN,
        )
    return ((codes - zero) * scale).view(shape)


def _contradiction(part: dict[str, Tensor], packing: str) -> str | None:
    """How a linear's tensors do not fit what they say of themselves; None if they do."""
    if missing := [which for which in GRIDS if which not in part]:
        return f"{missing[0]} is missing"
    if part["shape"].numel() != 2 or any(part[key].numel() != 1 for key in NUMBERS):
        return f"shape, {', '.join(NUMBERS)} are not two numbers and one each"
    bits, size, axis = (int(part[key]) for key in NUMBERS)
    rows, columns = part["shape"].flatten().tolist()
    per_word, widest = WORDS[packing]
    if not 1 <= bits <= widest or axis not in (0, 1):
        return f"{bits} bits along axis {axis} are not in the packing {packing}"
    if size < 1 or min(rows, columns) < 1 or (columns if axis == 1 else rows) % size:
        return f"[{rows}, {columns}] has no groups of {size} along axis {axis}"
    groups = rows * columns // size
    high, wide = (groups, size) if axis == 1 else (size, groups)
    expected = {"W_q": (-(-high // per_word), wide)}
    expected["scale"] = expected["zero"] = (groups, 1) if axis == 1 else (1, groups)
    for key, shape in expected.items():
        if tuple(part[key].shape) != shape:
            return f"{key} is {list(part[key].shape)}, where {list(shape)} belongs"
    return None


def decode_item(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dense tensors by checkpoint name: decoded linears in float32, everything else as stored."""
    return LAYOUT.decoded(tensors, lambda name: decode_linear(name, tensors))


@dataclass(frozen=True)
class HqqFormat:
    """The writing side, see `quantkit.formats.contract.Format`.

    Attributes:
        bits, group_size, axis: of every linear.
        skip: name endings of linears that stay dense.
        pickled: also write `qmodel.pt`.
    """

    bits: int
    group_size: int
    axis: int
    skip: tuple[str, ...] = ()
    pickled: bool = False
    name: str = NAME
    stored_dtype: torch.dtype = STORED

    def problems(self, shapes: list[tuple[str, int, int]]) -> list[str]:
        """Why linears of these (name, out, in) shapes cannot be stored, one line each; empty if all can."""
        found = []
        for name, rows, columns in shapes:
            grouped, side = (columns, "in_features") if self.axis == 1 else (rows, "out_features")
            blocks = {4: 2, 2: 4}.get(self.bits, 1)
            packed_rows = rows * columns // self.group_size if self.axis == 1 else self.group_size
            if name.endswith(self.skip):
                continue
            if grouped % self.group_size:
                reason = f"{side} {grouped} is not divisible by group_size {self.group_size}"
            elif packed_rows % blocks:
                reason = f"{packed_rows} groups do not fill bytes of {blocks} codes"
            else:
                continue
            ending = in_layer(name)
            found.append(f'{name}: {reason}; leave it in 16 bits with quantize.skip = ["{ending}"]')
        return found

    def stored_bits(self, name: str, rows: int, columns: int) -> int:
        """Bits that a quantized linear takes in the file: codes, scales and zeros."""
        groups = rows * columns // self.group_size
        if self.bits == 3:
            packed_rows, width = (groups, self.group_size) if self.axis == 1 else (self.group_size, groups)
            return 32 * -(-packed_rows // CODES_PER_WORD) * width + groups * 32
        return rows * columns * self.bits + groups * 32

    def encode_item(self, item: Item) -> dict[str, Tensor]:
        """All tensors of one item as they stand in the file."""
        tensors = {name: tensor.contiguous() for name, tensor in item.tensors.items()}
        for name, linear in item.linears.items():
            tensors |= encode_linear(name, linear, self.group_size)
        return tensors

    def decode_item(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors by checkpoint name."""
        return decode_item(tensors)

    def settings(self, modules: list[str]) -> dict[str, Any]:
        """`quantization_config` of config.json, in the words of transformers 4, which read HQQ.

        Args:
            modules: full names of every linear of the decoder layers, quantized or not.
        """
        weights = {
            "nbits": self.bits,
            "channel_wise": True,
            "group_size": self.group_size,
            "optimize": True,
            "round_zero": False,
            "axis": self.axis,
            "view_as_float": False,
        }
        return {
            "quant_method": NAME,
            "quant_config": {
                "weight_quant_params": weights,
                "scale_quant_params": None,
                "zero_quant_params": None,
                "offload_meta": False,
            },
            "skip_modules": ["lm_head", *(module for module in modules if module.endswith(self.skip))],
        }

    def assemble(self, checkpoint: Checkpoint, items: list[Path], folder: Path) -> dict[str, list[str]]:
        """Weights, config.json and the source's tokenizer files."""
        written = merge(items, folder, max_shard_bytes=MAX_SHARD_BYTES, stem=STEM)
        settings = self.settings([name for name, _, _ in checkpoint.linear_shapes()])
        write_sidecars(checkpoint.folder, folder, quantized_config(checkpoint.config, settings, "float16"), {})
        names = [path.name for path in written]
        if self.pickled:
            write_pickle(open_tensors(folder, stem=STEM), folder / PICKLE)
            names.append(PICKLE)
        return {NAME: names}


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


@dataclass(frozen=True)
class HqqArtifact:
    """An HQQ folder as dense weights by item, ours or anybody's.

    Attributes:
        tensors: the stored tensors.
        config: config.json.
        settings: its quantization_config, if any.
        family: the architecture's row.
    """

    tensors: TensorFolder
    config: dict
    settings: dict[str, Any]
    family: Family

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized linears, scales and zeros included, over their number of weights."""
        infos = self.tensors.tensors
        modules = LAYOUT.modules(infos)
        names = (f"{module}.{part}" for module in modules for part in WEIGHING)
        stored = sum(infos[name].size_bytes for name in names if name in infos)
        shapes = self.tensors.read([f"{module}.shape" for module in modules]).values()
        return 8 * stored / sum(int(shape.prod()) for shape in shapes)

    @property
    def weights(self) -> frozenset[str]:
        """Checkpoint names of what `read` gives."""
        return LAYOUT.weights(self.tensors.tensors)

    def read(self, item: str) -> dict[str, Tensor]:
        """Dense tensors of an item by checkpoint name, on the CPU."""
        return decode_item(self.tensors.read([name for name in self.tensors.tensors if item_of(name) == item]))


def open_artifact(folder: Path) -> HqqArtifact:
    """A reader of an HQQ folder: ours, hqq's `qmodel.pt`, or the safetensors that transformers 4 wrote.

    Raises:
        RefusedError: it holds no HQQ weights, misses a part of a linear, or tensors contradict the model.
    """
    config = read_json(folder / "config.json")
    opened = next((opener for name, opener in OPENERS if any(folder.glob(name))), None)
    if opened is None:
        raise RefusedError("no HQQ weights are there", where=str(folder), fix="download the artifact again")
    tensors, family = opened(folder), family_of(config, where=str(folder / "config.json"))

    def expected(name: str, rows: int, columns: int) -> dict[str, Shape]:
        """The parts fit the shape that is stored with them, see `decode_linear`; that one must be the model's."""
        stated = tensors.read([f"{name}.shape"])[f"{name}.shape"].flatten().tolist()
        if stated != [rows, columns]:
            raise RefusedError(
                f"{name}.shape says {stated}, where {[rows, columns]} belongs", where=str(folder), fix=AGAIN
            )
        for which in GRIDS:
            if not {f"{name}.{which}", f"{name}.{which}_q"} & tensors.tensors.keys():
                raise RefusedError(f"{name}.{which} is missing", where=str(folder), fix=AGAIN)
        return {}

    require_fit(LAYOUT, tensors, config, family, expected)
    return HqqArtifact(tensors, config, config.get("quantization_config") or {}, family)


OPENERS: tuple[tuple[str, Callable[[Path], TensorFolder]], ...] = (
    (f"{STEM}*.safetensors", lambda folder: open_tensors(folder, stem=STEM)),
    ("model*.safetensors", open_tensors),
    (PICKLE, open_pickle),
)


def recognizes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder is HQQ; what hqq itself saves says so by its weight file only."""
    settings = config.get("quantization_config") or {}
    return settings.get("quant_method") == NAME or (not settings and (folder / PICKLE).exists())


def use(repo: str, quantize: dict[str, Any], variants: Sequence[str]) -> str:
    """How the card says it is loaded."""
    return USE.format(repo=repo, stem=STEM) + (PICKLE_NOTE if quantize["qmodel_pt"] else "")


READING = Reading(recognizes, open_artifact, NATIVE_ENGINE, (NAME,), None, use)
