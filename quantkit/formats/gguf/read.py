"""GGUF files read back as a checkpoint's dense weights, by gguf-py's decoder: it shares nothing with the writer."""

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
from quantkit.formats.gguf.header import Header, read_header
from quantkit.formats.gguf.names import ARCHITECTURES, Model, checkpoint_name, halves, heads_of
from quantkit.formats.gguf.write import NAME

NATIVE_ENGINE = "llama-cpp"
USUAL = "Q4_K_M"  # the type the card shows how to load
SUFFIX = ".gguf"
EMBEDDING = "token_embd.weight"
UNWEIGHED = ("F32", "F16", "BF16")
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
        """Stored bits of the quantized tensors, scales and all, over their number of weights."""
        quantized = [entry for entry in self.header.tensors.values() if entry.kind not in UNWEIGHED]
        weights = sum(int(np.prod(entry.shape)) for entry in quantized)
        return 8 * sum(entry.size_bytes for entry in quantized) / max(weights, 1)

    def read(self, item: str) -> dict[str, Tensor]:
        """Dense tensors of an item by checkpoint name, float32 on the CPU."""
        found = {}
        for name, entry in self.header.tensors.items():
            target = checkpoint_name(name)
            if target is None or item_of(target) != item:
                continue
            raw = np.fromfile(self.header.path, dtype=np.uint8, count=entry.size_bytes, offset=entry.start)
            stored = raw.reshape(*entry.shape[:-1], -1)
            dense = gguf.dequantize(stored, gguf.GGMLQuantizationType[entry.kind])
            found[target] = halves(torch.from_numpy(dense).reshape(entry.shape), heads_of(name, self.model))
        return found


def open_file(path: Path) -> GgufArtifact:
    """A reader of one GGUF file.

    Raises:
        RefusedError: it is damaged, of an unknown architecture, split, or misses tensors.
    """
    header = read_header(path)
    config = config_of(header)
    model = Model.of(config)
    names = [name for name in header.tensors if checkpoint_name(name)]
    layers = {name.split(".")[1] for name in names if name.startswith("blk.")}
    if EMBEDDING not in names or len(layers) != model.layers:
        raise RefusedError(
            f"{path.name} holds {len(layers)} of {model.layers} layers",
            where=str(path.parent),
            fix="join a split file with llama-gguf-split --merge; a file that is not split is damaged",
        )
    infos = {
        name: TensorInfo(name, entry.kind, entry.shape, path.name) for name, entry in sorted(header.tensors.items())
    }
    return GgufArtifact(TensorFolder(path.parent, infos), config, family_of(config, where=str(path)), header, model)


def config_of(header: Header) -> dict[str, Any]:
    """The metadata of a model in the keys of config.json.

    Raises:
        RefusedError: an architecture that quantkit does not know, or a key that is missing.
    """
    data = header.metadata
    architecture = data.get("general.architecture")
    types = {value: key for key, value in reversed(ARCHITECTURES.items())}
    if architecture not in types:
        raise RefusedError(
            f"{header.path.name} is of the unknown architecture {architecture!r}",
            where=str(header.path.parent),
            fix="known: " + ", ".join(sorted(types)),
        )
    try:
        heads = int(data[f"{architecture}.attention.head_count"])
        return {
            "model_type": types[architecture],
            "hidden_size": int(data[f"{architecture}.embedding_length"]),
            "intermediate_size": int(data[f"{architecture}.feed_forward_length"]),
            "num_hidden_layers": int(data[f"{architecture}.block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(data.get(f"{architecture}.attention.head_count_kv", heads)),
            "max_position_embeddings": int(data[f"{architecture}.context_length"]),
            "tie_word_embeddings": "output.weight" not in header.tensors,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(
            f"{header.path.name}: metadata is missing or odd: {error}",
            where=str(header.path.parent),
            fix="download it again, or make it with a current converter",
        ) from None


def open_variants(folder: Path) -> dict[str, GgufArtifact]:
    """Every model file of a folder, smallest first, by what its name ends in: "Q4_K_M" of "name.Q4_K_M.gguf".

    Raises:
        RefusedError: none is there, or one cannot be read.
    """
    found = {}
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: (path.stat().st_size, path.name)):
        header = read_header(path)
        if header.metadata.get("general.type", "model") == "model" and header.tensors:
            found[_variant(path)] = open_file(path)
    if not found:
        raise RefusedError("no GGUF file of a model is there", where=str(folder), fix="give a folder with *.gguf files")
    return found


def _variant(path: Path) -> str:
    name = path.name.removesuffix(SUFFIX)
    return name.rsplit("." if "." in name else "-", 1)[-1]


def open_artifact(folder: Path) -> GgufArtifact:
    """The first model file of a folder; see `open_variants`."""
    return next(iter(open_variants(folder).values()))


def recognizes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder holds GGUF files."""
    return any(folder.glob(f"*{SUFFIX}"))


def _use(repo: str, quantize: dict[str, Any]) -> str:
    types = quantize["types"]
    shown = USUAL if USUAL in types else types[-1]
    return USE.format(repo=repo, type=shown, file=f"{quantize['name']}.{shown}.gguf")


READING = Reading(
    recognizes,
    open_artifact,
    NATIVE_ENGINE,
    (NAME, "llama.cpp"),
    None,
    _use,
    open_variants,
)
