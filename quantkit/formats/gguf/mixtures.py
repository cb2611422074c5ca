"""Which ggml type each tensor of a published file type has: llama-quantize's rules for dense models, as data.

Read from `llama_tensor_get_type_impl` and `tensor_type_fallback` of llama.cpp (src/llama-quant.cpp, MIT).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from quantkit.formats.gguf.names import Model, gguf_name
from quantkit.grids.blocks import BLOCK, TYPES


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: `index` of `count` layers, and query heads per key head."""

    index: int
    count: int
    heads_per_key: int


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
Rules = tuple[tuple[Condition, str], ...]
"""The first that holds gives the type; the base if none does."""


@dataclass(frozen=True)
class Mixture:
    """One published file type.

    Attributes:
        number: `general.file_type`.
        base: the type of everything that no rule names.
        v, down, output: rules of attn_v, ffn_down and attn_output.
        weighted_down: rules of ffn_down that hold with an importance matrix only.
    """

    number: int
    base: str
    v: Rules = ()
    down: Rules = ()
    output: Rules = ()
    weighted_down: Rules = field(default=())


MIXTURES = {
    "Q4_0": Mixture(2, "Q4_0", weighted_down=((FIRST_EIGHTH, "Q4_1"),)),
    "Q4_1": Mixture(3, "Q4_1"),
    "Q8_0": Mixture(7, "Q8_0"),
    "Q5_0": Mixture(8, "Q5_0", weighted_down=((FIRST_EIGHTH, "Q5_1"),)),
    "Q5_1": Mixture(9, "Q5_1"),
    "Q2_K": Mixture(
        10, "Q2_K", v=((GROUPED, "Q4_K"), (ALWAYS, "Q3_K")), down=((ALWAYS, "Q3_K"),), output=((ALWAYS, "Q3_K"),)
    ),
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
}
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What a tensor gets whose rows are no multiple of 256."""


def tensor_type(file_type: str, module: str, columns: int, model: Model, *, weighted: bool) -> str:
    """The ggml type of one linear, embedding or head.

    Args:
        file_type: a key of `MIXTURES`.
        module: its full name in the checkpoint, such as "model.layers.3.mlp.down_proj".
        columns: length of its rows, a multiple of 32.
        model: what the rules depend on.
        weighted: whether there is an importance matrix.
    """
    mixture = MIXTURES[file_type]
    name = gguf_name(f"{module}.weight")
    kind = mixture.base
    if name == "output.weight" or (name == "token_embd.weight" and model.tied):
        if columns % TYPES[kind].block:
            kind = "Q8_0"
        elif kind != "Q8_0":
            kind = "Q6_K"
    elif name.startswith("blk."):
        _, index, role, _ = name.split(".")
        place = Place(int(index), model.layers, model.heads // model.key_heads)
        rules = {"attn_v": mixture.v, "ffn_down": mixture.down, "attn_output": mixture.output}.get(role, ())
        if role == "ffn_down" and weighted:
            rules += mixture.weighted_down
        kind = next((found for holds, found in rules if holds(place)), kind)
        if role == "attn_v" and model.shares_values and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
    if columns % TYPES[kind].block:
        kind = FALLBACKS[kind]
    assert columns % BLOCK == 0, "rows are multiples of 32"
    return kind
