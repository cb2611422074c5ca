"""Peak memory and seconds per layer against depth, each build in a process of its own.

    python -m bench.growth --layers 4 16     # same width, more depth: memory must stay, time per layer too
    python -m bench.growth --layers 1 --hidden 4096 --feed-forward 14336 --windows 64 --set asymmetric=0  # of a 7B

Models are random; weights are made and read as bf16, text is the shipped calibration half (repeated if need be).
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.models import make_model
from bench.ways import parse_pairs

ROOT = Path(__file__).resolve().parent.parent
WINDOW_TOKENS = 512

WORKER = """
import json, sys, time
from pathlib import Path
import torch
from quantkit.pipeline import build
from quantkit.recipe import Recipe

recipe = Recipe.of(json.loads(sys.argv[1]))
started = time.perf_counter()
done = build(recipe, out=Path(sys.argv[2]), device=torch.device("cpu"), validated=False)
facts = done.record["build"]
print(json.dumps({
    "wall_s": round(time.perf_counter() - started, 2),
    "quantize_s": facts["seconds"]["quantize"],
    "peak_host_bytes": facts["peak_memory_bytes"]["host"],
    "device_model": done.record["environment"]["device_model"],
    "commit": done.record["environment"]["commit"],
    "versions": done.record["environment"]["versions"],
}))
"""


def measure(folder: Path, text: Path, out: Path, windows: int, threads: int, quantize: dict[str, Any]) -> dict:
    """One build in a fresh process."""
    recipe = {
        "format": "gptq",
        "quantize": quantize,
        "model": {"id": str(folder)},
        "calibration": {"texts": {str(text): windows}, "window_tokens": WINDOW_TOKENS},
        "compute": {"threads": threads},
    }
    done = subprocess.run(
        [sys.executable, "-c", WORKER, json.dumps(recipe), str(out)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--feed-forward", type=int, default=1536)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="keys of [quantize], as KEY=VALUE,...")
    options = parser.parse_args()
    rows, quantize = [], parse_pairs(",".join(options.set))
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text((ROOT / "calibration" / "calibration.jsonl").read_text(encoding="utf-8") * 3, encoding="utf-8")
        for layers in options.layers:
            folder = Path(scratch) / f"model-{layers}"
            folder.mkdir()
            make_model(folder, layers=layers, hidden=options.hidden, feed_forward=options.feed_forward)
            found = measure(folder, text, Path(scratch) / f"out-{layers}", options.windows, options.threads, quantize)
            rows.append({"layers": layers, "seconds_per_layer": round(found["quantize_s"] / layers, 3), **found})
    first, last = rows[0], rows[-1]
    print(
        json.dumps(
            {
                "options": vars(options),
                "python": platform.python_version(),
                "rows": rows,
                "memory_ratio_last_to_first": round(last["peak_host_bytes"] / first["peak_host_bytes"], 3),
                "seconds_per_layer_ratio_last_to_first": round(
                    last["seconds_per_layer"] / first["seconds_per_layer"], 3
                ),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
