"""llama.cpp's way to GGUF files, as one process for bench.speed: a 16-bit file first, then llama-quantize per type.

    python -m bench.llama_quantize RECIPE.toml OUT

The 16-bit file is written by quantkit, for llama.cpp's converter runs with its own checkout of gguf-py only; each
type is made by `llama_model_quantize` of the `llama-cpp` engine in a process of its own, as by the command line tool,
without an importance matrix. The 16-bit file stays beside the others.
"""

import subprocess
import sys
from pathlib import Path

import torch

from quantkit.engines.env import environment_python, find_engine
from quantkit.engines.runtime import variables
from quantkit.formats.gguf.mixtures import MIXTURES
from quantkit.pipeline import build
from quantkit.recipe import load_recipe

ENGINE = "llama-cpp"
QUANTIZE = """
import ctypes, sys
import llama_cpp
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


def main() -> None:
    recipe, out = load_recipe(Path(sys.argv[1])), Path(sys.argv[2])
    dense = recipe.quantize.model_copy(update={"types": ("BF16",), "imatrix": False, "solver": "search"})
    build(recipe.model_copy(update={"quantize": dense}), out=out, device=torch.device("cpu"), validated=False)
    engine, stem, threads = find_engine(ENGINE), out / recipe.quantize.name, recipe.compute.threads
    for kind in recipe.quantize.types:
        arguments = [f"{stem}.BF16.gguf", f"{stem}.{kind}.gguf", str(MIXTURES[kind].number), str(threads)]
        subprocess.run(
            [str(environment_python(engine)), "-I", "-c", QUANTIZE, *arguments],
            env=variables(engine, threads, "cpu"),
            check=True,
        )


if __name__ == "__main__":
    main()
