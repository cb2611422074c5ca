"""Which ggml type each tensor of a published file type has: llama-quantize's rules for dense models, as data.

Read from `llama_tensor_get_type_impl` and `tensor_type_fallback` of llama.cpp (src/llama-quant.cpp, MIT).
"""

from collections.abc import Callable
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantkit.formats.gguf.names import Model, gguf_name


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: `index` of `count` layers, query heads per key head, with an importance matrix or not."""

    index: int
    count: int
    heads_per_key: int
    weighted: bool


def _more(place: Place) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


Condition = Callable[[Place], bool]
ALWAYS: Condition = lambda place: True  # noqa: E731
GROUPED: Condition = lambda place: place.heads_per_key >= 4  # noqa: E731
FIRST_2: Condition = lambda place: place.index < 2  # noqa: E731
FIRST_4: Condition = lambda place: place.index < 4  # noqa: E731
FIRST_EIGHTH: Condition = lambda place: place.index < place.count // 8  # noqa: E731
FIRST_SIXTEENTH: Condition = lambda place: place.index < place.count // 16  # noqa: E731
BETWEEN_EIGHTHS: Condition = lambda place: place.count // 8 <= place.index < 7 * place.count // 8  # noqa: E731
WEIGHTED_FIRST_EIGHTH: Condition = lambda place: place.weighted and FIRST_EIGHTH(place)  # noqa: E731
BLIND_FIRST_EIGHTH: Condition = lambda place: not place.weighted and FIRST_EIGHTH(place)  # noqa: E731
Rules = tuple[tuple[Condition, str], ...]
"""The first that holds gives the type; the base if none does."""


@dataclass(frozen=True)
class Mixture:
    """One published file type.

    Attributes:
        number: `general.file_type`.
        base: the type of everything that no rule names.
        v, down, output, query_key, gate_up: rules of attn_v, ffn_down, attn_output, attn_q with attn_k, and ffn_gate
            with ffn_up.
        head: the type of the head and of a tied embedding, where the base is coarser than 8 bits.
        embedding: the type of an untied embedding; None is the base.
        shared_values: attn_v gets Q5_K for Q3_K and Q4_K in models whose value heads are shared by many.
        needs_importance: llama-quantize refuses it without an importance matrix.
    """

    number: int
    base: str
    v: Rules = ()
    down: Rules = ()
    output: Rules = ()
    query_key: Rules = ()
    gate_up: Rules = ()
    head: str = "Q6_K"
    embedding: str | None = None
    shared_values: bool = True
    needs_importance: bool = False


def _lowest(number: int, base: str, better: str, output: Rules = ()) -> Mixture:
    """The file types of two bits and less: sensitive tensors get `better`."""
    return Mixture(
        number,
        base,
        v=((GROUPED, "Q4_K"), (ALWAYS, better)),
        down=((FIRST_EIGHTH, better),),
        output=output,
        head="Q5_K",
        embedding=better,
        shared_values=False,
        needs_importance=True,
    )


MIXTURES = {
    "F16": Mixture(1, "F16", head="F16"),
    "BF16": Mixture(32, "BF16", head="BF16"),
    "Q4_0": Mixture(2, "Q4_0", down=((WEIGHTED_FIRST_EIGHTH, "Q4_1"),)),
    "Q4_1": Mixture(3, "Q4_1"),
    "Q8_0": Mixture(7, "Q8_0", head="Q8_0"),
    "Q5_0": Mixture(8, "Q5_0", down=((WEIGHTED_FIRST_EIGHTH, "Q5_1"),)),
    "Q5_1": Mixture(9, "Q5_1"),
    "Q2_K": Mixture(
        10, "Q2_K", v=((GROUPED, "Q4_K"), (ALWAYS, "Q3_K")), down=((ALWAYS, "Q3_K"),), output=((ALWAYS, "Q3_K"),)
    ),
    "Q2_K_S": Mixture(21, "Q2_K", v=((GROUPED, "Q4_K"),), down=((FIRST_EIGHTH, "Q4_K"),), needs_importance=True),
    "Q3_K_S": Mixture(11, "Q3_K"),
    "Q3_K_M": Mixture(
        12,
        "Q3_K",
        v=((FIRST_2, "Q5_K"), (ALWAYS, "Q4_K")),
        down=((FIRST_SIXTEENTH, "Q5_K"), (ALWAYS, "Q4_K")),
        output=((ALWAYS, "Q4_K"),),
    ),
    "Q3_K_L": Mixture(13, "Q3_K", v=((ALWAYS, "Q5_K"),), down=((ALWAYS, "Q5_K"),), output=((ALWAYS, "Q5_K"),)),
    "Q4_K_S": Mixture(14, "Q4_K", v=((FIRST_4, "Q5_K"),), down=((FIRST_EIGHTH, "Q5_K"),)),
    "Q4_K_M": Mixture(15, "Q4_K", v=((_more, "Q6_K"),), down=((_more, "Q6_K"),)),
    "Q5_K_S": Mixture(16, "Q5_K"),
    "Q5_K_M": Mixture(17, "Q5_K", v=((_more, "Q6_K"),), down=((_more, "Q6_K"),)),
    "Q6_K": Mixture(18, "Q6_K"),
    "IQ1_S": _lowest(24, "IQ1_S", "Q2_K", output=((ALWAYS, "IQ2_XXS"),)),
    "IQ1_M": _lowest(31, "IQ1_M", "Q2_K", output=((ALWAYS, "IQ2_XXS"),)),
    "IQ2_XXS": _lowest(19, "IQ2_XXS", "Q2_K"),
    "IQ2_XS": _lowest(20, "IQ2_XS", "Q2_K"),
    # as llama.cpp has it: IQ2_S is mostly IQ2_XS, and IQ2_M mostly IQ2_S
    "IQ2_S": _lowest(28, "IQ2_XS", "IQ3_S", output=((ALWAYS, "IQ3_S"),)),
    "IQ2_M": _lowest(29, "IQ2_S", "IQ3_S", output=((ALWAYS, "IQ3_S"),)),
    "IQ3_XXS": Mixture(
        23,
        "IQ3_XXS",
        v=((GROUPED, "Q4_K"),),
        output=((ALWAYS, "IQ3_S"),),
        query_key=((ALWAYS, "IQ2_S"),),
        head="Q5_K",
        embedding="IQ3_S",
        needs_importance=True,
    ),
    "IQ3_XS": Mixture(
        22,
        "IQ3_S",
        v=((GROUPED, "Q4_K"),),
        query_key=((ALWAYS, "IQ3_XXS"),),
        gate_up=((BETWEEN_EIGHTHS, "IQ3_XXS"),),
        needs_importance=True,
    ),
    "IQ3_S": Mixture(26, "IQ3_S", v=((GROUPED, "Q4_K"),)),
    "IQ3_M": Mixture(27, "IQ3_S", v=((ALWAYS, "Q4_K"),), down=((FIRST_EIGHTH, "Q4_K"),), output=((ALWAYS, "Q4_K"),)),
    "IQ4_NL": Mixture(25, "IQ4_NL", v=((GROUPED, "Q5_K"),), down=((BLIND_FIRST_EIGHTH, "Q5_K"),)),
    "IQ4_XS": Mixture(30, "IQ4_XS", v=((GROUPED, "Q5_K"),), down=((BLIND_FIRST_EIGHTH, "Q5_K"),)),
}
DENSE_TYPES = ("F16", "BF16")
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"} | dict.fromkeys(
    ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"
)
"""What a tensor gets whose rows are no multiple of 256; F16 if they are no multiple of 32 either."""


def block_of(kind: str) -> tuple[int, int]:
    """Weights and bytes of one block of a ggml type."""
    weights, size_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return weights, size_bytes


def columns_of(kind: str, size_bytes: int) -> int:
    """Weights in a row of so many bytes."""
    weights, block_bytes = block_of(kind)
    return size_bytes // block_bytes * weights


def tensor_type(file_type: str, module: str, columns: int, model: Model, *, weighted: bool) -> str:
    """The ggml type of one linear, embedding or head.

    Args:
        file_type: a key of `MIXTURES`.
        module: its full name in the checkpoint, such as "model.layers.3.mlp.down_proj".
        columns: length of its rows.
        model: what the rules depend on.
        weighted: whether there is an importance matrix.
    """
    mixture = MIXTURES[file_type]
    name = gguf_name(f"{module}.weight")
    kind = mixture.base
    if kind in DENSE_TYPES:
        return kind
    if name == "output.weight" or (name == "token_embd.weight" and model.tied):
        kind = "Q8_0" if columns % block_of(kind)[0] else mixture.head
    elif name == "token_embd.weight":
        kind = mixture.embedding or kind
    else:
        _, index, role, _ = name.split(".")
        place = Place(int(index), model.layers, model.heads // model.key_heads, weighted)
        kind = next((found for holds, found in _rules(mixture, role) if holds(place)), kind)
        if role == "attn_v" and model.shares_values and mixture.shared_values and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
    if columns % block_of(kind)[0]:
        kind = FALLBACKS.get(kind, kind)
    return "F16" if columns % block_of(kind)[0] else kind


def _rules(mixture: Mixture, role: str) -> Rules:
    return {
        "attn_v": mixture.v,
        "ffn_down": mixture.down,
        "attn_output": mixture.output,
        "attn_q": mixture.query_key,
        "attn_k": mixture.query_key,
        "ffn_gate": mixture.gate_up,
        "ffn_up": mixture.gate_up,
    }[role]
