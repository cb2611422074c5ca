"""GGUF files read back as a checkpoint's dense weights, by gguf-py's decoder: it shares nothing with the writer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from quantkit.checkpoint.families import Family, family_of, item_of
from quantkit.checkpoint.index import TensorFolder, TensorInfo
from quantkit.errors import RefusedError
from quantkit.formats.contract import Reading
from quantkit.formats.gguf.agreement import differences
from quantkit.formats.gguf.header import SPLIT_NAME, Header, read_split
from quantkit.formats.gguf.metadata import ROPE_FACTORS
from quantkit.formats.gguf.names import ARCHITECTURES, Model, checkpoint_name, halves, heads_of
from quantkit.formats.gguf.ollama import retold
from quantkit.formats.gguf.write import NAME

NATIVE_ENGINE = "llama-cpp"
USUAL = "Q4_K_M"  # the type the card shows how to load
SUFFIX = ".gguf"
EMBEDDING = "token_embd.weight"
LAYER_ROLES = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
REQUIRED = (EMBEDDING, "output_norm.weight", *(f".{role}.weight" for role in LAYER_ROLES))
"""Endings of the names that every model has."""
TOKENS = "tokenizer.ggml.tokens"
USE = """```sh
# llama.cpp, or any program built on it
llama-cli --hf-repo {repo}:{type} --conversation
ollama run hf.co/{repo}:{type}
```

From Python, after `hf download {repo} {file} --local-dir .`:

```python
# pip install llama-cpp-python
from llama_cpp import Llama

model = Llama("{file}", verbose=False)
messages = [{{"role": "user", "content": "Jakie mamy pory roku w Polsce?"}}]
print(model.create_chat_completion(messages, max_tokens=200)["choices"][0]["message"]["content"])
```
"""


@dataclass(frozen=True)
class GgufArtifact:
    """One GGUF file of a model as dense weights by item, ours or anybody's.

    Attributes:
        tensors: the file's tensors by GGUF name; `dtype` is ggml's type.
        config: what the metadata says, in the keys of config.json.
        family: the architecture's row.
        header: the file's head.
        model: what names and rows depend on.
    """

    tensors: TensorFolder
    config: dict
    family: Family
    header: Header
    model: Model

    @property
    def settings(self) -> dict[str, Any]:
        """Metadata that is neither the vocabulary nor long."""
        return {key: value for key, value in self.header.metadata.items() if not isinstance(value, list)}

    @property
    def num_layers(self) -> int:
        return self.model.layers

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the matrices, scales and all, over their number of weights; norms and biases are left out."""
        quantized = [entry for entry in self.header.tensors.values() if len(entry.shape) > 1]
        weights = sum(int(np.prod(entry.shape)) for entry in quantized)
        return 8 * sum(entry.size_bytes for entry in quantized) / max(weights, 1)

    @property
    def weights(self) -> frozenset[str]:
        """Checkpoint names of what `read` gives."""
        return frozenset(name for name in map(checkpoint_name, self.tensors.tensors) if name is not None)

    def read(self, item: str) -> dict[str, Tensor]:
        """Dense tensors of an item by checkpoint name, float32 on the CPU."""
        found = {}
        for name, entry in self.header.tensors.items():
            target = checkpoint_name(name)
            if target is None or item_of(target) != item:
                continue
            path = self.header.path.with_name(entry.file)
            raw = np.fromfile(path, dtype=np.uint8, count=entry.size_bytes, offset=entry.start)
            stored = raw.reshape(*entry.shape[:-1], -1)
            try:
                dense = gguf.dequantize(stored, gguf.GGMLQuantizationType[entry.kind])
            except NotImplementedError:
                raise RefusedError(
                    f"{name} is of the type {entry.kind}, which gguf-py does not decode",
                    where=str(path),
                    fix="judge the file with --runtime native",
                ) from None
            found[target] = halves(torch.from_numpy(dense).reshape(entry.shape), heads_of(name, self.model))
        return found


def open_file(path: Path) -> GgufArtifact:
    """A reader of one GGUF file, or of the files that it was split into, given the first.

    Raises:
        RefusedError: it is damaged, of an unknown architecture, or misses tensors.
    """
    header = read_split(path)
    config = config_of(header)
    model = Model.of(config)
    if problems := _problems(header, config):
        raise RefusedError(
            f"{path.name}: tensors are not what the metadata calls for: {'; '.join(problems[:4])}"
            + (f"; and {len(problems) - 4} more" if len(problems) > 4 else ""),
            where=str(path.parent),
            fix="it is damaged; download it again",
        )
    infos = {
        name: TensorInfo(name, entry.kind, entry.shape, entry.file) for name, entry in sorted(header.tensors.items())
    }
    return GgufArtifact(TensorFolder(path.parent, infos), config, family_of(config, where=str(path)), header, model)


def _problems(header: Header, config: dict[str, Any]) -> list[str]:
    """Tensors that are missing, unknown, or of a shape that contradicts the metadata, one line each."""
    expected = _expected(config, len(header.metadata.get(TOKENS) or ()) or None)
    found = {name: entry.shape for name, entry in header.tensors.items()}
    problems = [f"{name} is missing" for name in expected if name.endswith(REQUIRED) and name not in found]
    for name, shape in found.items():
        if name not in expected:
            problems.append(f"{name} is unknown")
        elif len(shape) != len(expected[name]) or any(
            side not in (None, length) for side, length in zip(expected[name], shape, strict=True)
        ):
            problems.append(f"{name} is {list(shape)} instead of {list(expected[name])}")
    return problems


