"""Compile every Triton kernel to machine code for GPUs that need not be here; run as a program, without an interpreter.

Its argument says how many: `few`, every kernel for one architecture, or `all`, with more constants and for every one.
Prints JSON: by kernel, variant and architecture the bytes of machine code, how many products were fused with sums, and
the bytes of a thread that its registers did not hold.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantkit.grids.blocks import TYPES as TYPES_OF_BLOCKS
from quantkit.kernels import gpu, gpu_codes, gpu_search
from quantkit.kernels.gpu_rounding import MAGIC, PLAIN

TYPES = {torch.float32: "fp32", torch.float64: "fp64"}
ARCHITECTURES = (80, 90)  # A100; H100, H200 and GH200
BLOCK = {"TOP": 15, "MAGIC": MAGIC[torch.float32], "LENGTH": 32, "BLOCKS": gpu.COLUMNS}


def pointers(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), f"*{kind}")


def whole(names: str, kind: str = "i32") -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def solve(dtype: torch.dtype, half: bool):
    strides = "weight feedback upper step shift less codes error"
    return gpu._solve_rows, (
        pointers("weight feedback upper step shift less", TYPES[dtype])
        | pointers("codes", "u8")
        | pointers("error lost", TYPES[dtype])
        | whole("channels rows")
        | whole(" ".join(f"{name}_stride" for name in strides.split()))
    ), {"TOP": 15, "HALF": half, "MAGIC": MAGIC[dtype], "CHANNELS": 128, "ROWS": gpu.ROWS}  # fmt: skip


def pack(bits: int):
    signature = pointers("codes", "u8") | pointers("words", "i32") | whole("width code_stride width_stride")
    overlap = -(-32 // bits) + (32 % bits > 0)
    return gpu_codes._pack_words, signature, {"BITS": bits, "OVERLAP": overlap, "WIDTH": gpu_codes.CODES}


def unpack(bits: int):
    signature = pointers("words", "i32") | pointers("codes", "u8") | whole("num_words width word_stride width_stride")
    return gpu_codes._unpack_words, signature, {"BITS": bits, "WIDTH": gpu_codes.CODES}


def decode(kind: str):
    signature = pointers("codes", "u8") | pointers("scale zero", "fp32") | pointers("group", "i32")
    signature |= pointers("weight", kind) | whole("columns groups row_stride column_stride")
    return gpu_codes._decode_rows, signature, {"WIDTH": gpu_codes.CODES}


def ranges(signed: bool):
    signature = pointers("x w step less best_step best_less", "fp32") | whole("length blocks candidates refits")
    return gpu._fit_ranges, signature, {"SIGNED": signed, **BLOCK}


def choose(turned: bool):
    signature = pointers("weight importance scale", "fp32") | pointers("index", "i64")
    signature |= whole("channels rows candidates") | {"worth_turning": "fp32"}
    constants = {
        "TOP": 15,
        "TURNED": turned,
        "MAGIC": MAGIC[torch.float32],
        "CHANNELS": gpu.CHOSEN_FROM,
        "ROWS": gpu.CHOSEN,
    }
    return gpu._choose_rows, signature, constants


def search(name: str):
    kind = TYPES_OF_BLOCKS[name]
    low, high = kind.scale_range
    return gpu_search._search, (
        pointers("x w divisor d dmin scale less", "fp32")
        | pointers("span", "i32")
        | pointers("codes", "u8")
        | whole("columns weights starts refinements")
    ), {
        "TOP": kind.top, "OFFSET": kind.offset, "LOW": low, "HIGH": high, "MIN_TOP": kind.min_top,
        "MAGIC": MAGIC[torch.float32], "SUBS": kind.block // kind.sub, "LENGTH": kind.sub, "COLUMNS": gpu.COLUMNS,
    }  # fmt: skip


CASES = {
    "solve float32": solve(torch.float32, False),
    "solve float32, products of float16": solve(torch.float32, True),
    "solve float64": solve(torch.float64, False),
    "round": (
        gpu._round_rows,
        pointers("weight importance scale zero error", "fp32") | whole("channels rows channel_stride row_stride"),
        {"TOP": 15, "MAGIC": MAGIC[torch.float32], "CHANNELS": 8, "ROWS": gpu.COLUMNS},
    ),
    "choose": choose(False),
    "choose, with signs": choose(True),
    "moments": (
        gpu._moment_rows,
        pointers("weight importance scale zero moments", "fp32") | whole("channels rows channel_stride row_stride"),
        {"TOP": 15, "MAGIC": MAGIC[torch.float32], "CHANNELS": 8, "ROWS": gpu.COLUMNS},
    ),
    "pack": pack(3),
    "unpack": unpack(3),
    "decode float32": decode("fp32"),
    "decode float16": decode("fp16"),
    "decode bfloat16": decode("bf16"),
    "fit ranges": ranges(False),
    "fit ranges, signed": ranges(True),
    "fit offset": (
        gpu._fit_offset,
        pointers("x w largest codes best_step", "fp32") | whole("length blocks candidates"),
        {"OFFSET": 8, **BLOCK},
    ),
    "search, with mins": search("Q4_K"),
    "search, with an offset": search("Q6_K"),
}

# what differs from a case above in its constants alone
VARIANTS = {f"search for {name}": search(name) for name in ("Q2_K", "Q3_K", "Q5_K")}
VARIANTS |= {f"{made.__name__} {bits} bits": made(bits) for made in (pack, unpack) for bits in (2, 4, 8)}
WANTED = {"few": (CASES, ARCHITECTURES[-1:]), "all": (CASES | VARIANTS, ARCHITECTURES)}


def compiled(case, architecture: int) -> dict[str, int]:
    kernel, signature, constants = case
    full = signature | dict.fromkeys(constants, "constexpr")
    order = {name: full[name] for name in kernel.arg_names}
    source = ASTSource(
        kernel,
        order,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, parameter in enumerate(kernel.params)
            if takes_alignment(full[parameter.name]) and not parameter.do_not_specialize_on_alignment
        },
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(PLAIN))
    return {
        "bytes": len(made.asm["cubin"]),
        "fused": len(re.findall(r"\bfma\.rn", made.asm["ptx"])),
        "spilled": spilled(made.asm["cubin"]),
    }


def takes_alignment(kind: str) -> bool:
    """Of pointers and whole numbers Triton asks; those of large models are multiples of 16."""
    return kind.startswith("*") or kind in ("i32", "i64")


def spilled(machine_code: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said).groups())


if __name__ == "__main__":
    cases, architectures = WANTED[sys.argv[1]]
    print(
        json.dumps(
            {f"{name}, sm_{each}": compiled(case, each) for name, case in cases.items() for each in architectures}
        )
    )
