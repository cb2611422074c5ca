"""What the stream asks of a solver, and of who prepares a layer for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quantkit.calibration.statistics import Statistics
from quantkit.checkpoint.layer import DecoderLayer
from quantkit.costs import Cost, LayerWork, StageWork
from quantkit.qtensor import LinearFacts, QuantizedLinear


class Solver(Protocol):
    """Chooses codes for linears that read the same input."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics it asks for; if empty, no text is read and no forward pass is run."""
        ...

    def solve(
        self, weights: dict[str, Tensor], statistics: Statistics
    ) -> Iterator[tuple[str, QuantizedLinear, LinearFacts]]:
        """Solved linears, one by one.

        Args:
            weights: [O, I] by full module name, in the compute dtype, or narrower where the source is: to be widened as
                they are worked on. Not modified.
            statistics: of the input they share.
        """
        ...

    def cost(self, work: StageWork) -> Cost:
        """What solving these linears takes, beside the statistics."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A decoder layer that computes what it did, otherwise.

    Attributes:
        tensors: dense tensors that replace the layer's own, by checkpoint name, in the compute dtype or a wider one.
        divided: what the channels [I] of a stage's input were divided by, by the stage's name; as they were elsewhere.
    """

    tensors: dict[str, Tensor]
    divided: dict[str, Tensor]


class Preparation(Protocol):
    """Rewrites a decoder layer before it is solved, without changing what the layer computes."""

    @property
    def windows(self) -> int:
        """Most calibration windows whose hidden states `prepare` is given."""
        ...

    def prepare(self, layer: DecoderLayer, hidden_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Prepared:
        """What is changed in the layer.

        Args:
            layer: holding the source's weights; may be altered, the stream makes itself another.
            hidden_BTD: the layer's input [B, T, D] for some windows, evenly spaced; not modified.
            rope: for `DecoderLayer.walk`.
        """
        ...

    def cost(self, layer: LayerWork) -> Cost:
        """What rewriting such a layer takes."""
        ...
