"""Slow, obvious versions of the solvers: the paper's equations, no factorization tricks, no blocks.

They share nothing with quantkit/solvers and quantkit/grids.
"""

import torch
from torch import Tensor


def correlated_layer(rows: int, columns: int, *, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """float64 weight [rows, columns] and Hessian [columns, columns] of inputs that are correlated and uneven."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mixing *= torch.rand(columns, generator=generator, dtype=torch.float64) * 3
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    inputs += torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs


def oracle_grid(group: Tensor, importance: Tensor, *, bits: int, symmetric: bool, candidates: int):
    """Scale and zero per row of one group [rows, columns], ranges tried one by one, row by row."""
    top = 2**bits - 1
    scales, zeros = [], []
    for row in group:
        best = None
        for step in range(candidates + 1):
            fraction = 1 - 0.5 * step / candidates if candidates else 1.0
            low = min(float(row.min()), 0.0) * fraction
            high = max(float(row.max()), 0.0) * fraction
            span = 2 * max(-low, high) if symmetric else high - low
            scale = float(torch.tensor(max(span / top, 2.0**-24), dtype=torch.float64).half().double())
            zero = 2 ** (bits - 1) if symmetric else min(max(round(-low / scale), 0), top)
            codes = torch.clamp(torch.round(row / scale) + zero, 0, top)
            error = float((importance * (row - scale * (codes - zero)) ** 2).sum())
            if best is None or error < best[0]:
                best = (error, scale, zero)
        scales.append(best[1])
        zeros.append(best[2])
    return torch.tensor(scales, dtype=torch.float64), torch.tensor(zeros, dtype=torch.float64)


def oracle_gptq(weight, hessian, *, bits, group_size, damping, order, symmetric=True, candidates=0):
    """GPTQ with a fresh inverse of the remaining Hessian for every column: O(I^4).

    Args:
        order: list of channels in the order they are visited; groups are consecutive in it.

    Returns:
        codes [rows, columns] in the original channel order, and the decoded weights.
    """
    order = list(order)
    w = weight[:, order].clone()
    h = hessian[order][:, order].clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    columns = w.shape[1]
    size = columns if group_size == -1 else group_size
    codes = torch.empty(w.shape, dtype=torch.uint8)
    decoded = torch.empty_like(w)
    for i in range(columns):
        if i % size == 0:
            group = slice(i, min(i + size, columns))
            scale, zero = oracle_grid(
                w[:, group], h.diagonal()[group], bits=bits, symmetric=symmetric, candidates=candidates
            )
        q = torch.clamp(torch.round(w[:, i] / scale) + zero, 0, 2**bits - 1)
        codes[:, i] = q.to(torch.uint8)
        decoded[:, i] = scale * (q - zero)
        inverse = torch.linalg.inv(h[i:, i:])
        w[:, i:] -= torch.outer((w[:, i] - decoded[:, i]) / inverse[0, 0], inverse[0])
    back = torch.argsort(torch.tensor(order))
    return codes[:, back], decoded[:, back]
