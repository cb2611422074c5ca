"""Every Triton kernel on a GPU against plain torch, its rate, and GPTQ of one layer of a 7B's shape from end to end.

    python -m bench.gpu.kernels                   # on CUDA, at a 7B's shape
    TRITON_INTERPRET=1 python -m bench.gpu.kernels --device cpu --rows 24 --columns 160 --feed-forward 256 --windows 4

Prints one JSON document. On a CPU kernels are interpreted and the figures mean nothing: that tries the script out.
Bytes are those that must be read and written once, operations those that the mathematics asks for.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.models import make_model
from quantkit.grids.blocks import TYPES, fit, search, steps_of
from quantkit.kernels import gpu, reference
from quantkit.kernels.levels import Levels
from quantkit.machine import environment
from quantkit.pipeline import build
from quantkit.recipe import Recipe

REPEATS = 5
CANDIDATES = 21
GROUP = 128


@dataclass(frozen=True)
class Case:
    """One call of a kernel.

    Attributes:
        run: given the implementation, what it finds.
        moved: bytes read and written.
        operations: of floating point; 0 where there are none to speak of.
        exact: results must be equal; else codes may differ where two are as near.
    """

    run: Callable[[Any], Tensor]
    moved: int
    operations: float = 0.0
    exact: bool = False


def cases(rows: int, columns: int, device: torch.device) -> dict[str, Case]:
    """Calls of a linear's shape, [rows, columns]."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    size = rows * columns
    channels = min(GROUP, columns)
    panel, feedback = drawn(channels, rows), drawn(channels, rows) * 0.1
    upper = torch.triu(drawn(channels, channels) * 0.1) + torch.eye(channels, device=device)
    scale = drawn(rows).abs() * 0.2 + 0.01
    levels = Levels.of_zeros(scale, torch.full_like(scale, 8), 15)

    def solved(kernels: Any) -> Tensor:
        codes, error = torch.empty(channels, rows, dtype=torch.uint8, device=device), torch.empty_like(panel)
        kernels.solve_panel(panel, feedback, upper, levels, codes, error)
        return codes

    importance, tried = drawn(channels).abs(), (drawn(CANDIDATES, rows).abs() + 0.1, drawn(CANDIDATES, rows) + 8)
    codes = torch.randint(0, 8, (columns // 32 * 32, rows), dtype=torch.uint8, generator=generator, device=device)
    words = reference.pack(codes, 3)
    groups = -(-columns // GROUP)
    decoded = (
        torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator, device=device),
        drawn(rows, groups),
        drawn(rows, groups),
        torch.arange(columns, dtype=torch.int32, device=device) // GROUP,
        torch.float16,
    )
    kind, offset_kind = TYPES["Q4_K"], TYPES["Q6_K"]
    long, short = (drawn(each.sub, size // each.sub) * 0.02 for each in (kind, offset_kind))
    weigh_long, weigh_short = long.abs() + 0.01, short.abs() + 0.01
    span, low = long.amax(0) - long.amin(0), long.amin(0).clamp(max=0)
    steps = torch.stack([span / (kind.top - 0.9 + 0.1 * step) for step in range(28)])
    starts = steps, (-low).expand_as(steps).contiguous()
    tries = torch.tensor([-32 - 0.1 * step for step in range(-9, 10)], device=device)
    largest = short.gather(0, short.abs().argmax(0, keepdim=True))[0]
    return {
        "solve_panel": Case(solved, 13 * panel.numel(), float(rows * channels * (channels + 3))),
        "rounding_errors": Case(
            lambda kernels: kernels.rounding_errors(panel, importance, *tried, 15),
            4 * (panel.numel() + 3 * CANDIDATES * rows),
            8.0 * CANDIDATES * panel.numel(),
        ),
        "best_scales": Case(
            lambda kernels: kernels.best_scales(panel, importance, tried[0], 15, 1.0),
            4 * (panel.numel() + CANDIDATES * rows) + 8 * rows,
            14.0 * CANDIDATES * panel.numel(),
        ),
        "pack": Case(lambda kernels: kernels.pack(codes, 3), codes.numel() * 11 // 8, exact=True),
        "unpack": Case(lambda kernels: kernels.unpack(words, 3), codes.numel() * 11 // 8, exact=True),
        "dequantize": Case(lambda kernels: kernels.dequantize(*decoded), 3 * size, 2.0 * size, exact=True),
        "fit_ranges": Case(
            lambda kernels: kernels.fit_ranges(long, weigh_long, *starts, kind.top, signed=False, refits=0)[0],
            8 * size + 8 * steps.numel(),
            20.0 * len(steps) * size,
        ),
        "fit_offset": Case(
            lambda kernels: kernels.fit_offset(short, weigh_short, largest, tries, 32, offset_kind.top),
            8 * size,
            9.0 * len(tries) * size,
        ),
    }


def searched(rows: int, columns: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """The whole search of K-quants in one kernel against the same in steps of plain torch: seconds, and errors."""
    generator, found = torch.Generator(device).manual_seed(0), {}
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q6_K"):
        kind = TYPES[name]
        shape = (rows * max(columns // kind.block, 1), kind.block // kind.sub, kind.sub)
        weight_NSL = torch.randn(*shape, generator=generator, device=device) * 0.02
        weigh_NSL = torch.randn(*shape, generator=generator, device=device).abs() + 0.01
        grids = search(weight_NSL, weigh_NSL, kind)[0], fit(weight_NSL, weigh_NSL, kind)
        x_LM, w_LM = (part.flatten(0, 1).t() for part in (weight_NSL, weigh_NSL))
        error, expected = (
            float(reference.block_errors(x_LM, w_LM, step_1M, less_1M, kind.offset, kind.top).sum())
            for step_1M, less_1M in ([part.flatten()[None] for part in steps_of(grid)] for grid in grids)
        )
        seconds = best_seconds(partial(search, weight_NSL, weigh_NSL, kind), device)
        found[name] = {
            "agrees": error <= 1.001 * expected,
            "error_over_that_of_steps": error / expected,
            "seconds": seconds,
            "weights_per_s": weight_NSL.numel() / seconds,
            "times_steps": best_seconds(partial(fit, weight_NSL, weigh_NSL, kind), device) / seconds,
        }
    return found


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    found = []
    for _ in range(REPEATS):
        settle(device)
        started = time.perf_counter()
        run()
        settle(device)
        found.append(time.perf_counter() - started)
    return min(found)


def judged(case: Case, device: torch.device) -> dict[str, Any]:
    """Whether a kernel agrees with plain torch, and its rates; what was compiled for it is not in the seconds."""
    found, expected = case.run(gpu), case.run(reference)
    if case.exact:
        agrees = torch.equal(found, expected)
        far = 0.0 if agrees else 1.0
    else:
        off = (found.float() - expected.float()).abs() > 1e-3 * expected.float().abs() + 1e-6
        far = float(off.float().mean())
        agrees = far < 1e-2
    seconds = best_seconds(lambda: case.run(gpu), device)
    return {
        "agrees": agrees,
        "share_that_differs": far,
        "seconds": seconds,
        "GB_per_s": case.moved / seconds / 1e9,
        "TFLOP_per_s": case.operations / seconds / 1e12,
        "times_plain_torch": best_seconds(lambda: case.run(reference), device) / seconds,
    }


def one_layer(hidden: int, feed_forward: int, windows: int, device: torch.device) -> dict[str, Any]:
    """A whole build of a random model of one layer; its seconds by stage are those of the layer."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model", layers=1, hidden=hidden, feed_forward=feed_forward)
        recipe = Recipe.of(
            {
                "format": "gptq",
                "model": {"id": str(folder / "model")},
                "calibration": {
                    "texts": {"polish-core": windows},
                    "window_tokens": 128 if device.type == "cpu" else 2048,
                },
                "compute": {"dtype": "bfloat16"},
            }
        )
        made = build(recipe, out=folder / "out", device=device, validated=False).record["build"]
    facts = {key: made[key] for key in ("operations", "bytes", "seconds", "peak_memory_bytes")}
    return {"layer_seconds": made["items"]["layers.0"]["seconds"]} | facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--feed-forward", type=int, default=14336)
    parser.add_argument("--windows", type=int, default=64)
    options = parser.parse_args()
    device = torch.device(options.device)
    tried = {name: judged(case, device) for name, case in cases(options.rows, options.columns, device).items()}
    tried |= {f"search {name}": each for name, each in searched(options.rows, options.columns, device).items()}
    hidden = max(options.columns // 128, 1) * 128
    facts = {
        "environment": environment(device),
        "shape": [options.rows, options.columns],
        "kernels": tried,
        "gptq_of_one_layer": one_layer(hidden, options.feed_forward, options.windows, device),
    }
    print(json.dumps(facts, indent=2))
    if not all(each["agrees"] for each in tried.values()):
        raise SystemExit("a kernel does not agree with plain torch")


if __name__ == "__main__":
    main()
