"""The symmetric grid, whose codes reach one step further down than up."""

import pytest
import torch

from quantkit.grids.affine import AffineRule


def group(rows: int = 64, columns: int = 32):
    """Weights [columns, rows], float64, and their importance."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(columns, rows, generator=generator, dtype=torch.float64)
    return weight, torch.rand(columns, generator=generator, dtype=torch.float64)


def lost(rule, weight, importance, scale, zero):
    decoded = scale * (rule.encode(weight.clone(), scale, zero) - zero)
    return importance @ (weight - decoded).square()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_turned_round_are_as_well_off(bits):
    """And the grid of most rows is the other's turned round, where there is anything to choose."""
    rule = AffineRule(bits, candidates=20)
    weight, importance = group()
    found, turned = rule.fit(weight, importance), rule.fit(-weight, importance)
    torch.testing.assert_close(
        lost(rule, -weight, importance, *turned), lost(rule, weight, importance, *found), rtol=2e-3, atol=0
    )
    same = found[0].sign() == turned[0].sign()
    assert same.float().mean() < 0.5
    assert (found[0][same] > 0).all(), "where both signs leave the same, the scale is positive"


def test_the_larger_end_gets_the_further_code():
    weight = torch.tensor([[1.0, -1.0], [-0.5, 0.5], [0.0, 0.0], [0.5, -0.5]], dtype=torch.float64)
    rule = AffineRule(2, candidates=20)
    scale, zero = rule.fit(weight, torch.ones(4, dtype=torch.float64))
    assert scale.sign().tolist() == [-1, 1]
    assert zero.tolist() == [2, 2]
    assert rule.encode(weight.clone(), scale, zero).tolist() == [[0, 0], [3, 3], [2, 2], [1, 1]]
    # 21 ranges do not hold the half exactly
    assert (lost(rule, weight, torch.ones(4, dtype=torch.float64), scale, zero) < 0.002).all()


def test_a_refitted_scale_keeps_its_sign():
    """Where codes stay, the best scale is the one they were taken with, of whichever sign."""
    rule = AffineRule(3, candidates=8)
    weight, importance = group()
    scale, zero = rule.fit(weight, importance)
    assert (scale < 0).any()
    codes = rule.encode(weight.clone(), scale, zero)
    off = weight - scale * (codes - zero)
    refitted, _ = rule.refit(codes.to(torch.uint8), scale, zero, importance.diag(), importance.unsqueeze(1) * off)
    assert (refitted.sign() == scale.sign()).all()
    assert (refitted != scale).float().mean() > 0.5
    again = importance @ (weight - refitted * (codes - zero)).square()
    assert (again <= importance @ off.square()).all()
