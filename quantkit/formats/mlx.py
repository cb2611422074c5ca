"""MLX folders: every linear, the embedding and the head packed for mlx-lm (docs/formats/mlx.md).

Shape legend: O out features, I in features, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.families import family_of
from quantkit.checkpoint.index import Checkpoint, open_tensors, read_json
from quantkit.errors import RefusedError
from quantkit.formats.bitstream import pack_rows, unpack_rows
from quantkit.formats.contract import MAX_SHARD_BYTES, Reading
from quantkit.formats.fit import number_of, require_fit
from quantkit.formats.parts import FLOATS, Layout, PartsArtifact, Shape, encoded, unstorable
from quantkit.formats.placed import Shards, lay_out, planned, size_bits
from quantkit.formats.shards import indexed
from quantkit.formats.sidecars import quantized_config, write_sidecars
from quantkit.grids.affine import BiasGrid
from quantkit.qtensor import Item, QuantizedLinear

NAME = "mlx"
NATIVE_ENGINE = "mlx-lm"
AFFINE = "affine"  # the mode with a scale and a bias per group; others have tensors of their own
METADATA = {"format": "mlx"}
PARTS = ("weight", "scales", "biases")
LAYOUT = Layout(PARTS, "scales", {"weight": ("U32",), "scales": FLOATS, "biases": FLOATS})
WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
USE = """```python
# pip install mlx-lm            (on Linux: pip install "mlx[cpu]" mlx-lm)
from mlx_lm import generate, load

model, tokenizer = load("{repo}")
messages = [{{"role": "user", "content": "Jakie mamy pory roku w Polsce?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
print(generate(model, tokenizer, prompt=prompt, max_tokens=200))
```
"""


def encode_linear(name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one quantized matrix by their names in the file.

    Args:
        name: full module name.
        linear: on a grid of scale and bias.
        dtype: of scales and biases.
    """
    grid = linear.grid
    assert isinstance(grid, BiasGrid), "MLX stores scale and bias"
    words_OW = pack_rows(linear.codes_OI, grid.bits)
    tensors = {
        f"{name}.weight": words_OW.view(torch.uint32),
        f"{name}.scales": grid.scale_OG.to(dtype).contiguous(),
        f"{name}.biases": grid.biases().to(dtype).contiguous(),
    }
    if linear.bias_O is not None:
        tensors[f"{name}.bias"] = linear.bias_O.to(dtype).contiguous()
    return tensors


