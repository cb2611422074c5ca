"""The AWQ container in its GEMM layout, as AutoAWQ introduced it (byte layout: docs/formats/awq.md).

Shape legend: O out features, I in features, G groups.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.families import family_of, shortened
from quantkit.checkpoint.index import Checkpoint, open_tensors, read_json, weights_stem
from quantkit.errors import RefusedError
from quantkit.formats.bitstream import CODES_PER_RUN, pack, unpack
from quantkit.formats.contract import MAX_SHARD_BYTES, Reading, transformers_snippet
from quantkit.formats.fit import number_of, require_fit
from quantkit.formats.parts import FLOATS, WORDS, Layout, PartsArtifact, Shape, encoded, groups_of, unstorable
from quantkit.formats.placed import Shards, lay_out, planned, size_bits
from quantkit.formats.shards import indexed
from quantkit.formats.sidecars import quantized_config, write_sidecars
from quantkit.grids.affine import AffineGrid
from quantkit.qtensor import Item, QuantizedLinear

NAME = "awq"
NATIVE_ENGINE = "gptqmodel"
BITS = 4  # the layout has no other width
STORED = torch.float16  # of scales and of every dense tensor
PARTS = ("qweight", "qzeros", "scales")
LAYOUT = Layout(PARTS, "qzeros", {"qweight": WORDS, "qzeros": WORDS, "scales": FLOATS})
WRITTEN = {"qweight": torch.int32, "qzeros": torch.int32, "scales": STORED}
GROUP_SIZES = (-1, 16, 32, 64, 128, 256)
CODES_PER_WORD = 32 // BITS
SETTINGS_FILE = "quant_config.json"  # of artifacts from before config.json carried the settings
INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)  # the column at each nibble of a word, lowest first
USE = f"""{transformers_snippet("transformers gptqmodel")}
vLLM serves it as it is: `vllm serve {{repo}}`. Channel scales are folded into norms, `v_proj` and `up_proj`, so these
differ from the source's.
"""


def encode_linear(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one quantized linear by their names in the file, contiguous."""
    grid = linear.grid
    assert isinstance(grid, AffineGrid), "AWQ codes are on an affine grid"
    assert grid.bits == BITS, "the GEMM layout holds 4-bit codes"
    group_size = grid.group_I.numel() // grid.scale_OG.shape[1]
    in_place_I = torch.arange(grid.group_I.numel(), device=grid.group_I.device) // group_size
    assert torch.equal(grid.group_I.long(), in_place_I), "the layout has no g_idx: groups stand where they are"
    tensors = {
        f"{name}.qweight": _pack_columns(linear.codes_OI),
        f"{name}.qzeros": _pack_columns(grid.zero_OG.to(torch.uint8)),
        f"{name}.scales": grid.scale_OG.t().to(STORED).contiguous(),
    }
    if linear.bias_O is not None:
        tensors[f"{name}.bias"] = linear.bias_O.to(STORED).contiguous()
    return tensors


def decode_linear(name: str, tensors: dict[str, Tensor]) -> QuantizedLinear:
    """One quantized linear from its tensors; scales may be float16 or bfloat16.

    Args:
        name: full module name.
        tensors: at least `name`.qweight, .qzeros and .scales; see `expected_shapes`.
    """
    qweight, qzeros, scales_GO = (tensors[f"{name}.{part}"] for part in PARTS)
    num_channels, num_groups = qweight.shape[0], scales_GO.shape[0]
    group_I = torch.arange(num_channels, dtype=torch.int32) // (num_channels // num_groups)
    scale_OG = scales_GO.t().float().contiguous()
    grid = AffineGrid(BITS, scale_OG, _unpack_columns(qzeros).float(), group_I)
    return QuantizedLinear(_unpack_columns(qweight), grid, tensors.get(f"{name}.bias"))


def _pack_columns(code_OX: Tensor) -> Tensor:
    """int32 [X, O / 8] of codes [O, X]."""
    eights = code_OX.view(-1, len(INTERLEAVE), code_OX.shape[1])
    return pack(eights[:, list(INTERLEAVE)].reshape(code_OX.shape), BITS).t().contiguous()


def _unpack_columns(words: Tensor) -> Tensor:
    """uint8 codes [O, X] of int32 [X, O / 8]."""
    code_OX = unpack(words.t().contiguous(), BITS)
    place = torch.argsort(torch.tensor(INTERLEAVE))
    return code_OX.view(-1, len(INTERLEAVE), code_OX.shape[1])[:, place].reshape(code_OX.shape)


