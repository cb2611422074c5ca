"""What a GGUF file says of the model, beside its tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from quantkit.checkpoint.numbers import rope_of
from quantkit.errors import RefusedError
from quantkit.formats.gguf.names import Model
from quantkit.formats.gguf.tokenizer import Vocabulary

QUANTIZATION_VERSION = 2
RMS_NORM_EPS = 1e-6  # of every family where config.json does not say, as transformers has it
ROPE_FACTORS = "rope_freqs.weight"
SAYABLE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    ),
}
"""Keys of each rotary scaling that GGUF has a way to say to llama.cpp."""
FIXED = {"partial_rotary_factor": 1.0, "truncate": True, "beta_fast": 32, "beta_slow": 1}
"""What llama.cpp goes by in any case; it has keys for the betas, but reads them for other architectures only."""


@dataclass(frozen=True)
class About:
    """What people are told.

    Attributes:
        name: of the model.
        license: SPDX or Hub identifier; None leaves it out.
        languages: ISO 639-1 codes.
        base_model: `org/name` on the Hub; None where the source is elsewhere.
        quantized_by: an organization; None leaves it out.
    """

    name: str
    license: str | None = None
    languages: tuple[str, ...] = ()
    base_model: str | None = None
    quantized_by: str | None = None


def rope_factors(config: dict[str, Any]) -> Tensor | None:
    """float32 [head_dim / 2]: what each rotary frequency is divided by (Llama 3.1's scaling); else None."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    width = Model.of(config).head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    original, low, high = (
        float(rope[key]) for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    share = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / float(rope["factor"]) + share)).float()


def write_model(writer: gguf.GGUFWriter, config: dict[str, Any], model: Model, about: About, parameters: int) -> None:
    """Architecture and description.

    Args:
        writer: of the file.
        config: config.json of the source.
        model: the same as GGUF sees it.
        about: what people are told.
        parameters: of the model.

    Raises:
        RefusedError: a rotary scaling that GGUF has no keys for.
    """
    writer.add_type("model")
    writer.add_name(about.name)
    writer.add_size_label(f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M")
    if about.license:
        writer.add_license(about.license)
    if about.base_model:
        organization, _, name = about.base_model.partition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{about.base_model}")
    if about.languages:
        writer.add_languages(list(about.languages))
    if about.quantized_by:
        writer.add_quantized_by(about.quantized_by)
    add: dict[type, Callable[[str, Any], None]] = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in architecture_keys(config, model).items():
        add[type(value)](f"{model.architecture}.{key}", value)
    writer.add_quantization_version(QUANTIZATION_VERSION)


def architecture_keys(config: dict[str, Any], model: Model) -> dict[str, int | float | str]:
    """How the model computes: what goes under the architecture's name, in the order of the file.

    Args:
        config: config.json of the source.
        model: the same as GGUF sees it.

    Raises:
        RefusedError: a rotary scaling that GGUF has no keys for.
    """
    return {
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": int(config["hidden_size"]),
        "block_count": model.layers,
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.key_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", RMS_NORM_EPS)),
        "vocab_size": int(config["vocab_size"]),
        "rope.dimension_count": model.head_dim,
        **_rope_keys(rope_of(config)),
    }


def _rope_keys(rope: dict[str, Any]) -> dict[str, int | float | str]:
    kind = rope["rope_type"]
    if kind not in SAYABLE:
        raise RefusedError(
            f"GGUF has no keys for the rotary scaling {kind!r}",
            where="config.json",
            fix=f"known: {', '.join(SAYABLE)}",
        )
    sayable = ("rope_type", "rope_theta", *SAYABLE[kind])
    odd = {key: value for key, value in rope.items() if key not in sayable and value not in (None, FIXED.get(key))}
    if odd:
        raise RefusedError(
            f"GGUF cannot say {', '.join(f'{key} = {value!r}' for key, value in odd.items())} of {kind} rotary scaling",
            where="config.json",
            fix="publish the model in another format",
        )
    keys: dict[str, int | float | str] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    return keys | (_yarn_keys(rope) if kind == "yarn" else {})


def _yarn_keys(rope: dict[str, Any]) -> dict[str, int | float | str]:
    keys: dict[str, int | float | str] = {}
    if rope.get("original_max_position_embeddings"):
        keys["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    factor = float(rope["factor"])
    # cosines and sines grow by this in llama.cpp, and by it times attn_factor where that is given
    usual, wanted = _yarn_growth(factor, 1.0), rope.get("attention_factor")
    if wanted is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        wanted = _yarn_growth(factor, float(rope["mscale"])) / _yarn_growth(factor, float(rope["mscale_all_dim"]))
    if wanted is not None and float(wanted) != usual:
        keys["rope.scaling.attn_factor"] = float(wanted) / usual
    return keys


def _yarn_growth(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def write_tokenizer(writer: gguf.GGUFWriter, words: Vocabulary) -> None:
    """Everything under `tokenizer.*`."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    writer.add_token_types(words.types)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unknown": writer.add_unk_token_id,
        "padding": writer.add_pad_token_id,
    }
    for key, token in words.special.items():
        add[key](token)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.add_space_prefix is not None:
        writer.add_add_space_prefix(words.add_space_prefix)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)
