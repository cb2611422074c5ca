"""The writing side, and how what is written is used."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.index import Checkpoint, open_tensors
from quantkit.formats.contract import MAX_SHARD_BYTES
from quantkit.formats.hqq.linear import LAYOUT, STORED, decode_item, encode_linear, parts
from quantkit.formats.hqq.pickled import PICKLE, write_pickle
from quantkit.formats.parts import Shape, encoded, unstorable
from quantkit.formats.placed import Shards, lay_out, planned, size_bits
from quantkit.formats.shards import indexed
from quantkit.formats.sidecars import quantized_config, write_sidecars
from quantkit.qtensor import Item

NAME = "hqq"
STEM = "hqq_model"
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

        def reason(rows: int, columns: int) -> str | None:
            grouped, side = (columns, "in_features") if self.axis == 1 else (rows, "out_features")
            if grouped % self.group_size:
                return f"{side} {grouped} is not divisible by group_size {self.group_size}"
            blocks = {4: 2, 2: 4}.get(self.bits, 1)
            packed_rows = rows * columns // self.group_size if self.axis == 1 else self.group_size
            return f"{packed_rows} groups do not fill bytes of {blocks} codes" if packed_rows % blocks else None

        return unstorable(shapes, self.skip, reason)

    def stored_bits(self, name: str, rows: int, columns: int) -> int:
        """Bits that a quantized linear takes in the file: codes, scales and zeros."""
        return size_bits(
            {part: each for part, each in self.parts(name, rows, columns).items() if part not in LAYOUT.notes}
        )

    def parts(self, name: str, rows: int, columns: int) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and shape of each part of a quantized linear."""
        return parts(rows, columns, self.bits, self.group_size, self.axis)

    def lay_out(self, checkpoint: Checkpoint, folder: Path) -> Shards:
        """See `quantkit.formats.contract.InPlace`."""
        return lay_out(folder, planned(checkpoint, self), max_shard_bytes=MAX_SHARD_BYTES, stem=STEM)

    def encode_item(self, item: Item) -> dict[str, Tensor]:
        """All tensors of one item as they stand in the file."""
        return encoded(item, partial(encode_linear, group_size=self.group_size))

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
        """The weights' index, config.json and the source's tokenizer files."""
        written = indexed(folder, stem=STEM)
        settings = self.settings([name for name, _, _ in checkpoint.linear_shapes()])
        config = quantized_config(checkpoint.config, settings, self.stored_dtype)
        write_sidecars(checkpoint.folder, folder, config, {})
        names = [path.name for path in written]
        if self.pickled:
            write_pickle(open_tensors(folder, stem=STEM), folder / PICKLE)
            names.append(PICKLE)
        return {NAME: names}


def use(repo: str, quantize: dict[str, Any], variants: Sequence[str]) -> str:
    """How the card says it is loaded."""
    return USE.format(repo=repo, stem=STEM) + (PICKLE_NOTE if quantize["qmodel_pt"] else "")
