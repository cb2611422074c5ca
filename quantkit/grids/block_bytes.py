"""Block grids as bytes: ggml's layouts (docs/formats/gguf.md has each of them).

Shape legend: O rows, R of them, I columns, N blocks, S sub-blocks, Y bytes of a row or a block.
"""

import torch
from torch import Tensor

from quantkit.grids.blocks import BlockGrid, BlockType, quantize_rows
from quantkit.grids.encoded import EncodedGrid
from quantkit.machine import rows_together, side_by_side


def encode(
    weight_OI: Tensor, kind: BlockType, importance_I: Tensor | None = None, *, where: str = ""
) -> tuple[Tensor, EncodedGrid]:
    """Bytes uint8 [O, Y] of what `quantkit.grids.blocks.quantize` finds; there are codes of some rows at a time.

    Args:
        weight_OI, kind, importance_I, where: as there.

    Raises:
        RefusedError: as there.
    """
    rows, columns = weight_OI.shape
    row_bytes = columns // kind.block * kind.size_bytes
    encoded_OY = torch.empty((rows, row_bytes), dtype=torch.uint8, device=weight_OI.device)

    def fill(weight_RI: Tensor, encoded_RY: Tensor) -> None:
        encoded_RY.copy_(pack(*quantize_rows(weight_RI, kind, importance_I, where)))

    together = rows_together(weight_OI)
    side_by_side(fill, zip(weight_OI.split(together), encoded_OY.split(together), strict=True), weight_OI.device)
    return encoded_OY, EncodedGrid(kind.name)


def pack(codes_OI: Tensor, grid: BlockGrid) -> Tensor:
    """uint8 [O, Y]: codes and what they mean, as a file holds them."""
    kind = grid.kind
    rows, columns = codes_OI.shape
    codes_ONI = codes_OI.reshape(rows, columns // kind.block, kind.block)
    blocks_ONY = torch.cat(LAYOUTS[kind.name](codes_ONI, grid), dim=2)
    assert blocks_ONY.shape[2] == kind.size_bytes, f"{kind.name} blocks have {kind.size_bytes} bytes"
    return blocks_ONY.flatten(1)


def _half_bytes(value_ON: Tensor) -> Tensor:
    return value_ON.to(torch.float16).unsqueeze(2).view(torch.uint8)


def _nibbles(codes_ONI: Tensor, run: int) -> Tensor:
    """Low 4 bits of two runs in one byte: of every 2 * `run` codes the first half low, the second half high."""
    low, high = (codes_ONI & 15).unflatten(2, (-1, 2, run)).unbind(3)
    return (low | (high << 4)).flatten(2)


def _fields(codes_ONI: Tensor, count: int, run: int, bits: int) -> Tensor:
    """`count` runs of codes in one run of bytes, the first run in the lowest bits."""
    runs = codes_ONI.unflatten(2, (-1, count, run)).unbind(3)
    total = torch.zeros_like(runs[0])
    for position, codes in enumerate(runs):
        total |= codes << (bits * position)
    return total.flatten(2)


def _q8_0(codes: Tensor, grid: BlockGrid) -> list[Tensor]:
    signed = (codes.to(torch.int16) - grid.kind.offset).to(torch.int8)
    return [_half_bytes(grid.d_ON), signed.view(torch.uint8)]


def _q4_0(codes: Tensor, grid: BlockGrid) -> list[Tensor]:
    return [_half_bytes(grid.d_ON), _nibbles(codes, 16)]


def _q4_1(codes: Tensor, grid: BlockGrid) -> list[Tensor]:
    return [_half_bytes(grid.d_ON), _half_bytes(-grid.dmin_ON), _nibbles(codes, 16)]


def _q5_0(codes: Tensor, grid: BlockGrid) -> list[Tensor]:
    return [_half_bytes(grid.d_ON), _fields(codes >> 4, 8, 1, 1), _nibbles(codes, 16)]


def _q5_1(codes: Tensor, grid: BlockGrid) -> list[Tensor]:
    return [_half_bytes(grid.d_ON), _half_bytes(-grid.dmin_ON), _fields(codes >> 4, 8, 1, 1), _nibbles(codes, 16)]


def _q2_k(codes: Tensor, grid: BlockGrid) -> list[Tensor]:
    scales = (grid.scale_ONS | (grid.min_ONS << 4)).to(torch.uint8)
    return [scales, _fields(codes, 4, 32, 2), _half_bytes(grid.d_ON), _half_bytes(grid.dmin_ON)]


def _q3_k(codes: Tensor, grid: BlockGrid) -> list[Tensor]:
    scales = (grid.scale_ONS + 32).to(torch.uint8)
    low = _fields(scales & 15, 2, 8, 4)
    high = _fields(scales >> 4, 4, 4, 2)
    return [_fields(codes >> 2, 8, 32, 1), _fields(codes & 3, 4, 32, 2), low, high, _half_bytes(grid.d_ON)]


def _six_bit_pairs(grid: BlockGrid) -> Tensor:
    """Eight scales and eight mins of 6 bits in 12 bytes."""
    scales, mins = grid.scale_ONS.to(torch.uint8), grid.min_ONS.to(torch.uint8)
    first = scales[..., :4] | ((scales[..., 4:] >> 4) << 6)
    second = mins[..., :4] | ((mins[..., 4:] >> 4) << 6)
    third = (scales[..., 4:] & 15) | ((mins[..., 4:] & 15) << 4)
    return torch.cat([first, second, third], dim=2)


def _q4_k(codes: Tensor, grid: BlockGrid) -> list[Tensor]:
    return [_half_bytes(grid.d_ON), _half_bytes(grid.dmin_ON), _six_bit_pairs(grid), _nibbles(codes, 32)]


def _q5_k(codes: Tensor, grid: BlockGrid) -> list[Tensor]:
    high = _fields(codes >> 4, 8, 32, 1)
    return [_half_bytes(grid.d_ON), _half_bytes(grid.dmin_ON), _six_bit_pairs(grid), high, _nibbles(codes, 32)]


def _q6_k(codes: Tensor, grid: BlockGrid) -> list[Tensor]:
    scales = grid.scale_ONS.to(torch.int8).view(torch.uint8)
    return [_nibbles(codes, 64), _fields(codes >> 4, 4, 32, 2), scales, _half_bytes(grid.d_ON)]


LAYOUTS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
