"""What a build took, stage by stage, against what the device could do at best.

    python -m bench.floor --artifact artifacts/bielik-nano-GPTQ

Operations, bytes and seconds come from the artifact's record; the rates are measured here and now, so run it on the
machine that built, with nothing else running: a square matmul in the recipe's dtype, a copy in memory, and the reading
of a file that was just written. A stage's floor is its operations or bytes at that rate, the ratio what it really took.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantkit.report.record import read_record

SIDE = 2048
COPIED = 256 * 1024**2
REPEATS = 5
# stages of the record that an operation count stands for; what is factorised is part of solving
PARTS = {"forward": ("forward",), "statistics": ("statistics",), "solve": ("factorise", "solve")}


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


def rates(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """FLOP/s of a matmul, bytes/s of a copy on the device and of a file's reading."""
    left = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    block = torch.ones(COPIED, dtype=torch.uint8, device=device)
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(COPIED))
        file.flush()
        path = Path(file.name)
        return {
            "matmul_flops": 2.0 * SIDE**3 / best(lambda: left @ left, device),
            "copy_bytes": 2.0 * COPIED / best(block.clone, device),
            "read_bytes": COPIED / best(path.read_bytes, torch.device("cpu")),
        }


def stages(record: dict[str, Any], found: dict[str, float]) -> list[dict[str, Any]]:
    """Seconds, floor and their ratio by stage; a stage without a count has no floor."""
    built = record["build"]
    spent: dict[str, float] = {}
    for item in built["items"].values():
        for stage, seconds in item["seconds"].items():
            spent[stage] = spent.get(stage, 0.0) + seconds
    floors = {
        stage: sum(built["operations"].get(part, 0.0) for part in parts) / found["matmul_flops"]
        for stage, parts in PARTS.items()
    }
    floors["read"] = built["bytes"]["read"] / found["read_bytes"]
    floors |= dict.fromkeys(("pack", "write"), 2 * built["bytes"]["written"] / found["copy_bytes"])
    return [
        {
            "stage": stage,
            "seconds": round(seconds, 4),
            "floor": round(floors[stage], 4) if floors.get(stage) else None,
            "ratio": round(seconds / floors[stage], 2) if floors.get(stage) else None,
        }
        for stage, seconds in sorted(spent.items(), key=lambda pair: -pair[1])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    options = parser.parse_args()
    record = read_record(options.artifact)
    if record is None:
        parser.error(f"{options.artifact} has no record")
    device = torch.device(record["environment"]["device"])
    torch.set_num_threads(record["recipe"]["compute"]["threads"])
    found = rates(getattr(torch, record["recipe"]["compute"]["dtype"]), device)
    rows = stages(record, found)
    total = sum(row["floor"] or 0.0 for row in rows)
    facts = {
        "artifact": options.artifact.name,
        "environment": record["environment"],
        "rates": {name: f"{rate:.3g}" for name, rate in found.items()},
        "stages": rows,
        "quantize_seconds": record["build"]["seconds"]["quantize"],
        "floor_seconds": round(total, 3),
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
