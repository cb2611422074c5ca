"""The GPTQ container, version 1: what AutoGPTQ's lineage of readers loads (byte layout: docs/formats/gptq.md).

Shape legend: O out features, I in features, G groups.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import __version__
from quantkit.checkpoint.families import family_of, shortened
from quantkit.checkpoint.index import Checkpoint, open_tensors, read_json, weights_stem
from quantkit.errors import RefusedError
from quantkit.formats.bitstream import CODES_PER_RUN, pack, unpack
from quantkit.formats.contract import MAX_SHARD_BYTES, Reading, transformers_snippet
from quantkit.formats.fit import number_of, require_fit, require_groups
from quantkit.formats.parts import FLOATS, WORDS, Layout, PartsArtifact, Shape, encoded, groups_of, unstorable
from quantkit.formats.placed import Shards, lay_out, planned, size_bits
from quantkit.formats.shards import indexed
from quantkit.formats.sidecars import quantized_config, write_sidecars
from quantkit.grids.affine import AffineGrid
from quantkit.qtensor import Item, QuantizedLinear

NAME = "gptq"
NATIVE_ENGINE = "gptqmodel"
STORED = torch.float16  # of scales and of every dense tensor
LOWEST_ASYMMETRIC_ZERO = 1  # version 1 stores zero - 1, and readers disagree on a stored -1
PARTS = ("qweight", "qzeros", "scales", "g_idx")
LAYOUT = Layout(
    PARTS[:3],
    "qzeros",
    {"qweight": WORDS, "qzeros": WORDS, "scales": FLOATS, "g_idx": ("I32", "I64")},
    optional=PARTS[3:],
)
WRITTEN = {"qweight": torch.int32, "qzeros": torch.int32, "scales": STORED, "g_idx": torch.int32}
WIDTHS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
USE = transformers_snippet("transformers optimum gptqmodel")


def encode_linear(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one quantized linear by their names in the file, contiguous."""
    grid = linear.grid
    assert isinstance(grid, AffineGrid), "GPTQ codes are on an affine grid"
    bits = grid.bits
    stored_zero_OG = (grid.zero_OG.to(torch.int32) - 1) & (2**bits - 1)
    tensors = {
        f"{name}.qweight": pack(linear.codes_OI.t(), bits),
        f"{name}.qzeros": pack(stored_zero_OG, bits).t().contiguous(),
        f"{name}.scales": grid.scale_OG.t().to(STORED).contiguous(),
        f"{name}.g_idx": grid.group_I.to(torch.int32).contiguous(),
    }
    if linear.bias_O is not None:
        tensors[f"{name}.bias"] = linear.bias_O.to(STORED).contiguous()
    return tensors


