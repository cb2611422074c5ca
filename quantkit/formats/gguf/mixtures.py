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

    def anywhere(self) -> bool:
        return True

    def is_grouped(self) -> bool:
        return self.heads_per_key >= 4

    def in_first_2(self) -> bool:
        return self.index < 2

    def in_first_4(self) -> bool:
        return self.index < 4

    def in_first_sixteenth(self) -> bool:
        return self.index < self.count // 16

    def in_first_eighth(self) -> bool:
        return self.index < self.count // 8

    def in_last_eighth(self) -> bool:
        return self.index >= 7 * self.count // 8

    def is_between_eighths(self) -> bool:
        return not self.in_first_eighth() and not self.in_last_eighth()

    def is_sensitive(self) -> bool:
        return is_sensitive(self.index, self.count)

    def is_weighted_in_first_eighth(self) -> bool:
        return self.weighted and self.in_first_eighth()

    def is_blind_in_first_eighth(self) -> bool:
        return not self.weighted and self.in_first_eighth()


def is_sensitive(index: int, count: int) -> bool:
    """Whether a layer is of those that suffer most: the first and last eighth, and every third between."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


Condition = Callable[[Place], bool]
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


def _lowest(number: int, base: str, better: str, output: Rules = ()) -> Mixture:
    """The file types of two bits and less: sensitive tensors get `better`."""
    return Mixture(
        number,
        base,
        v=((Place.is_grouped, "Q4_K"), (Place.anywhere, better)),
        down=((Place.in_first_eighth, better),),
        output=output,
        head="Q5_K",
        embedding=better,
        shared_values=False,
    )


MIXTURES = {
    "F16": Mixture(1, "F16", head="F16"),
    "BF16": Mixture(32, "BF16", head="BF16"),
    "Q4_0": Mixture(2, "Q4_0", down=((Place.is_weighted_in_first_eighth, "Q4_1"),)),
    "Q4_1": Mixture(3, "Q4_1"),
    "Q8_0": Mixture(7, "Q8_0", head="Q8_0"),
    "Q5_0": Mixture(8, "Q5_0", down=((Place.is_weighted_in_first_eighth, "Q5_1"),)),
    "Q5_1": Mixture(9, "Q5_1"),
    "Q2_K": Mixture(
        10,
        "Q2_K",
        v=((Place.is_grouped, "Q4_K"), (Place.anywhere, "Q3_K")),
        down=((Place.anywhere, "Q3_K"),),
        output=((Place.anywhere, "Q3_K"),),
    ),
    "Q2_K_S": Mixture(21, "Q2_K", v=((Place.is_grouped, "Q4_K"),), down=((Place.in_first_eighth, "Q4_K"),)),
    "Q3_K_S": Mixture(11, "Q3_K"),
    "Q3_K_M": Mixture(
        12,
        "Q3_K",
        v=((Place.in_first_2, "Q5_K"), (Place.anywhere, "Q4_K")),
        down=((Place.in_first_sixteenth, "Q5_K"), (Place.anywhere, "Q4_K")),
        output=((Place.anywhere, "Q4_K"),),
    ),
    "Q3_K_L": Mixture(
        13, "Q3_K", v=((Place.anywhere, "Q5_K"),), down=((Place.anywhere, "Q5_K"),), output=((Place.anywhere, "Q5_K"),)
    ),
    "Q4_K_S": Mixture(14, "Q4_K", v=((Place.in_first_4, "Q5_K"),), down=((Place.in_first_eighth, "Q5_K"),)),
    "Q4_K_M": Mixture(15, "Q4_K", v=((Place.is_sensitive, "Q6_K"),), down=((Place.is_sensitive, "Q6_K"),)),
    "Q5_K_S": Mixture(16, "Q5_K"),
    "Q5_K_M": Mixture(17, "Q5_K", v=((Place.is_sensitive, "Q6_K"),), down=((Place.is_sensitive, "Q6_K"),)),
    "Q6_K": Mixture(18, "Q6_K"),
    "IQ1_S": _lowest(24, "IQ1_S", "Q2_K", output=((Place.anywhere, "IQ2_XXS"),)),
    "IQ1_M": _lowest(31, "IQ1_M", "Q2_K", output=((Place.anywhere, "IQ2_XXS"),)),
    "IQ2_XXS": _lowest(19, "IQ2_XXS", "Q2_K"),
    "IQ2_XS": _lowest(20, "IQ2_XS", "Q2_K"),
    # as llama.cpp has it: IQ2_S is mostly IQ2_XS, and IQ2_M mostly IQ2_S
    "IQ2_S": _lowest(28, "IQ2_XS", "IQ3_S", output=((Place.anywhere, "IQ3_S"),)),
    "IQ2_M": _lowest(29, "IQ2_S", "IQ3_S", output=((Place.anywhere, "IQ3_S"),)),
    "IQ3_XXS": Mixture(
        23,
        "IQ3_XXS",
        v=((Place.is_grouped, "Q4_K"),),
        output=((Place.anywhere, "IQ3_S"),),
        query_key=((Place.anywhere, "IQ2_S"),),
        head="Q5_K",
        embedding="IQ3_S",
    ),
    "IQ3_XS": Mixture(
        22,
        "IQ3_S",
        v=((Place.is_grouped, "Q4_K"),),
        query_key=((Place.anywhere, "IQ3_XXS"),),
        gate_up=((Place.is_between_eighths, "IQ3_XXS"),),
    ),
    "IQ3_S": Mixture(26, "IQ3_S", v=((Place.is_grouped, "Q4_K"),)),
    "IQ3_M": Mixture(
        27,
        "IQ3_S",
        v=((Place.anywhere, "Q4_K"),),
        down=((Place.in_first_eighth, "Q4_K"),),
        output=((Place.anywhere, "Q4_K"),),
    ),
    "IQ4_NL": Mixture(25, "IQ4_NL", v=((Place.is_grouped, "Q5_K"),), down=((Place.is_blind_in_first_eighth, "Q5_K"),)),
    "IQ4_XS": Mixture(30, "IQ4_XS", v=((Place.is_grouped, "Q5_K"),), down=((Place.is_blind_in_first_eighth, "Q5_K"),)),
}
RULED_BY = {
    "attn_v": "v",
    "ffn_down": "down",
    "attn_output": "output",
    "attn_q": "query_key",
    "attn_k": "query_key",
    "ffn_gate": "gate_up",
    "ffn_up": "gate_up",
}
"""Which of a mixture's rules a tensor of a layer goes by."""
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
        rules: Rules = getattr(mixture, RULED_BY[role])
        kind = next((found for holds, found in rules if holds(place)), kind)
        if role == "attn_v" and model.shares_values and mixture.shared_values and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
    if columns % block_of(kind)[0]:
        kind = FALLBACKS.get(kind, kind)
    return "F16" if columns % block_of(kind)[0] else kind
