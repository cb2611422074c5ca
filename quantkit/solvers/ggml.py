"""ggml's own encoder: `ggml_quantize_chunk` of the library in the `llama-cpp` engine's environment, through ctypes.

Rows are independent of each other, so chunks of rows may go to any thread in any order.
"""

import ctypes
from functools import cache
from typing import Any

import gguf
import torch
from torch import Tensor

from quantkit.checkpoint.index import is_finite
from quantkit.engines.env import environment_of, find_engine, is_installed
from quantkit.errors import RefusedError, RunFailedError, UnavailableError
from quantkit.grids.encoded import EncodedGrid
from quantkit.machine import side_by_side

ENGINE = "llama-cpp"
LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
CHUNK_WEIGHTS = 1 << 16


@cache
def library() -> Any:
    """The engine's libggml-base, loaded once.

    Raises:
        UnavailableError: the engine is not installed.
    """
    engine = find_engine(ENGINE)
    if not is_installed(engine):
        raise UnavailableError(f"the engine {ENGINE} is not installed", fix=f"`{engine.install_command}`")
    paths = sorted(path for name in LIBRARIES for path in environment_of(engine).rglob(name))
    if not paths:
        raise UnavailableError(
            f"the environment of {ENGINE} has no libggml-base", where=str(environment_of(engine)), fix="install it anew"
        )
    found = ctypes.CDLL(str(paths[0]))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    found.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    found.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    found.ggml_validate_row_data.restype = ctypes.c_bool
    found.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    found.ggml_quantize_init.restype = None
    found.ggml_quantize_init.argtypes = [ctypes.c_int]
    return found


def encode(weight_OI: Tensor, kind: str, importance_I: Tensor | None, *, where: str = "") -> tuple[Tensor, EncodedGrid]:
    """Bytes uint8 [O, bytes of a row] that ggml makes of a linear, and the grid that decodes them.

    Args:
        weight_OI: any float dtype; I is a multiple of the type's block. Not modified.
        kind: ggml's type name.
        importance_I: mean square of every input; None where it is not known.
        where: the linear's name, for the error.

    Raises:
        RefusedError: the type needs an importance matrix, or the weights or what was made of them is not finite.
        RunFailedError: ggml wrote another number of bytes than the type has.
        UnavailableError: the engine is not installed.
    """
    ggml, number = library(), int(gguf.GGMLQuantizationType[kind])
    if importance_I is None and ggml.ggml_quantize_requires_imatrix(number):
        raise RefusedError(
            f"{where}: {kind} cannot be made without an importance matrix",
            where="quantize.imatrix",
            fix="set it to true, or choose another type",
        )
    ggml.ggml_quantize_init(number)
    held_OI = weight_OI.cpu()
    given_I = None if importance_I is None else importance_I.to(device="cpu", dtype=torch.float32).contiguous()
    for what, values in (("weights", held_OI), ("importance", given_I)):
        if values is not None and not is_finite(values):
            raise RefusedError(
                f"{int((~torch.isfinite(values)).sum())} value(s) of the {what} are not finite",
                where=where,
                fix="look at the checkpoint's weights and the calibration text",
            )
    rows, columns = held_OI.shape
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    encoded_OY = torch.empty((rows, columns // block * block_bytes), dtype=torch.uint8)
    step = max(1, CHUNK_WEIGHTS // columns)
    pointer = None if given_I is None else given_I.data_ptr()

    def chunk(held_RI: Tensor, encoded_RY: Tensor) -> int:
        values_RI = held_RI.to(torch.float32).contiguous()
        written: int = ggml.ggml_quantize_chunk(
            number, values_RI.data_ptr(), encoded_RY.data_ptr(), 0, *values_RI.shape, pointer
        )
        return written

    written = sum(side_by_side(chunk, zip(held_OI.split(step), encoded_OY.split(step), strict=True), held_OI.device))
    if written != encoded_OY.numel():
        raise RunFailedError(
            f"{where}: ggml wrote {written} bytes of {kind} instead of {encoded_OY.numel()}",
            where=str(environment_of(find_engine(ENGINE))),
            fix=f"remove the environment and run `{find_engine(ENGINE).install_command}`",
        )
    if not ggml.ggml_validate_row_data(number, encoded_OY.data_ptr(), encoded_OY.numel()):
        raise RefusedError(
            f"weights up to {float(torch.stack(held_OI.aminmax()).abs().max()):g} are too large for {kind}",
            where=where,
            fix="the type's scales are 16-bit floats; this model cannot be stored in it",
        )
    return encoded_OY.to(weight_OI.device), EncodedGrid(kind)
