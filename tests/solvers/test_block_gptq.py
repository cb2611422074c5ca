"""GPTQ on ggml's block grids against the inverse form, one column at a time."""

from dataclasses import replace

import pytest
import torch

from quantkit.grids.blocks import TYPES, fit, quantize, steps_of
from quantkit.solvers import block_gptq, refine
from quantkit.solvers.block_gptq import solve_blocks
from quantkit.solvers.gptq import factorize
from tests.oracles import correlated_layer, oracle_sweeps

DAMPING = 0.01


def oracle(weight, hessian, kind, order):
    """The paper's equations with a fresh inverse for every column; scales are fitted on a block's updated weights."""
    w, h = weight[:, order].clone(), hessian[order][:, order].clone()
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    importance = h.diagonal().clone()
    rows, columns = w.shape
    decoded = torch.empty_like(w)
    subs = kind.block // kind.sub
    for i in range(columns):
        if i % kind.block == 0:
            inside = slice(i, i + kind.block)
            place = torch.tensor(order[inside]) % kind.block
            back = torch.argsort(place)
            x = w[:, inside][:, back].float().reshape(rows, subs, kind.sub)
            found = fit(x, importance[inside][back].float().view(1, subs, kind.sub).expand_as(x), kind)
            step, less = (value.double() for value in steps_of(found))
        sub = int(place[i % kind.block]) // kind.sub
        scale, offset = step[:, sub], less[:, sub]
        inverse_scale = torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))
        code = ((w[:, i] + offset) * inverse_scale).round().clamp(-kind.offset, kind.top - kind.offset)
        decoded[:, i] = scale * code - offset
        inverse = torch.linalg.inv(h[i:, i:])
        w[:, i:] -= torch.outer((w[:, i] - decoded[:, i]) / inverse[0, 0], inverse[0])
    return decoded[:, torch.argsort(torch.tensor(order))]


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1"])
@pytest.mark.parametrize("panel", [7, 128])
def test_equals_the_oracle(name, panel, monkeypatch):
    monkeypatch.setattr(block_gptq, "PANEL", panel)
    weight, hessian = correlated_layer(6, 96)
    factor = factorize(hessian, order="group-aware", group_size=32, damping=DAMPING)
    codes, grid, _ = solve_blocks(weight, factor, TYPES[name])
    expected = oracle(weight, hessian, TYPES[name], factor.order_I.tolist())
    torch.testing.assert_close(grid.decode(codes).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_equals_the_oracle_with_scales_of_sub_blocks(name):
    kind = replace(TYPES[name], block=64)  # the oracle's cost grows with the fourth power of the columns
    weight, hessian = correlated_layer(3, 128)
    factor = factorize(hessian, order="group-aware", group_size=64, damping=DAMPING)
    codes, grid, _ = solve_blocks(weight, factor, kind)
    expected = oracle(weight, hessian, kind, factor.order_I.tolist())
    torch.testing.assert_close(grid.decode(codes).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q2_K", "Q3_K"])
@pytest.mark.parametrize(("panel", "span"), [(128, 512), (7, 33)])
def test_sweeps_equal_trying_every_code(name, panel, span, monkeypatch):
    monkeypatch.setattr(refine, "PANEL", panel)
    monkeypatch.setattr(refine, "SPAN", span)
    kind = replace(TYPES[name], block=32)
    weight, hessian = correlated_layer(3, 96, tokens=150)
    factor = factorize(hessian, order="group-aware", group_size=kind.block, damping=DAMPING)
    codes, grid, _ = solve_blocks(weight, factor, kind)
    swept, same, _ = solve_blocks(weight, factor, kind, sweeps=refine.Sweeps.of(2, hessian, factor.order_I, DAMPING))
    values = torch.stack([grid.decode(torch.full_like(codes, code)) for code in range(kind.top + 1)], 2).double()
    expected = oracle_sweeps(weight, codes, values, hessian, damping=DAMPING, sweeps=2, order=factor.order_I.tolist())
    assert (swept != codes).any()
    assert torch.equal(swept, expected)
    assert torch.equal(same.decode(codes), grid.decode(codes)), "scales stay"


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K"])
def test_a_sweep_loses_less_and_says_how_much(name):
    kind = TYPES[name]
    weight, hessian = (value.float() for value in correlated_layer(16, 512, tokens=1500))
    factor = factorize(hessian, order="group-aware", group_size=kind.block, damping=DAMPING)
    losses = []
    for sweeps in (0, 1, 2):
        codes, grid, loss = solve_blocks(
            weight, factor, kind, sweeps=refine.Sweeps.of(sweeps, hessian, factor.order_I, DAMPING)
        )
        assert lost(weight, hessian, grid.decode(codes)) == pytest.approx(loss, rel=1e-3)
        losses.append(loss)
    assert 0.97 * losses[0] > losses[1] > losses[2]


def lost(weight, hessian, decoded) -> float:
    """Of the outputs, with the damped Hessian."""
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    error = weight - decoded
    return float(((error @ damped) * error).sum())


@pytest.mark.parametrize("name", TYPES)
def test_a_third_less_is_lost_than_by_the_search(name):
    kind = TYPES[name]
    weight, hessian = (value.float() for value in correlated_layer(16, 512, tokens=1500))
    factor = factorize(hessian, order="group-aware", group_size=kind.block, damping=DAMPING)
    codes, grid, loss = solve_blocks(weight, factor, kind)
    assert lost(weight, hessian, grid.decode(codes)) == pytest.approx(loss, rel=1e-3)
    codes, grid = quantize(weight, kind, hessian.diagonal() + DAMPING * hessian.diagonal().mean())
    assert loss < 0.67 * lost(weight, hessian, grid.decode(codes))
