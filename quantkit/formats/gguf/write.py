"""GGUF files from one pass: one per file type, every (tensor, type) pair encoded once.

Solved tensors, "<name>|<type>", go straight to their places in the files; a work file holds what the importance matrix
is made of: "<name>|importance" (mean squares) and "<name>|tokens".
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from quantkit.checkpoint.families import EMBEDDING, END_MODULES
from quantkit.checkpoint.index import Checkpoint, read_json
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.files import write_text
from quantkit.formats.gguf.files import DENSE, Planned, TypedFiles, head_of, lay_out, parts_of, write_head
from quantkit.formats.gguf.header import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, split_name
from quantkit.formats.gguf.metadata import ROPE_FACTORS, About, rope_factors, write_model, write_tokenizer
from quantkit.formats.gguf.mixtures import MIXTURES, block_of, columns_of, tensor_type
from quantkit.formats.gguf.names import Model, checkpoint_name, gguf_name, halves, heads_of, interleave
from quantkit.formats.gguf.ollama import MODELFILE, chat_pieces, modelfile, parameters, written_for
from quantkit.formats.gguf.tokenizer import Vocabulary, vocabulary
from quantkit.formats.shards import copy_file, extents
from quantkit.grids.encoded import EncodedGrid
from quantkit.qtensor import Item
from quantkit.quantize import FileType

NAME = "gguf"
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

    def could_make(self, variant: str) -> bool:
        return variant in get_args(FileType)

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
        words = self._words(checkpoint)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "head.gguf"
            writer = gguf.GGUFWriter(path, self.model.architecture)
            self._describe(writer, self.file_types[0], checkpoint, words)
            write_head(writer, self._planned(checkpoint, self.file_types[0]))
            return path.stat().st_size

    def importance(self, items: Sequence[Path]) -> dict[str, np.ndarray]:
        """See `quantkit.formats.contract.KeepsImportance`."""
        found = importance_of({extent.name: extent.path for path in items for extent in extents(path)})
        return {name: mean_I for name, (mean_I, _) in found.items()}

    def lay_out(self, checkpoint: Checkpoint, folder: Path) -> TypedFiles:
        """Every type's files with their heads and room for all tensors; what an earlier run left is kept."""
        names = self._files(checkpoint)
        paths = [folder / name for found in names.values() for name in found]
        fresh = not all(path.is_file() for path in paths)
        if fresh:
            words = self._words(checkpoint)
            for file_type, found in names.items():
                tensors = self._planned(checkpoint, file_type)
                for number, part in enumerate(parts_of(tensors, self.shard_bytes)):
                    path = folder / found[number]
                    writer = gguf.GGUFWriter(head_of(path), self.model.architecture)
                    if number == 0:
                        self._describe(writer, file_type, checkpoint, words)
                    if len(found) > 1:
                        writer.add_uint16(SPLIT_NO, number)
                        writer.add_uint16(SPLIT_COUNT, len(found))
                        writer.add_int32(SPLIT_TENSORS, len(tensors))
                    lay_out(path, writer, part)
        placed = {item: [gguf_name(name) for name in checkpoint.names(item)] for item in checkpoint.items}
        laid_out = TypedFiles([folder / found[0] for found in names.values()], placed, fresh=fresh)
        # of no item, so nothing tells whether a run before this one came so far
        if (factors := rope_factors(checkpoint.config)) is not None:
            laid_out.write({f"{ROPE_FACTORS}|{DENSE}": factors})
        return laid_out

    def _files(self, checkpoint: Checkpoint) -> dict[str, list[str]]:
        """Names of each type's files."""
        found = {}
        for file_type in self.file_types:
            stem = f"{self.about.name}.{file_type}"
            count = len(parts_of(self._planned(checkpoint, file_type), self.shard_bytes))
            found[file_type] = [split_name(stem, n, count) for n in range(count)] if count > 1 else [f"{stem}.gguf"]
        return found

    def _planned(self, checkpoint: Checkpoint, file_type: str) -> list[Planned]:
        """A file's tensors in the order of the stream."""
        infos = checkpoint.tensors.tensors
        linears = {name: columns for name, _, columns in checkpoint.linear_shapes(ends=True)}
        factors = rope_factors(checkpoint.config)
        tensors = [] if factors is None else [Planned(ROPE_FACTORS, DENSE, tuple(factors.shape))]
        for item in checkpoint.items:
            for name in sorted(checkpoint.names(item)):
                module, _, part = name.rpartition(".")
                solved = module in linears and part == "weight"
                kind = self._type(file_type, module, linears[module]) if solved else DENSE
                tensors.append(Planned(gguf_name(name), kind, infos[name].shape))
        return tensors

    def _words(self, checkpoint: Checkpoint) -> Vocabulary:
        rows = checkpoint.tensors.tensors["model.embed_tokens.weight"].shape[0]
        return vocabulary(checkpoint.folder, checkpoint.config, rows)

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
                assert isinstance(each.grid, EncodedGrid), "GGUF tensors are bytes of a type"
                tensors[f"{name}|{each.grid.kind}"] = interleave(each.codes_OI, heads)
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
        """The importance matrix, what Ollama wants, and the source's licence, beside the files of the types."""
        places = {extent.name: extent.path for path in items for extent in extents(path)}
        imatrix, written = self._imatrix, self._files(checkpoint)
        if imatrix:
            write_imatrix(folder / imatrix, places)
            if self.imatrix_dat:
                write_imatrix_dat(folder / f"{self.about.name}.imatrix.dat", places)
        if self.ollama and self._words(checkpoint).chat_template:
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
            texts[MODELFILE] = modelfile(model, template, params, self.system)
        for name, text in texts.items():
            if text:
                write_text(folder / name, text)

    def _describe(
        self,
        writer: gguf.GGUFWriter,
        file_type: str,
        checkpoint: Checkpoint,
        words: Vocabulary,
    ) -> None:
        parameters = sum(info.num_elements for info in checkpoint.tensors.tensors.values())
        write_model(writer, checkpoint.config, self.model, self.about, parameters)
        writer.add_file_type(MIXTURES[file_type].number)
        write_tokenizer(writer, words)
        if self._imatrix:
            writer.add_string("quantize.imatrix.file", self._imatrix)
            writer.add_string("quantize.imatrix.dataset", THE_RECORD)
            solved = [name for name, _, _ in checkpoint.linear_shapes(ends=True) if name != END_MODULES[EMBEDDING]]
            writer.add_int32("quantize.imatrix.entries_count", len(solved))
            writer.add_int32("quantize.imatrix.chunks_count", CHUNKS)


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
    found = importance_of(places)
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
    found = importance_of(places)
    dataset = THE_RECORD.encode()
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(found)))
        for name, (mean, _) in found.items():
            # means times the number of calls, by which a reader divides
            file.write(struct.pack("<i", len(name)) + name.encode() + struct.pack("<2i", CHUNKS, len(mean)))
            file.write((mean * np.float32(CHUNKS)).astype("<f4").tobytes())
        file.write(struct.pack("<2i", CHUNKS, len(dataset)) + dataset)


def importance_of(places: dict[str, Path]) -> dict[str, tuple[np.ndarray, int]]:
    """Mean squares, float32 [I], and token counts by tensor.

    Args:
        places: work files by key; those with "|importance" and "|tokens" are taken.
    """
    names = [key.removesuffix(f"|{IMPORTANCE}") for key in places if key.endswith(f"|{IMPORTANCE}")]
    return {
        name: (
            _read(places[f"{name}|{IMPORTANCE}"], f"{name}|{IMPORTANCE}"),
            int(_read(places[f"{name}|{TOKENS}"], f"{name}|{TOKENS}")[0]),
        )
        for name in names
    }