def decode_item(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dense tensors by checkpoint name: decoded linears in float32, everything else as stored."""
    return LAYOUT.decoded(tensors, lambda name: decode_linear(name, tensors))


def expected_shapes(rows: int, columns: int, group_size: int) -> dict[str, Shape]:
    """The shape of each part of a linear [rows, columns]."""
    groups = groups_of(columns, group_size)
    return {
        "qweight": (columns, rows // CODES_PER_WORD),
        "qzeros": (groups, rows // CODES_PER_WORD),
        "scales": (groups, rows),
    }


@dataclass(frozen=True)
class AwqFormat:
    """The writing side, see `quantkit.formats.contract.Format`.

    Attributes:
        group_size: input channels per scale and zero.
        skip: name endings of linears that stay dense.
    """

    group_size: int
    skip: tuple[str, ...] = ()
    name: str = NAME
    stored_dtype: torch.dtype = STORED

    def problems(self, shapes: list[tuple[str, int, int]]) -> list[str]:
        """Why linears of these (name, out, in) shapes cannot be stored, one line each; empty if all can."""

        def reason(rows: int, columns: int) -> str | None:
            if columns % self.group_size:
                return f"in_features {columns} is not divisible by group_size {self.group_size}"
            if rows % CODES_PER_RUN:
                return f"out_features {rows} is not divisible by {CODES_PER_RUN}, which the kernels need"
            return None

        return unstorable(shapes, self.skip, reason)

    def stored_bits(self, name: str, rows: int, columns: int) -> int:
        """Bits that a quantized linear takes in the file: codes, scales and zeros."""
        return size_bits(self.parts(name, rows, columns))

    def parts(self, name: str, rows: int, columns: int) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and shape of each part of a quantized linear."""
        shapes = expected_shapes(rows, columns, self.group_size)
        return {part: (WRITTEN[part], shape) for part, shape in shapes.items()}

    def lay_out(self, checkpoint: Checkpoint, folder: Path) -> Shards:
        """See `quantkit.formats.contract.InPlace`."""
        return lay_out(folder, planned(checkpoint, self), max_shard_bytes=MAX_SHARD_BYTES)

    def encode_item(self, item: Item) -> dict[str, Tensor]:
        """All tensors of one item as they stand in the file."""
        return encoded(item, encode_linear)

    def decode_item(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors by checkpoint name."""
        return decode_item(tensors)

    def settings(self, modules: list[str]) -> dict[str, Any]:
        """`quantization_config` of config.json, with the keys that vLLM, transformers and autoawq read.

        Args:
            modules: full names of every linear of the decoder layers, quantized or not.
        """
        # readers match these as substrings, autoawq of the name inside a layer: full names, none of which is part of
        # another, only where layers differ
        skipped = [module for module in modules if module.endswith(self.skip)]
        dense = shortened(skipped, [module for module in modules if module not in skipped])
        return {
            "quant_method": NAME,
            "bits": BITS,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            "format": "gemm",
            "modules_to_not_convert": [*dense, "lm_head"] if dense else None,
        }

    def assemble(self, checkpoint: Checkpoint, items: list[Path], folder: Path) -> dict[str, list[str]]:
        """The weights' index, config.json and the source's tokenizer files."""
        written = indexed(folder)
        settings = self.settings([name for name, _, _ in checkpoint.linear_shapes()])
        config = quantized_config(checkpoint.config, settings, self.stored_dtype)
        write_sidecars(checkpoint.folder, folder, config, {})
        return {NAME: [path.name for path in written]}


def open_artifact(folder: Path) -> PartsArtifact:
    """A reader of an AWQ folder.

    Raises:
        RefusedError: it is of another layout than GEMM, misses a part of a linear, has weights of several names, or
            tensors contradict each other, the settings or the model.
    """
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config")
    if settings is None:
        settings = read_json(folder / SETTINGS_FILE)
    require_gemm(settings)
    where = str(folder / "config.json")
    key = "group_size" if "group_size" in settings else "q_group_size"
    group_size = number_of(settings, key, GROUP_SIZES, where=where)
    tensors, family = open_tensors(folder, weights_stem(folder)), family_of(config, where=where)
    require_fit(LAYOUT, tensors, config, family, lambda _, rows, columns: expected_shapes(rows, columns, group_size))
    return PartsArtifact(tensors, config, settings, family, LAYOUT, decode_item)


def require_gemm(settings: dict[str, Any]) -> None:
    """Stop at a layout that is not 4-bit GEMM with zeros.

    Raises:
        RefusedError: the settings say so.
    """
    bits = settings.get("bits", settings.get("w_bit", BITS))
    layouts = {str(settings[key]).lower() for key in ("version", "format", "checkpoint_format") if settings.get(key)}
    odd = [f"layout {layout}" for layout in sorted(layouts - {"gemm"})]
    odd += [f"{bits} bits"] if bits != BITS else []
    odd += [] if settings.get("zero_point", True) else ["no zero points"]
    if odd:
        raise RefusedError(
            f"quantization_config says {' and '.join(odd)}",
            where="config.json",
            fix="quantkit reads AWQ's GEMM layout: 4 bits with zero points",
        )


def recognizes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder says that it is AWQ; older tools say so in quant_config.json only."""
    settings = config.get("quantization_config") or {}
    return settings.get("quant_method") == NAME or (not settings and (folder / SETTINGS_FILE).exists())


READING = Reading.of_one(NAME, recognizes, open_artifact, NATIVE_ENGINE, "transformers", USE)
