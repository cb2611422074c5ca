"""ggml's block types as the stream's solver: every type that some variant needs, from one read of the weights."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from quantkit.calibration.statistics import SQUARES, Statistics
from quantkit.grids.blocks import TYPES, quantize
from quantkit.qtensor import Importance, LinearFacts, QuantizedLinear


@dataclass(frozen=True)
class BlockSolver:
    """Searches each type's scales on the weights, weighted by the inputs' mean squares where there are any.

    Attributes:
        types: the ggml types that a linear is needed in, by its full name and its row length; the first is the one
            that a stream goes on with.
        weighted: collect the mean squares.
    """

    types: Callable[[str, int], tuple[str, ...]]
    weighted: bool

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({SQUARES} if self.weighted else ())

    def solve(
        self, weights: dict[str, Tensor], statistics: Statistics
    ) -> Iterator[tuple[str, QuantizedLinear, LinearFacts]]:
        """Solved linears, one by one; see `quantkit.stream.Solver`."""
        # an embedding has no input whose squares could weigh its columns
        mean_I = statistics.mean_square() if SQUARES in statistics.needs and statistics.num_tokens else None
        importance = None if mean_I is None else Importance(mean_I, statistics.num_tokens)
        for name, weight_OI in weights.items():
            started = time.perf_counter()
            first, *others = (
                QuantizedLinear(*quantize(weight_OI, TYPES[kind], mean_I, where=name))
                for kind in self.types(name, weight_OI.shape[1])
            )
            solved = replace(first, others=tuple(others), importance=importance)
            yield name, solved, LinearFacts(name, None, None, time.perf_counter() - started)
