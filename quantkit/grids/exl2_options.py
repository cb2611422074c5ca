"""The mixtures that a sub-layer may be given: data, to be extended here.

An option names a mixture for each linear of attention or MLP; the strongest input channels come first in each. Bits of
an option count everything that the file stores for it. The rows are those of exllamav2's converter; between them lie
options that take a linear or two of a row further down (`_BETWEEN`), whose mixtures are solved for the rows anyway.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.grids.exl2 import Mixture

ATTENTION, MLP = "self_attn", "mlp"
LINEARS = {ATTENTION: ("q_proj", "k_proj", "v_proj", "o_proj"), MLP: ("gate_proj", "up_proj", "down_proj")}

# q, k, v, o
_ATTENTION = (
    ("3:.05/64 2:.95/64",) * 4,
    ("3:.1/64 2:.9/64", "3:.1/64 2:.9/64", "3:.25/64 2:.75/64", "3:.1/64 2:.9/64"),
    ("3:.1/64 2:.9/64", "3:.1/64 2:.9/64", "4:.1/128 3:.9/128", "3:.1/64 2:.9/64"),
    ("3:.1/64 2:.9/64", "3:.1/64 2:.9/64", "4:.1/128 3:.9/128", "4:.1/128 3:.9/128"),
    ("4:.1/128 3:.9/128",) * 4,
    ("4:.1/128 3:.9/128", "4:.1/128 3:.9/128", "4:.1/64 3:.9/64", "4:.1/128 3:.9/128"),
    ("4:1/128",) * 4,
    ("4:1/128", "4:1/128", "4:1/64", "4:1/128"),
    ("4:1/64", "4:1/64", "4:1/32", "4:1/64"),
    ("4:1/32",) * 4,
    ("5:.1/128 4:.9/128", "5:.1/128 4:.9/128", "5:.1/64 4:.9/64", "5:.1/128 4:.9/128"),
    ("5:.1/64 4:.9/64", "5:.1/64 4:.9/64", "5:.1/32 4:.9/32", "5:.1/64 4:.9/64"),
    ("5:.1/64 4:.9/64", "5:.1/64 4:.9/64", "5:1/64", "5:.1/64 4:.9/64"),
    ("5:.1/32 4:.9/32", "5:.1/32 4:.9/32", "5:1/32", "5:.1/32 4:.9/32"),
    ("6:.1/128 5:.9/128", "6:.1/128 5:.9/128", "6:1/128", "6:.1/128 5:.9/128"),
    ("6:.1/32 5:.9/32", "6:.1/32 5:.9/32", "6:1/32", "6:.1/32 5:.9/32"),
    ("6:1/128",) * 4,
    ("6:1/32", "6:1/32", "8:1/32", "6:1/32"),
    ("8:1/128",) * 4,
)
# gate, up, down
_MLP = (
    ("3:.05/64 2:.95/64", "3:.05/64 2:.95/64", "6:.05/32 3:.2/64 2:.75/64"),
    ("3:.1/64 2:.9/64", "3:.25/64 2:.75/64", "6:.05/32 3:.2/64 2:.75/64"),
    ("3:.1/64 2:.9/64", "3:.3/64 2:.7/64", "5:.05/32 3:.95/32"),
    ("3:.1/64 2:.9/64", "3:.3/64 2:.7/64", "5:.05/32 4:.95/32"),
    ("4:.1/128 3:.9/128", "4:.25/128 3:.75/128", "8:.05/32 4:.1/128 3:.85/128"),
    ("4:.1/32 3:.9/32", "4:.25/32 3:.75/32", "8:.05/32 4:.1/32 3:.85/32"),
    ("4:.1/32 3:.9/32", "4:.25/32 3:.75/32", "8:.05/32 4:.95/128"),
    ("4:1/128", "4:1/32", "8:.05/32 4:.95/128"),
    ("4:1/32", "4:1/32", "8:.05/32 4:.95/32"),
    ("5:.1/128 4:.9/128", "5:.25/128 4:.75/128", "8:.05/32 5:.1/128 4:.85/128"),
    ("5:.1/32 4:.9/32", "5:.25/32 4:.75/32", "8:.05/32 5:.1/32 4:.85/32"),
    ("6:.1/128 5:.9/128", "6:.25/128 5:.75/128", "8:.05/32 6:.1/128 5:.85/128"),
    ("6:.1/32 5:.9/32", "6:.25/32 5:.75/32", "8:.05/32 6:.1/32 5:.85/32"),
    ("6:1/128", "6:1/128", "8:.05/32 6:.95/128"),
    ("8:.1/128 6:.9/128", "8:.1/128 6:.9/128", "8:.15/128 6:.85/128"),
    ("8:.1/128 6:.9/128", "8:.1/128 6:.9/128", "8:1/128"),
    ("8:1/128",) * 3,
)
# linears that take the mixture of a later row, and how many rows later that is
_BETWEEN = {
    ATTENTION: ((("v_proj",), (3,)), (("k_proj", "v_proj"), (1,)), (("o_proj",), (1, 2))),
    MLP: ((("down_proj",), (1, 2, 3)),),
}
HEADS = {
    2: Mixture.of("4:.3/32 2:.7/32"),
    3: Mixture.of("4:.15/32 3:.85/32"),
    4: Mixture.of("6:.15/32 4:.85/32"),
    5: Mixture.of("6:.15/128 5:.85/128"),
    6: Mixture.of("8:.15/128 6:.85/128"),
    8: Mixture.of("8:1/128"),
}


@dataclass(frozen=True)
class Option:
    """Mixtures of one sub-layer's linears, by their names inside it."""

    mixtures: tuple[tuple[str, Mixture], ...]

    def stored_bits(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Bits that the sub-layer takes, given the (out, in) features of its linears."""
        return sum(mixture.stored_bits(*shapes[linear]) for linear, mixture in self.mixtures)


def _rows(block: str, rows: tuple[tuple[str, ...], ...]) -> list[dict[str, Mixture]]:
    return [dict(zip(LINEARS[block], map(Mixture.of, row), strict=True)) for row in rows]


def _between(block: str, rows: list[dict[str, Mixture]]) -> list[dict[str, Mixture]]:
    return [
        row | {linear: later[linear] for linear in linears}
        for linears, steps in _BETWEEN[block]
        for step in steps
        for row, later in zip(rows, rows[step:], strict=False)
    ]


def _options(rows: list[dict[str, Mixture]]) -> tuple[Option, ...]:
    return tuple(dict.fromkeys(Option(tuple(row.items())) for row in rows))


_ROWS = {ATTENTION: _rows(ATTENTION, _ATTENTION), MLP: _rows(MLP, _MLP)}
PUBLISHED = {block: _options(rows) for block, rows in _ROWS.items()}
"""exllamav2's options of each block, fewest bits first."""
OPTIONS = {
    block: _options(sorted(rows + _between(block, rows), key=lambda row: [*map(repr, row.values())]))
    for block, rows in _ROWS.items()
}
"""All options of each block, those with the same first mixtures side by side."""
