"""What one pass for several recipes saves: whole-process time of `build all` against one process for each recipe.

    python -m bench.one_pass --make 1024 3584 4 --windows 32
    python -m bench.one_pass --model DIR --windows 64 --window-tokens 512

The recipes are bielik-nano's on another model, without validation. A first round is not counted; then the single builds
and the pass for all take turns. `over_single` is the pass over the sum of the single builds of the same round; peak
memory is over the largest of them. The artifacts' files are compared: a difference ends the bench.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.models import make_model
from bench.processes import measured
from bench.speed import QUANTKIT
from bench.ways import command_line
from quantkit.machine import environment
from quantkit.nano import NAME
from quantkit.recipe_files import ALL, recipes_named
from quantkit.report.record import read_record

MEASURES = ("wall_s", "cpu_s", "peak_gb")


def build(recipe: str, out: Path, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """What a build took in a fresh process, and the hashes of every artifact it left in `out`, which is removed."""
    changes = {
        "calibration.texts": f'{{ "{options.calibration}" = {options.windows} }}',
        "calibration.window_tokens": options.window_tokens,
        "compute.threads": options.threads,
        "compute.dtype": options.dtype,
    }
    given = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command = [*QUANTKIT, "build", recipe, "--model", str(options.model.resolve()), "--device", "cpu", "--no-validate"]
    # a single build's folder is its artifact, that of several their parent
    several = recipe.endswith(f"/{ALL}")
    found = measured([*command, *given, "--out", str(out if several else out / "one")], dict(os.environ))
    outputs = {}
    for folder in sorted(out.iterdir()):
        record = read_record(folder)
        assert record is not None, f"{folder} has no record"
        outputs[record["fingerprint"]] = record["outputs"]
    shutil.rmtree(out)
    return {key: found[key] for key in MEASURES}, outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--make", type=int, nargs=3, metavar=("HIDDEN", "FEED_FORWARD", "LAYERS"))
    parser.add_argument("--calibration", default="polish-core")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    together = f"{NAME}/{ALL}"
    names = [*recipes_named(together), together]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        if options.make:
            hidden, feed_forward, layers = options.make
            options.model = Path(scratch) / f"random-{hidden}-{feed_forward}-{layers}"
            options.model.mkdir()
            make_model(options.model, layers=layers, hidden=hidden, feed_forward=feed_forward)
        for number in range(options.rounds + 1):
            outputs: dict[str, Any] = {}
            for name in names:
                taken, made = build(name, Path(scratch) / "out", options)
                print(name, taken, "" if number else "(not counted)", file=sys.stderr, flush=True)
                if name == together and made != outputs:
                    sys.exit("the pass for all did not make what the single builds made")
                outputs |= made
                if number:
                    found[name].append(taken)
    *single, whole = found.values()
    apart = [
        {key: (max if key == "peak_gb" else sum)(run[key] for run in runs) for key in MEASURES}
        for runs in zip(*single, strict=True)
    ]
    facts = {
        "command": command_line("bench.one_pass"),
        "model": options.model.name,
        "calibration": [Path(options.calibration).name, options.windows, options.window_tokens],
        "threads": options.threads,
        "environment": environment(torch.device("cpu")),
        "rows": [
            {"recipe": name, **{key: round(statistics.median(run[key] for run in runs), 3) for key in MEASURES}}
            for name, runs in found.items()
        ],
        "over_single": {
            key: [round(run[key] / base[key], 3) for run, base in zip(whole, apart, strict=True)] for key in MEASURES
        },
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
