# mypy: ignore-errors
"""autoawq, inside its environment; see start.py."""

import os
import sys

import numpy as np
import torch
from start import causal_logits, read_json, versions


def load(request):
    """Read an artifact with autoawq's own loader."""
    from awq import AutoAWQForCausalLM

    refuse_what_it_misreads(request["artifact"])
    torch.set_num_threads(request["threads"])
    if request["device"] == "cpu":
        use_plain_path()
    model = AutoAWQForCausalLM.from_quantized(
        request["artifact"],
        fuse_layers=False,
        safetensors=True,
        torch_dtype=torch.float16,
        device_map={"": request["device"]},
    ).model.eval()

    return causal_logits(model, request["device"]), versions("autoawq", "torch", "transformers")


def refuse_what_it_misreads(folder):
    """It compares with names inside a layer, so it takes for packed what is in 16 bits in some layers only."""
    dense = read_json(folder, "config.json")["quantization_config"].get("modules_to_not_convert") or []
    if found := [name for name in dense if ".layers." in name]:
        sys.exit(f"autoawq takes linears that are in 16 bits in some layers only for packed ones: {', '.join(found)}")


def build(request):
    """Quantize a checkpoint with autoawq's scaling and clipping."""
    from awq import AutoAWQForCausalLM

    torch.set_num_threads(request["threads"])
    settings, device = request["settings"], request["device"]
    tokens = np.load(request["tokens"])
    model = AutoAWQForCausalLM.from_pretrained(
        request["checkpoint"], torch_dtype=torch.float16, device_map={"": device}, local_files_only=True
    )
    # with token ids there is nothing to be tokenized
    model.quantize(
        None,
        {"zero_point": True, "q_group_size": settings["group_size"], "w_bit": 4, "version": "GEMM"},
        calib_data=tokens.tolist(),
        max_calib_samples=len(tokens),
        # it leaves out what is longer
        max_calib_seq_len=tokens.shape[1],
    )
    os.makedirs(request["out"], exist_ok=True)
    model.save_quantized(request["out"])
    return versions("autoawq", "torch", "transformers")


def use_plain_path():
    """Its loader asks for intel_extension_for_pytorch on a CPU, and Triton's kernels do not run there: it has a third
    way, which decodes and multiplies, but takes it only if it finds neither.
    """
    from awq.models import base
    from awq.modules.linear import gemm

    gemm.TRITON_AVAILABLE = False
    # asked for nothing else there
    base.get_best_device = lambda: "a device without kernels"
