"""Slow, obvious versions of the solvers: the paper's equations, no factorization tricks, no blocks.

They share nothing with quantkit/solvers and quantkit/grids.
"""

from itertools import product

import numpy as np
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
        turned = (1, -1) if symmetric and candidates else (1,)
        for sign, step in product(turned, range(candidates + 1)):
            fraction = 1 - 0.5 * step / candidates if candidates else 1.0
            low = min(float(row.min()), 0.0) * fraction
            high = max(float(row.max()), 0.0) * fraction
            span = 2 * max(-low, high) if symmetric else high - low
            scale = sign * float(torch.tensor(max(span / top, 2.0**-24), dtype=torch.float64).half().double())
            zero = 2 ** (bits - 1) if symmetric else min(max(round(-low / scale), 0), top)
            codes = torch.clamp(torch.round(row / scale) + zero, 0, top)
            error = float((importance * (row - scale * (codes - zero)) ** 2).sum())
            # what a negative scale gains by rounding alone is no gain
            worth = 1 - 2.0**-10 if best is not None and best[1] > 0 > scale else 1
            if best is None or error < best[0] * worth:
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


def half(value: float) -> float:
    """As float16 holds it."""
    return float(np.float16(value))


def oracle_exl2_scales(group: Tensor, importance: Tensor, *, bits: int, candidates: int) -> tuple[list[int], float]:
    """Scale code of every row and the group's largest scale, for one group [rows, columns], row by row."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def error(row: Tensor, scale: float) -> float:
        steps = [min(max(round(float(value) / scale), low), high) if scale else 0 for value in row]
        return float((importance * (row - torch.tensor(steps) * scale) ** 2).sum())

    wanted = []
    for row in group:
        full = float(row.abs().max()) / ((2**bits - 1) / 2)
        tried = [full * (1.1 - 0.6 * i / (candidates - 1)) for i in range(candidates)] if candidates > 1 else [full]
        wanted.append(min(tried, key=lambda scale: error(row, scale)))
    largest = half(max(wanted))
    unit = half(largest / 256)
    codes = []
    for row, scale in zip(group, wanted, strict=True):
        near = round(16 * (scale / largest) ** 0.5) if largest else 1
        around = [min(max(near + shift, 1), 16) for shift in (0, -1, 1)]
        codes.append(min(around, key=lambda code: error(row, half(code * code * unit))))
    return codes, largest


def oracle_exl2(weight, hessian, *, groups, damping, candidates):
    """GPTQ on EXL2's grid with a fresh inverse of the remaining Hessian for every column, strongest first.

    Args:
        groups: (bits, columns) in the order of falling diagonal.

    Returns:
        codes [rows, columns] in the original channel order, scale codes [groups, rows], each group's largest scale,
        and the decoded weights.
    """
    order = sorted(range(weight.shape[1]), key=lambda channel: -float(hessian[channel, channel]))
    w = weight[:, order].clone()
    h = hessian[order][:, order].clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    codes = torch.empty(w.shape, dtype=torch.uint8)
    decoded = torch.empty_like(w)
    scale_codes, largest, start = [], [], 0
    for bits, size in groups:
        inside = slice(start, start + size)
        found, top = oracle_exl2_scales(w[:, inside], h.diagonal()[inside], bits=bits, candidates=candidates)
        scale_codes.append(found)
        largest.append(top)
        for i in range(start, start + size):
            for row, code in enumerate(found):
                scale = half(code * code * half(top / 256))
                step = (
                    min(max(round(float(w[row, i]) / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) if scale else 0
                )
                codes[row, i] = step + 2 ** (bits - 1)
                decoded[row, i] = half(step * scale)
            inverse = torch.linalg.inv(h[i:, i:])
            w[:, i:] -= torch.outer((w[:, i] - decoded[:, i]) / inverse[0, 0], inverse[0])
        start += size
    back = torch.argsort(torch.tensor(order))
    return codes[:, back], torch.tensor(scale_codes), largest, decoded[:, back]


def oracle_refine(weight, codes, scale, zero, group, hessian, *, bits, damping, sweeps, order, float_zero):
    """Coordinate descent by trying: every code a channel could have, every row's scale by what its whole loss says.

    Args:
        weight, hessian: float64.
        codes, scale, zero, group: what is to be bettered: [rows, columns], [rows, groups] twice, [columns].
        order: of the channels; groups come in that of their numbers.
        float_zero: the zero is chosen too, and kept in float16; otherwise it stays.

    Returns:
        codes, scale and zero.
    """
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    codes, scale, zero = codes.double().clone(), scale.double().clone(), zero.double().clone()

    def loss(row: int) -> float:
        error = weight[row] - (codes[row] - zero[row, group]) * scale[row, group]
        return float(error @ h @ error)

    for _ in range(sweeps):
        for g in range(scale.shape[1]):
            inside = [channel for channel in order if int(group[channel]) == g]
            for row in range(len(weight)):
                kept = float(scale[row, g]), float(zero[row, g])
                before = loss(row)
                others = weight[row] - (codes[row] - zero[row, group]) * scale[row, group]
                others[inside] = weight[row, inside]
                # the decoded group is basis @ (scale, lowest value), or basis @ (scale,) with the zero as it is
                columns = [codes[row, inside], torch.ones(len(inside), dtype=torch.float64)]
                basis = torch.stack(columns if float_zero else [codes[row, inside] - zero[row, g]], 1)
                wide = torch.zeros(len(group), basis.shape[1], dtype=torch.float64)
                wide[inside] = basis
                best = torch.linalg.solve(wide.T @ h @ wide, wide.T @ h @ others).tolist()
                scale[row, g] = half(max(best[0], 2.0**-24) if best[0] >= 0 else min(best[0], -(2.0**-24)))
                if float_zero:
                    zero[row, g] = half(-best[1] / float(scale[row, g]))
                if loss(row) >= before:
                    scale[row, g], zero[row, g] = kept
            for channel in inside:
                for row in range(len(weight)):
                    tried = []
                    for code in range(2**bits):
                        codes[row, channel] = code
                        tried.append(loss(row))
                    codes[row, channel] = tried.index(min(tried))
    return codes.to(torch.uint8), scale, zero


def oracle_sweeps(weight, codes, values, hessian, *, damping, sweeps, order):
    """Coordinate descent by trying: every code of one channel after another by what the row's whole loss says.

    Args:
        weight, hessian: float64.
        codes: [rows, columns].
        values: float64 [rows, columns, codes], what each code would stand for.
        order: of the channels.
    """
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    codes = codes.long().clone()
    for _ in range(sweeps):
        for channel in order:
            for row in range(len(weight)):
                losses = []
                for code in range(values.shape[2]):
                    codes[row, channel] = code
                    error = weight[row] - values[row].gather(1, codes[row].unsqueeze(1)).squeeze(1)
                    losses.append(float(error @ h @ error))
                codes[row, channel] = losses.index(min(losses))
    return codes.to(torch.uint8)
