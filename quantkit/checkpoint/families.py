"""Architecture facts as a table: which linears a decoder layer has and in which order they are solved.

A new family of the same shape (pre-norm attention, gated MLP) is one row; docs/add-a-family.md says how to prove it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from quantkit.errors import RefusedError

EMBEDDING = "embedding"
HEAD = "head"
END_MODULES = {EMBEDDING: "model.embed_tokens", HEAD: "lm_head"}
"""The one matrix of each item that is no decoder layer; a tied model has no `lm_head`."""
MOST_LAYERS = 4096
"""Decoder layers that a config.json may claim; each is named before work begins."""
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")
IGNORED = ("rotary_emb.inv_freq",)
"""How names of tensors end that old checkpoints hold and no model needs: they follow from config.json."""


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


SIDES = {
    "self_attn.q_proj": ("queries", "hidden"),
    "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"),
    "self_attn.o_proj": ("hidden", "queries"),
    "mlp.gate_proj": ("inner", "hidden"),
    "mlp.up_proj": ("inner", "hidden"),
    "mlp.down_proj": ("hidden", "inner"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "self_attn.q_norm": ("head",),
    "self_attn.k_norm": ("head",),
}
"""Sides of the weight of a decoder layer's module, as `side_lengths` names them: out features, then in features."""
NORMS = ("input_layernorm", "post_attention_layernorm")
READS_HIDDEN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (*READS_HIDDEN, "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """One model architecture.

    Attributes:
        model_type: `model_type` in config.json.
        architecture: the class name in config.json's `architectures`.
        stages: the linears of a decoder layer, in the order data flows through them.
        folds: where scales of input channels can be hidden without changing what the layer computes.
        norms: the norms of a decoder layer.
        biased: linears that always have a bias.
        biased_if: keys of config.json with the linears that have a bias where the key is true.
        key_value_heads: where config.json does not say; None means as many as query heads.
        head_dim: where config.json does not say; None means the hidden size divided among the query heads.
    """

    model_type: str
    architecture: str
    stages: tuple[Stage, ...] = GATED_STAGES
    folds: tuple[Fold, ...] = GATED_FOLDS
    norms: tuple[str, ...] = NORMS
    biased: tuple[str, ...] = ()
    biased_if: tuple[tuple[str, tuple[str, ...]], ...] = ()
    key_value_heads: int | None = None
    head_dim: int | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(linear for stage in self.stages for linear in stage.linears)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("mistral", "MistralForCausalLM", key_value_heads=8),
        Family("llama", "LlamaForCausalLM", biased_if=(("attention_bias", ATTENTION), ("mlp_bias", MLP))),
        Family("qwen2", "Qwen2ForCausalLM", biased=READS_HIDDEN, key_value_heads=32),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            norms=(*NORMS, "self_attn.q_norm", "self_attn.k_norm"),
            biased_if=(("attention_bias", ATTENTION),),
            key_value_heads=32,
            head_dim=128,
        ),
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
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise RefusedError(
            f"unknown architecture: model_type is {model_type!r}",
            where=where,
            fix="known: " + ", ".join(sorted(FAMILIES)) + "; docs/add-a-family.md says how to add one",
        )
    return FAMILIES[model_type]


def weight_sides(config: dict, family: Family, *, where: str) -> dict[str, tuple[str, ...]]:
    """Every tensor that a model of this config.json needs, by checkpoint name, with its sides; see `side_lengths`.

    Raises:
        RefusedError: the config does not say how many layers there are, or more than any model has.
    """
    layers = length_of(config, "num_hidden_layers", where=where)
    if layers > MOST_LAYERS:
        raise RefusedError(
            f"config.json says num_hidden_layers = {layers}, more than {MOST_LAYERS}",
            where=where,
            fix="take config.json from the model's own repository",
        )
    biased = {*family.biased, *(linear for key, linears in family.biased_if if config.get(key) for linear in linears)}
    in_layer = {f"{module}.weight": SIDES[module] for module in (*family.norms, *family.linears)}
    in_layer |= {f"{linear}.bias": SIDES[linear][:1] for linear in family.linears if linear in biased}
    sides = {f"model.layers.{index}.{name}": found for index in range(layers) for name, found in in_layer.items()}
    sides |= {f"{END_MODULES[EMBEDDING]}.weight": ("vocabulary", "hidden"), "model.norm.weight": ("hidden",)}
    if not config.get("tie_word_embeddings", False):
        sides[f"{END_MODULES[HEAD]}.weight"] = ("vocabulary", "hidden")
    return sides


def side_lengths(config: dict, family: Family, *, where: str) -> dict[str, int]:
    """How long the sides of a model's tensors are, by the names that `SIDES` gives them.

    Raises:
        RefusedError: config.json does not say it, or says something that is no size.
    """
    heads, keys, head = attention_sizes(config, family, where=where)
    return {
        "hidden": length_of(config, "hidden_size", where=where),
        "inner": length_of(config, "intermediate_size", where=where),
        "vocabulary": length_of(config, "vocab_size", where=where),
        "head": head,
        "queries": heads * head,
        "keys": keys * head,
    }


def attention_sizes(config: dict, family: Family, *, where: str) -> tuple[int, int, int]:
    """Query heads, key heads, and the width of one head; the family's own values where config.json has none.

    Raises:
        RefusedError: config.json does not say it, says something that is no size, or heads that do not go together.
    """
    # null is as good as nothing, but not to a family with a value of its own
    defaults = {"head_dim": family.head_dim, "num_key_value_heads": family.key_value_heads}
    config = {key: default for key, default in defaults.items() if default} | config
    hidden, heads = (length_of(config, key, where=where) for key in ("hidden_size", "num_attention_heads"))
    keys, head = (
        length_of(config, key, where=where) if config.get(key) is not None else otherwise
        for key, otherwise in (("num_key_value_heads", heads), ("head_dim", hidden // heads))
    )
    problems = [f"{heads} query heads cannot share {keys} key heads evenly"] if heads % keys else []
    problems += [f"a head of {head} numbers cannot be turned in pairs"] if head % 2 else []
    if problems:
        raise RefusedError(
            f"config.json does not go together: {'; '.join(problems)}",
            where=where,
            fix="take config.json from the model's own repository",
        )
    return heads, keys, head


def weight_shapes(config: dict, family: Family, *, where: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a model of this config.json may have by checkpoint name, a tied head's among them.

    Raises:
        RefusedError: config.json does not say a size, or says something that is none.
    """
    lengths = side_lengths(config, family, where=where)
    sides = {f"{END_MODULES[HEAD]}.weight": ("vocabulary", "hidden")} | weight_sides(config, family, where=where)
    return {name: tuple(lengths[side] for side in named) for name, named in sides.items()}


def length_of(config: dict, key: str, *, where: str) -> int:
    """A size that config.json must give, above 0.

    Raises:
        RefusedError: it does not.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RefusedError(
            f"config.json says {key} = {value!r}, which is no size",
            where=where,
            fix="take config.json from the model's own repository",
        )
    return value


def item_of(tensor_name: str) -> str:
    """Which item of the stream a checkpoint tensor belongs to."""
    if match := LAYER_NAME.match(tensor_name):
        return f"layers.{match[1]}"
    return EMBEDDING if tensor_name.startswith("model.embed_tokens.") else HEAD


def in_layer(module: str) -> str:
    """ "mlp.down_proj" of "model.layers.7.mlp.down_proj"; another name as it is."""
    return module.split(".", 3)[-1]


def shortened(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names as readers match them: inside a layer, each once; in full where one of the others shares that name."""
    shared = {in_layer(module) for module in others}
    return list(dict.fromkeys(module if in_layer(module) in shared else in_layer(module) for module in modules))


def item_names(num_layers: int) -> list[str]:
    """Every item in stream order."""
    return [EMBEDDING, *(f"layers.{index}" for index in range(num_layers)), HEAD]
