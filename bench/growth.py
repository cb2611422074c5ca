"""Peak memory, seconds and operations of builds against depth, width, tokens and vocabulary, and what plans said.

    python -m bench.growth --layers 4 16                                   # memory must stay, time per layer too
    python -m bench.growth --hidden 512 1024 2048 --feed-forward 1536 3072 6144
    python -m bench.growth --windows 16 32 64 128
    python -m bench.growth --vocabulary 8192 32768 131072 --judged         # of all judging alone knows the vocabulary
    python -m bench.growth --layers 1 --hidden 4096 --feed-forward 14336 --windows 64 --set asymmetric=0  # of a 7B
    python -m bench.growth --layers 2 --windows 96 --threads 1 --ranks 2   # the largest of two processes

One key has several values, or two go in step. Each build runs in processes of its own. Models are random; weights are
made and read as bf16, text is the shipped calibration half (repeated if need be).
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
import torch

from bench.models import make_model
from bench.processes import measured
from bench.ways import command_line, parse_pairs
from quantkit.pipeline import plan
from quantkit.progress import Progress
from quantkit.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
WINDOW_TOKENS = 512
JUDGED_WINDOWS = 8
VARIED = ("layers", "hidden", "feed_forward", "windows", "vocabulary")


def sizes_of(values: dict[str, list[int]]) -> list[dict[str, int]]:
    """The models to build: a key with one value keeps it, others go in step.

    Raises:
        SystemExit: they are not equally many.
    """
    count = max(len(found) for found in values.values())
    if odd := [key for key, found in values.items() if len(found) not in (1, count)]:
        raise SystemExit(f"--{odd[0].replace('_', '-')} has {len(values[odd[0]])} values, another {count}")
    return [{key: found[number if len(found) > 1 else 0] for key, found in values.items()} for number in range(count)]


def measure(size: dict[str, int], text: Path, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One build in processes of its own; the peak is that of the largest."""
    folder, out = scratch / "model", scratch / "out"
    folder.mkdir(parents=True)
    shape = {key: value for key, value in size.items() if key != "windows"}
    make_model(folder, **shape)
    content = {
        "format": options.format,
        "quantize": parse_pairs(",".join(options.set)),
        "model": {"id": str(folder)},
        "calibration": {"texts": {str(text): size["windows"]}, "window_tokens": WINDOW_TOKENS},
        "validation": {"texts": {str(text): JUDGED_WINDOWS}},
        "compute": {"threads": options.threads},
    }
    path = scratch / "recipe.toml"
    path.write_text(tomlkit.dumps(content), encoding="utf-8")
    command = [sys.executable, "-m", "quantkit", "build", str(path), "--out", str(out), "--device", "cpu"]
    command += [*(() if options.judged else ("--no-validate",)), "--ranks", str(options.ranks)]
    needed = plan(
        Recipe.of(content),
        out=scratch / "other",
        device=torch.device("cpu"),
        progress=Progress(),
        ranks=options.ranks,
    )
    found = measured(command, dict(os.environ) | {"PYTHONPATH": str(ROOT)})
    record = json.loads((out / "quantkit.json").read_text(encoding="utf-8"))
    return size | {
        "wall_s": round(found["wall_s"], 2),
        "quantize_s": record["build"]["seconds"]["quantize"],
        "peak_host_bytes": round(found["peak_gb"] * 1e9),
        "planned_bytes": max(needed.rank_bytes, needed.judging_bytes if options.judged else 0),
        "operations": sum(record["build"]["operations"].values()),
        **{key: record["environment"][key] for key in ("ranks", "device_model", "commit", "versions")},
    }


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as much the last row has as the first."""
    keys = ("peak_host_bytes", "planned_bytes", "quantize_s", "operations")
    return {key: round(rows[-1][key] / rows[0][key], 3) for key in keys if rows[0][key]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512])
    parser.add_argument("--feed-forward", type=int, nargs="+", default=[1536])
    parser.add_argument("--windows", type=int, nargs="+", default=[32])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[384])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="processes of so many threads each")
    parser.add_argument("--format", default="gptq")
    parser.add_argument("--set", action="append", default=[], help="keys of [quantize], as KEY=VALUE,...")
    parser.add_argument("--judged", action="store_true", help="judge the artifact as well, which is in the peak then")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text((ROOT / "calibration" / "calibration.jsonl").read_text(encoding="utf-8") * 3, encoding="utf-8")
        rows = [
            measure(size, text, Path(scratch) / str(number), options)
            for number, size in enumerate(sizes_of({key: getattr(options, key) for key in VARIED}))
        ]
    print(
        json.dumps(
            {
                "command": command_line("bench.growth"),
                "python": platform.python_version(),
                "rows": rows,
                "last_to_first": growth(rows),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