def _expected(config: dict[str, Any], rows: int | None) -> dict[str, tuple[int | None, ...]]:
    """Shapes by name of all that a file may hold; a side that nothing tells is None.

    Args:
        config: what the metadata says.
        rows: entries of the vocabulary.
    """
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = width * config["num_attention_heads"], width * config["num_key_value_heads"]
    matrices = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    layer: dict[str, tuple[int | None, ...]] = {f"{role}.weight": shape for role, shape in matrices.items()}
    layer |= {f"{role}.bias": shape[:1] for role, shape in matrices.items()}
    layer |= {f"{role}.weight": (hidden,) for role in ("attn_norm", "ffn_norm")}
    layer |= {f"{role}.weight": (width,) for role in ("attn_q_norm", "attn_k_norm")}
    outside: dict[str, tuple[int | None, ...]] = {
        EMBEDDING: (rows, hidden),
        "output.weight": (rows, hidden),
        "output_norm.weight": (hidden,),
        ROPE_FACTORS: (width // 2,),
    }
    return outside | {
        f"blk.{index}.{name}": shape for index in range(config["num_hidden_layers"]) for name, shape in layer.items()
    }


def config_of(header: Header) -> dict[str, Any]:
    """The metadata of a model in the keys of config.json.

    Raises:
        RefusedError: an architecture that quantkit does not know, or a key that is missing.
    """
    data = header.metadata
    architecture = data.get("general.architecture")
    types = {value: key for key, value in reversed(ARCHITECTURES.items())}
    if not isinstance(architecture, str) or architecture not in types:
        raise RefusedError(
            f"{header.path.name} is of the unknown architecture {architecture!r}",
            where=str(header.path.parent),
            fix="known: " + ", ".join(sorted(types)),
        )
    try:
        heads = int(data[f"{architecture}.attention.head_count"])
        config: dict[str, Any] = {
            "model_type": types[architecture],
            "hidden_size": int(data[f"{architecture}.embedding_length"]),
            "intermediate_size": int(data[f"{architecture}.feed_forward_length"]),
            "num_hidden_layers": int(data[f"{architecture}.block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(data.get(f"{architecture}.attention.head_count_kv", heads)),
            "max_position_embeddings": int(data[f"{architecture}.context_length"]),
            "tie_word_embeddings": "output.weight" not in header.tensors,
        }
        width = int(data.get(f"{architecture}.attention.key_length", config["hidden_size"] // heads))
        config["head_dim"] = width
        if int(data.get(f"{architecture}.attention.value_length", width)) != width:
            raise ValueError("keys and values have heads of different widths")
        if int(data.get(f"{architecture}.rope.dimension_count", width)) != width or width % 2:
            raise ValueError("the rotary code turns a part of each head")
        if heads % config["num_key_value_heads"]:
            raise ValueError(f"{heads} query heads share {config['num_key_value_heads']} key heads")
        if config["num_hidden_layers"] > len(header.tensors):
            raise ValueError(f"block_count is {config['num_hidden_layers']} of {len(header.tensors)} tensors")
        if any(isinstance(value, int) and value < 1 for key, value in config.items() if key != "tie_word_embeddings"):
            raise ValueError("a size is not positive")
        return config
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise RefusedError(
            f"{header.path.name}: metadata is missing or odd: {error}",
            where=str(header.path.parent),
            fix="download it again, or make it with a current converter",
        ) from None


def open_variants(folder: Path) -> dict[str, GgufArtifact]:
    """Every model file of a folder, smallest first, by what its name ends in: "Q4_K_M" of "name.Q4_K_M.gguf".

    Args:
        folder: or one file alone.

    Raises:
        RefusedError: none is there, or one cannot be read.
    """
    if folder.is_file():
        return {_variant(folder): open_file(folder)}
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        split = SPLIT_NAME.match(path.name)
        if split and int(split[2]) > 1 and path.with_name(f"{split[1]}-00001-of-{split[3]}{SUFFIX}").is_file():
            continue
        header = read_split(path)
        if header.metadata.get("general.type", "model") == "model" and header.tensors:
            found.append(open_file(path))
    if not found:
        raise RefusedError("no GGUF file of a model is there", where=str(folder), fix="give a folder with *.gguf files")
    found.sort(key=lambda artifact: sum(entry.size_bytes for entry in artifact.header.tensors.values()))
    return {_variant(artifact.header.path): artifact for artifact in found}


def _variant(path: Path) -> str:
    split = SPLIT_NAME.match(path.name)
    name = split[1] if split else path.name.removesuffix(SUFFIX)
    return name.rsplit("." if "." in name else "-", 1)[-1]


def recognizes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder holds GGUF files, or is one."""
    return folder.suffix == SUFFIX if folder.is_file() else any(folder.glob(f"*{SUFFIX}"))


def _use(repo: str, quantize: dict[str, Any], variants: Sequence[str]) -> str:
    shown = USUAL if USUAL in variants else variants[-1]
    return USE.format(repo=repo, type=shown, file=f"{quantize['name']}.{shown}.gguf")


READING = Reading(
    recognizes,
    open_variants,
    NATIVE_ENGINE,
    (NAME, "llama.cpp"),
    None,
    _use,
    differences,
    retold,
)
