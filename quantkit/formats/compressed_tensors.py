"""compressed-tensors, pack-quantized: what llm-compressor writes and vLLM serves (docs/formats/compressed-tensors.md).

Shape legend: O out features, I in features, G groups.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.checkpoint.families import family_of
from quantkit.checkpoint.index import Checkpoint, open_tensors, read_json
from quantkit.errors import RefusedError
from quantkit.formats.bitstream import CODES_PER_RUN, pack, pack_rows, unpack
from quantkit.formats.contract import MAX_SHARD_BYTES, Reading, transformers_snippet
from quantkit.formats.fit import number_of, require_fit, require_groups
from quantkit.formats.parts import AGAIN, FLOATS, WORDS, Layout, PartsArtifact, Shape, encoded, groups_of, unstorable
from quantkit.formats.placed import Shards, lay_out, planned, size_bits
from quantkit.formats.shards import indexed
from quantkit.formats.sidecars import quantized_config, write_sidecars
from quantkit.grids.affine import AffineGrid
from quantkit.qtensor import Item, QuantizedLinear

NAME = "compressed-tensors"
PACKING = "pack-quantized"
NATIVE_ENGINE = "llm-compressor"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
LAYOUT = Layout(
    PARTS[:3],
    "weight_packed",
    {
        "weight_packed": WORDS,
        "weight_scale": FLOATS,
        "weight_shape": ("I64", "I32"),
        "weight_zero_point": WORDS,
        "weight_g_idx": ("I32", "I64"),
    },
    optional=PARTS[3:],
)
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
USE = f"""{transformers_snippet("transformers compressed-tensors")}
`vllm serve {{repo}}` serves it.
"""


def encode_linear(name: str, linear: QuantizedLinear, *, symmetric: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one quantized linear by their names in the file, contiguous.

    Args:
        name: full module name.
        linear: groups must be contiguous.
        symmetric: no zeros are stored; they are all 2**(bits-1).
        dtype: of scales and bias.
    """
    grid = linear.grid
    assert isinstance(grid, AffineGrid), "the codes are on an affine grid"
    tensors = {
        f"{name}.weight_packed": pack_rows(linear.codes_OI, grid.bits),
        f"{name}.weight_scale": grid.scale_OG.to(dtype).contiguous(),
        f"{name}.weight_shape": torch.tensor(linear.codes_OI.shape),
    }
    if not symmetric:
        tensors[f"{name}.weight_zero_point"] = pack(grid.zero_OG.to(torch.int32), grid.bits)
    if linear.bias_O is not None:
        tensors[f"{name}.bias"] = linear.bias_O.to(dtype).contiguous()
    return tensors


