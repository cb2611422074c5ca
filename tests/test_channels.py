"""Channels in another order, against plain indexing."""

import pytest
import torch

from quantkit.channels import by_channel, by_row, permuted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (33, 20)])
def test_columns_become_rows_in_an_order_and_are_turned_back(rows, columns, dtype):
    matrix, order = torch.randint(0, 200, (rows, columns)).to(dtype), torch.randperm(columns)
    before = matrix.clone()
    turned = by_channel(matrix, order)
    assert torch.equal(turned, matrix[:, order].t())
    assert turned.is_contiguous()
    back = by_row(turned, order)
    assert torch.equal(back, matrix)
    assert back.is_contiguous()
    turned.zero_()
    assert torch.equal(matrix, before)
    assert torch.equal(back, before), "a new matrix"


@pytest.mark.parametrize("side", [7, 512, 1100])
def test_a_matrix_is_put_in_order_by_both_sides(side):
    matrix, order = torch.randn(side, side), torch.randperm(side)
    found = permuted(matrix, order)
    assert torch.equal(found, matrix[order][:, order])
    assert found.is_contiguous()
