"""A solver whose linears are solved by several processes, each linear by one of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from quantkit.calibration.statistics import Statistics
from quantkit.costs import Cost, StageWork
from quantkit.qtensor import LinearFacts, QuantizedLinear
from quantkit.ranks import Ranks, owners
from quantkit.solvers.contract import Solver


@dataclass(frozen=True)
class Dealt:
    """Deals a stage's linears by their size; every process ends up with all of them, as the one that solved it has it.

    Attributes:
        solver: solves one's own. What it makes of a linear must not depend on those beside it.
        ranks: all of them, with the same statistics.
    """

    solver: Solver
    ranks: Ranks

    @property
    def needs(self) -> frozenset[str]:
        return self.solver.needs

    def solve(
        self, weights: dict[str, Tensor], statistics: Statistics
    ) -> Iterator[tuple[str, QuantizedLinear, LinearFacts]]:
        """Solved linears; see `quantkit.solvers.contract.Solver`."""
        solvers = owners([weight.numel() for weight in weights.values()], self.ranks.size)
        own = {name: weights[name] for name, owner in zip(weights, solvers, strict=True) if owner == self.ranks.rank}
        found = self.ranks.exchange(list(self.solver.solve(own, statistics)) if own else [])
        solved = {each[0]: each for given in found for each in given}
        for name in weights:
            yield solved[name]

    def cost(self, work: StageWork) -> Cost:
        """Of all processes together."""
        return self.solver.cost(work)
