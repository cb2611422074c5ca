"""Wall seconds, CPU seconds and peak memory of whole processes that quantize, quantkit against the upstream packages.

    python -m bench.speed --model DIR --way "quantkit:" --way "gptqmodel:engine=gptqmodel" --set bits=4
    python -m bench.speed --make 2048 5632 2 --windows 32 --way ...      # a random Mistral of that size

    python -m bench.speed --make 4096 14336 1 --set format=gguf,imatrix=false \\
        --way "llama-quantize:engine=llama-quantize" --way "quantkit:" --way "ggml:encoder=ggml"

    python -m bench.speed --make 1024 3584 4 --windows 32 --way "one:threads=1" --way "two:ranks=2,threads=1"

A way is NAME:KEY=VALUE,... as in bench.quality; `threads` is its own number of them, instead of --threads, and `ranks`
the number of quantkit's processes, of so many threads each: `cpu_s` is of all of them, `peak_gb` of the largest. Each
is run from start to exit: `quantkit build` without validation, or the engine's runner in its own environment, which
does nothing but what the package's users write; the engine llama-quantize is bench.llama_quantize. All get the same
tokens. A first run of each, in which packages compile, is not counted (with `--compiled` they have, and it is);
then they take turns. A ratio is this way's over the first way's of the same round. `written_over_files` is what the
processes have written to disk over what is left in the output folder; 0 where the folder is not on a disk.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit
import torch

from bench.models import make_model
from bench.processes import measured
from bench.ways import Way, command_line, parse_pairs, parse_way, recipe_of
from quantkit.calibration.tokens import calibration_windows
from quantkit.checkpoint.index import open_checkpoint
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.engines.env import find_engine, installed_facts
from quantkit.engines.runtime import command, variables
from quantkit.machine import environment
from quantkit.recipe import OWN_ENGINE, Recipe
from quantkit.texts import load_text_set
from quantkit.upstream import settled

QUANTKIT = [sys.executable, "-m", "quantkit"]
LLAMA_QUANTIZE = "llama-quantize"
MEASURES = ("wall_s", "cpu_s", "peak_gb", "written_over_files")


@dataclass(frozen=True)
class Run:
    """A command with everything it needs, and the folder it writes, which is removed before and after."""

    command: list[str]
    variables: dict[str, str]
    out: Path


@dataclass(frozen=True)
class Entry:
    """A way, and with how many processes of how many threads."""

    way: Way
    ranks: int
    threads: int


def parse_entry(text: str, common: dict[str, Any], threads: int) -> Entry:
    """An entry from NAME:KEY=VALUE,...; `ranks` is for quantkit alone."""
    way = parse_way(text, common)
    keys = dict(way.quantize)
    ranks, threads = keys.pop("ranks", 1), keys.pop("threads", threads)
    if ranks > 1 and way.engine != OWN_ENGINE:
        sys.exit(f"{way.engine} is one process: leave ranks out")
    return Entry(replace(way, quantize=keys), ranks, threads)


def prepared(entry: Entry, options: argparse.Namespace, scratch: Path) -> Run:
    """The whole-process run of an entry."""
    way, texts = entry.way, {options.calibration: options.windows}
    content = recipe_of(way, options.model, texts, options.window_tokens, threads=entry.threads)
    if way.engine == LLAMA_QUANTIZE:
        content["engine"] = OWN_ENGINE
    recipe = settled(Recipe.of(content))
    folder = scratch / way.name.replace(" ", "-")
    folder.mkdir()
    out = folder / "out"
    if way.engine in (OWN_ENGINE, LLAMA_QUANTIZE):
        path = folder / "recipe.toml"
        path.write_text(tomlkit.dumps(content), encoding="utf-8")
        if way.engine == LLAMA_QUANTIZE:
            peer = [sys.executable, "-m", "bench.llama_quantize", str(path), str(out)]
            paths = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
            return Run(peer, dict(os.environ) | {"PYTHONPATH": paths}, out)
        arguments = ["build", str(path), "--out", str(out), "--device", "cpu", "--no-validate"]
        arguments += ["--ranks", str(entry.ranks)]
        return Run([*QUANTKIT, *arguments], dict(os.environ), out)
    engine = find_engine(way.engine)
    tokenizer = load_tokenizer(options.model, vocab_size=open_checkpoint(options.model).config["vocab_size"])
    parts = [(load_text_set(options.calibration, "calibration"), options.windows)]
    tokens = calibration_windows(parts, tokenizer, window_tokens=options.window_tokens, seed=0)
    np.save(folder / "tokens.npy", tokens.numpy())
    request = {
        "format": way.format,
        "checkpoint": str(options.model.resolve()),
        "out": str(out),
        "settings": recipe.quantize.model_dump(mode="json"),
        "tokens": str(folder / "tokens.npy"),
        "device": "cpu",
        "threads": entry.threads,
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    return Run(command(engine, "build", folder / "request.json"), variables(engine, entry.threads, "cpu"), out)


def run_once(run: Run) -> dict[str, float]:
    """One run in a fresh process; what it left is counted and removed."""
    found = measured(run.command, run.variables)
    left_bytes = sum(path.stat().st_size for path in run.out.rglob("*") if path.is_file())
    shutil.rmtree(run.out)
    return {**found, "written_over_files": found["written_bytes"] / left_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--make", type=int, nargs=3, metavar=("HIDDEN", "FEED_FORWARD", "LAYERS"))
    parser.add_argument("--calibration", default="polish-core")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="count the first runs too: nothing is left to compile")
    parser.add_argument("--set", action="append", default=[], help="keys common to all ways, as KEY=VALUE,...")
    parser.add_argument("--way", action="append", required=True)
    options = parser.parse_args()
    common = parse_pairs(",".join(options.set))
    entries = [parse_entry(text, common, options.threads) for text in options.way]
    found: dict[str, list[dict[str, float]]] = {entry.way.name: [] for entry in entries}
    with tempfile.TemporaryDirectory() as scratch:
        if options.make:
            hidden, feed_forward, layers = options.make
            options.model = Path(scratch) / f"random-{hidden}-{feed_forward}-{layers}"
            options.model.mkdir()
            make_model(options.model, layers=layers, hidden=hidden, feed_forward=feed_forward)
        runs = {entry.way.name: prepared(entry, options, Path(scratch)) for entry in entries}
        for run in runs.values() if not options.compiled else ():
            run_once(run)
        for _ in range(options.rounds):
            for name, run in runs.items():
                found[name].append(run_once(run))
                print(name, found[name][-1], file=sys.stderr, flush=True)
    first = found[entries[0].way.name]
    rows = []
    for entry in entries:
        way, taken = entry.way, found[entry.way.name]
        name = "llama-cpp" if way.engine == LLAMA_QUANTIZE or way.quantize.get("encoder") == "ggml" else way.engine
        facts = None if name == OWN_ENGINE else installed_facts(find_engine(name))
        rows.append(
            {
                "way": way.name,
                "engine": way.engine,
                "format": way.format,
                "compute_dtype": way.compute_dtype if way.engine == OWN_ENGINE else None,
                "settings": way.quantize,
                "ranks": entry.ranks,
                "threads": entry.threads,
                "version": facts["version"] if facts else None,
                **{key: round(statistics.median(run[key] for run in taken), 3) for key in MEASURES},
                "over_first": {
                    key: [round(run[key] / base[key], 3) for run, base in zip(taken, first, strict=True)]
                    for key in MEASURES[:3]
                },
            }
        )
    facts = {
        "command": command_line("bench.speed"),
        "model": options.model.name,
        "calibration": [Path(options.calibration).name, options.windows, options.window_tokens],
        "environment": environment(torch.device("cpu")),
        "rows": rows,
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
