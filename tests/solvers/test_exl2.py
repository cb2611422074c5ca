"""Adaptive GPTQ against a brute-force oracle, in float64, where equality of codes is exact."""

import pytest
import torch

from quantkit.calibration.statistics import HESSIAN, Statistics
from quantkit.errors import RefusedError
from quantkit.grids.exl2 import Mixture
from quantkit.solvers import refine
from quantkit.solvers.exl2 import Exl2Solver, blocks, solve_exl2
from quantkit.solvers.gptq import PANEL, factorize, output_energy
from tests.oracles import correlated_layer, oracle_exl2, oracle_sweeps

DAMPING = 0.01
MIXTURES = ["8:1/32", "4:.1/32 3:.9/64", "8:.05/32 4:.1/32 3:.85/128", "6:.05/32 3:.2/64 2:.75/64", "5:1/128"]


def solve(weight, hessian, mixture, *, candidates=12, sweeps=0):
    factor = factorize(hessian, order="activation", group_size=-1, damping=DAMPING)
    linear, lost = solve_exl2(
        weight,
        factor,
        Mixture.of(mixture),
        candidates=candidates,
        sweeps=refine.Sweeps.of(sweeps, hessian, factor.order_I, factor.damping),
    )
    energy = output_energy(weight.t()[factor.order_I], factor.upper_II)
    return linear, lost / energy if energy else 0.0


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("columns", [96, 160])
def test_codes_and_scales_equal_the_oracles(mixture, columns):
    weight, hessian = correlated_layer(rows=6, columns=columns, seed=columns)
    weight *= 0.02
    found, _ = solve(weight, hessian, mixture)
    groups = Mixture.of(mixture).groups(columns)
    codes, scale_codes, largest, decoded = oracle_exl2(weight, hessian, groups=groups, damping=DAMPING, candidates=12)
    assert (found.codes_OI != codes).sum() == 0
    assert torch.equal(found.grid.code_GO.long(), scale_codes)
    assert found.grid.scale_max_G.tolist() == largest
    assert torch.equal(found.dequantize().double(), decoded)


@pytest.mark.parametrize("mixture", ["3:.1/32 2:.9/64", "2:1/128"])
@pytest.mark.parametrize(("panel", "span"), [(128, 512), (7, 33)])
def test_sweeps_equal_trying_every_code(mixture, panel, span, monkeypatch):
    monkeypatch.setattr(refine, "PANEL", panel)
    monkeypatch.setattr(refine, "SPAN", span)
    weight, hessian = correlated_layer(rows=4, columns=96, seed=7, tokens=150)
    weight *= 0.02
    before, _ = solve(weight, hessian, mixture)
    found, _ = solve(weight, hessian, mixture, sweeps=2)
    # what a reader makes of each code; of narrower groups larger ones are not tried
    values = torch.empty(4, 96, 8, dtype=torch.float64)
    bits_I = torch.empty(96, dtype=torch.long)
    bits_I[before.grid.order_I] = torch.tensor([bits for bits, size in before.grid.groups for _ in range(size)])
    for code in range(8):
        decoded = before.grid.decode(torch.full_like(before.codes_OI, code)).double()
        values[:, :, code] = torch.where(code < 2**bits_I, decoded, 1e3)
    order = before.grid.order_I.tolist()
    expected = oracle_sweeps(weight, before.codes_OI, values, hessian, damping=DAMPING, sweeps=2, order=order)
    assert (found.codes_OI != before.codes_OI).any()
    assert torch.equal(found.codes_OI, expected)
    assert torch.equal(found.grid.code_GO, before.grid.code_GO)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_sweep_loses_less_and_says_how_much(mixture):
    weight, hessian = (value.float() for value in correlated_layer(rows=16, columns=256, seed=3, tokens=600))
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(256)
    shares = []
    for sweeps in (0, 1, 2):
        found, share = solve(weight, hessian, mixture, sweeps=sweeps)
        error = weight - found.dequantize()
        expected = (error @ damped @ error.T).trace() / (weight @ damped @ weight.T).trace()
        assert share == pytest.approx(float(expected), rel=2e-3)
        shares.append(share)
    assert shares[0] > shares[1] > shares[2]


@pytest.mark.parametrize("mixture", [*MIXTURES, "3:1/256"])
def test_blocks_are_whole_groups_that_fill_a_panel(mixture):
    groups = Mixture.of(mixture).groups(1184)
    found = list(blocks(groups))
    inside = [(group, each) for _, members in found for group, each in members]
    assert [group for group, _ in inside] == list(range(len(groups)))
    assert [each.stop - each.start for _, each in inside] == [size for _, size in groups]
    assert [each.start for _, each in inside] == [0, *(each.stop for _, each in inside[:-1])]
    assert all((block.start, block.stop) == (mine[0][1].start, mine[-1][1].stop) for block, mine in found)
    assert all(block.stop - block.start >= PANEL > mine[-1][1].start - block.start for block, mine in found[:-1])


