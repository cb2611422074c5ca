"""GPTQ against a brute-force oracle, in float64, where equality of codes is exact."""

import gc

import pytest
import torch

from quantkit.calibration.statistics import HESSIAN, Statistics
from quantkit.costs import FLOAT_BYTES, Shape, StageWork
from quantkit.errors import RunFailedError
from quantkit.grids.affine import AffineRule
from quantkit.solvers import gptq
from quantkit.solvers.gptq import (
    WORKING_COPIES,
    GptqSolver,
    factorize,
    in_file_order,
    solve_by_rows,
    solve_gptq,
    towards_float,
)
from quantkit.solvers.order import visiting_order
from quantkit.solvers.refine import Sweeps
from tests.oracles import correlated_layer, oracle_gptq

DAMPING = 0.01


def solve(weight, hessian, *, bits=4, group_size=32, order="natural", panel=128, symmetric=True, candidates=0):
    factor = factorize(hessian, order=order, group_size=group_size, damping=DAMPING)
    rule = AffineRule(bits, symmetric=symmetric, candidates=candidates)
    return solve_gptq(weight, factor, rule, group_size=group_size, panel=panel, span=panel), factor


@pytest.mark.parametrize("order", ["natural", "group-aware", "activation"])
@pytest.mark.parametrize("panel", [1, 7, 24, 32, 128])
@pytest.mark.parametrize("group_size", [8, 32, 96, -1])
def test_codes_equal_the_oracle(group_size, panel, order):
    weight, hessian = correlated_layer(rows=16, columns=96)
    found, factor = solve(weight, hessian, group_size=group_size, panel=panel, order=order)
    codes, decoded = oracle_gptq(
        weight, hessian, bits=4, group_size=group_size, damping=DAMPING, order=factor.order_I.tolist()
    )
    assert (found.codes_OI != codes).sum() == 0
    torch.testing.assert_close(found.grid.decode(found.codes_OI), decoded.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("candidates", [0, 12])
def test_codes_equal_the_oracle_on_every_grid(bits, symmetric, candidates):
    weight, hessian = correlated_layer(rows=12, columns=80, seed=3)
    found, _ = solve(weight, hessian, bits=bits, symmetric=symmetric, candidates=candidates, group_size=32, panel=20)
    codes, _ = oracle_gptq(
        weight,
        hessian,
        bits=bits,
        group_size=32,
        damping=DAMPING,
        order=range(80),
        symmetric=symmetric,
        candidates=candidates,
    )
    assert (found.codes_OI != codes).sum() == 0  # 80 columns: the last group is a short one


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sweeps", [0, 1])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_may_be_solved_apart(threads, sweeps, symmetric, monkeypatch):
    """For as many threads as there are to be; one core alone makes the same of them."""
    monkeypatch.setattr("quantkit.machine.FEWEST_ROWS", 8)
    monkeypatch.setattr("quantkit.machine.MOST_ROWS", 32)
    torch.set_num_threads(threads)
    weight, hessian = correlated_layer(rows=77, columns=64, seed=6)
    factor = factorize(hessian, order="activation", group_size=32, damping=DAMPING)
    again = Sweeps.of(sweeps, hessian, factor.order_I, factor.damping)
    rule = AffineRule(3, symmetric=symmetric, candidates=4)
    whole = solve_gptq(weight, factor, rule, group_size=32, sweeps=again)
    for cores in (1, 2):
        monkeypatch.setattr("quantkit.machine.os.cpu_count", lambda cores=cores: cores)
        found = solve_by_rows(weight, factor, rule, group_size=32, sweeps=again)
        assert torch.equal(found.codes_OI, whole.codes_OI)
        for part in ("scale_OG", "zero_OG", "group_I"):
            assert torch.equal(getattr(found.grid, part), getattr(whole.grid, part))
        assert found.loss == pytest.approx(whole.loss, rel=1e-12)
        assert found.energy == pytest.approx(whole.energy, rel=1e-12)


def summed(inputs, needs=frozenset({HESSIAN}), exact=None) -> Statistics:
    statistics = Statistics(needs)
    statistics.add(inputs, exact)
    statistics.complete()
    return statistics


@pytest.mark.parametrize("order", ["natural", "group-aware", "activation"])
def test_the_solver_sweeps_by_the_hessian_in_its_order(order):
    """By another, a sweep would lose more, and another share than it says."""
    generator = torch.Generator().manual_seed(1)
    weight, mixed = torch.randn(24, 96, generator=generator), torch.randn(96, 96, generator=generator)
    inputs = torch.randn(1, 500, 96, generator=generator) @ mixed * torch.linspace(0.2, 3, 96)
    damped = inputs[0].T @ inputs[0]
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    losses = []
    for sweeps in (0, 1):
        solver = GptqSolver(AffineRule(3, candidates=4), 32, order, DAMPING, sweeps=sweeps)
        ((_, linear, facts),) = solver.solve({"up": weight}, summed(inputs))
        error = weight - linear.dequantize()
        expected = (error @ damped @ error.T).trace() / (weight @ damped @ weight.T).trace()
        assert facts.loss == pytest.approx(float(expected), rel=1e-3)
        losses.append(facts.loss)
    assert losses[1] < 0.97 * losses[0]


@pytest.mark.parametrize("sweeps", [0, 1])
@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
def test_matrices_as_wide_as_the_input_are_planned(asymmetric, sweeps, monkeypatch):
    """Beside the sums that the solver is given, and what it takes for a linear."""
    rows, side = 96, 64
    generator = torch.Generator().manual_seed(1)
    inputs, moved = torch.randn(2, 1, 300, side, generator=generator)
    solver = GptqSolver(AffineRule(4), 32, "group-aware", DAMPING, asymmetric, sweeps)
    statistics = summed(inputs, solver.needs, inputs + moved if asymmetric else None)
    given = {total.data_ptr() for total in statistics._sums.values()}
    beside = []
    solve = gptq.solve_by_rows

    def noting(*arguments, **named):
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape == (side, side)]
        beside.append(len({each.untyped_storage().data_ptr() for each in tensors} - given))
        return solve(*arguments, **named)

    monkeypatch.setattr(gptq, "solve_by_rows", noting)
    weights = {name: torch.randn(rows, side, generator=generator) for name in ("gate", "up")}
    assert len(list(solver.solve(weights, statistics))) == 2
    work = StageWork(tuple(Shape(name, rows, side) for name in weights), side, tokens=300, compared=300)
    planned = solver.cost(work).memory_bytes - WORKING_COPIES * rows * side * FLOAT_BYTES
    assert beside == [1 + bool(asymmetric) + sweeps] * 2
    assert max(beside) * side**2 * FLOAT_BYTES <= planned


