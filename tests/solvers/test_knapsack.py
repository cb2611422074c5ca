"""The knapsack against every choice there is."""

import itertools
import random

import pytest

from quantkit.solvers import knapsack
from quantkit.solvers.knapsack import choose


def least(slots, budget):
    """Least cost by trying everything."""
    return min(
        sum(cost for _, cost in picked)
        for picked in itertools.product(*slots)
        if sum(size for size, _ in picked) <= budget
    )


def random_slots(seed: int, slots: int, options: int, *, exponent: float = 1.0):
    draw = random.Random(seed)
    return [[(draw.randint(1, 60), draw.random() ** exponent) for _ in range(options)] for _ in range(slots)]


@pytest.mark.parametrize("seed", range(40))
def test_it_costs_what_the_best_of_all_choices_costs(seed):
    slots = random_slots(seed, slots=2 + seed % 4, options=2 + seed % 5, exponent=1 + seed % 3)
    smallest = sum(min(size for size, _ in slot) for slot in slots)
    for budget in (smallest, smallest + 7, smallest + 40, 1000):
        found = choose(slots, budget)
        picked = [slot[option] for slot, option in zip(slots, found.options, strict=True)]
        assert found.size == sum(size for size, _ in picked) <= budget
        assert found.cost == pytest.approx(sum(cost for _, cost in picked), rel=1e-12)
        assert found.cost == pytest.approx(least(slots, budget), rel=1e-12)
        assert found.bound == found.cost, "the optimum is proven"


def layers(seed: int, count: int):
    """Slots as they come from a model: falling errors over rising sizes, which are multiples of large numbers."""
    draw = random.Random(seed)
    slots = []
    for place in range(count):
        weights = 40_000_000 + 130_000_000 * (place % 2)
        hurt = draw.random() + 0.1
        bits = (2.14, 2.2, 2.28, 2.68, 3.17, 3.18, 4.04, 4.05, 4.08, 4.14, 4.17, 4.19, 4.27, 4.33, 5.26, 6.04, 8.04)
        slots.append([(int(each * weights), hurt * 4.0**-each * (0.8 + 0.4 * draw.random())) for each in bits])
    return slots, sum(40_000_000 + 130_000_000 * (place % 2) for place in range(count))


@pytest.mark.parametrize("target", [2.5, 3.0, 4.0, 6.0])
def test_a_model_of_32_layers_is_solved_to_a_proven_optimum(target):
    slots, weights = layers(3, 64)
    found = choose(slots, int(target * weights))
    assert found.bound == found.cost
    assert 0 <= target - found.size / weights < 0.01
    assert choose(slots, int(target * weights)) == found


def test_a_bound_stays_below_the_cost_where_states_must_be_dropped(monkeypatch):
    slots, weights = layers(5, 12)
    exact = choose(slots, int(3.4 * weights))
    monkeypatch.setattr(knapsack, "MOST_STATES", 3)
    rough = choose(slots, int(3.4 * weights))
    assert rough.bound <= exact.cost <= rough.cost
    assert rough.cost - rough.bound < 0.1 * rough.cost


def test_a_budget_below_the_smallest_options_is_no_choice():
    with pytest.raises(ValueError, match="the smallest options take 7, the budget is 6"):
        choose([[(3, 1.0), (5, 0.0)], [(4, 0.0)]], 6)
