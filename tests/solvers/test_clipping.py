"""Rounding on clipped ranges against AWQ's search written out: a loop over rows, groups and shares, on outputs."""

import pytest
import torch

from quantkit.calibration.statistics import HESSIAN, Statistics
from quantkit.grids.affine import AffineRule
from quantkit.solvers.clipping import ClippedRounding

SIZE = 32


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [O, I] with outliers in both directions and inputs [N, I] whose channels go together, in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 96, generator=generator, dtype=torch.float64)
    weight = weight * (1 + 6 * (torch.rand(12, 96, generator=generator) > 0.95))
    mixing = torch.randn(96, 96, generator=generator, dtype=torch.float64)
    return weight, torch.randn(200, 96, generator=generator, dtype=torch.float64) @ mixing


def rounded(values: torch.Tensor, edge: float) -> torch.Tensor:
    """One group [K], clipped and rounded on 16 levels that hold 0, the scale as float16 holds it."""
    clipped = values.clamp(-edge, edge)
    low, high = min(float(clipped.min()), 0.0), max(float(clipped.max()), 0.0)
    scale = torch.tensor((high - low) / 15).half().double()
    zero = (-low / scale).round().clamp(0, 15)
    return ((clipped / scale).round().add(zero).clamp(0, 15) - zero) * scale


def searched(weight: torch.Tensor, inputs: torch.Tensor, steps: int) -> torch.Tensor:
    """What AWQ keeps: of every row and group the share whose output is nearest over the tokens."""
    kept = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], SIZE):
            inside = slice(start, start + SIZE)
            values, seen = weight[row, inside], inputs[:, inside]
            edges = [float(values.abs().max()) * (1 - 0.5 * step / max(steps, 1)) for step in range(steps + 1)]
            tried = [rounded(values, edge) for edge in edges]
            errors = [float((seen @ (values - each)).square().mean()) for each in tried]
            kept[row, inside] = tried[errors.index(min(errors))]
    return kept


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_it_keeps_what_the_search_over_outputs_keeps(steps):
    weight, inputs = problem()
    statistics = Statistics(frozenset({HESSIAN}))
    statistics.add(inputs)
    statistics.complete()
    solver = ClippedRounding(AffineRule(4, symmetric=False, candidates=steps), SIZE)
    ((name, quantized, facts),) = solver.solve({"p": weight}, statistics)
    expected = searched(weight, inputs, steps)
    torch.testing.assert_close(quantized.dequantize().double(), expected, rtol=1e-6, atol=1e-9)
    lost = (inputs @ (weight - expected).T).square().sum() / (inputs @ weight.T).square().sum()
    assert name == facts.name == "p"
    assert facts.loss == pytest.approx(float(lost), rel=1e-5)
    assert facts.damping is None


def test_clipping_loses_less_of_each_groups_output():
    weight, inputs = problem()
    plain, clipped = (searched(weight, inputs, steps) for steps in (0, 10))

    def lost(found: torch.Tensor) -> float:
        error = (weight - found).unflatten(1, (-1, SIZE))
        return float(torch.einsum("ngk,ogk->ngo", inputs.unflatten(1, (-1, SIZE)), error).square().sum())

    assert lost(clipped) < 0.96 * lost(plain)
