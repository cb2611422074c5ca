"""What work costs, stated before it is done by whoever will do it: operations and memory.

Operations are floating-point operations, a multiply-add being two, and the least that the mathematics asks for:
products and factorizations, not elementwise work or searches.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Of one piece of work.

    Attributes:
        operations: by stage of the record ("forward", "statistics", "factorise", "solve", "prepare", "survey").
        memory_bytes: at the peak, beside the work's inputs.
    """

    operations: dict[str, float] = field(default_factory=dict)
    memory_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Of one piece of work after the other: operations add up, of the peaks the higher counts."""
        stages = self.operations | other.operations
        summed = {name: self.operations.get(name, 0.0) + other.operations.get(name, 0.0) for name in stages}
        return Cost(summed, max(self.memory_bytes, other.memory_bytes))

    def under(self, stage: str) -> "Cost":
        """The same with all operations under one stage's name."""
        return Cost({stage: sum(self.operations.values())} if self.operations else {}, self.memory_bytes)


def total(costs: Iterable[Cost]) -> Cost:
    """Of pieces of work one after another."""
    return sum(costs, Cost())


@dataclass(frozen=True)
class Shape:
    """A linear's full name, out and in features."""

    name: str
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """How many weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class StageWork:
    """Linears that read the same input, and how much of it.

    Attributes:
        shapes: of the linears; of one that is left dense there is none.
        columns: of the input.
        tokens: that statistics are collected over; 0 where there is no input, as for an embedding.
        compared: of them, those that the unquantized stream has, too.
        narrow: of the deviation only the linear's product with it is kept; see `quantkit.calibration.statistics`.
    """

    shapes: tuple[Shape, ...]
    columns: int
    tokens: int
    compared: int = 0
    narrow: bool = False

    @property
    def largest(self) -> int:
        """Weights of the largest linear."""
        return max((shape.size for shape in self.shapes), default=0)


@dataclass(frozen=True)
class LayerWork:
    """A decoder layer.

    Attributes:
        stages: in the order data flows through them, by name; the second reads what attention gives.
        forward_weights: of all its linears, also of those that are left dense.
        attention_columns: heads times their width.
        tokens: of calibration.
        compared: of them, those that are in the unquantized stream, where there is one beside the other.
        window: tokens that attend to each other.
        width_bytes: of a number in the compute dtype.
    """

    stages: dict[str, StageWork]
    forward_weights: int
    attention_columns: int
    tokens: int
    compared: int
    window: int
    width_bytes: int

    def forward_operations(self, tokens: int) -> float:
        """Of walking so many tokens through the layer, attention without its mask."""
        return 2.0 * tokens * (self.forward_weights + 2 * self.window * self.attention_columns)
