"""Whether a GGUF file and a checkpoint are of one model, for quantkit's own runtime goes by the checkpoint's config."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.checkpoint.index import Checkpoint
from quantkit.errors import RefusedError
from quantkit.formats.gguf.metadata import ROPE_FACTORS, architecture_keys, rope_factors
from quantkit.formats.gguf.names import Model, checkpoint_name

if TYPE_CHECKING:
    from quantkit.formats.gguf.read import GgufArtifact

PRECISION = 1e-5
SCALING = "rope.scaling."


def differences(artifact: "GgufArtifact", checkpoint: Checkpoint) -> list[str]:
    """What a file says otherwise than the checkpoint it is held against, one line each.

    Args:
        artifact: the file.
        checkpoint: what it should have been made from.

    Raises:
        RefusedError: the checkpoint's rotary scaling cannot be said in GGUF.
    """
    architecture = artifact.model.architecture
    wanted = Model.of(checkpoint.config)
    if architecture != wanted.architecture:
        return [f"general.architecture is {architecture}, the model's {wanted.architecture}"]
    prefix = f"{architecture}."
    metadata = artifact.header.metadata
    said = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    found, expected = _completed(said), _completed(architecture_keys(checkpoint.config, wanted))
    other = [
        f"{prefix}{key} is {found.get(key)}, the model's {expected[key]}"
        for key in expected
        # rows of the embedding tell how large the vocabulary is
        if key != "vocab_size" and not _same(found.get(key), expected[key])
    ]
    return other + _other_tensors(artifact, checkpoint) + _other_factors(artifact, checkpoint)


def _completed(keys: dict[str, Any]) -> dict[str, Any]:
    """Keys with what llama.cpp takes where one is absent; those of a scaling only where they count."""
    heads = keys.get("attention.head_count")
    width = keys.get("attention.key_length", int(keys["embedding_length"]) // int(heads or 1))
    full = {
        "attention.head_count_kv": heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "rope.freq_base": 10000.0,
    } | {key: value for key, value in keys.items() if not key.startswith(SCALING)}
    factor = keys.get(f"{SCALING}factor", 1.0)
    kind = keys.get(f"{SCALING}type", "linear" if factor != 1 else "none")
    full[f"{SCALING}type"] = kind
    if kind != "none":
        full[f"{SCALING}factor"] = factor
    if kind == "yarn":
        yarn = {"original_context_length": keys.get("context_length"), "attn_factor": 1.0}
        full |= {f"{SCALING}{key}": keys.get(f"{SCALING}{key}", value) for key, value in yarn.items()}
    return full


def _same(found: Any, expected: Any) -> bool:
    """Equal, floats to what float32 and a division keep."""
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(found, expected, rel_tol=PRECISION)
    return bool(found == expected)


def _other_tensors(artifact: "GgufArtifact", checkpoint: Checkpoint) -> list[str]:
    """Tensors that one of the two lacks or has in another shape."""
    wanted = {name: info.shape for name, info in checkpoint.tensors.tensors.items()}
    found = {}
    for name, entry in artifact.header.tensors.items():
        if target := checkpoint_name(name):
            found[target] = (name, entry.shape)
    other = [f"{name} is missing" for name in wanted if name not in found]
    for target, (name, shape) in found.items():
        # a tied head may be written out
        like = "model.embed_tokens.weight" if target == "lm_head.weight" and target not in wanted else target
        if wanted.get(like) != shape:
            has = f"the model's {target} {list(wanted[like])}" if like in wanted else "and the model has no such tensor"
            other.append(f"{name} is {list(shape)}, {has}")
    return other


def _other_factors(artifact: "GgufArtifact", checkpoint: Checkpoint) -> list[str]:
    """Whether the rotary frequencies are scaled as the checkpoint scales them."""
    factors, entry = rope_factors(checkpoint.config), artifact.header.tensors.get(ROPE_FACTORS)
    width = int(architecture_keys(checkpoint.config, artifact.model)["rope.dimension_count"]) // 2
    expected = np.ones(width, dtype=np.float32) if factors is None else factors.numpy()
    found = np.ones(width, dtype=np.float32)
    if entry is not None:
        path = artifact.header.path.with_name(entry.file)
        if entry.kind != "F32":
            raise RefusedError(f"{ROPE_FACTORS} is {entry.kind}", where=str(path), fix="download the file again")
        found = np.fromfile(path, dtype=np.float32, count=entry.size_bytes // 4, offset=entry.start)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=PRECISION, atol=0):
        return [f"{ROPE_FACTORS} scales the rotary frequencies otherwise than the model"]
    return []
