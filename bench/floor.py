"""What a build must take on a device at least, stage by stage; and what one took.

    python -m bench.floor --shape mistral-7b --device cuda
    python -m bench.floor --shape mistral-7b --device cuda --layers 32
    python -m bench.floor --artifact artifacts/bielik-nano-GPTQ

The first is of a shape in bench/shapes and a recipe (GPTQ of Bielik-7B unless --recipe names another), without a build.
The second makes random weights of that shape, with so many layers, on the disk of the current folder, builds them, and
has what that took beside each floor. The third takes operations, bytes and seconds from an artifact's record: run it on
the machine that built.

Rates are measured here and now, so with nothing else running: a square matmul in the recipe's dtype, or in what the
device multiplies that in, and one in float32, a copy in memory, and a file in the current folder, written durably and
read after its pages were dropped from the cache (where the system lets a program do so: Linux). A stage's floor is its
operations or bytes at that rate. The inner loops are compiled once for each machine, at their first use, and then
loaded: seconds of a first build have that in `solve`.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.models import make_shape
from bench.ways import command_line
from quantkit.checkpoint.index import describe_model
from quantkit.estimate import IN_FLOAT32
from quantkit.machine import choose_device, environment, product_dtype
from quantkit.methods import METHODS
from quantkit.pipeline import build
from quantkit.plan import make_plan
from quantkit.recipe_files import find_recipe, load_recipe
from quantkit.report.record import built_record

SHAPES = Path(__file__).parent / "shapes"
SIDE = 2048
COPIED = 256 * 1024**2
REPEATS = 5
COUNTED = ("forward", "statistics", "prepare", "survey", "factorise", "solve")
PART_OF = {"embed": "forward", "advance": "forward"}  # stages of the record that one count stands for


def best(work: Callable[[], object], device: torch.device) -> float:
    """Least seconds of a few repetitions."""
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square product."""
    left = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    return 2.0 * SIDE**3 / best(lambda: left @ left, device)


def rates(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """FLOP/s of products, bytes/s of a copy on the device and of a file's writing and reading."""
    block = torch.ones(COPIED, dtype=torch.uint8, device=device)
    cpu = torch.device("cpu")
    # not where temporary files go: that may be memory
    with tempfile.NamedTemporaryFile(dir=".") as file:
        content = os.urandom(COPIED)

        def write() -> None:
            file.seek(0)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

        def read() -> None:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            Path(file.name).read_bytes()

        write_bytes = COPIED / best(write, cpu)
        read_bytes = COPIED / best(read, cpu)
    return {
        "matmul_flops": matmul_rate(product_dtype(device, dtype), device),
        "float32_flops": matmul_rate(torch.float32, device),
        "copy_bytes": 2.0 * COPIED / best(block.clone, device),
        "write_bytes": write_bytes,
        "read_bytes": read_bytes,
    }


def floors(operations: dict[str, float], read: int, written: int, found: dict[str, float]) -> dict[str, float]:
    """Least seconds of each stage that something is counted for."""
    counted = {
        stage: operations.get(stage, 0.0) / found["float32_flops" if stage in IN_FLOAT32 else "matmul_flops"]
        for stage in COUNTED
    }
    moved = {
        "read": read / found["read_bytes"],
        "pack": 2 * written / found["copy_bytes"],
        "write": written / found["write_bytes"],
    }
    return {stage: seconds for stage, seconds in (counted | moved).items() if seconds}


def shape_floors(shape: str, recipe_name: str, changes: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    """Floors of a model that need not be here."""
    checkpoint = describe_model(SHAPES / shape)
    recipe = load_recipe(find_recipe(recipe_name), changes)
    method = METHODS[recipe.format](recipe.quantize, checkpoint.config)
    plan = make_plan(recipe, checkpoint, method, out=Path(), device=device)
    torch.set_num_threads(recipe.compute.threads)
    found = rates(getattr(torch, recipe.compute.dtype), device)
    least = floors(plan.operations, plan.source_bytes, plan.artifact_bytes, found)
    return {
        "shape": shape,
        "recipe": recipe_name,
        "environment": environment(device),
        "rates": {name: f"{rate:.3g}" for name, rate in found.items()},
        "operations": plan.operations,
        "floor_by_stage": {stage: round(seconds, 3) for stage, seconds in least.items()},
        "floor_seconds": round(sum(least.values()), 3),
    }


def built_floors(
    shape: str, recipe_name: str, changes: tuple[str, ...], layers: int, device: torch.device
) -> dict[str, Any]:
    """Floors of a random model of a shape, and what building it took."""
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        folder, out = Path(scratch) / "model", Path(scratch) / "artifact"
        folder.mkdir()
        make_shape(folder, SHAPES / shape, layers=layers)
        recipe = load_recipe(find_recipe(recipe_name), changes, model=str(folder))
        build(recipe, out=out, device=device, validated=False)
        return artifact_floors(out) | {"shape": shape, "recipe": recipe_name, "layers": layers}


def artifact_floors(artifact: Path) -> dict[str, Any]:
    """Floors of an artifact's build on this machine, and what it took.

    Raises:
        RefusedError: it has no record.
    """
    record = built_record(artifact)
    device = torch.device(record["environment"]["device"])
    torch.set_num_threads(record["recipe"]["compute"]["threads"])
    found = rates(getattr(torch, record["recipe"]["compute"]["dtype"]), device)
    rows = stages(record, found)
    return {
        "format": record["format"],
        "quantize": record["recipe"]["quantize"],
        "environment": record["environment"],
        "rates": {name: f"{rate:.3g}" for name, rate in found.items()},
        "stages": rows,
        "seconds": record["build"]["seconds"],
        "floor_seconds": round(sum(row["floor"] or 0.0 for row in rows), 3),
    }


def stages(record: dict[str, Any], found: dict[str, float]) -> list[dict[str, Any]]:
    """Seconds, floor and their ratio by stage; a stage without a count has no floor."""
    built = record["build"]
    spent: dict[str, float] = {}
    for item in built["items"].values():
        for part, seconds in item["seconds"].items():
            stage = PART_OF.get(part, part)
            spent[stage] = spent.get(stage, 0.0) + seconds
    least = floors(built["operations"], built["bytes"]["read"], built["bytes"]["written"], found)
    return [
        {
            "stage": stage,
            "seconds": round(seconds, 4),
            "floor": round(least[stage], 4) if stage in least else None,
            "ratio": round(seconds / least[stage], 2) if stage in least else None,
        }
        for stage, seconds in sorted(spent.items(), key=lambda pair: -pair[1])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--artifact", type=Path)
    what.add_argument("--shape", choices=sorted(each.name for each in SHAPES.iterdir()))
    parser.add_argument("--recipe", default="bielik-7b-instruct-v0.1/gptq")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layers", type=int, help="of a model of that shape to be made and built; none without it")
    parser.add_argument("--set", action="append", default=[], help="a key of the recipe, as TABLE.KEY=VALUE")
    options = parser.parse_args()
    recipe, device = (options.recipe, tuple(options.set)), choose_device(options.device)
    if options.artifact:
        found = artifact_floors(options.artifact)
    elif options.layers:
        found = built_floors(options.shape, *recipe, options.layers, device)
    else:
        found = shape_floors(options.shape, *recipe, device)
    print(json.dumps({"command": command_line("bench.floor")} | found, indent=2))


if __name__ == "__main__":
    main()
