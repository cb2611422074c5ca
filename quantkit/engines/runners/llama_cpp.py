# mypy: ignore-errors
"""llama-cpp-python, inside its environment; see start.py."""

import os
from importlib.metadata import version

import numpy as np


def load(request):
    """Read a GGUF file; it tokenizes nothing, for it is given token ids."""
    from llama_cpp import Llama

    name = request["files"][0]  # of a split file the first, which finds the rest
    longest = int(np.load(request["windows"]).shape[1])
    model = Llama(
        os.path.join(request["artifact"], name),
        n_ctx=longest,
        # a window goes through in one piece, as it does everywhere else
        n_batch=longest,
        n_ubatch=longest,
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        n_gpu_layers=-1 if request["device"] == "cuda" else 0,
        logits_all=True,
        verbose=False,
    )

    def logits(ids):
        # else the window would go on with the one before
        model.reset()
        model.eval([int(token) for token in ids])
        return np.array(model.scores[: len(ids)], dtype=np.float32)

    return logits, {"package": "llama-cpp-python", "version": version("llama-cpp-python")}
