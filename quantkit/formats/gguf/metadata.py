"""What a GGUF file says of the model, beside its tensors."""

import math
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from quantkit.errors import RefusedError
from quantkit.formats.gguf.names import Model
from quantkit.formats.gguf.tokenizer import Vocabulary

QUANTIZATION_VERSION = 2


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


def head_dim_of(config: dict[str, Any]) -> int:
    """Width of one attention head."""
    return int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings in one place: "rope_type", "rope_theta" and what the type needs."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def rope_factors(config: dict[str, Any]) -> Tensor | None:
    """float32 [head_dim / 2]: what each rotary frequency is divided by (Llama 3.1's scaling); else None."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    width = head_dim_of(config)
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
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.key_heads)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_rope_dimension_count(head_dim_of(config))
    _write_rope(writer, rope_of(config))
    writer.add_quantization_version(QUANTIZATION_VERSION)


def _write_rope(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):
        return
    if kind not in ("linear", "yarn"):
        raise RefusedError(
            f"GGUF has no keys for the rotary scaling {kind!r}", where="config.json", fix="known: linear, yarn, llama3"
        )
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn" and "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


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
