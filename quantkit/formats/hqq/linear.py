"""A linear as the hqq package encodes it.

Shape legend: O out features, I in features, R rows of the grouped matrix, C its columns.
"""

import math

import torch
from torch import Tensor

from quantkit.errors import RefusedError
from quantkit.formats.parts import AGAIN, FLOATS, Layout, Shape
from quantkit.grids.affine import AffineGrid, Grid, StridedGrid
from quantkit.qtensor import QuantizedLinear

STORED = torch.float16
CODES_PER_WORD = 10  # of 3-bit codes; the two highest bits of a word stay empty
COMPUTE = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16, "torch.float32": torch.float32}
PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
# what a stored word holds: codes, and bits of each
WORDS = {"8bit_u8": (1, 8), "4bit_u8": (2, 4), "3bit_32": (CODES_PER_WORD, 3), "2bit_u8": (4, 2)}
STORED_AS = {"8bit_u8": torch.uint8, "4bit_u8": torch.uint8, "3bit_32": torch.int32, "2bit_u8": torch.uint8}
TEXTS = ("packing", "unpack_view_dtype", "compute_dtype")
NUMBERS = ("nbits", "group_size", "axis")
FLAGS = (
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)
GRIDS = ("scale", "zero")
# what old releases of hqq made of a scale or a zero that was quantized itself, with settings of its own
OF_GRIDS = (*GRIDS, "shape", "packing", "view_as_float")
NESTED = tuple(f"meta_{which}:{key}" for which in GRIDS for key in OF_GRIDS)
RAISED = ("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize")
LAYOUT = Layout(
    ("W_q", "shape", "packing", *NUMBERS),
    "W_q",
    {"scale": FLOATS, "zero": FLOATS},
    optional=(*GRIDS, "scale_q", "zero_q", *TEXTS[1:], *FLAGS, *NESTED),
    notes=("shape", *TEXTS, *NUMBERS, *FLAGS, *(key for key in NESTED if not key.endswith(GRIDS))),
)


