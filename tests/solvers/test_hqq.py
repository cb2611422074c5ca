"""Grids from the weights alone: against the published loop, written out, and against brute force."""

import itertools

import pytest
import torch

from quantkit.calibration.statistics import Statistics
from quantkit.grids.affine import FloatZeroRule
from quantkit.kernels import code_moments, rounding_errors
from quantkit.solvers.hqq import HalfQuadratic, _still_moving
from quantkit.solvers.weights import GroupFit, WeightSolver


def published(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The hqq package's loop over all groups [K, N], with its defaults: one stop for all, fixed scales, the last zero.

    Scale and zero [N] as it stores them.
    """
    highest, beta, norm = 2**bits - 1, 10.0, 0.7
    scale = highest / (weight.amax(0) - weight.amin(0))
    zero = -weight.amin(0) * scale
    if bits == 4:
        zero = zero.round()
    before = torch.inf
    for _ in range(20):
        code = (weight * scale + zero).round().clamp(0, highest)
        residual = weight - (code - zero) / scale
        kept = residual.sign() * (residual.abs() - residual.abs() ** (norm - 1) / beta).clamp(min=0)
        zero = (code - (weight - kept) * scale).mean(0)
        error = residual.abs().mean()
        if error >= before:
            break
        before = error
    return (1 / scale).half().double(), zero.half().double()


def decoded(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    return ((weight / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


def lost(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """What every iterate is judged by, for each group."""
    return (weight - decoded(weight, scale, zero, bits)).square().sum(0)


def groups(number: int = 12) -> torch.Tensor:
    """[K, N] with outliers, as weights have them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, number, generator=generator, dtype=torch.float64) * 0.05
    return weight * (1 + 4 * (torch.rand(64, number, generator=generator) > 0.97))


def correlated(number: int = 300) -> torch.Tensor:
    """[K, N], rows of a matrix whose columns go together, with outliers."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    weight = torch.randn(number, 64, generator=generator, dtype=torch.float64) @ mixing * 0.01
    return (weight * (1 + 4 * (torch.rand(weight.shape, generator=generator) > 0.97))).T.contiguous()


@pytest.mark.parametrize("weight", [groups(300), correlated(), correlated(1)], ids=["plain", "correlated", "one"])
@pytest.mark.parametrize("candidates", [0, 4])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_half_quadratic_is_never_above_the_published_loop(bits, candidates, weight):
    """In no group, with the settings that recipes use."""
    ours = lost(weight, *HalfQuadratic(FloatZeroRule(bits, candidates=candidates)).fit(weight), bits)
    theirs = lost(weight, *published(weight, bits), bits)
    assert (ours <= theirs * (1 + 1e-9)).all()
    # of a single range the last iterate may be the best of all
    assert weight.shape[1] == 1 or not candidates or ours.sum() < theirs.sum()


def every_iterate(weight: torch.Tensor, rule: FloatZeroRule) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of all iterates of all groups together, without a thought of what is in vain; scale and zero [N]."""
    best = None
    for density, zero in HalfQuadratic(rule)._starts(weight):
        scale = density.reciprocal().half().float()
        for _ in range(21):
            stored = zero.half().float()
            error = rounding_errors(weight, torch.ones(len(weight)), scale[None], stored[None], rule.highest_code)[0]
            if best is None:
                best = scale.clone(), stored.clone(), error.clone()
            for kept, tried in zip(best[:2], (scale, stored), strict=True):
                kept[error < best[2]] = tried[error < best[2]]
            best[2][error < best[2]] = error[error < best[2]]
            code = (weight * density + zero).round().clamp(0, rule.highest_code)
            residual = weight - (code - zero) / density
            kept = residual.sign() * (residual.abs() - residual.abs() ** -0.3 / 10).clamp(min=0)
            zero = (code - (weight - kept) * density).mean(0)
    return best[:2]


