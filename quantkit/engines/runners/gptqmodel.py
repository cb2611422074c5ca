# mypy: ignore-errors
"""gptqmodel, inside its environment; see start.py."""

import os
import shutil
import sys

import numpy as np
import torch
from start import causal_logits, read_json, versions

CPU_FACTS = "/proc/cpuinfo"


def load(request):
    """Read an artifact the way most people do: transformers, which calls gptqmodel for the quantized linears."""
    from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig, GPTQConfig

    torch.set_num_threads(request["threads"])
    folder = request["artifact"]
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    settings = dict(getattr(config, "quantization_config", None) or read_json(folder, "quantize_config.json"))
    method = settings.pop("quant_method", "gptq")
    # these are the kernels that need no compiler; the automatic choice compiles with g++ or nvcc at first use
    settings["backend"] = {"gptq": "torch", "awq": "torch_awq"}[method]
    config.quantization_config = {**settings, "quant_method": method}
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        quantization_config={"gptq": GPTQConfig, "awq": AwqConfig}[method](**settings),
        dtype=torch.float16,
        device_map={"": request["device"]},
        local_files_only=True,
    ).eval()

    return causal_logits(model, request["device"]), versions("gptqmodel", "torch", "transformers")


def build(request):
    """Quantize a checkpoint with gptqmodel's own GPTQ or AWQ."""
    # what it compiles at first use belongs into this environment, not into the user's cache folder
    os.environ["GPTQMODEL_TORCH_EXTENSIONS_DIR"] = os.path.join(sys.prefix, "torch_extensions")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    torch.set_num_threads(request["threads"])
    backend = {"gptq": BACKEND.TORCH, "awq": BACKEND.AWQ_TORCH}[request["format"]]
    config = QuantizeConfig(
        **{"gptq": gptq_settings, "awq": awq_settings}[request["format"]](request["settings"]),
        device=request["device"],
        offload_to_disk=False,
        # its default rounds to nearest where too few tokens reach a module; that would no longer be the method
        fallback=None,
    )
    dtype = build_dtype(request["format"], request["device"])
    model = GPTQModel.load(request["checkpoint"], config, backend=backend, dtype=dtype)
    tokens = np.load(request["tokens"])
    # plain lists: every other form of calibration data goes through a tokenizer
    windows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model.quantize(windows, batch_size=1, backend=backend)
    if dtype == torch.float32:
        as_bfloat16(model.model)
    model.save(request["out"])
    # losses by module: not for publishing
    log = os.path.join(request["out"], "quant_log.csv")
    if os.path.exists(log):
        os.remove(log)
    return versions("gptqmodel", "torch", "transformers")


def build_dtype(form, device):
    """What the model is run in: its own choice, but for processors that bfloat16 takes longer on than float32.

    There GPTQ runs in float32. AWQ does not: what packs it refuses a linear that is not of 16 bits.
    """
    slow = device == "cpu" and not (torch.ops.mkldnn._is_mkldnn_bf16_supported() and not has_intel_vectors_alone())
    return torch.float32 if slow and form == "gptq" else "auto"


def has_intel_vectors_alone():
    """Whether it is an Intel processor without tiles (AMX): its vectors multiply bfloat16 no faster than float32."""
    try:
        with open(CPU_FACTS, encoding="utf-8") as file:
            facts = file.read()
    except OSError:
        return False
    return "GenuineIntel" in facts and "amx_bf16" not in facts


def as_bfloat16(model):
    """What is left dense, in the dtype that it would have had; scales are buffers, and stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16


def gptq_settings(settings):
    """[quantize] of a GPTQ recipe in its words."""
    return {
        "bits": settings["bits"],
        "group_size": settings["group_size"],
        "sym": settings["symmetric"],
        "desc_act": settings["order"] == "activation",
        # its default is on whenever desc_act is off, so it must be said either way
        "act_group_aware": settings["order"] == "group-aware",
        "damp_percent": settings["damping"],
        "gptaq": {"alpha": settings["asymmetric"]} if settings["asymmetric"] else None,
        # its fast packing is compiled with g++ at first use
        "pack_impl": "cpu" if shutil.which("g++") else "original",
    }


def awq_settings(settings):
    """[quantize] of an AWQ recipe in its words."""
    return {"quant_method": "awq", "format": "gemm", "bits": 4, "group_size": settings["group_size"], "sym": False}
