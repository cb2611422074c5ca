# mypy: ignore-errors
"""mlx-lm, inside its environment; see start.py."""

import os
from pathlib import Path

import numpy as np
from start import versions


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

    return logits, versions("mlx-lm", "transformers", "mlx")


def build(request):
    """Quantize a checkpoint with what mlx-lm has under the recipe's solver."""
    {"round-to-nearest": build_rounded, "gptq": build_gptq}[request["settings"]["solver"]](request)
    readme = os.path.join(request["out"], "README.md")
    if os.path.exists(readme):
        os.remove(readme)
    return versions("mlx-lm", "transformers", "mlx")


def build_rounded(request):
    """`mlx_lm.convert`."""
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


def build_gptq(request):
    """`mlx_lm.gptq`, without the command that fetches its calibration text from the web."""
    import mlx.core as mx
    from mlx_lm.quant.gptq import gptq_quantize
    from mlx_lm.utils import load, save

    settings = request["settings"]
    bits, size = settings["bits"], settings["group_size"]
    model, tokenizer, config = load(request["checkpoint"], lazy=True, return_config=True)
    # it sums x x^T in the model's own dtype, which overflows in float16 and keeps three digits in bfloat16
    model.set_dtype(mx.float32)
    tokens = mx.array(np.load(request["tokens"]).astype(np.int32))
    # the embedding is not solved but rounded: to as many bits, where it would take 6
    model, config["quantization"] = gptq_quantize(model, tokens, bits, size, bits, size)
    model.set_dtype({"float16": mx.float16, "bfloat16": mx.bfloat16}[settings["dtype"]])
    save(request["out"], request["checkpoint"], model, tokenizer, config)
