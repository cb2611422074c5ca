"""What measuring for EXL2 costs, counted in plain 4-bit GPTQ builds of the same model with the same windows.

    python -m bench.exl2_measure --make 1024 3584 2 --windows 32
    python -m bench.exl2_measure --model DIR --windows 64

Whole processes of `quantkit build` without validation, all on the unquantized model's activations. A measurement is
what EXL2 with one target takes, less what it takes again with `quantize.measurement`, given what the first found: all
that is saved by having a measurement, its own walk over all windows and their sums included, the start of a process and
the solving not. It stands against whole GPTQ processes of the same round, so against the start of a process too, which
a small model should not hide behind: `cpu_s_but_start` has GPTQ's less those of `quantkit plan`, which does all that a
build does before it begins; and `stages` is the same out of the records, seconds of `measure` against those of all of
GPTQ's stages. GPTQ is as it is by default, without the correction that such activations leave nothing to do for; once
more without sweeps.

A first round, in which loops compile, is not counted; then all take turns. Seconds of the processor tell more than
those of the clock where something else runs.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import tomlkit
import torch

from bench.models import make_model
from bench.processes import measured
from bench.speed import QUANTKIT
from bench.ways import Way, command_line, recipe_of
from quantkit.formats.exl2 import MEASUREMENT
from quantkit.machine import environment
from quantkit.report.record import read_record

TARGET = 4.0
FLOAT = {"activations": "float"}
MEASURES = ("wall_s", "cpu_s", "peak_gb")
DURATIONS = MEASURES[:2]
START = "plan"


def ways(measurement: Path) -> tuple[Way, ...]:
    """What takes turns: EXL2 that measures, EXL2 that does not, then the GPTQ builds that it is held against."""
    plain = {"bits": 4, "asymmetric": 0.0}
    return (
        Way("exl2", {"bits": [TARGET]}, format="exl2", **FLOAT),
        Way("exl2, measured before", {"bits": [TARGET], "measurement": str(measurement)}, format="exl2", **FLOAT),
        Way("gptq", plain, **FLOAT),
        Way("gptq without sweeps", plain | {"refine_sweeps": 0}, **FLOAT),
    )


def written(way: Way, options: argparse.Namespace, scratch: Path) -> Path:
    """The way's recipe as a file."""
    content = recipe_of(
        way,
        options.model.resolve(),
        {options.calibration: options.windows},
        options.window_tokens,
        threads=options.threads,
    )
    path = scratch / "recipe.toml"
    path.write_text(tomlkit.dumps(content), encoding="utf-8")
    return path


def build(way: Way, options: argparse.Namespace, scratch: Path, measurement: Path) -> dict[str, Any]:
    """What a build took in a fresh process, with the seconds of its stages; what it measured is left behind."""
    path, out = written(way, options, scratch), scratch / "out"
    command = [*QUANTKIT, "build", str(path), "--out", str(out), "--device", "cpu", "--no-validate"]
    found = measured(command, dict(os.environ))
    record = read_record(out)
    assert record is not None, f"{out} has no record"
    if (out / MEASUREMENT).exists() and "measurement" not in way.quantize:
        shutil.copy(out / MEASUREMENT, measurement)
    shutil.rmtree(out)
    return {key: found[key] for key in MEASURES} | {"stages": record["build"]["seconds"]}


def start(way: Way, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What it takes to plan a build in a fresh process."""
    found = measured([*QUANTKIT, "plan", str(written(way, options, scratch)), "--device", "cpu"], dict(os.environ))
    return {key: found[key] for key in MEASURES} | {"stages": {}}


def ratios(runs: dict[str, list[dict[str, Any]]], peer: str) -> dict[str, list[float]]:
    """A measurement over a GPTQ build, by round."""
    found: dict[str, list[float]] = {key: [] for key in (*DURATIONS, "cpu_s_but_start", "stages")}
    for whole, rest, gptq, planned in zip(
        runs["exl2"], runs["exl2, measured before"], runs[peer], runs[START], strict=True
    ):
        for key in DURATIONS:
            found[key].append(round((whole[key] - rest[key]) / gptq[key], 3))
        working_s = gptq["cpu_s"] - planned["cpu_s"]
        found["cpu_s_but_start"].append(round((whole["cpu_s"] - rest["cpu_s"]) / working_s, 3))
        found["stages"].append(round(whole["stages"]["measure"] / sum(gptq["stages"].values()), 3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--make", type=int, nargs=3, metavar=("HIDDEN", "FEED_FORWARD", "LAYERS"))
    parser.add_argument("--calibration", default="polish-core")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.make:
            hidden, feed_forward, layers = options.make
            options.model = scratch / f"random-{hidden}-{feed_forward}-{layers}"
            options.model.mkdir()
            make_model(options.model, layers=layers, hidden=hidden, feed_forward=feed_forward)
        measurement = scratch / "earlier.json"
        tried = ways(measurement)
        takes = {way.name: partial(build, way, options, scratch, measurement) for way in tried}
        takes[START] = partial(start, tried[-1], options, scratch)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in takes}
        for number in range(options.rounds + 1):
            for name, take in takes.items():
                taken = take()
                print(name, taken, "" if number else "(not counted)", file=sys.stderr, flush=True)
                if number:
                    runs[name].append(taken)
    rows = [
        {"way": name, **{key: round(statistics.median(run[key] for run in taken), 3) for key in MEASURES}}
        | {"stages": {stage: round(seconds, 3) for stage, seconds in taken[-1]["stages"].items()}}
        for name, taken in runs.items()
    ]
    facts = {
        "command": command_line("bench.exl2_measure"),
        "model": options.model.name,
        "calibration": [Path(options.calibration).name, options.windows, options.window_tokens],
        "threads": options.threads,
        "environment": environment(torch.device("cpu")),
        "rows": rows,
        "measuring_over": {peer: ratios(runs, peer) for peer in runs if peer.startswith("gptq")},
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