def decode_linear(name: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> QuantizedLinear:
    """One quantized matrix from its tensors.

    Args:
        name: full module name.
        tensors: at least its weight, scales and biases; see `expected_shapes`.
        settings: the folder's `quantization`.
    """
    bits, group_size = module_settings(name, settings)
    words_OW, scales_OG = tensors[f"{name}.weight"], tensors[f"{name}.scales"].float()
    codes_OI = unpack_rows(words_OW.view(torch.int32), bits)
    group_I = torch.arange(codes_OI.shape[1], dtype=torch.int32) // group_size
    grid = BiasGrid.of(bits, scales_OG, tensors[f"{name}.biases"], group_I)
    return QuantizedLinear(codes_OI, grid, tensors.get(f"{name}.bias"))


def module_settings(name: str, settings: dict[str, Any]) -> tuple[int, int]:
    """Bits and group size of one module: the folder's own, and over them what it says of the module.

    Raises:
        RefusedError: they are none that MLX has, or the mode is not the one with biases.
    """
    said = settings.get(name)
    # mlx-lm writes null for a group size that is the folder's
    over = {key: value for key, value in said.items() if value is not None} if isinstance(said, dict) else {}
    own, where = settings | over, f"{name} in config.json"
    require_affine(own, where)
    return number_of(own, "bits", WIDTHS, where=where), number_of(own, "group_size", GROUP_SIZES, where=where)


def require_affine(settings: dict[str, Any], where: str) -> None:
    """Stop at another mode than the one with a scale and a bias per group.

    Raises:
        RefusedError: the settings say so.
    """
    if settings.get("mode", AFFINE) != AFFINE:
        raise RefusedError(
            f"the mode is {settings['mode']!r}", where=where, fix=f"quantkit reads the mode {AFFINE!r} only"
        )


def expected_shapes(rows: int, columns: int, bits: int, group_size: int) -> dict[str, Shape]:
    """The shape of each part of a matrix [rows, columns]."""
    of_group = (rows, columns // group_size)
    return {"weight": (rows, columns * bits // 32), "scales": of_group, "biases": of_group}


def decode_item(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Dense tensors by checkpoint name: decoded matrices in float32, everything else as stored."""
    return LAYOUT.decoded(tensors, lambda name: decode_linear(name, tensors, settings))


@dataclass(frozen=True)
class MlxFormat:
    """The writing side, see `quantkit.formats.contract.Format`.

    Attributes:
        bits: of every matrix that `bits_of` says nothing else of.
        group_size: input channels per scale and bias.
        bits_of: a module's bits by its full name.
        stored_dtype: of scales, biases and dense tensors.
        skip: name endings of matrices that stay dense.
    """

    bits: int
    group_size: int
    bits_of: Callable[[str], int]
    stored_dtype: torch.dtype
    skip: tuple[str, ...] = ()
    name: str = NAME

    def problems(self, shapes: list[tuple[str, int, int]]) -> list[str]:
        """Why matrices of these (name, out, in) shapes cannot be stored, one line each; empty if all can."""

        def reason(rows: int, columns: int) -> str | None:
            if columns % self.group_size:
                return f"in_features {columns} is not divisible by group_size {self.group_size}"
            return None

        return unstorable(shapes, self.skip, reason)

    def stored_bits(self, name: str, rows: int, columns: int) -> int:
        """Bits that a quantized matrix takes in the file: codes, scales and biases."""
        return size_bits(self.parts(name, rows, columns))

    def parts(self, name: str, rows: int, columns: int) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and shape of each part of a quantized matrix."""
        shapes = expected_shapes(rows, columns, self.bits_of(name), self.group_size)
        return {part: (torch.uint32 if part == "weight" else self.stored_dtype, shapes[part]) for part in PARTS}

    def lay_out(self, checkpoint: Checkpoint, folder: Path) -> Shards:
        """See `quantkit.formats.contract.InPlace`."""
        return lay_out(folder, planned(checkpoint, self, ends=True), max_shard_bytes=MAX_SHARD_BYTES, metadata=METADATA)

    def encode_item(self, item: Item) -> dict[str, Tensor]:
        """All tensors of one item as they stand in the file."""
        return encoded(item, partial(encode_linear, dtype=self.stored_dtype))

    def decode_item(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors by checkpoint name."""
        return decode_item(tensors, self.settings([name.removesuffix(".scales") for name in tensors]))

    def settings(self, modules: list[str]) -> dict[str, Any]:
        """`quantization` of config.json.

        Args:
            modules: full names of every matrix, quantized or not.
        """
        common = {"group_size": self.group_size, "bits": self.bits, "mode": AFFINE}
        settings: dict[str, Any] = dict(common)
        for name in modules:
            if self.skip and name.endswith(self.skip):
                settings[name] = False
            elif self.bits_of(name) != self.bits:
                settings[name] = common | {"bits": self.bits_of(name)}
        return settings

    def assemble(self, checkpoint: Checkpoint, items: list[Path], folder: Path) -> dict[str, list[str]]:
        """The weights' index, config.json and the source's tokenizer files."""
        parameters = sum(info.num_elements for info in checkpoint.tensors.tensors.values())
        written = indexed(folder, index={"total_parameters": parameters})
        settings = self.settings([name for name, _, _ in checkpoint.linear_shapes(ends=True)])
        config = quantized_config(checkpoint.config, settings, self.stored_dtype) | {"quantization": settings}
        write_sidecars(checkpoint.folder, folder, config, {})
        return {NAME: [path.name for path in written]}


def open_artifact(folder: Path) -> PartsArtifact:
    """A reader of an MLX folder.

    Raises:
        RefusedError: a file is missing or damaged, a matrix misses a part, or tensors contradict each other, the
            settings or the model.
    """
    config = read_json(folder / "config.json")
    settings = config.get("quantization") or config["quantization_config"]
    # before anything is missed: other modes have other parts
    require_affine(settings, str(folder / "config.json"))
    tensors, family = open_tensors(folder), family_of(config, where=str(folder / "config.json"))

    def expected(name: str, rows: int, columns: int) -> dict[str, Shape]:
        return expected_shapes(rows, columns, *module_settings(name, settings))

    require_fit(LAYOUT, tensors, config, family, expected)
    return PartsArtifact(tensors, config, settings, family, LAYOUT, partial(decode_item, settings=settings))


def recognizes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder's config.json has MLX's own key with what it always holds."""
    return {"group_size", "bits"} <= (config.get("quantization") or {}).keys()


READING = Reading.of_one(NAME, recognizes, open_artifact, NATIVE_ENGINE, "mlx", USE)
