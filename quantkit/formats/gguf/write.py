"""GGUF files from one pass: one per file type, every (tensor, type) pair encoded once.

A work file holds each linear once per type, under "<name>|<type>", and what the importance matrix is made of under
"<name>|importance" (mean squares) and "<name>|tokens".
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from quantkit.checkpoint.index import Checkpoint
from quantkit.formats.gguf.metadata import About, rope_factors, write_model, write_tokenizer
from quantkit.formats.gguf.mixtures import MIXTURES, tensor_type
from quantkit.formats.gguf.names import Model, checkpoint_name, gguf_name, halves, heads_of, interleave
from quantkit.formats.gguf.pack import pack
from quantkit.formats.gguf.tokenizer import Vocabulary, vocabulary
from quantkit.formats.shards import copy_file, extents
from quantkit.grids.blocks import BLOCK, TYPES, BlockGrid
from quantkit.qtensor import Item

NAME = "gguf"
DENSE = "F32"
IMPORTANCE, TOKENS = "importance", "tokens"
COPIED = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
THE_RECORD = "quantkit.json"  # tells which text the statistics come from


@dataclass(frozen=True)
class GgufFormat:
    """The writing side, see `quantkit.formats.contract.Format`.

    Attributes:
        file_types: what is written, such as "Q4_K_M".
        model: what names, rows and types depend on.
        about: what the files say of the model.
        weighted: whether there is an importance matrix.
    """

    file_types: tuple[str, ...]
    model: Model
    about: About
    weighted: bool
    skip: tuple[str, ...] = ()
    name: str = NAME
    stored_dtype: torch.dtype = torch.float32

    @property
    def variants(self) -> tuple[str, ...]:
        return self.file_types

    def types(self, module: str, columns: int) -> tuple[str, ...]:
        """The distinct ggml types that a linear is needed in, in the order of the file types."""
        return tuple(dict.fromkeys(self._type(file_type, module, columns) for file_type in self.file_types))

    def _type(self, file_type: str, module: str, columns: int) -> str:
        return tensor_type(file_type, module, columns, self.model, weighted=self.weighted)

    def problems(self, shapes: list[tuple[str, int, int]]) -> list[str]:
        """Why linears of these (name, out, in) shapes cannot be stored, one line each; empty if all can."""
        return [
            f"{name}: in_features {columns} is no multiple of {BLOCK}, the smallest block"
            for name, _, columns in shapes
            if columns % BLOCK
        ]

    def stored_bits(self, name: str, rows: int, columns: int) -> int:
        """Bits that a linear takes in all files together."""
        return sum(self.variant_bits(name, rows, columns).values())

    def variant_bits(self, name: str, rows: int, columns: int) -> dict[str, int]:
        """Bits that a linear takes in each variant's file."""
        found = {}
        for file_type in self.file_types:
            kind = TYPES[self._type(file_type, name, columns)]
            found[file_type] = rows * columns // kind.block * kind.size_bytes * 8
        return found

    def encode_item(self, item: Item) -> dict[str, Tensor]:
        """An item's tensors as they stand in its work file."""
        tensors: dict[str, Tensor] = {}
        dense = dict(item.tensors)
        for module, linear in item.linears.items():
            name = gguf_name(f"{module}.weight")
            heads = heads_of(name, self.model)
            for each in (linear, *linear.others):
                assert isinstance(each.grid, BlockGrid), "GGUF codes are on block grids"
                tensors[f"{name}|{each.grid.kind.name}"] = interleave(pack(each), heads)
            if linear.bias_O is not None:
                dense[f"{module}.bias"] = linear.bias_O
            if linear.importance is not None:
                tensors[f"{name}|{IMPORTANCE}"] = linear.importance.mean_square_I.float().clone()
                tensors[f"{name}|{TOKENS}"] = torch.tensor([linear.importance.num_tokens])
        for key, tensor in dense.items():
            name = gguf_name(key)
            tensors[f"{name}|{DENSE}"] = interleave(tensor.float(), heads_of(name, self.model)).contiguous()
        return tensors

    def decode_item(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors by checkpoint name; of several variants the first's."""
        dense: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name, kind = key.split("|")
            target = checkpoint_name(name)
            if kind in (IMPORTANCE, TOKENS) or target is None:
                continue
            if kind != DENSE:
                columns = tensor.shape[1] // TYPES[kind].size_bytes * TYPES[kind].block
                if kind != self._type(self.file_types[0], target.removesuffix(".weight"), columns):
                    continue
                tensor = torch.from_numpy(gguf.dequantize(tensor.numpy(), gguf.GGMLQuantizationType[kind]))
            dense[target] = halves(tensor, heads_of(name, self.model))
        return dense

    def assemble(self, checkpoint: Checkpoint, items: list[Path], folder: Path) -> dict[str, list[str]]:
        """One file per file type, the importance matrix, and the source's licence."""
        places = {extent.name: extent.path for path in items for extent in extents(path)}
        shapes = {extent.name: extent.shape for path in items for extent in extents(path)}
        rows = next(shape[0] for key, shape in shapes.items() if key.startswith("token_embd.weight|"))
        words = vocabulary(checkpoint.folder, checkpoint.config, rows)
        imatrix = f"{self.about.name}.imatrix.gguf" if self.weighted else None
        written = {}
        for file_type in self.file_types:
            chosen = {}
            for key in places:
                name, kind = key.split("|")
                if kind in (IMPORTANCE, TOKENS):
                    continue
                if kind != DENSE:
                    module = str(checkpoint_name(name)).removesuffix(".weight")
                    columns = shapes[key][1] // TYPES[kind].size_bytes * TYPES[kind].block
                    if kind != self._type(file_type, module, columns):
                        continue
                chosen[name] = key
            path = folder / f"{self.about.name}.{file_type}.gguf"
            self._write(path, file_type, checkpoint, words, chosen, places, imatrix)
            written[file_type] = [path.name]
        if imatrix:
            write_imatrix(folder / imatrix, places)
        for name in COPIED:
            if (checkpoint.folder / name).is_file():
                copy_file(checkpoint.folder / name, folder / name)
        return written

    def _write(
        self,
        path: Path,
        file_type: str,
        checkpoint: Checkpoint,
        words: Vocabulary,
        chosen: dict[str, str],
        places: dict[str, Path],
        imatrix: str | None,
    ) -> None:
        writer = gguf.GGUFWriter(path, self.model.architecture)
        parameters = sum(info.num_elements for info in checkpoint.tensors.tensors.values())
        write_model(writer, checkpoint.config, self.model, self.about, parameters)
        writer.add_file_type(MIXTURES[file_type].number)
        write_tokenizer(writer, words)
        if imatrix:
            writer.add_string("quantize.imatrix.file", imatrix)
            writer.add_string("quantize.imatrix.dataset", THE_RECORD)
            writer.add_int32("quantize.imatrix.entries_count", sum(key.endswith(f"|{TOKENS}") for key in places))
        tensors: dict[str, tuple[Any, ...]] = {}
        if (factors := rope_factors(checkpoint.config)) is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes)
            tensors["rope_freqs.weight"] = (factors,)
        for name, key in chosen.items():
            kind = gguf.GGMLQuantizationType[key.split("|")[1]]
            with safe_open(places[key], framework="np") as file:
                part = file.get_slice(key)
                shape = part.get_shape()
            dtype = np.dtype(np.float32 if kind.name == DENSE else np.uint8)
            size_bytes = int(np.prod(shape)) * dtype.itemsize
            writer.add_tensor_info(name, shape, dtype, size_bytes, None if kind.name == DENSE else kind)
            tensors[name] = (places[key], key)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for source in tensors.values():
            writer.write_tensor_data(source[0].numpy() if len(source) == 1 else _read(*source))
        writer.close()


def _read(path: Path, key: str) -> np.ndarray:
    with safe_open(path, framework="np") as file:
        tensor: np.ndarray = file.get_tensor(key)
    return tensor


def write_imatrix(path: Path, places: dict[str, Path]) -> None:
    """The importance matrix as llama.cpp reads it: sums of squares and token counts by tensor name.

    Args:
        path: to be written.
        places: work files by key; those with "|importance" and "|tokens" are taken.
    """
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    names = [key.removesuffix(f"|{IMPORTANCE}") for key in places if key.endswith(f"|{IMPORTANCE}")]
    tokens = [int(_read(places[f"{name}|{TOKENS}"], f"{name}|{TOKENS}")[0]) for name in names]
    writer.add_array("imatrix.datasets", [THE_RECORD])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", max(tokens))
    for name, count in zip(names, tokens, strict=True):
        mean = _read(places[f"{name}|{IMPORTANCE}"], f"{name}|{IMPORTANCE}")
        writer.add_tensor(f"{name}.in_sum2", (mean * np.float32(count)).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), count, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