def decode_linear(name: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> QuantizedLinear:
    """One quantized linear from its tensors; any width up to 8 bits, with or without zeros and g_idx.

    Args:
        name: full module name.
        tensors: at least `name`.weight_packed, .weight_scale and .weight_shape; see `expected_shapes`.
        settings: the folder's quantization_config.

    Raises:
        RefusedError: weight_shape contradicts the codes, or weight_g_idx names groups that are not there.
    """
    packed, scale_OG, shape = (tensors[f"{name}.{part}"] for part in PARTS[:3])
    bits, _ = module_settings(name, settings)
    rows, columns = map(int, shape)
    if (rows, -(-columns * bits // 32)) != tuple(packed.shape):
        raise RefusedError(
            f"{name}.weight_shape says [{rows}, {columns}], which are not the codes that are stored",
            where=name,
            fix=AGAIN,
        )
    groups = scale_OG.shape[1]
    zero_OG = torch.full((rows, groups), float(2 ** (bits - 1)))
    if (zeros := tensors.get(f"{name}.weight_zero_point")) is not None:
        zero_OG = _unpacked(zeros, bits)[:rows].float()
    group_I = tensors.get(f"{name}.weight_g_idx")
    if group_I is None:
        group_I = torch.arange(columns) // -(-columns // groups)
    require_groups(name, group_I, groups)
    codes_OI = _unpacked(packed.t(), bits)[:columns].t().contiguous()
    grid = AffineGrid(bits, scale_OG.float(), zero_OG, group_I.to(torch.int32))
    return QuantizedLinear(codes_OI, grid, tensors.get(f"{name}.bias"))


def _unpacked(words_WX: Tensor, bits: int) -> Tensor:
    """Codes along the first dimension, with what fills the last run."""
    return unpack(pad(words_WX, (0, 0, 0, -len(words_WX) % bits)).contiguous(), bits)


def weight_arguments(module: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the folder says of a linear's weights: num_bits, group_size, strategy, symmetric.

    Args:
        module: full name.
        settings: the folder's quantization_config; the last group that names the module stands, one that names
            every "Linear" only if no other does.

    Raises:
        RefusedError: no group is about it.
    """
    fitting = []
    for group in settings.get("config_groups", {}).values():
        for target in group["targets"]:
            if target.startswith("re:"):
                named = re.match(target.removeprefix("re:"), module) is not None
            else:
                named = target == module
            if named or target == "Linear":
                fitting.append((named, group["weights"]))
    if not fitting:
        raise RefusedError(f"no config group is about {module}", where="config.json", fix="download the artifact again")
    arguments: dict[str, Any] = max(fitting, key=lambda found: found[0])[1]
    return arguments


def module_settings(name: str, settings: dict[str, Any]) -> tuple[int, int]:
    """Bits and group size of one linear; -1 is one group per row.

    Raises:
        RefusedError: the folder says something else of it.
    """
    found, where = weight_arguments(name, settings), f"{name} in config.json"
    bits = number_of(found, "num_bits", range(1, 9), where=where)
    if found.get("strategy") == "channel":
        return bits, -1
    return bits, number_of(found, "group_size", GROUP_SIZES, where=where)


def expected_shapes(rows: int, columns: int, bits: int, group_size: int) -> dict[str, Shape]:
    """The shape of each part of a linear [rows, columns]."""
    groups = groups_of(columns, group_size)
    return {
        "weight_packed": (rows, -(-columns * bits // 32)),
        "weight_scale": (rows, groups),
        "weight_shape": (2,),
        "weight_zero_point": (-(-rows * bits // 32), groups),
        "weight_g_idx": (columns,),
    }


def decode_item(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Dense tensors by checkpoint name: decoded linears in float32, everything else as stored."""
    return LAYOUT.decoded(tensors, lambda name: decode_linear(name, tensors, settings))


@dataclass(frozen=True)
class CompressedTensorsFormat:
    """The writing side, see `quantkit.formats.contract.Format`.

    Attributes:
        bits, group_size, symmetric: of the grid; -1 is one group per row.
        stored_dtype: of scales and of every dense tensor.
        skip: name endings of linears that stay dense.
    """

    bits: int
    group_size: int
    symmetric: bool
    stored_dtype: torch.dtype
    skip: tuple[str, ...] = ()
    name: str = NAME

    def problems(self, shapes: list[tuple[str, int, int]]) -> list[str]:
        """Why linears of these (name, out, in) shapes cannot be stored, one line each; empty if all can."""

        def reason(rows: int, columns: int) -> str | None:
            if self.group_size != -1 and columns % self.group_size:
                return f"in_features {columns} is not divisible by group_size {self.group_size}"
            if columns % CODES_PER_RUN or (rows % CODES_PER_RUN and not self.symmetric):
                return f"[{rows}, {columns}] is not in multiples of {CODES_PER_RUN}, which the packing needs"
            return None

        return unstorable(shapes, self.skip, reason)

    def stored_bits(self, name: str, rows: int, columns: int) -> int:
        """Bits that a quantized linear takes in the file: codes, scales, zeros and its shape."""
        return size_bits(self.parts(name, rows, columns))

    def parts(self, name: str, rows: int, columns: int) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and shape of each part of a quantized linear."""
        shapes = expected_shapes(rows, columns, self.bits, self.group_size)
        written = {"weight_packed": torch.int32, "weight_scale": self.stored_dtype, "weight_shape": torch.int64}
        written |= {} if self.symmetric else {"weight_zero_point": torch.int32}
        return {part: (dtype, shapes[part]) for part, dtype in written.items()}

    def lay_out(self, checkpoint: Checkpoint, folder: Path) -> Shards:
        """See `quantkit.formats.contract.InPlace`."""
        return lay_out(folder, planned(checkpoint, self), max_shard_bytes=MAX_SHARD_BYTES)

    def encode_item(self, item: Item) -> dict[str, Tensor]:
        """All tensors of one item as they stand in the file."""
        return encoded(item, partial(encode_linear, symmetric=self.symmetric, dtype=self.stored_dtype))

    def decode_item(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors by checkpoint name."""
        return decode_item(tensors, self.settings([]))

    def settings(self, modules: list[str]) -> dict[str, Any]:
        """`quantization_config` of config.json.

        Args:
            modules: full names of every linear of the decoder layers, quantized or not.
        """
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size == -1 else "group",
            "group_size": None if self.group_size == -1 else self.group_size,
            "dynamic": False,
            "actorder": None,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": NAME,
            "format": PACKING,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", *(module for module in modules if module.endswith(self.skip))],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def assemble(self, checkpoint: Checkpoint, items: list[Path], folder: Path) -> dict[str, list[str]]:
        """The weights' index, config.json and the source's tokenizer files."""
        written = indexed(folder)
        settings = self.settings([name for name, _, _ in checkpoint.linear_shapes()])
        config = quantized_config(checkpoint.config, settings, self.stored_dtype)
        write_sidecars(checkpoint.folder, folder, config, {})
        return {NAME: [path.name for path in written]}


def open_artifact(folder: Path) -> PartsArtifact:
    """A reader of a pack-quantized folder.

    Raises:
        RefusedError: it is of another layout of compressed-tensors, misses a part of a linear, or tensors contradict
            each other, the settings or the model.
    """
    config = read_json(folder / "config.json")
    settings = config["quantization_config"]
    layouts = {settings.get("format")} | {
        group.get("format") or settings.get("format") for group in settings.get("config_groups", {}).values()
    }
    if layouts != {PACKING}:
        raise RefusedError(
            f"the layout is {' and '.join(sorted(map(str, layouts)))}",
            where=str(folder / "config.json"),
            fix=f"quantkit reads {PACKING} (integer weights of up to 8 bits)",
        )
    tensors, family = open_tensors(folder), family_of(config, where=str(folder / "config.json"))

    def expected(name: str, rows: int, columns: int) -> dict[str, Shape]:
        return expected_shapes(rows, columns, *module_settings(name, settings))

    require_fit(LAYOUT, tensors, config, family, expected)
    return PartsArtifact(tensors, config, settings, family, LAYOUT, partial(decode_item, settings=settings))


def recognizes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder says that it is of compressed-tensors."""
    return (config.get("quantization_config") or {}).get("quant_method") == NAME


READING = Reading.of_one(NAME, recognizes, open_artifact, NATIVE_ENGINE, "transformers", USE)
