"""Peak memory and seconds per layer against depth, each build in processes of its own.

    python -m bench.growth --layers 4 16     # same width, more depth: memory must stay, time per layer too
    python -m bench.growth --layers 1 --hidden 4096 --feed-forward 14336 --windows 64 --set asymmetric=0  # of a 7B
    python -m bench.growth --layers 2 --windows 96 --threads 1 --ranks 2     # the largest of two processes

Models are random; weights are made and read as bf16, text is the shipped calibration half (repeated if need be).
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomlkit

from bench.models import make_model
from bench.processes import measured
from bench.ways import parse_pairs

ROOT = Path(__file__).resolve().parent.parent
WINDOW_TOKENS = 512


def measure(folder: Path, text: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One build in processes of its own; the peak is that of the largest."""
    recipe = {
        "format": "gptq",
        "quantize": parse_pairs(",".join(options.set)),
        "model": {"id": str(folder)},
        "calibration": {"texts": {str(text): options.windows}, "window_tokens": WINDOW_TOKENS},
        "compute": {"threads": options.threads},
    }
    path = out.with_suffix(".toml")
    path.write_text(tomlkit.dumps(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "quantkit", "build", str(path), "--out", str(out), "--device", "cpu"]
    command += ["--no-validate", "--ranks", str(options.ranks)]
    found = measured(command, dict(os.environ) | {"PYTHONPATH": str(ROOT)})
    record = json.loads((out / "quantkit.json").read_text(encoding="utf-8"))
    return {
        "wall_s": round(found["wall_s"], 2),
        "quantize_s": record["build"]["seconds"]["quantize"],
        "peak_host_bytes": round(found["peak_gb"] * 1e9),
        **{key: record["environment"][key] for key in ("ranks", "device_model", "commit", "versions")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--feed-forward", type=int, default=1536)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="processes of so many threads each")
    parser.add_argument("--set", action="append", default=[], help="keys of [quantize], as KEY=VALUE,...")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text((ROOT / "calibration" / "calibration.jsonl").read_text(encoding="utf-8") * 3, encoding="utf-8")
        for layers in options.layers:
            folder = Path(scratch) / f"model-{layers}"
            folder.mkdir()
            make_model(folder, layers=layers, hidden=options.hidden, feed_forward=options.feed_forward)
            found = measure(folder, text, Path(scratch) / f"out-{layers}", options)
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
