"""The multiple-choice knapsack: one option for each slot, the least total cost within a budget, solved exactly.

A multiplier on the size gives a lower bound on any completion (Lagrange); states that cannot beat the best choice known
are dropped, and so are those that another dominates. What is left after all slots holds the optimum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BISECTIONS = 100
MOST_STATES = 400_000  # beyond it the cheapest by bound are kept, and the gap is reported


@dataclass(frozen=True)
class Choice:
    """What to take.

    Attributes:
        options: index of the option taken, by slot.
        size: their total size, at most the budget.
        cost: their total cost.
        bound: no choice within the budget costs less; equal to `cost` where the optimum is proven.
    """

    options: tuple[int, ...]
    size: int
    cost: float
    bound: float


def choose(slots: Sequence[Sequence[tuple[int, float]]], budget: int) -> Choice:
    """The cheapest choice of one option per slot whose sizes fit the budget; of equals the smallest, then the first.

    Args:
        slots: (size, cost) of each option; costs are not negative.
        budget: in the units of sizes.

    Raises:
        ValueError: even the smallest options do not fit.
    """
    sizes = [np.array([size for size, _ in slot], dtype=np.int64) for slot in slots]
    costs = [np.array([cost for _, cost in slot], dtype=np.float64) for slot in slots]
    least_left = np.cumsum([0, *(int(size.min()) for size in reversed(sizes))])[::-1]
    if least_left[0] > budget:
        raise ValueError(f"the smallest options take {least_left[0]}, the budget is {budget}")
    multiplier, feasible = _multiplier(sizes, costs, budget)
    priced = [cost + multiplier * size for size, cost in zip(sizes, costs, strict=True)]
    # priced cost of the slots still to come: with what is spent it bounds every completion from below
    priced_left = np.cumsum([0.0, *(float(price.min()) for price in reversed(priced))])[::-1]
    bound = float(priced_left[0] - multiplier * budget)
    best = _improved(feasible, sizes, costs, budget)
    limit = float(sum(cost[i] for cost, i in zip(costs, best, strict=True)))
    slack = 1e-9 * max(abs(limit), 1e-300)

    size_S, cost_S, exact = np.zeros(1, dtype=np.int64), np.zeros(1), True
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for place, (size_C, cost_C) in enumerate(zip(sizes, costs, strict=True)):
        grown = (size_S[:, None] + size_C).ravel()
        paid = (cost_S[:, None] + cost_C).ravel()
        lower = paid + multiplier * (grown - budget) + priced_left[place + 1]
        kept = np.flatnonzero((grown + least_left[place + 1] <= budget) & (lower <= limit + slack))
        kept = kept[np.lexsort((kept, paid[kept], grown[kept]))]
        before = np.minimum.accumulate(np.concatenate([[np.inf], paid[kept]]))[:-1]
        kept = kept[paid[kept] < before]
        if kept.size > MOST_STATES:
            kept = np.sort(kept[np.argsort(lower[kept], kind="stable")[:MOST_STATES]])
            kept = kept[np.lexsort((kept, paid[kept], grown[kept]))]
            exact = False
        trail.append((kept // size_C.size, kept % size_C.size))
        size_S, cost_S = grown[kept], paid[kept]
        if not kept.size:
            break
    if size_S.size and (exact or float(cost_S.min()) < limit):
        state = int(np.argmin(cost_S))
        best = []
        for parents, options in reversed(trail):
            best.append(int(options[state]))
            state = int(parents[state])
        best.reverse()
    cost = float(sum(float(cost[i]) for cost, i in zip(costs, best, strict=True)))
    size = int(sum(int(size[i]) for size, i in zip(sizes, best, strict=True)))
    return Choice(tuple(best), size, cost, cost if exact else min(bound, cost))


def _multiplier(sizes: list[np.ndarray], costs: list[np.ndarray], budget: int) -> tuple[float, list[int]]:
    """The price of size at which the cheapest priced options just fit, and those options."""

    def cheapest(price: float) -> list[int]:
        # of equals the smaller, so that a higher price never takes more
        return [int(np.lexsort((size, cost + price * size))[0]) for size, cost in zip(sizes, costs, strict=True)]

    def total(options: list[int]) -> int:
        return int(sum(int(size[i]) for size, i in zip(sizes, options, strict=True)))

    free = cheapest(0.0)
    if total(free) <= budget:
        return 0.0, free
    smallest = [int(np.lexsort((cost, size))[0]) for size, cost in zip(sizes, costs, strict=True)]
    low, high = 0.0, 1e-30
    while total(cheapest(high)) > budget and high < 1e30:
        high *= 10
    if total(cheapest(high)) > budget:
        return high, smallest
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if total(cheapest(middle)) <= budget else (middle, high)
    return high, cheapest(high)


def _improved(options: list[int], sizes: list[np.ndarray], costs: list[np.ndarray], budget: int) -> list[int]:
    """Options with single changes made, the largest saving first, while any fits and saves."""
    options = list(options)
    spent = int(sum(int(size[i]) for size, i in zip(sizes, options, strict=True)))
    while True:
        saving, slot, option = 0.0, -1, -1
        for place, taken in enumerate(options):
            fits = spent - sizes[place][taken] + sizes[place] <= budget
            saved = np.where(fits, costs[place][taken] - costs[place], -np.inf)
            if saved.max() > saving:
                saving, slot, option = float(saved.max()), place, int(saved.argmax())
        if slot < 0:
            return options
        spent += int(sizes[slot][option] - sizes[slot][options[slot]])
        options[slot] = option
