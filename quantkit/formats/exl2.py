"""EXL2 folders, one for each target of bits per weight: linears and head packed for exllamav2 (docs/formats/exl2.md).

Shape legend: O out features (N where padded to 32), I in features, G groups, Q packed rows.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.channels import by_channel, by_row
from quantkit.checkpoint.families import END_MODULES, HEAD, family_of, in_layer
from quantkit.checkpoint.index import Checkpoint, open_every_file, read_json
from quantkit.errors import RefusedError
from quantkit.formats.bitstream import pack, unpack
from quantkit.formats.contract import MAX_SHARD_BYTES, Reading
from quantkit.formats.fit import require_fit
from quantkit.formats.parts import Layout, PartsArtifact, Shape
from quantkit.formats.shards import merge
from quantkit.formats.sidecars import quantized_config, write_sidecars
from quantkit.grids.exl2 import SCALE_BITS, UNIT, WIDTHS, Exl2Grid, Mixture, padded
from quantkit.grids.exl2_options import ATTENTION, LINEARS, MLP, OPTIONS
from quantkit.qtensor import Item, QuantizedLinear

NAME = "exl2"
NATIVE_ENGINE = "exllamav2"
VERSION = "0.3.2"  # of exllamav2, whose layout this is
STEM = "output"
SUFFIX = "bpw"
MEASUREMENT = "measurement.json"
DTYPES = {
    "q_weight": torch.int32,
    "q_scale": torch.int32,
    "q_scale_max": torch.float16,
    "q_groups": torch.int16,
    "q_invperm": torch.int32,
}
PARTS = tuple(DTYPES)
ATTENTION_LINEARS = tuple(f"{ATTENTION}.{linear}" for linear in LINEARS[ATTENTION])
LAYOUT = Layout(
    PARTS,
    "q_weight",
    {"q_weight": ("I32",), "q_scale": ("I32",), "q_scale_max": ("F16",), "q_groups": ("I16",), "q_invperm": ("I32",)},
)
MOST_CHANNELS = 2**16 - 1  # of an input: places are 16-bit numbers in the reader's memory
USE = """One branch holds each size; exllamav2 0.3.2 (CUDA) or a server built on it, such as TabbyAPI, loads it:

```sh
hf download {repo} --revision {branch} --local-dir model
```

