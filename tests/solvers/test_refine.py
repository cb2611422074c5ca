"""Sweeps after GPTQ against an oracle that tries every code, in float64, where equality is exact."""

import pytest
import torch

from quantkit.grids.affine import AffineRule, BiasRule, FloatZeroRule
from quantkit.solvers import refine as module
from quantkit.solvers.gptq import Factor, GptqSolution, factorize, solve_gptq
from quantkit.solvers.refine import Sweeps, refitted, sweep
from tests.oracles import correlated_layer, oracle_refine

DAMPING = 0.01
RULES = {
    "symmetric": AffineRule(3, candidates=4),
    "whole zeros": AffineRule(2, symmetric=False, candidates=4),
    "float zeros": FloatZeroRule(3, candidates=4),
}


def factor_of(hessian, *, order="group-aware", group_size=16) -> Factor:
    return factorize(hessian, order=order, group_size=group_size, damping=DAMPING)


def solved(weight, hessian, rule, factor, *, sweeps, group_size=16) -> GptqSolution:
    again = Sweeps.of(sweeps, hessian, factor.order_I, DAMPING)
    return solve_gptq(weight, factor, rule, group_size=group_size, sweeps=again)


def lost(weight, hessian, found):
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    error = weight.double() - found.grid.decode(found.codes_OI).double()
    return float((error @ damped @ error.T).trace())


@pytest.mark.parametrize(("panel", "span"), [(128, 512), (5, 1), (128, 33)])
@pytest.mark.parametrize("order", ["natural", "group-aware", "activation"])
@pytest.mark.parametrize("name", RULES)
def test_it_equals_trying_everything(name, order, panel, span, monkeypatch):
    monkeypatch.setattr(module, "PANEL", panel)
    monkeypatch.setattr(module, "SPAN", span)
    weight, hessian = correlated_layer(rows=6, columns=40, tokens=90, seed=4)
    rule, factor = RULES[name], factor_of(hessian, order=order)
    found = solved(weight, hessian, rule, factor, sweeps=0)  # the last group is a short one
    refined = solved(weight, hessian, rule, factor, sweeps=2)
    codes, scale, zero = oracle_refine(
        weight,
        found.codes_OI,
        found.grid.scale_OG,
        found.grid.zero_OG,
        found.grid.group_I,
        hessian,
        bits=rule.bits,
        damping=DAMPING,
        sweeps=2,
        order=factor.order_I.tolist(),
        float_zero=name == "float zeros",
    )
    assert (refined.codes_OI != found.codes_OI).any()
    assert torch.equal(refined.codes_OI, codes)
    assert torch.equal(refined.grid.scale_OG.double(), scale)
    assert torch.equal(refined.grid.zero_OG.double(), zero)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "rule", [*RULES.values(), BiasRule(2, candidates=4, stored=torch.bfloat16)], ids=[*RULES, "mlx"]
)
def test_every_sweep_loses_less_and_says_how_much(rule, dtype):
    weight, hessian = correlated_layer(rows=48, columns=192, tokens=500, seed=2)
    weight, hessian = weight.to(dtype), hessian.to(dtype)
    factor = factor_of(hessian, group_size=64)
    found = [solved(weight, hessian, rule, factor, sweeps=sweeps, group_size=64) for sweeps in (0, 1, 2, 4)]
    losses = [lost(weight, hessian, each) for each in found]
    for each, loss in zip(found[1:], losses[1:], strict=True):
        assert (each.loss - found[0].loss) * each.energy == pytest.approx(loss - losses[0], rel=1e-3)
    assert losses[0] * 0.92 > losses[1] > losses[2] > losses[3]


def test_inputs_that_are_all_zero_lose_a_number():
    """Not 0 over 0: damping counts as if the mean were 1, as in the factor."""
    weight, hessian = torch.randn(6, 48), torch.zeros(48, 48)
    once, more = (solved(weight, hessian, RULES["symmetric"], factor_of(hessian), sweeps=sweeps) for sweeps in (0, 1))
    assert 0 < more.loss <= once.loss
    assert torch.isfinite(more.grid.scale_OG).all()


def test_what_is_exact_stays():
    """Weights that lie on the grid lose nothing, and rows of zeros have no scale to choose."""
    codes = torch.randint(0, 8, (32, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[:, 0] = 4
    scale, zero = torch.full((2, 5), 0.25), torch.full((2, 5), 4.0)
    weight, sizes = (codes - 4.0) * 0.25, [16, 16]
    settle = refitted(AffineRule(3), weight, scale, zero, sizes)
    found, hessian = codes.clone(), correlated_layer(rows=1, columns=32)[1].float()
    change = sweep(weight, found, torch.zeros(32, 5), sizes, settle, Sweeps(1, hessian))
    assert torch.equal(found, codes)
    assert torch.equal(scale, torch.full((2, 5), 0.25))
    assert change == 0


def test_spans_hold_as_many_groups_as_fit():
    """And a group by itself that is larger."""
    assert list(module._together([128] * 9)) == [(0, 4), (4, 8), (8, 9)]
    assert list(module._together([32, 64, 600, 500, 12, 1])) == [(0, 2), (2, 3), (3, 5), (5, 6)]