def test_a_group_may_be_wider_than_a_panel():
    test_codes_and_scales_equal_the_oracles("4:.1/32 3:.9/160", 224)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_loss_is_the_lost_share_of_output_energy(mixture):
    weight, hessian = correlated_layer(rows=8, columns=160, seed=5)
    found, loss = solve(weight, hessian, mixture)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    error = weight - found.dequantize().double()
    expected = (error @ damped @ error.T).trace() / (weight @ damped @ weight.T).trace()
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_float32_loses_no_more_output_than_float64():
    weight, hessian = correlated_layer(rows=32, columns=256, seed=7, tokens=2000)
    _, double = solve(weight, hessian, "4:.1/32 3:.9/64")
    _, single = solve(weight.float(), hessian.float(), "4:.1/32 3:.9/64")
    assert single == pytest.approx(double, rel=1e-2)


def test_the_strongest_channels_get_the_widest_codes():
    weight, hessian = correlated_layer(rows=4, columns=96, seed=2)
    found, _ = solve(weight, hessian, "8:.3/32 2:.7/32")
    strongest = hessian.diagonal().argsort(descending=True)[:32]
    assert sorted(found.grid.order_I[:32].tolist()) == sorted(strongest.tolist())
    error = (weight - found.dequantize().double()).abs().amax(0)
    assert error[found.grid.order_I[:32]].max() < 0.2 * error[found.grid.order_I[32:]].min()


def test_feedback_beats_rounding():
    weight, hessian = correlated_layer(rows=16, columns=128, seed=9)
    _, solved = solve(weight, hessian, "3:1/64")
    alone, _ = solve(weight, hessian.diagonal().diag(), "3:1/64")  # no correlation, so nothing to feed back
    error = weight - alone.dequantize().double()
    rounded = (error @ hessian @ error.T).trace() / (weight @ hessian @ weight.T).trace()
    assert solved < 0.67 * float(rounded)


def test_zero_weights_and_silent_channels():
    weight, hessian = correlated_layer(rows=4, columns=64, seed=4)
    hessian[5], hessian[:, 5] = 0, 0
    found, _ = solve(weight, hessian, "4:.1/32 3:.9/32")
    assert torch.isfinite(found.dequantize()).all()
    found, loss = solve(torch.zeros_like(weight), hessian, "2:1/32")
    assert (found.dequantize().abs().max(), loss) == (0, 0)


def test_weights_beyond_float16_are_refused_by_name():
    weight, hessian = correlated_layer(rows=4, columns=32)
    factor = factorize(hessian, order="activation", group_size=-1, damping=DAMPING)
    with pytest.raises(RefusedError, match="beyond float16") as caught:
        solve_exl2(weight * 1e6, factor, Mixture.of("4:1/32"), candidates=2, where="model.layers.0.mlp.up_proj")
    assert caught.value.where == "model.layers.0.mlp.up_proj"


def test_variants_share_a_factor_and_equal_mixtures_a_solution():
    generator = torch.Generator().manual_seed(0)
    statistics = Statistics(frozenset({HESSIAN}))
    statistics.add(torch.randn(200, 64, generator=generator))
    statistics.complete()
    weight = torch.randn(32, 64, generator=generator) * 0.02
    three, four = Mixture.of("3:1/32"), Mixture.of("4:1/32")
    solver = Exl2Solver(lambda name: (three, four, three), DAMPING, 4)
    ((name, linear, facts),) = solver.solve({"p": weight}, statistics)
    assert (name, facts.name, facts.damping) == ("p", "p", DAMPING)
    assert [one.grid.bits for one in (linear, *linear.others)] == [3, 4, 3]
    alone = Exl2Solver(lambda name: (four,), DAMPING, 4)
    ((_, expected, _),) = alone.solve({"p": weight}, statistics)
    assert torch.equal(linear.others[0].dequantize(), expected.dequantize())


def test_the_solver_weighs_what_it_sweeps_by_each_channels_own_inputs():
    """In the order that channels are visited in, which is not the checkpoint's."""
    weight, hessian = (value.float() for value in correlated_layer(rows=16, columns=128, seed=9, tokens=400))
    statistics = Statistics(frozenset({HESSIAN}))
    statistics.add(torch.linalg.cholesky(hessian).t())
    statistics.complete()
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(128)
    shares = []
    for sweeps in (0, 1):
        solver = Exl2Solver(lambda name: (Mixture.of("3:1/32"),), DAMPING, 4, sweeps)
        ((_, linear, facts),) = solver.solve({"p": weight}, statistics)
        error = weight - linear.dequantize()
        share = (error @ damped @ error.T).trace() / (weight @ damped @ weight.T).trace()
        assert facts.loss == pytest.approx(float(share), rel=2e-3)
        shares.append(facts.loss)
    assert shares[0] > shares[1]