@pytest.mark.parametrize("number", [1, 33, 4096, 4096 + 96])
@pytest.mark.parametrize("size", [0.02, 2.0], ids=["small", "large"])
@pytest.mark.parametrize("bits", [3, 4])
def test_what_is_left_out_changes_no_bit(bits, size, number):
    """Groups whose zero stands still, and the operator where it keeps nothing; of large weights it keeps some."""
    weight = groups(number).float() * size / 0.05
    rule = FloatZeroRule(bits, candidates=1)
    for found, expected in zip(HalfQuadratic(rule).fit(weight), every_iterate(weight, rule), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("moving", [1, 40])
@pytest.mark.parametrize("number", [128, 4096, 4160])
def test_groups_that_go_on_move_as_they_would_among_all(number, moving):
    """The file's float16 zeros would hide most of what another order of sums does."""
    weight = groups(number).float()
    search = HalfQuadratic(FloatZeroRule(3))
    density, zero = next(search._starts(weight))
    kept = _still_moving(torch.arange(number) % (number // moving) == 0)
    assert moving <= len(kept) < number
    found = search._moved(weight[:, kept], density[kept], zero[kept])
    assert torch.equal(found, search._moved(weight, density, zero)[kept])


def test_more_iterations_never_make_it_worse():
    weight = groups()
    errors = []
    for iterations in (0, 1, 5, 20):
        scale, zero = HalfQuadratic(FloatZeroRule(3), iterations=iterations).fit(weight)
        errors.append(lost(weight, scale, zero, 3))
    for earlier, later in itertools.pairwise(errors):
        assert (later <= earlier).all()
    assert (errors[-1] < errors[0]).any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_least_squares_is_near_the_best_of_a_fine_search(bits):
    weight = groups(6)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def error(scale, zero):
        return (importance[:, None] * (weight - decoded(weight, scale, zero, bits)).square()).sum(0)

    low, high = weight.amin(0), weight.amax(0)
    rounding = error(*FloatZeroRule(bits, refits=0).fit(weight, importance))
    ours = error(*FloatZeroRule(bits, candidates=20, refits=4).fit(weight, importance))
    best = torch.full_like(ours, torch.inf)
    for below in torch.linspace(0.3, 1.05, 60):
        for above in torch.linspace(0.3, 1.05, 60):
            scale = (high * above - low * below) / (2**bits - 1)
            best = torch.minimum(best, error(scale, -low * below / scale))
    assert (ours <= rounding).all()
    # of what the fine search gains over rounding, most
    assert (rounding - ours).sum() >= 0.7 * (rounding - best).sum()


def test_refitting_finds_a_grid_that_the_range_hides():
    """Weights that lie on a grid except for one outlier that sets the range."""
    codes = torch.arange(64, dtype=torch.float64) % 8
    weight = (codes - 3.25)[:, None] * 0.125
    scale, zero = FloatZeroRule(3).fit(weight, torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(decoded(weight, scale, zero, 3), weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 6e-8])
def test_groups_of_one_value_stay_finite(value):
    weight = torch.full((64, 2), value)
    rule = FloatZeroRule(3)
    for fit in (lambda w: rule.fit(w, torch.ones(64)), HalfQuadratic(rule).fit):
        scale, zero = fit(weight)
        assert torch.isfinite(scale).all()
        assert torch.isfinite(zero.half()).all()
        assert (decoded(weight, scale, zero, 3) - weight).abs().max() <= 1e-3 * abs(value) + 1e-7


@pytest.mark.parametrize("axis", [0, 1])
def test_a_linear_is_solved_group_by_group(axis):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    rule = FloatZeroRule(3)
    solver = WeightSolver(GroupFit(lambda w: rule.fit(w, torch.ones(32)), rule, 32, axis).quantize)
    ((name, quantized, facts),) = solver.solve({"p": weight}, Statistics(frozenset()))
    assert name == facts.name == "p"
    found = quantized.dequantize()
    grouped = weight.reshape(-1, 32).T if axis == 1 else weight.reshape(32, -1)
    for column in range(grouped.shape[1]):
        values = grouped[:, column : column + 1].contiguous()
        scale, zero = rule.fit(values, torch.ones(32))
        expected = decoded(values, scale, zero, 3)
        seen = found.reshape(-1, 32).T if axis == 1 else found.reshape(32, -1)
        torch.testing.assert_close(seen[:, column : column + 1], expected)
    assert facts.loss == pytest.approx(float((weight - found).square().sum() / weight.square().sum()))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_large_linear_is_solved_as_its_parts_are(axis):
    """More groups than are gone through together, and more rows than are decoded together for the loss."""
    weight = torch.randn(768, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    rule = FloatZeroRule(3)
    solver = WeightSolver(GroupFit(lambda w: rule.fit(w, torch.ones(16)), rule, 16, axis).quantize)
    ((_, quantized, facts),) = solver.solve({"p": weight}, Statistics(frozenset()))
    found = quantized.dequantize()
    parts = [solver.quantize(part.contiguous()).dequantize() for part in weight.split(64, dim=1 - axis)]
    assert torch.equal(found, torch.cat(parts, dim=1 - axis))
    lost = (weight - found).double().square().sum() / weight.double().square().sum()
    assert facts.loss == pytest.approx(float(lost), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_refit_is_the_regression_of_the_weights_on_their_codes(bits):
    """As a solver of least squares gives it, but for what float16 holds of scale and zero."""
    weight, rule = groups(30), FloatZeroRule(bits)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = (weight.amax(0) - weight.amin(0)) / (0.8 * rule.highest_code)  # a fifth too wide
    zero = -weight.amin(0) / scale
    moments = code_moments(weight, importance, scale, zero, rule.highest_code)
    found_scale, found_zero = rule._refitted(moments, scale, zero)
    root = importance.sqrt()[:, None]
    for column, codes in enumerate(rule.encode(weight, scale, zero).T):
        design = torch.stack([codes, torch.ones_like(codes)], dim=1)
        slope, low = torch.linalg.lstsq(root * design, root * weight[:, column : column + 1]).solution.flatten()
        assert float(found_scale[column]) == pytest.approx(float(slope), rel=1e-3)
        assert float(-found_scale[column] * found_zero[column]) == pytest.approx(float(low), rel=2e-3)
