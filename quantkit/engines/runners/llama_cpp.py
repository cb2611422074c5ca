# mypy: ignore-errors
"""llama-cpp-python, inside its environment; see start.py."""

import ctypes
import os
import sys

import numpy as np
from start import versions


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

    return logits, versions("llama-cpp-python")


def build(request):
    """A file of each type by `llama_model_quantize`, from the 16-bit file and the importance in the folder given."""
    import llama_cpp

    settings, given = request["settings"], request["checkpoint"]
    (source,) = (os.path.join(given, name) for name in os.listdir(given) if name.endswith(".gguf"))
    importance = dict(np.load(os.path.join(given, "importance.npz"))) if settings["imatrix"] else {}
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = request["threads"]
    # an entry without a name ends them
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        params.imatrix = entries
    os.mkdir(request["out"])
    for kind in settings["types"]:
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        made = os.path.join(request["out"], f"{settings['name']}.{kind}.gguf")
        if llama_cpp.llama_model_quantize(source.encode(), made.encode(), ctypes.byref(params)):
            sys.exit(f"llama.cpp did not make {kind}")
    return versions("llama-cpp-python")
