"""Sweeps after GPTQ against an oracle that tries every code, in float64, where equality is exact."""

import pytest
import torch

from quantkit.grids.affine import AffineRule, BiasRule, FloatZeroRule
from quantkit.solvers import refine as module
from quantkit.solvers.gptq import factorize, in_file_order, solve_gptq
from quantkit.solvers.refine import refine
from tests.oracles import correlated_layer, oracle_refine

DAMPING = 0.01
RULES = {
    "symmetric": AffineRule(3, candidates=4),
    "whole zeros": AffineRule(2, symmetric=False, candidates=4),
    "float zeros": FloatZeroRule(3, candidates=4),
}


def solved(weight, hessian, rule, *, order="group-aware", group_size=16):
    factor = factorize(hessian, order=order, group_size=group_size, damping=DAMPING)
    found = solve_gptq(weight, factor, rule, group_size=group_size)
    return found if order == "activation" else in_file_order(found)


def lost(weight, hessian, codes, grid):
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    error = weight.double() - grid.decode(codes).double()
    return float((error @ damped @ error.T).trace())


@pytest.mark.parametrize(("panel", "span"), [(128, 512), (5, 1), (128, 33)])
@pytest.mark.parametrize("order", ["group-aware", "activation"])
@pytest.mark.parametrize("name", RULES)
def test_it_equals_trying_everything(name, order, panel, span, monkeypatch):
    monkeypatch.setattr(module, "PANEL", panel)
    monkeypatch.setattr(module, "SPAN", span)
    weight, hessian = correlated_layer(rows=6, columns=40, tokens=90, seed=4)
    rule = RULES[name]
    found = solved(weight, hessian, rule, order=order)  # the last group is a short one
    refined = refine(weight, found.codes_OI, found.grid, hessian, rule, damping=DAMPING, sweeps=2)
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
    found = solved(weight, hessian, rule, group_size=64)
    losses = [lost(weight, hessian, found.codes_OI, found.grid)]
    for sweeps in (1, 2, 4):
        refined = refine(weight, found.codes_OI, found.grid, hessian, rule, damping=DAMPING, sweeps=sweeps)
        losses.append(lost(weight, hessian, refined.codes_OI, refined.grid))
        assert refined.change == pytest.approx(losses[-1] - losses[0], rel=1e-3)
    assert losses[0] * 0.92 > losses[1] > losses[2] > losses[3]


def test_inputs_that_are_all_zero_lose_a_number():
    """Not 0 over 0: damping counts as if the mean were 1, as in the factor."""
    rule = RULES["symmetric"]
    weight, hessian = torch.randn(6, 48), torch.zeros(48, 48)
    found = solved(weight, hessian, rule)
    refined = refine(weight, found.codes_OI, found.grid, hessian, rule, damping=DAMPING, sweeps=1)
    assert -found.energy < refined.change <= 0
    assert torch.isfinite(refined.grid.scale_OG).all()


def test_what_is_exact_stays():
    """Weights that lie on the grid lose nothing, and rows of zeros have no scale to choose."""
    codes = torch.randint(0, 8, (5, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rule = AffineRule(3)
    grid = rule.grid(torch.full((5, 2), 0.25), torch.full((5, 2), 4.0), torch.arange(32, dtype=torch.int32) // 16)
    codes[0] = 4
    hessian = correlated_layer(rows=1, columns=32)[1].float()
    refined = refine(grid.decode(codes), codes, grid, hessian, rule, damping=DAMPING, sweeps=1)
    assert torch.equal(refined.codes_OI, codes)
    assert torch.equal(refined.grid.scale_OG, grid.scale_OG)
    assert refined.change == 0


def test_spans_hold_as_many_groups_as_fit():
    """And a group by itself that is larger."""
    assert list(module._together([128] * 9)) == [(0, 4), (4, 8), (8, 9)]
    assert list(module._together([32, 64, 600, 500, 12, 1])) == [(0, 2), (2, 3), (3, 5), (5, 6)]