def decode_linear(name: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> QuantizedLinear:
    """One quantized linear from its tensors; any width of 2, 3, 4 or 8 bits, any g_idx, version 1 or 2 zeros.

    Args:
        name: full module name.
        tensors: at least `name`.qweight, .qzeros and .scales; see `expected_shapes`.
        settings: the artifact's quantization_config.

    Raises:
        RefusedError: g_idx names groups that are not there.
    """
    qweight, qzeros, scales_GO = (tensors[f"{name}.{part}"] for part in PARTS[:3])
    g_idx = tensors.get(f"{name}.g_idx")
    bits, group_size = module_settings(name, settings)
    num_channels = qweight.shape[0] * 32 // bits
    if g_idx is None:
        g_idx = torch.arange(num_channels, dtype=torch.int32) // (num_channels if group_size == -1 else group_size)
    require_groups(name, g_idx, scales_GO.shape[0])
    field_OG = unpack(qzeros.t().contiguous(), bits)
    shift = 0 if zero_version(settings) == 2 else 1
    zero_OG = (field_OG.to(torch.int32) + shift) & (2**bits - 1)
    grid = AffineGrid(bits, scales_GO.t().float().contiguous(), zero_OG.float(), g_idx)
    return QuantizedLinear(unpack(qweight, bits).t().contiguous(), grid, tensors.get(f"{name}.bias"))


def module_settings(name: str, settings: dict[str, Any]) -> tuple[int, int]:
    """Bits and group size of one linear: the folder's own, and over them the first of its `dynamic` rules that fits.

    Raises:
        RefusedError: they are none that the layout has.
    """
    rules: dict[str, dict[str, Any]] = settings.get("dynamic") or {}
    over = next((keys for rule, keys in rules.items() if re.match(rule.removeprefix("+:"), name)), {})
    own = settings | over
    bits, group_size = (
        number_of(own, key, possible, where=f"{name} in config.json")
        for key, possible in (("bits", WIDTHS), ("group_size", GROUP_SIZES))
    )
    return bits, group_size


def expected_shapes(rows: int, columns: int, bits: int, group_size: int) -> dict[str, Shape]:
    """The shape of each part of a linear [rows, columns]."""
    groups = groups_of(columns, group_size)
    return {
        "qweight": (columns * bits // 32, rows),
        "qzeros": (groups, rows * bits // 32),
        "scales": (groups, rows),
        "g_idx": (columns,),
    }


def zero_version(settings: dict[str, Any]) -> int:
    """1 where the file stores zero - 1, 2 where it stores zero.

    Raises:
        RefusedError: `format` and `checkpoint_format` contradict each other, or name a layout of another kind.
    """
    named = {settings[key] for key in ("checkpoint_format", "format") if settings.get(key)}
    if len(named) > 1 or named - {"gptq", "gptq_v2"}:
        raise RefusedError(
            f"quantization_config names the layout {' and '.join(sorted(named))}",
            where="config.json",
            fix="quantkit reads the layouts gptq and gptq_v2; the file must say which one it is",
        )
    return 2 if named == {"gptq_v2"} else 1


def decode_item(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Dense tensors by checkpoint name: decoded linears in float32, everything else as stored."""
    return LAYOUT.decoded(tensors, lambda name: decode_linear(name, tensors, settings))


@dataclass(frozen=True)
class GptqFormat:
    """The writing side, see `quantkit.formats.contract.Format`.

    Attributes:
        bits, group_size, symmetric, order, damping: what the solver was given; they go into config.json.
        skip: name endings of linears that stay dense.
    """

    bits: int
    group_size: int
    symmetric: bool
    order: str
    damping: float
    skip: tuple[str, ...] = ()
    name: str = NAME
    stored_dtype: torch.dtype = STORED

    def problems(self, shapes: list[tuple[str, int, int]]) -> list[str]:
        """Why linears of these (name, out, in) shapes cannot be stored, one line each; empty if all can."""

        def reason(rows: int, columns: int) -> str | None:
            if self.group_size != -1 and columns % self.group_size:
                return f"in_features {columns} is not divisible by group_size {self.group_size}"
            if columns % CODES_PER_RUN or rows % CODES_PER_RUN:
                return f"[{rows}, {columns}] is not in multiples of {CODES_PER_RUN}, which the packing needs"
            return None

        return unstorable(shapes, self.skip, reason)

    def stored_bits(self, name: str, rows: int, columns: int) -> int:
        """Bits that a quantized linear takes in the file: codes, scales, zeros and g_idx."""
        return size_bits(self.parts(name, rows, columns))

    def parts(self, name: str, rows: int, columns: int) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and shape of each part of a quantized linear."""
        shapes = expected_shapes(rows, columns, self.bits, self.group_size)
        return {part: (WRITTEN[part], shape) for part, shape in shapes.items()}

    def lay_out(self, checkpoint: Checkpoint, folder: Path) -> Shards:
        """See `quantkit.formats.contract.InPlace`."""
        return lay_out(folder, planned(checkpoint, self), max_shard_bytes=MAX_SHARD_BYTES)

    def encode_item(self, item: Item) -> dict[str, Tensor]:
        """All tensors of one item as they stand in the file."""
        return encoded(item, encode_linear)

    def decode_item(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors by checkpoint name."""
        return decode_item(tensors, self.settings([]))

    def settings(self, modules: list[str]) -> dict[str, Any]:
        """`quantization_config` of config.json, with the keys that vLLM, transformers and gptqmodel read.

        Args:
            modules: full names of every linear of the decoder layers, quantized or not.
        """
        settings: dict[str, Any] = {
            "quant_method": NAME,
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.order == "activation",
            "sym": self.symmetric,
            "lm_head": False,
            "format": "gptq",
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "damp_percent": self.damping,
            "meta": {
                "quantizer": [f"quantkit:{__version__}"],
                "act_group_aware": self.order == "group-aware",
            },
        }
        dense = [module for module in modules if module.endswith(self.skip)]
        if dense:
            settings["dynamic"] = {f"-:^{re.escape(module)}$": {} for module in dense}
            # optimum takes these as endings of full names
            kept = shortened([module for module in modules if module not in dense], dense)
            settings["modules_in_block_to_quantize"] = [[name] for name in kept]
        return settings

    def assemble(self, checkpoint: Checkpoint, items: list[Path], folder: Path) -> dict[str, list[str]]:
        """The weights' index, config.json, quantize_config.json and the source's tokenizer files."""
        written = indexed(folder)
        settings = self.settings([name for name, _, _ in checkpoint.linear_shapes()])
        config = quantized_config(checkpoint.config, settings, self.stored_dtype)
        write_sidecars(checkpoint.folder, folder, config, {"quantize_config.json": settings})
        return {NAME: [path.name for path in written]}


def open_artifact(folder: Path) -> PartsArtifact:
    """A reader of a GPTQ folder.

    Raises:
        RefusedError: it is of another layout, misses a part of a linear, has weights of several names, or tensors
            contradict each other, the settings or the model.
    """
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config")
    if settings is None:
        settings = read_json(folder / "quantize_config.json")
    zero_version(settings)
    tensors, family = open_tensors(folder, weights_stem(folder)), family_of(config, where=str(folder / "config.json"))

    def expected(name: str, rows: int, columns: int) -> dict[str, Shape]:
        return expected_shapes(rows, columns, *module_settings(name, settings))

    require_fit(LAYOUT, tensors, config, family, expected)
    return PartsArtifact(tensors, config, settings, family, LAYOUT, partial(decode_item, settings=settings))


def recognizes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder says that it is GPTQ; older tools say so in quantize_config.json only."""
    settings = config.get("quantization_config") or {}
    return settings.get("quant_method") == NAME or (not settings and (folder / "quantize_config.json").exists())


READING = Reading.of_one(NAME, recognizes, open_artifact, NATIVE_ENGINE, "transformers", USE)
