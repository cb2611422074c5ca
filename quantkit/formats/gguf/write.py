"""GGUF files from one pass: one per file type, every (tensor, type) pair encoded once.

A work file holds each linear once per type, under "<name>|<type>", and what the importance matrix is made of under
"<name>|importance" (mean squares) and "<name>|tokens".
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from quantkit.checkpoint.index import Checkpoint, read_json
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.formats.gguf.header import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, split_name
from quantkit.formats.gguf.metadata import About, rope_factors, write_model, write_tokenizer
from quantkit.formats.gguf.mixtures import MIXTURES, block_of, columns_of, tensor_type
from quantkit.formats.gguf.names import Model, checkpoint_name, gguf_name, halves, heads_of, interleave
from quantkit.formats.gguf.ollama import chat_pieces, modelfile, parameters, written_for
from quantkit.formats.gguf.pack import pack, type_of
from quantkit.formats.gguf.tokenizer import Vocabulary, vocabulary
from quantkit.formats.shards import copy_file, extents
from quantkit.qtensor import Item
from quantkit.workdir import write_text

NAME = "gguf"
DENSE = "F32"
IMPORTANCE, TOKENS = "importance", "tokens"
CHUNKS = 1  # the statistics are one sum over all windows
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
        shard_bytes: most weights in one file; what has more is split.
        ollama: write Ollama's files too.
        system: the system turn that these name, if any.
        imatrix_dat: write the importance matrix in the older form too.
    """

    file_types: tuple[str, ...]
    model: Model
    about: About
    weighted: bool
    shard_bytes: int
    ollama: bool
    system: str | None = None
    imatrix_dat: bool = False
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
        """None: rows that no block fits are stored as F16."""
        return []

    def stored_bits(self, name: str, rows: int, columns: int) -> int:
        """Bits that a linear takes in all files together."""
        return sum(self.variant_bits(name, rows, columns).values())

    def variant_bits(self, name: str, rows: int, columns: int) -> dict[str, int]:
        """Bits that a linear takes in each variant's file."""
        found = {}
        for file_type in self.file_types:
            block, block_bytes = block_of(self._type(file_type, name, columns))
            found[file_type] = rows * columns // block * block_bytes * 8
        return found

    def head_bytes(self, checkpoint: Checkpoint) -> int:
        """What stands in front of the weights: the vocabulary most of all."""
        infos = checkpoint.tensors.tensors
        words = vocabulary(checkpoint.folder, checkpoint.config, infos["model.embed_tokens.weight"].shape[0])
        with TemporaryDirectory() as folder:
            path = Path(folder) / "head.gguf"
            writer = gguf.GGUFWriter(path, self.model.architecture)
            self._describe(writer, self.file_types[0], checkpoint, words, self._imatrix, len(infos))
            for name, info in infos.items():
                writer.add_tensor_info(gguf_name(name), info.shape, np.dtype(np.float32), 0)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            return path.stat().st_size

    @property
    def _imatrix(self) -> str | None:
        return f"{self.about.name}.imatrix.gguf" if self.weighted else None

    def encode_item(self, item: Item) -> dict[str, Tensor]:
        """An item's tensors as they stand in its work file."""
        tensors: dict[str, Tensor] = {}
        dense = dict(item.tensors)
        for module, linear in item.linears.items():
            name = gguf_name(f"{module}.weight")
            heads = heads_of(name, self.model)
            for each in (linear, *linear.others):
                tensors[f"{name}|{type_of(each)}"] = interleave(pack(each), heads)
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
                columns = columns_of(kind, tensor.shape[1])
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
        imatrix = self._imatrix
        written = {}
        for file_type in self.file_types:
            chosen = {}
            for key in places:
                name, kind = key.split("|")
                if kind in (IMPORTANCE, TOKENS):
                    continue
                if kind != DENSE:
                    module = str(checkpoint_name(name)).removesuffix(".weight")
                    if kind != self._type(file_type, module, columns_of(kind, shapes[key][1])):
                        continue
                chosen[name] = key
            written[file_type] = self._write(folder, file_type, checkpoint, words, chosen, places, imatrix)
        if imatrix:
            write_imatrix(folder / imatrix, places)
            if self.imatrix_dat:
                write_imatrix_dat(folder / f"{self.about.name}.imatrix.dat", places)
        if self.ollama and words.chat_template:
            self._write_ollama(checkpoint, written, folder)
        for name in COPIED:
            if (checkpoint.folder / name).is_file():
                copy_file(checkpoint.folder / name, folder / name)
        return written

    def _write_ollama(self, checkpoint: Checkpoint, written: dict[str, list[str]], folder: Path) -> None:
        tokenizer = load_tokenizer(checkpoint.folder, vocab_size=int(checkpoint.config["vocab_size"]))
        pieces = chat_pieces(lambda turns, answer: tokenizer.render(turns, answer=answer))
        generation = checkpoint.folder / "generation_config.json"
        params = parameters(read_json(generation) if generation.is_file() else {}, pieces, tokenizer.end)
        template = pieces.template() if pieces else None
        texts = {
            "template": template,
            "params": json.dumps(params, ensure_ascii=False, indent=2),
            "system": self.system,
        }
        if model := written_for(written):
            texts["Modelfile"] = modelfile(model, template, params, self.system)
        for name, text in texts.items():
            if text:
                write_text(folder / name, text)

    def _write(
        self,
        folder: Path,
        file_type: str,
        checkpoint: Checkpoint,
        words: Vocabulary,
        chosen: dict[str, str],
        places: dict[str, Path],
        imatrix: str | None,
    ) -> list[str]:
        """One file type; returns the names of its files."""
        tensors = [_stored(name, places[key], key) for name, key in chosen.items()]
        if (factors := rope_factors(checkpoint.config)) is not None:
            values = factors.numpy()
            tensors.insert(0, _Stored("rope_freqs.weight", DENSE, values.shape, values.nbytes, lambda: values))
        parts = _parts(tensors, self.shard_bytes)
        stem = f"{self.about.name}.{file_type}"
        names = [f"{stem}.gguf"]
        if len(parts) > 1:
            names = [split_name(stem, number, len(parts)) for number in range(len(parts))]
        for number, (name, part) in enumerate(zip(names, parts, strict=True)):
            writer = gguf.GGUFWriter(folder / name, self.model.architecture)
            if number == 0:
                entries = sum(key.endswith(f"|{TOKENS}") for key in places)
                self._describe(writer, file_type, checkpoint, words, imatrix, entries)
            if len(parts) > 1:
                writer.add_uint16(SPLIT_NO, number)
                writer.add_uint16(SPLIT_COUNT, len(parts))
                writer.add_int32(SPLIT_TENSORS, len(tensors))
            _write_tensors(writer, part)
        return names

    def _describe(
        self,
        writer: gguf.GGUFWriter,
        file_type: str,
        checkpoint: Checkpoint,
        words: Vocabulary,
        imatrix: str | None,
        entries: int,
    ) -> None:
        parameters = sum(info.num_elements for info in checkpoint.tensors.tensors.values())
        write_model(writer, checkpoint.config, self.model, self.about, parameters)
        writer.add_file_type(MIXTURES[file_type].number)
        write_tokenizer(writer, words)
        if imatrix:
            writer.add_string("quantize.imatrix.file", imatrix)
            writer.add_string("quantize.imatrix.dataset", THE_RECORD)
            writer.add_int32("quantize.imatrix.entries_count", entries)
            writer.add_int32("quantize.imatrix.chunks_count", CHUNKS)


