"""What the stream asks of a solver."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from quantkit.calibration.statistics import Statistics
from quantkit.costs import Cost, StageWork
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
