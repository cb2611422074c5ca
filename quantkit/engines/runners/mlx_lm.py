# mypy: ignore-errors
"""mlx-lm, inside its environment; see start.py."""

import os
from importlib.metadata import version
from pathlib import Path

import numpy as np


def load(request):
    """Read an artifact with mlx-lm's own loader."""
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model, load_model

    model, _ = load_model(Path(request["artifact"]))
    # float32 and unpacked once: on a CPU its packed products in half precision are many times slower
    model.set_dtype(mx.float32)
    model = dequantize_model(model)

    def logits(ids):
        found = model(mx.array(np.asarray(ids, dtype=np.int32))[None])
        return np.array(found[0].astype(mx.float32))

    return logits, facts()


def build(request):
    """Quantize a checkpoint with `mlx_lm.convert`; it rounds the weights to nearest."""
    from mlx_lm import convert

    settings = request["settings"]
    mixed = settings["mixed"]
    convert(
        request["checkpoint"],
        request["out"],
        quantize=True,
        q_group_size=settings["group_size"],
        q_bits=settings["bits"],
        dtype=settings["dtype"],
        quant_predicate=None if mixed == "none" else mixed,
    )
    readme = os.path.join(request["out"], "README.md")
    if os.path.exists(readme):
        os.remove(readme)
    return facts()


def facts():
    return {
        "package": "mlx-lm",
        "version": version("mlx-lm"),
        "torch": "",
        "transformers": version("transformers"),
        "mlx": version("mlx"),
    }
