"""llama.cpp's way to GGUF files, as one process for bench.speed: a 16-bit file first, then llama-quantize per type.

    python -m bench.llama_quantize RECIPE.toml OUT

The 16-bit file is written by quantkit, for llama.cpp's converter runs with its own checkout of gguf-py only; the types
are made by `llama_model_quantize` in the runner of the `llama-cpp` engine, without an importance matrix. The 16-bit
file stays beside the others.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from quantkit.engines import runtime
from quantkit.engines.env import find_engine
from quantkit.pipeline import build
from quantkit.recipe_files import load_recipe


def main() -> None:
    recipe, out = load_recipe(Path(sys.argv[1])), Path(sys.argv[2])
    dense = recipe.quantize.model_copy(update={"types": ("BF16",), "imatrix": False, "solver": "search"})
    whole = recipe.model_copy(update={"quantize": dense})
    build(whole, out=out / "16-bit", device=torch.device("cpu"), validated=False)
    runtime.build(
        find_engine("llama-cpp"),
        recipe.format,
        out / "16-bit",
        np.zeros((0, 0)),
        {"types": list(recipe.quantize.types), "name": recipe.quantize.name, "imatrix": False},
        out / "types",
        threads=recipe.compute.threads,
    )


if __name__ == "__main__":
    main()
