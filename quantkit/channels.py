"""Matrices whose input channels are taken in another order, turned so that a loop finds each channel contiguous.

Shape legend: O out features, I in features.
"""

import torch
from torch import Tensor

ROWS = 512  # of a matrix that are put in order at once


def by_channel(matrix_OI: Tensor, order_I: Tensor) -> Tensor:
    """[I, O]: the columns of a matrix as rows, in an order, int64 [I]; a new matrix.

    Turned first and put in order then: a CPU takes more than twice as long for the rows of what is only seen turned.
    """
    return matrix_OI.t().contiguous().index_select(0, order_I)


def by_row(matrix_IO: Tensor, order_I: Tensor) -> Tensor:
    """[O, I]: what `by_channel` made of a matrix by this order, turned back; a new matrix."""
    return matrix_IO.index_select(0, torch.argsort(order_I)).t().contiguous()


def permuted(matrix_II: Tensor, order_I: Tensor) -> Tensor:
    """Rows and columns of a matrix [I, I] in an order, int64 [I]; a new matrix.

    By rows and then by columns, some rows at a time: indexed by both at once, a GPU makes two int64 matrices of the
    indices first, and a CPU takes more than twice as long.
    """
    found_II = torch.empty_like(matrix_II)
    for start in range(0, len(order_I), ROWS):
        rows_I = order_I[start : start + ROWS]
        torch.index_select(matrix_II[rows_I], 1, order_I, out=found_II[start : start + ROWS])
    return found_II