@dataclass(frozen=True)
class _Stored:
    """A tensor to be written: name, ggml's type, shape of what is stored, its bytes, and how to get them."""

    name: str
    kind: str
    shape: tuple[int, ...]
    size_bytes: int
    read: Callable[[], np.ndarray]


def _stored(name: str, path: Path, key: str) -> _Stored:
    kind = key.split("|")[1]
    with safe_open(path, framework="np") as file:
        shape = tuple(file.get_slice(key).get_shape())
    size_bytes = prod(shape) * (np.dtype(np.float32).itemsize if kind == DENSE else 1)
    return _Stored(name, kind, shape, size_bytes, partial(_read, path, key))


def _parts(tensors: list[_Stored], most_bytes: int) -> list[list[_Stored]]:
    """Tensors in runs of no more than so many bytes, or of one tensor."""
    parts: list[list[_Stored]] = [[]]
    held = 0
    for tensor in tensors:
        if parts[-1] and held + tensor.size_bytes > most_bytes:
            parts.append([])
            held = 0
        parts[-1].append(tensor)
        held += tensor.size_bytes
    return parts


def _write_tensors(writer: gguf.GGUFWriter, tensors: list[_Stored]) -> None:
    for tensor in tensors:
        dtype = np.dtype(np.float32 if tensor.kind == DENSE else np.uint8)
        kind = None if tensor.kind == DENSE else gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.size_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.read())
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
    found = _importance(places)
    writer.add_array("imatrix.datasets", [THE_RECORD])
    writer.add_uint32("imatrix.chunk_count", CHUNKS)
    writer.add_uint32("imatrix.chunk_size", max(count for _, count in found.values()))
    for name, (mean, count) in found.items():
        writer.add_tensor(f"{name}.in_sum2", (mean * np.float32(count)).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), count, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_imatrix_dat(path: Path, places: dict[str, Path]) -> None:
    """The importance matrix as llama.cpp wrote it before it had a GGUF form: little-endian counts, names and floats.

    Args:
        path, places: as for `write_imatrix`.
    """
    found = _importance(places)
    dataset = THE_RECORD.encode()
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(found)))
        for name, (mean, _) in found.items():
            # means times the number of calls, by which a reader divides
            file.write(struct.pack("<i", len(name)) + name.encode() + struct.pack("<2i", CHUNKS, len(mean)))
            file.write((mean * np.float32(CHUNKS)).astype("<f4").tobytes())
        file.write(struct.pack("<2i", CHUNKS, len(dataset)) + dataset)


def _importance(places: dict[str, Path]) -> dict[str, tuple[np.ndarray, int]]:
    """Mean squares and token counts by tensor."""
    names = [key.removesuffix(f"|{IMPORTANCE}") for key in places if key.endswith(f"|{IMPORTANCE}")]
    return {
        name: (
            _read(places[f"{name}|{IMPORTANCE}"], f"{name}|{IMPORTANCE}"),
            int(_read(places[f"{name}|{TOKENS}"], f"{name}|{TOKENS}")[0]),
        )
        for name in names
    }
