# mypy: ignore-errors
"""auto-round, inside its environment; see start.py."""

import os
import sys

import numpy as np
import torch
from start import causal_logits, read_json, versions


def load(request):
    """Read an artifact with auto-round's own linears (layout version 1, symmetric) inside transformers' model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoRoundConfig

    torch.set_num_threads(request["threads"])
    folder = request["artifact"]
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    settings = dict(getattr(config, "quantization_config", None) or read_json(folder, "quantize_config.json"))
    refuse_what_it_misreads(settings)
    # transformers takes whoever writes this key for a packer of version 2, and refuses
    settings.pop("meta", None)
    config.quantization_config = settings
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        # plain PyTorch; the automatic choice looks for kernels that must be installed beside it
        quantization_config=AutoRoundConfig(backend="auto_round:torch_zp"),
        dtype=torch.float16,
        device_map={"": request["device"]},
        local_files_only=True,
    ).eval()

    return causal_logits(model, request["device"]), versions("auto-round", "torch", "transformers")


def refuse_what_it_misreads(settings):
    """It stops at these far from the cause, or takes one layout for another."""
    if settings.get("checkpoint_format") == "gptq_v2" or settings.get("format") == "gptq_v2":
        sys.exit("auto-round takes zeros of layout version 2 for those of version 1")
    if settings.get("desc_act"):
        sys.exit("auto-round looks at no g_idx, which desc_act needs")
    if not settings.get("sym", True):
        sys.exit("auto-round reads symmetric GPTQ only")


def build(request):
    """Quantize a checkpoint with SignRound: roundings and ranges learnt block by block, its own steps and rates."""
    from auto_round import AutoRound

    torch.set_num_threads(request["threads"])
    settings = request["settings"]
    tokens = torch.from_numpy(np.load(request["tokens"]))
    # without a mask it takes the same token several times at a window's end for padding
    windows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
    learner = AutoRound(
        request["checkpoint"],
        bits=settings["bits"],
        group_size=settings["group_size"],
        sym=settings["symmetric"],
        dataset=windows,
        # what is shorter it would leave out
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        device_map=request["device"],
        # it would compile with a C++ compiler at first use
        enable_torch_compile=False,
        trust_remote_code=False,
    )
    # it writes into a folder inside the one it is given, named by model and scheme
    outer = request["out"] + ".made"
    _, inner = learner.quantize_and_save(outer, format="auto_gptq")
    os.rename(inner, request["out"])
    os.rmdir(outer)
    return versions("auto-round", "torch", "transformers")