Without flash-attn set `EXLLAMA_NO_SDPA=1`: exllamav2's other path gives running text no causal mask; figures then come
out too good and answers wrong.
"""


def variant_name(bits: float) -> str:
    """Name of a variant, of its folder and of its branch: "4.0bpw"."""
    return f"{bits}{SUFFIX}"


def encode_linear(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one linear by their names in the file; out features are padded to 32 with what decodes to 0."""
    grid = linear.grid
    assert isinstance(grid, Exl2Grid), "EXL2 stores mixed widths with quadratic scales"
    codes_IO = by_channel(linear.codes_OI, grid.order_I)
    rows = codes_IO.shape[1]
    words, table, start, place = [], [], 0, 0
    for bits, size in grid.groups:
        codes_IN = codes_IO.new_full((size, padded(rows)), 2 ** (bits - 1))
        codes_IN[:, :rows] = codes_IO[start : start + size]
        words.append(pack(codes_IN, bits))
        table += [bits, place]
        start += size
        place += words[-1].shape[0]
    code_NG = torch.zeros((padded(rows), len(grid.groups)), dtype=torch.uint8, device=codes_IO.device)
    code_NG[:rows] = grid.code_GO.t() - 1
    tensors = {
        "q_weight": torch.cat(words),
        "q_scale": pack(code_NG, SCALE_BITS).t().contiguous(),
        "q_scale_max": grid.scale_max_G.half(),
        "q_groups": torch.tensor(table, dtype=torch.int16),
        "q_invperm": torch.argsort(grid.order_I).to(torch.int32),
    }
    if linear.bias_O is not None:
        tensors["bias"] = torch.nn.functional.pad(linear.bias_O.half(), (0, padded(rows) - rows))
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def decode_linear(name: str, tensors: dict[str, Tensor]) -> QuantizedLinear:
    """One linear from its tensors, padding included.

    Raises:
        RefusedError: tensors that are missing or do not fit together, or groups that no reader walks through.
    """
    part = {key: tensors[f"{name}.{key}"] for key in PARTS if f"{name}.{key}" in tensors}
    bias_N = tensors.get(f"{name}.bias")
    if contradiction := _contradiction(part, bias_N):
        raise RefusedError(f"{name} is damaged: {contradiction}", where=name, fix="download the folder again")
    widths, starts = part["q_groups"].tolist()[0::2], part["q_groups"].tolist()[1::2]
    stops = [*starts[1:], part["q_weight"].shape[0]]
    order_I = torch.argsort(part["q_invperm"].long())
    codes_IN = torch.cat(
        [unpack(part["q_weight"][start:stop], bits) for bits, start, stop in zip(widths, starts, stops, strict=True)]
    )
    codes_NI = by_row(codes_IN, order_I)
    code_GN = unpack(part["q_scale"].t().contiguous(), SCALE_BITS).t() + 1
    groups = tuple((bits, 32 * (stop - start) // bits) for bits, start, stop in zip(widths, starts, stops, strict=True))
    return QuantizedLinear(codes_NI, Exl2Grid(groups, part["q_scale_max"].float(), code_GN, order_I), bias_N)


def _contradiction(part: dict[str, Tensor], bias_N: Tensor | None) -> str | None:
    """How a linear's tensors are not what a reader takes together; None if they are."""
    if missing := DTYPES.keys() - part.keys():
        return f"{min(missing)} is missing"
    for key, dtype in DTYPES.items():
        if part[key].dtype != dtype:
            return f"{key} holds {_plain(part[key].dtype)}, where {_plain(dtype)} belongs"
    words_QN, table, inverse_I = part["q_weight"], part["q_groups"], part["q_invperm"]
    if words_QN.dim() != 2 or words_QN.shape[1] % UNIT or not words_QN.numel():
        return f"q_weight is {list(words_QN.shape)}, not rows of words by a multiple of {UNIT} columns"
    if table.dim() != 1 or table.numel() % 2 or not table.numel():
        return f"q_groups is {list(table.shape)}, not two numbers for each group"
    widths, starts = table.tolist()[0::2], table.tolist()[1::2]
    if not set(widths) <= set(WIDTHS) or widths != sorted(widths, reverse=True):
        return f"its groups have the widths {widths[:8]}"
    spans = [stop - start for start, stop in zip(starts, [*starts[1:], words_QN.shape[0]], strict=True)]
    if starts[0] or any(span <= 0 or span % bits for span, bits in zip(spans, widths, strict=True)):
        return (
            f"its groups start at the rows {starts[:8]} of {words_QN.shape[0]}, which hold no whole number of channels"
        )
    channels = sum(span // bits for span, bits in zip(spans, widths, strict=True)) * UNIT
    rows, count = words_QN.shape[1], len(widths)
    for key, shape in expected_shapes(rows, channels, len(words_QN), count).items():
        if tuple(part[key].shape) != shape:
            return f"{key} is {list(part[key].shape)}, where {list(shape)} belongs"
    if not torch.equal(inverse_I.long().sort().values, torch.arange(channels)):
        return "q_invperm is no permutation"
    if not torch.isfinite(part["q_scale_max"]).all():
        return "q_scale_max holds values that are not finite"
    if bias_N is not None and tuple(bias_N.shape) != (rows,):
        return f"bias is {list(bias_N.shape)}, where {[rows]} belongs"
    return None


def expected_shapes(rows: int, columns: int, words: int, groups: int) -> dict[str, Shape]:
    """Shapes of a linear's parts.

    Args:
        rows: out features; a head's are padded.
        columns: in features.
        words: rows of packed codes.
        groups: of channels.
    """
    return {
        "q_weight": (words, padded(rows)),
        "q_scale": (groups, padded(rows) // 8),
        "q_scale_max": (groups,),
        "q_groups": (2 * groups,),
        "q_invperm": (columns,),
    }


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decode_item(tensors: dict[str, Tensor], head_rows: int) -> dict[str, Tensor]:
    """Dense tensors by checkpoint name: decoded linears in float32, everything else as stored.

    Args:
        tensors: of one item.
        head_rows: out features of the head without its padding.
    """
    dense = LAYOUT.decoded(tensors, lambda name: decode_linear(name, tensors))
    head = f"{END_MODULES[HEAD]}.weight"
    return dense | {head: dense[head][:head_rows]} if head in dense else dense


@dataclass(frozen=True)
class Exl2Format:
    """The writing side, see `quantkit.formats.contract.Format`.

    Attributes:
        bits: targets, over the linears of the decoder layers.
        head: mixture of the head.
        head_bits: what config.json calls it.
        head_rows: out features of the head.
        biased: linears of a decoder layer that the reader expects a bias of, and of no others.
        measurement: content of measurement.json, once it is known.
        calibration: what config.json says of it, once it is known.
    """

    bits: tuple[float, ...]
    head: Mixture
    head_bits: int
    head_rows: int
    biased: tuple[str, ...] = ()
    measurement: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    skip: tuple[str, ...] = ("embed_tokens",)
    name: str = NAME
    stored_dtype: torch.dtype = torch.float16

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(variant_name(bits) for bits in self.bits)

    def could_make(self, variant: str) -> bool:
        return re.fullmatch(rf"\d+\.\d+{SUFFIX}", variant) is not None

    def problems(self, shapes: list[tuple[str, int, int]]) -> list[str]:
        """Why linears of these (name, out, in) shapes cannot be stored, one line each; empty if all can."""
        found = []
        linears = {name: (rows, columns) for name, rows, columns in shapes if not name.endswith(self.skip)}
        for name, (rows, columns) in linears.items():
            if columns % UNIT:
                found.append(f"{name}: in_features {columns} is not divisible by {UNIT}, the smallest group")
            if rows % UNIT and name != END_MODULES[HEAD]:
                found.append(f"{name}: out_features {rows} is not divisible by {UNIT}")
            if columns > MOST_CHANNELS:
                found.append(f"{name}: in_features {columns} is more than {MOST_CHANNELS}")
        found += [line for key, parts in sublayers(linears).items() for line in _uncoupled(key, parts)]
        if not found and (least := least_bits(linears)) > min(self.bits):
            found.append(f"quantize.bits = {min(self.bits)} is below {least:.3f}, the least that the mixtures allow")
        return found

    def tensor_problems(self, names: Collection[str]) -> list[str]:
        """Biases that the reader does not expect, or does and misses; it stops at either."""
        linears = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
        found = []
        for linear in sorted(linears):
            expected = in_layer(linear) in self.biased
            if (f"{linear}.bias" in names) != expected:
                found.append(f"{linear}: exllamav2 expects {'a' if expected else 'no'} bias there")
        return found

    def calibrated(self, texts: Sequence[str], windows: int, window_tokens: int) -> "Exl2Format":
        """See `quantkit.formats.contract.TellsCalibration`; the keys are those of exllamav2's own config.json."""
        told = {"rows": windows, "length": window_tokens, "dataset": " + ".join(texts)}
        return replace(self, calibration=told)

    def stored_bits(self, name: str, rows: int, columns: int) -> int:
        """Bits that a linear takes in all variants together; in the decoder layers what the targets allow."""
        return sum(self.variant_bits(name, rows, columns).values())

    def variant_bits(self, name: str, rows: int, columns: int) -> dict[str, int]:
        """Bits that a linear takes in each variant, as far as is known before anything was measured."""
        if name == END_MODULES[HEAD]:
            return dict.fromkeys(self.variants, self.head.stored_bits(rows, columns))
        return {variant_name(bits): int(bits * rows * columns) for bits in self.bits}

    def encode_item(self, item: Item) -> dict[str, Tensor]:
        """An item's tensors as they stand in its work file; those of a linear as "<variant>|<name>"."""
        tensors = {name: tensor.contiguous() for name, tensor in item.tensors.items()}
        for name, linear in item.linears.items():
            each = (linear, *linear.others) if linear.others else (linear,) * len(self.bits)
            for variant, one in zip(self.variants, each, strict=True):
                encoded = encode_linear(name, replace(one, bias_O=linear.bias_O))
                tensors |= {f"{variant}|{key}": tensor.cpu().clone() for key, tensor in encoded.items()}
        return tensors

    def decode_item(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors by checkpoint name; of several variants the first's."""
        kept = ((_stored_name(key, self.variants[0]), tensor) for key, tensor in tensors.items())
        return decode_item({key: tensor for key, tensor in kept if key is not None}, self.head_rows)

    def assemble(self, checkpoint: Checkpoint, items: list[Path], folder: Path) -> dict[str, list[str]]:
        """A complete folder for each variant, and what was measured beside them."""
        written = {}
        for bits, variant in zip(self.bits, self.variants, strict=True):
            target = folder / variant
            target.mkdir()
            files = merge(
                items,
                target,
                max_shard_bytes=MAX_SHARD_BYTES,
                stem=STEM,
                renamed=lambda key, variant=variant: _stored_name(key, variant),  # type: ignore[misc]
            )
            settings = {"quant_method": NAME, "version": VERSION, "bits": bits, "head_bits": self.head_bits}
            if self.calibration is not None:
                settings["calibration"] = self.calibration
            config = quantized_config(checkpoint.config, settings, self.stored_dtype)
            write_sidecars(checkpoint.folder, target, config, {})
            written[variant] = [f"{variant}/{path.name}" for path in files]
        if self.measurement is not None:
            (folder / MEASUREMENT).write_text(json.dumps(self.measurement, indent=1) + "\n", encoding="utf-8")
        return written


def _stored_name(key: str, variant: str) -> str | None:
    """A tensor's name in a variant's file; None if it is of another variant."""
    of, _, name = key.rpartition("|")
    return name if of in ("", variant) else None


def expected_biases(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Linears of a decoder layer that exllamav2 expects a bias of, by its table and config.json's `attention_bias`.

    It would take biases in the MLP too (`mlp_bias`), but not the permutation that down_proj then has.
    """
    if config.get("model_type") == "qwen2":
        return ATTENTION_LINEARS[:3]
    return ATTENTION_LINEARS if config.get("attention_bias") else ()


def _uncoupled(key: str, parts: Mapping[str, tuple[int, int]]) -> list[str]:
    """What breaks the bonds between the linears of a sub-layer: the reader takes all of them or none.

    When it loads an MLP it moves the columns of gate and up to where down reads them, so their numbers must agree.
    """
    names = LINEARS[key.rsplit(".", 1)[1]]
    if missing := [name for name in names if name not in parts]:
        return [f"{key}.{missing[0]} is missing: exllamav2 takes a sub-layer as a whole or not at all"]
    if names != LINEARS[MLP]:
        return []
    (gate, _), (up, _), (_, down) = (parts[name] for name in names)
    if gate == up == down:
        return []
    return [f"{key}: gate_proj and up_proj have {gate} and {up} out_features, down_proj reads {down}; they must agree"]


def least_bits(linears: Mapping[str, tuple[int, int]]) -> float:
    """Fewest bits per weight that the mixtures allow the decoder layers, given (out, in) by full module name."""
    least = weights = 0
    for key, shapes in sublayers(linears).items():
        options = OPTIONS[key.rsplit(".", 1)[1]]
        least += min(option.stored_bits(shapes) for option in options)
        weights += sum(rows * columns for rows, columns in shapes.values())
    return least / weights


def sublayers(linears: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, tuple[int, int]]]:
    """(out, in) of the linears of each attention and MLP, by the sub-layer's full name."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in linears.items():
        parent, _, linear = name.rpartition(".")
        if parent.rsplit(".", 1)[-1] in LINEARS:
            found.setdefault(parent, {})[linear] = shape
    return found


def open_variants(folder: Path) -> dict[str, PartsArtifact]:
    """The folder's variants, narrowest first; a folder that is one variant itself goes by its bits.

    Raises:
        RefusedError: a file is missing or damaged.
    """
    if not (folder / "config.json").exists():
        parts = sorted(folder.glob(f"*{SUFFIX}/config.json"), key=lambda path: _bits(path.parent))
        return {path.parent.name: _open(folder, path.parent.name) for path in parts}
    return {variant_name(_bits(folder)[0]): _open(folder, ".")}


def _bits(folder: Path) -> tuple[float, str]:
    settings = read_json(folder / "config.json").get("quantization_config")
    bits = settings.get("bits") if isinstance(settings, dict) else None
    if isinstance(bits, bool) or not isinstance(bits, int | float):
        raise RefusedError(
            f"quantization_config has bits = {bits!r}, not a number",
            where=str(folder / "config.json"),
            fix="download the folder again",
        )
    return float(bits), folder.name


def _open(folder: Path, variant: str) -> PartsArtifact:
    path = folder / variant / "config.json"
    config = read_json(path)
    tensors, family = open_every_file(folder, variant), family_of(config, where=str(path))

    def expected(name: str, rows: int, columns: int) -> dict[str, Shape]:
        """What the mixture leaves open is told by the parts themselves; their values are looked at in decoding."""
        words, groups = (math.prod(tensors.tensors[f"{name}.{part}"].shape[:1]) for part in ("q_weight", "q_scale_max"))
        return expected_shapes(rows, columns, words, groups)

    require_fit(LAYOUT, tensors, config, family, expected)
    decode = partial(decode_item, head_rows=int(config["vocab_size"]))
    return PartsArtifact(tensors, config, config["quantization_config"], family, LAYOUT, decode)


def recognizes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder's config.json names EXL2, or that of a folder named by bits per weight inside it."""
    if not config:
        config = next((read_json(path) for path in sorted(folder.glob(f"*{SUFFIX}/config.json"))), {})
    return (config.get("quantization_config") or {}).get("quant_method") == NAME


def _use(repo: str, quantize: dict[str, Any], variants: Sequence[str]) -> str:
    return USE.format(repo=repo, branch=variants[0])


READING = Reading(recognizes, open_variants, NATIVE_ENGINE, (NAME, "exllamav2"), None, _use)