@pytest.mark.parametrize("order", ["natural", "group-aware", "activation"])
def test_loss_is_the_lost_share_of_output_energy(order):
    weight, hessian = correlated_layer(rows=8, columns=64, seed=5)
    found, _ = solve(weight, hessian, order=order, bits=3)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    error = weight - found.grid.decode(found.codes_OI).double()
    expected = (error @ damped @ error.T).trace() / (weight @ damped @ weight.T).trace()
    assert found.loss == pytest.approx(float(expected), rel=1e-5)


def test_float32_loses_no_more_output_than_float64():
    weight, hessian = correlated_layer(rows=32, columns=256, seed=7, tokens=2000)
    double, _ = solve(weight, hessian, group_size=128)
    single, _ = solve(weight.float(), hessian.float(), group_size=128)
    assert single.loss == pytest.approx(double.loss, rel=1e-2)


def test_group_aware_order_keeps_groups_in_place():
    weight, hessian = correlated_layer(rows=4, columns=80, seed=1)
    found, factor = solve(weight, hessian, order="group-aware", group_size=32)
    for start, stop in ((0, 32), (32, 64), (64, 80)):
        positions = [i for i, channel in enumerate(factor.order_I.tolist()) if start <= channel < stop]
        assert positions == list(range(positions[0], positions[0] + stop - start))
        inside = hessian.diagonal()[factor.order_I[positions]]
        assert (inside.diff() <= 0).all()
    assert factor.order_I[-16:].min() == 64  # the short tail stays last
    filed = in_file_order(found)
    assert filed.grid.group_I.tolist() == [0] * 32 + [1] * 32 + [2] * 16
    assert torch.equal(filed.grid.decode(filed.codes_OI), found.grid.decode(found.codes_OI))


def test_activation_order_decreases_over_all_channels():
    _, hessian = correlated_layer(rows=4, columns=64, seed=2)
    order = visiting_order(hessian.diagonal(), "activation", 16)
    assert (hessian.diagonal()[order].diff() <= 0).all()
    assert sorted(order.tolist()) == list(range(64))


