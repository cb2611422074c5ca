"""The model as GGUF sees it: architecture, tensor names, and the order of query and key rows.

Shape legend: O rows, I columns.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantkit.checkpoint.families import attention_sizes, family_of, length_of

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`general.architecture` by `model_type`."""
PERMUTED = ("llama",)
"""Architectures whose rotary code pairs neighbours instead of halves."""
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)$")
BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)$")


@dataclass(frozen=True)
class Model:
    """What decides names, rows and types.

    Attributes:
        architecture: `general.architecture`.
        layers, heads, key_heads, head_dim: of config.json, or the family's own.
        tied: the head is the embedding.
    """

    architecture: str
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    tied: bool

    @staticmethod
    def of(config: dict[str, Any]) -> "Model":
        """From config.json.

        Raises:
            RefusedError: an architecture that quantkit does not know, or a size that is missing.
        """
        family = family_of(config, where="config.json")
        layers = length_of(config, "num_hidden_layers", where="config.json")
        tied = bool(config.get("tie_word_embeddings", False))
        return Model(
            ARCHITECTURES[family.model_type], layers, *attention_sizes(config, family, where="config.json"), tied
        )

    @property
    def shares_values(self) -> bool:
        """llama.cpp's "70B": 80 layers whose value heads are shared, and so are small enough to get more bits."""
        return self.layers == 80 and self.architecture != "qwen3" and self.heads != self.key_heads


def gguf_name(name: str) -> str:
    """A checkpoint tensor's name in GGUF."""
    if match := LAYER.match(name):
        return f"blk.{match[1]}.{INSIDE[match[2]]}.{match[3]}"
    module, _, part = name.rpartition(".")
    return f"{OUTSIDE[module]}.{part}"


def checkpoint_name(name: str) -> str | None:
    """The other way; None for a tensor that no checkpoint has."""
    if match := BLOCK_NAME.match(name):
        inside = {short: long for long, short in INSIDE.items()}
        return f"model.layers.{match[1]}.{inside[match[2]]}.{match[3]}" if match[2] in inside else None
    module, _, part = name.rpartition(".")
    outside = {short: long for long, short in OUTSIDE.items()}
    return f"{outside[module]}.{part}" if module in outside else None


def heads_of(name: str, model: Model) -> int:
    """Heads whose rows a tensor's GGUF order regroups; 0 where the order is the checkpoint's."""
    if model.architecture not in PERMUTED:
        return 0
    short = name.split(".")[2] if name.startswith("blk.") else ""
    return {"attn_q": model.heads, "attn_k": model.key_heads}.get(short, 0)


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows [O, ...] of each head regrouped so that the two halves alternate; unchanged for 0 heads."""
    if not heads:
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    if not heads:
        return rows
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