def pack(codes_RC: Tensor, packing: str) -> Tensor:
    """Codes [R, C] packed along rows, the first block of rows in the highest bits.

    Args:
        codes_RC: uint8; R in multiples of 2 for 4bit_u8, of 4 for 2bit_u8.
        packing: as hqq names it.
    """
    codes_in_word, bits = WORDS[packing]
    step = -(-len(codes_RC) // codes_in_word)
    if missing := step * codes_in_word - len(codes_RC):
        codes_RC = torch.cat([codes_RC, codes_RC.new_zeros((missing, codes_RC.shape[1]))])
    blocks_PRC = codes_RC.view(codes_in_word, step, -1)
    words_RC = blocks_PRC.new_zeros(blocks_PRC.shape[1:], dtype=STORED_AS[packing])
    for place, block_RC in enumerate(blocks_PRC):
        words_RC |= block_RC.to(words_RC.dtype) << bits * (codes_in_word - 1 - place)
    return words_RC


def unpack(packed: Tensor, packing: str, rows: int) -> Tensor:
    """uint8 codes [rows, C]: what `pack` packed."""
    codes_in_word, bits = WORDS[packing]
    if codes_in_word == 1:
        return packed
    shifts = range(bits * (codes_in_word - 1), -1, -bits)
    return torch.cat([((packed >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts])[:rows]


def encode_linear(name: str, linear: QuantizedLinear, group_size: int) -> dict[str, Tensor]:
    """The tensors of one quantized linear by their names in the file."""
    grid, codes_OI = linear.grid, linear.codes_OI
    packing = PACKINGS[grid.bits]
    if isinstance(grid, StridedGrid):
        axis, codes_RC = 0, codes_OI.view(group_size, -1)
        scale, zero = grid.scale_GI.view(1, -1), grid.zero_GI.view(1, -1)
    else:
        assert isinstance(grid, AffineGrid), "HQQ codes are on an affine grid"
        # a group as long as a row leaves codes as the solver laid them
        axis, codes_RC = 1, codes_OI.reshape(-1, group_size).contiguous()
        scale, zero = grid.scale_OG.reshape(-1, 1), grid.zero_OG.reshape(-1, 1)
    found = {
        "W_q": pack(codes_RC, packing),
        "scale": scale.to(STORED).contiguous(),
        "zero": zero.to(STORED).contiguous(),
        "shape": torch.tensor(codes_OI.shape, dtype=torch.int64),
        **{
            key: torch.tensor(list(text.encode()), dtype=torch.uint8)
            for key, text in zip(TEXTS, _texts(packing), strict=True)
        },
        **{
            key: torch.tensor(value, dtype=torch.int32)
            for key, value in zip(NUMBERS, (grid.bits, group_size, axis), strict=True)
        },
        **{key: torch.tensor(int(key in RAISED), dtype=torch.uint8) for key in FLAGS},
    }
    if linear.bias_O is not None:
        found["bias"] = linear.bias_O.to(STORED).contiguous()
    return {f"{name}.{part}": tensor for part, tensor in found.items()}


def decode_linear(name: str, tensors: dict[str, Tensor]) -> QuantizedLinear:
    """One quantized linear from its tensors, ours or hqq's.

    Raises:
        RefusedError: a packing that is not known, or tensors that are missing or contradict each other; nothing in the
            file is evaluated.
    """
    part = {key: tensors[f"{name}.{key}"] for key in LAYOUT.parts if f"{name}.{key}" in tensors}
    packing = _known_packing(name, part)
    for which in GRIDS:
        if f"{which}_q" in part:
            part[which] = _grid_part(name, part, which)
    if contradiction := _contradiction(part, packing):
        raise RefusedError(f"{name}: {contradiction}", where=name, fix=AGAIN)
    bits, size, axis = (int(part[key]) for key in NUMBERS)
    rows, columns = part["shape"].tolist()
    scale, zero = part["scale"].float(), part["zero"].float()
    bias = tensors.get(f"{name}.bias")
    if axis == 0:
        codes_OI = unpack(part["W_q"], packing, size).reshape(rows, columns)
        shape = (rows // size, columns)
        grid: Grid = StridedGrid(bits, scale.view(shape), zero.view(shape))
    else:
        codes_OI = unpack(part["W_q"], packing, rows * columns // size).reshape(rows, columns)
        shape = (rows, columns // size)
        group_I = torch.arange(columns, dtype=torch.int32) // size
        grid = AffineGrid(bits, scale.view(shape), zero.view(shape), group_I)
    return QuantizedLinear(codes_OI, grid, bias)


def _known_packing(name: str, part: dict[str, Tensor]) -> str:
    """The packing of codes, if it and everything beside it is known.

    Raises:
        RefusedError: it is not.
    """
    packing = bytes(part["packing"].flatten().tolist()).decode("ascii", errors="replace")
    flags = {key for key in ("view_as_float", "quant_scale", "quant_zero") if key in part and bool(part[key].any())}
    flags -= {f"quant_{which}" for which in GRIDS if f"{which}_q" in part}
    if packing not in WORDS or flags:
        found = f"the packing {packing!r}" if packing not in WORDS else " and ".join(sorted(flags))
        raise RefusedError(
            f"{name} uses {found}, which quantkit does not read",
            where=name,
            fix=f"known packings: {', '.join(WORDS)}",
        )
    return packing


def _grid_part(name: str, part: dict[str, Tensor], which: str) -> Tensor:
    """Scales or zeros that are quantized themselves, float32: codes of one group or of several, as weights are.

    Raises:
        RefusedError: a packing that is not known, or tensors that are missing or contradict each other.
    """
    own = {key: part[f"meta_{which}:{key}"] for key in OF_GRIDS if f"meta_{which}:{key}" in part}
    if missing := [key for key in OF_GRIDS[:4] if key not in own]:
        raise RefusedError(f"{name}.meta_{which} has no {missing[0]}", where=name, fix=AGAIN)
    packing = _known_packing(f"{name}.{which}_q", own)
    words, shape = part[f"{which}_q"], own["shape"].tolist()
    words = words if words.dim() == 2 else words.view(-1, 1)
    high = math.prod(shape) // words.shape[1]
    codes = unpack(words, packing, high).float()
    scale, zero = own["scale"].float(), own["zero"].float()
    fits = codes.shape[0] * codes.shape[1] == math.prod(shape) and scale.shape == zero.shape
    if not fits or (scale.numel() > 1 and tuple(scale.shape) not in ((high, 1), (1, codes.shape[1]))):
        raise RefusedError(
            f"{name}: {which}_q is {list(part[f'{which}_q'].shape)} with scales {list(scale.shape)}, which do not make "
            f"{shape}",
            where=name,
            fix=AGAIN,
        )
    return ((codes - zero) * scale).view(shape)


def expected_shapes(rows: int, columns: int, packing: str, group_size: int, axis: int) -> dict[str, Shape]:
    """The shape of codes, scales and zeros of a linear [rows, columns]."""
    per_word, _ = WORDS[packing]
    groups = rows * columns // group_size
    high, wide = (groups, group_size) if axis == 1 else (group_size, groups)
    of_grid = (groups, 1) if axis == 1 else (1, groups)
    return {"W_q": (-(-high // per_word), wide), "scale": of_grid, "zero": of_grid}


def parts(rows: int, columns: int, bits: int, group_size: int, axis: int) -> dict[str, tuple[torch.dtype, Shape]]:
    """Dtype and shape of each part of a linear [rows, columns], as `encode_linear` gives them."""
    packing = PACKINGS[bits]
    own = {"W_q": STORED_AS[packing], "scale": STORED, "zero": STORED}
    found = {
        part: (own[part], shape) for part, shape in expected_shapes(rows, columns, packing, group_size, axis).items()
    }
    notes: dict[str, tuple[torch.dtype, Shape]] = {
        key: (torch.uint8, (len(text),)) for key, text in zip(TEXTS, _texts(packing), strict=True)
    }
    notes |= dict.fromkeys(NUMBERS, (torch.int32, ())) | dict.fromkeys(FLAGS, (torch.uint8, ()))
    return found | {"shape": (torch.int64, (2,))} | notes


def _texts(packing: str) -> tuple[str, str, str]:
    """What `TEXTS` say."""
    return packing, str(STORED_AS[packing]), str(STORED)


def _contradiction(part: dict[str, Tensor], packing: str) -> str | None:
    """How a linear's tensors do not fit what they say of themselves; None if they do."""
    if missing := [which for which in GRIDS if which not in part]:
        return f"{missing[0]} is missing"
    if part["shape"].numel() != 2 or any(part[key].numel() != 1 for key in NUMBERS):
        return f"shape, {', '.join(NUMBERS)} are not two numbers and one each"
    bits, size, axis = (int(part[key]) for key in NUMBERS)
    rows, columns = part["shape"].flatten().tolist()
    _, widest = WORDS[packing]
    if not 1 <= bits <= widest or axis not in (0, 1):
        return f"{bits} bits along axis {axis} are not in the packing {packing}"
    if size < 1 or min(rows, columns) < 1 or (columns if axis == 1 else rows) % size:
        return f"[{rows}, {columns}] has no groups of {size} along axis {axis}"
    for key, shape in expected_shapes(rows, columns, packing, size, axis).items():
        if tuple(part[key].shape) != shape:
            return f"{key} is {list(part[key].shape)}, where {list(shape)} belongs"
    return None


def decode_item(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dense tensors by checkpoint name: decoded linears in float32, everything else as stored."""
    return LAYOUT.decoded(tensors, lambda name: decode_linear(name, tensors))
