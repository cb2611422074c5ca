"""Architecture facts as a table: which linears a decoder layer has and in which order they are solved.

A new family of the same shape (pre-norm attention, gated MLP) is one row; docs/add-a-family.md says how to prove it.
"""

import re
from dataclasses import dataclass

from quantkit.errors import RefusedError

EMBEDDING = "embedding"
HEAD = "head"
END_MODULES = {EMBEDDING: "model.embed_tokens", HEAD: "lm_head"}
"""The one matrix of each item that is no decoder layer; a tied model has no `lm_head`."""
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Stage:
    """Linears of one decoder layer that read the same input, solved together before the next stage sees them."""

    name: str
    linears: tuple[str, ...]


GATED_STAGES = (
    Stage("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Stage("o", ("self_attn.o_proj",)),
    Stage("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    Stage("down", ("mlp.down_proj",)),
)


@dataclass(frozen=True)
class Fold:
    """A stage whose input channels can be multiplied, because what makes its input can be divided by the same.

    Attributes:
        stage: the stage's name.
        producer: the module of the layer whose output channels are divided, weight and bias.
    """

    stage: str
    producer: str


GATED_FOLDS = (
    Fold("qkv", "input_layernorm"),
    Fold("o", "self_attn.v_proj"),
    Fold("gate_up", "post_attention_layernorm"),
    Fold("down", "mlp.up_proj"),
)


@dataclass(frozen=True)
class Family:
    """One model architecture.

    Attributes:
        model_type: `model_type` in config.json.
        architecture: the class name in config.json's `architectures`.
        stages: the linears of a decoder layer, in the order data flows through them.
        folds: where scales of input channels can be hidden without changing what the layer computes.
    """

    model_type: str
    architecture: str
    stages: tuple[Stage, ...] = GATED_STAGES
    folds: tuple[Fold, ...] = GATED_FOLDS

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(linear for stage in self.stages for linear in stage.linears)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("mistral", "MistralForCausalLM"),
        Family("llama", "LlamaForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3ForCausalLM"),
    )
}


def family_of(config: dict, *, where: str) -> Family:
    """The family that a config.json describes.

    Raises:
        RefusedError: the architecture is unknown, or would need code shipped inside the checkpoint.
    """
    if "auto_map" in config:
        raise RefusedError(
            "the checkpoint asks to run code of its own (auto_map, trust_remote_code)",
            where=where,
            fix="quantkit never runs code from a checkpoint; use one of " + ", ".join(sorted(FAMILIES)),
        )
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise RefusedError(
            f"unknown architecture: model_type is {model_type!r}",
            where=where,
            fix="known: " + ", ".join(sorted(FAMILIES)) + "; docs/add-a-family.md says how to add one",
        )
    return FAMILIES[model_type]


def item_of(tensor_name: str) -> str:
    """Which item of the stream a checkpoint tensor belongs to."""
    if match := LAYER_NAME.match(tensor_name):
        return f"layers.{match[1]}"
    return EMBEDDING if tensor_name.startswith("model.embed_tokens.") else HEAD


def item_names(num_layers: int) -> list[str]:
    """Every item in stream order."""
    return [EMBEDDING, *(f"layers.{index}" for index in range(num_layers)), HEAD]
