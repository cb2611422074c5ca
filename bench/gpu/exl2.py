"""An EXL2 artifact in exllamav2 on a GPU, beside quantkit's decode; and what making one of a 7B's shape takes.

    quantkit engines install exllamav2
    python -m bench.gpu.exl2 --artifact artifacts/bielik-nano-EXL2
    python -m bench.gpu.exl2 --artifact artifacts/bielik-nano-EXL2 --layers 32 --hidden 4096 --feed-forward 14336

Checks that no token sees a later one, judges every variant by both readers on the artifact's own validation text, and
with --layers builds a random checkpoint of that shape at 4 bits per weight. Prints one JSON document. Needs CUDA:
without it the engine says so, and nothing is measured.
"""

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.models import make_model
from quantkit.engines.env import find_engine
from quantkit.engines.runtime import evaluate, require
from quantkit.formats import open_variants
from quantkit.judgement import validate
from quantkit.machine import environment
from quantkit.pipeline import build
from quantkit.recipe import Recipe

ENGINE = find_engine("exllamav2")
WINDOW = 64
CHANGED, LOOKED_AT = 40, 20  # a token, and an earlier position that must not notice


def looks_ahead(artifact: Path) -> float:
    """Largest change of the logits at a position when a later token changes; 0 for a causal model."""
    for variant in open_variants("exl2", artifact).values():
        ids = np.arange(3, 3 + WINDOW)
        other = ids.copy()
        other[CHANGED] += 7
        windows = [SimpleNamespace(inputs=each.tolist(), targets=each.tolist()) for each in (ids, other)]
        one, two = evaluate(ENGINE, variant.tensors.folder, windows, device="cuda")
        return float(np.abs(one[: LOOKED_AT + 1] - two[: LOOKED_AT + 1]).max())
    raise ValueError(f"{artifact} holds no variant")


def build_times(layers: int, hidden: int, feed_forward: int, windows: int, window_tokens: int) -> dict[str, Any]:
    """Seconds of each stage and peak memory for a random checkpoint of a shape."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model", layers=layers, hidden=hidden, feed_forward=feed_forward)
        recipe = Recipe.of(
            {
                "format": "exl2",
                "model": {"id": str(folder / "model")},
                "calibration": {
                    "texts": {"polish-core": windows},
                    "window_tokens": window_tokens,
                    "activations": "float",
                },
                "compute": {"dtype": "bfloat16"},
            }
        )
        made = build(recipe, out=folder / "out", device=torch.device("cuda"), validated=False).record["build"]
        return {key: made[key] for key in ("seconds", "wall_seconds", "peak_memory_bytes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--feed-forward", type=int, default=14336)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window-tokens", type=int, default=512)
    options = parser.parse_args()
    require(ENGINE, "cuda")
    cuda = torch.device("cuda")
    facts: dict[str, Any] = {"environment": environment(cuda), "looks_ahead": looks_ahead(options.artifact)}
    facts["validation"] = validate(options.artifact, model=None, texts=(), runtime="both", device=cuda)
    if options.layers:
        shape = (options.layers, options.hidden, options.feed_forward)
        facts["build"] = build_times(*shape, options.windows, options.window_tokens)
    print(json.dumps(facts, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
