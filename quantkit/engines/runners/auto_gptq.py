# mypy: ignore-errors
"""auto-gptq, inside its environment; see start.py."""

import os
import shutil
import sys

import numpy as np
import torch
from start import causal_logits, read_json, versions

KNOWN_ROPES = ("default", "linear", "dynamic")

# tokens only, never a tokenizer: transformers 4.40 cannot read a tokenizer.json written by tokenizers 0.23


def load(request):
    """Read an artifact (layout version 1; config.json must carry rope_theta, which transformers 4.40 looks for)."""
    from auto_gptq import AutoGPTQForCausalLM

    refuse_what_it_misreads(request["artifact"])
    torch.set_num_threads(request["threads"])
    model = AutoGPTQForCausalLM.from_quantized(
        request["artifact"],
        device=request["device"],
        # no triton on the CPU, and its GPU kernels would compile; the plain path decodes and multiplies
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        use_safetensors=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
    )

    return causal_logits(model, request["device"]), versions("auto-gptq", "torch", "transformers")


def refuse_what_it_misreads(folder):
    """It loads such artifacts without a word and gives wrong numbers, or stops at something far from the cause."""
    config = read_json(folder, "config.json")
    settings = config.get("quantization_config") or read_json(folder, "quantize_config.json")
    refuse_unknown_model(config)
    if config.get("tie_word_embeddings"):
        sys.exit("auto-gptq leaves a head that is the embedding (tie_word_embeddings) as it was allocated")
    if settings.get("dynamic"):
        sys.exit("auto-gptq takes linears that were left in 16 bits (dynamic) for packed ones")


def refuse_unknown_model(config):
    """A family that auto-gptq has not, or what transformers 4.40 does not know of the others."""
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP

    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = config.get("head_dim") or hidden // heads
    if config["model_type"] not in GPTQ_CAUSAL_LM_MODEL_MAP:
        sys.exit(f"auto-gptq knows no {config['model_type']}")
    if kind not in KNOWN_ROPES:
        sys.exit(f"transformers 4.40 does not know the position encoding {kind!r} of this model")
    if width * heads != hidden:
        # of llama and mistral it looks at no head_dim, and makes attention of another shape
        sys.exit(f"transformers 4.40 takes heads for {hidden} / {heads} numbers wide, and not {width} (head_dim)")


def build(request):
    """Quantize a checkpoint with auto-gptq's own GPTQ."""
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
    from transformers import AutoModelForCausalLM

    refuse_unknown_model(read_json(request["checkpoint"], "config.json"))
    torch.set_num_threads(request["threads"])
    settings = request["settings"]
    if request["device"] == "cpu":
        # it moves every layer to a hard-wired cuda:0 and waits for it after each
        _base.CUDA_0 = torch.device("cpu")
        torch.cuda.synchronize = lambda *args, **kwargs: None
    config = BaseQuantizeConfig(
        bits=settings["bits"],
        group_size=settings["group_size"],
        sym=settings["symmetric"],
        desc_act=settings["order"] == "activation",
        damp_percent=settings["damping"],
        # else gptq_model-4bit-128g.safetensors, which only its own lineage looks for
        model_file_base_name="model",
    )
    # float32 on the CPU, where half precision is slow and its Cholesky does not exist
    dtype = torch.float32 if request["device"] == "cpu" else torch.float16
    inner = AutoModelForCausalLM.from_pretrained(
        request["checkpoint"], config=old_config(request["checkpoint"]), torch_dtype=dtype, local_files_only=True
    ).eval()
    # its from_pretrained refuses to run without CUDA, so the model is wrapped by hand
    without_bias = [
        name for name, part in inner.named_modules() if isinstance(part, torch.nn.Linear) and part.bias is None
    ]
    model = GPTQ_CAUSAL_LM_MODEL_MAP[inner.config.model_type](inner, False, config)
    tokens = np.load(request["tokens"])
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model.quantize(examples, batch_size=1, use_triton=False, cache_examples_on_gpu=False)
    for name in without_bias:
        # its packed linears always have one, of zeros: readers that know the architecture have no place for it
        inner.get_submodule(name).bias = None
    model.model.half()
    model.model.config.torch_dtype = torch.float16
    model.model.config.dtype = "float16"
    # a path of this machine
    model.model.config._name_or_path = ""
    model.save_quantized(request["out"], use_safetensors=True)
    generation = os.path.join(request["checkpoint"], "generation_config.json")
    if os.path.exists(generation):
        shutil.copy(generation, request["out"])
    return versions("auto-gptq", "torch", "transformers")


def old_config(folder):
    """config.json as transformers 4.40 understands it: it takes 10000 for a rope_theta that it does not find."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        config.rope_theta = rope["rope_theta"]
    kind = rope.get("rope_type", "default")
    if kind != "default":
        config.rope_scaling = {"type": kind, "factor": rope["factor"]}
    return config
