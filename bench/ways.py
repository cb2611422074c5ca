"""Ways to quantize, as benches name them on the command line: NAME:KEY=VALUE,..."""

import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Way:
    """One way to quantize: a name, keys of [quantize], and keys of other tables."""

    name: str
    quantize: dict[str, Any]
    activations: str = "quantized"
    engine: str = "quantkit"
    format: str = "gptq"
    compute_dtype: str = "float32"


def parse_way(text: str, common: dict[str, Any]) -> Way:
    """A way from NAME:KEY=VALUE,...; values are JSON, bare words strings."""
    name, _, pairs = text.partition(":")
    keys = common | parse_pairs(pairs)
    others = {key: keys.pop(key) for key in ("activations", "engine", "format", "compute_dtype") if key in keys}
    return Way(name.strip(), keys, **others)


def parse_pairs(text: str) -> dict[str, Any]:
    """Keys with their values, from KEY=VALUE,...; commas within brackets belong to a value."""
    found = {}
    for pair in filter(None, re.split(r",(?![^\[]*\])", text)):
        key, _, value = pair.partition("=")
        try:
            found[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[key.strip()] = value
    return found


def recipe_of(
    way: Way, model: Path, texts: dict[str, int], window_tokens: int, *, seed: int = 0, threads: int = 2
) -> dict[str, Any]:
    """The recipe of a way, as `Recipe.of` takes it.

    Args:
        way: what is varied.
        model: the checkpoint's folder.
        texts: windows to take from each calibration text.
        window_tokens: tokens per window.
        seed: the calibration draw.
        threads: of the CPU.
    """
    return {
        "format": way.format,
        "engine": way.engine,
        "model": {"id": str(model)},
        "quantize": way.quantize,
        "calibration": {
            "texts": texts,
            "window_tokens": window_tokens,
            "seed": seed,
            "activations": way.activations,
        },
        "compute": {"threads": threads, "dtype": way.compute_dtype},
    }


def command_line(module: str) -> str:
    """How this bench was called, to be kept beside its figures; paths are cut to their last part."""
    words = [Path(word).name if Path(word).exists() or Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", module, *words])