def test_silent_channels_are_solved_without_nan():
    weight, hessian = correlated_layer(rows=4, columns=32, seed=4)
    hessian[5], hessian[:, 5] = 0, 0
    found, _ = solve(weight, hessian, group_size=32)
    assert torch.isfinite(found.grid.decode(found.codes_OI)).all()
    silent, _ = solve(weight, torch.zeros_like(hessian), group_size=32)
    assert torch.isfinite(silent.grid.decode(silent.codes_OI)).all()


def test_zero_weights_stay_zero():
    _, hessian = correlated_layer(rows=4, columns=32)
    found, _ = solve(torch.zeros(4, 32, dtype=torch.float64), hessian)
    assert found.grid.decode(found.codes_OI).abs().max() == 0
    assert found.loss == 0


def test_damping_rises_until_it_works_and_is_recorded():
    direction = torch.randn(24, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = direction @ direction.T - 0.02 * torch.eye(24, dtype=torch.float64)
    factor = factorize(hessian, order="natural", group_size=8, damping=0.01)
    assert factor.damping in (0.02, 0.04, 0.08)
    rebuilt = factor.upper_II @ factor.upper_II.T
    expected = hessian + factor.damping * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(rebuilt, expected)
    assert (factor.upper_II.tril(-1) == 0).all()


def test_hopeless_hessian_names_the_layer_and_the_remedy():
    with pytest.raises(RunFailedError) as caught:
        factorize(-torch.eye(8), order="natural", group_size=8, damping=0.01, where="model.layers.1.mlp.up_proj")
    assert str(caught.value) == (
        "the Hessian is not positive definite with damping up to 0.64\n"
        "  at:  model.layers.1.mlp.up_proj\n"
        "  fix: raise quantize.damping, or give more calibration windows"
    )


def test_non_finite_activations_name_the_layer():
    hessian = torch.eye(8)
    hessian[3, 3] = float("nan")
    with pytest.raises(RunFailedError, match="activations are not finite") as caught:
        factorize(hessian, order="natural", group_size=8, damping=0.01, where="model.layers.0.mlp.down_proj")
    assert caught.value.where == "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_weights_moved_towards_the_float_stream_are_the_least_squares_answer(order):
    generator = torch.Generator().manual_seed(0)
    # fewer rows than channels, as many, more, and fewer again: two ways to the same answer
    weights = [torch.randn(rows, 20, generator=generator, dtype=torch.float64) for rows in (6, 20, 33, 1)]
    exact = torch.randn(200, 20, generator=generator, dtype=torch.float64)
    drifted = exact + 0.3 * torch.randn(200, 20, generator=generator, dtype=torch.float64)
    factor = factorize(drifted.T @ drifted, order=order, group_size=4, damping=0.0)
    moved = towards_float(weights, (exact - drifted).T @ drifted, factor, 1.0)
    for weight, found in zip(weights, moved, strict=True):
        torch.testing.assert_close(found, torch.linalg.lstsq(drifted, exact @ weight.T).solution.T)


@pytest.mark.parametrize("rows", [6, 33])
def test_the_share_of_the_way_is_kept_and_damping_counts(rows):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, 20, generator=generator, dtype=torch.float64)
    deviation = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    _, hessian = correlated_layer(rows=4, columns=20, seed=2)
    factor = factorize(hessian, order="group-aware", group_size=4, damping=0.1)
    (found,) = towards_float([weight], deviation, factor, 0.25)
    damped = hessian + factor.damping * hessian.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(found, weight + 0.25 * weight @ deviation @ torch.linalg.inv(damped))


def test_a_product_with_the_deviation_moves_weights_as_the_deviation_does():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    deviation = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    _, hessian = correlated_layer(rows=4, columns=20, seed=2)
    factor = factorize(hessian, order="group-aware", group_size=4, damping=0.1)
    (expected,) = towards_float([weight], deviation, factor, 0.25)
    (found,) = towards_float([weight], weight @ deviation, factor, 0.25)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bits", [3, 4])
def test_beats_rounding_on_correlated_inputs(bits):
    weight, hessian = correlated_layer(rows=16, columns=128, seed=9)
    found, _ = solve(weight, hessian, bits=bits, group_size=64, order="group-aware")
    rule = AffineRule(bits)
    rounded = torch.empty_like(weight)
    for start in (0, 64):
        part = weight[:, start : start + 64].T
        scale, zero = rule.fit(part, torch.ones(64, dtype=torch.float64))
        rounded[:, start : start + 64] = ((rule.encode(part, scale, zero) - zero) * scale).T
    error = weight - rounded
    rounding_loss = (error @ hessian @ error.T).trace() / (weight @ hessian @ weight.T).trace()
    assert found.loss < 0.67 * float(rounding_loss)
