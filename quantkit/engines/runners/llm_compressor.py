# mypy: ignore-errors
"""llm-compressor, inside its environment; see start.py."""

import os

import numpy as np
import torch
from start import causal_logits, versions


def load(request):
    """Read an artifact the way most people do: transformers, which calls compressed-tensors for the packed linears."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        request["artifact"],
        # on a CPU half precision is slow, and decoding in bfloat16 would round every weight once more
        dtype=torch.float32 if request["device"] == "cpu" else "auto",
        device_map={"": request["device"]},
        local_files_only=True,
    ).eval()

    return causal_logits(model, request["device"]), versions("llmcompressor", "torch", "transformers")


def build(request):
    """Quantize a checkpoint with llm-compressor's GPTQ."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(request["threads"])
    settings = request["settings"]
    size = settings["group_size"]
    weights = {
        "num_bits": settings["bits"],
        "type": "int",
        "symmetric": settings["symmetric"],
        "strategy": "channel" if size == -1 else "group",
        "group_size": None if size == -1 else size,
    }
    modifier = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        dampening_frac=settings["damping"],
        # its default, "static", solves by activation and keeps groups in place; null is the plain order
        actorder={"group-aware": "static", "natural": None}[settings["order"]],
    )
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[settings["dtype"]]
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=dtype, local_files_only=True)
    tokens = np.load(request["tokens"])
    rows = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=[modifier],
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(request["out"], save_compressed=True)
    left = os.path.join(request["out"], "recipe.yaml")
    if os.path.exists(left):
        os.remove(left)
    return versions("llmcompressor", "torch", "transformers")
