# mypy: ignore-errors
"""auto-gptq, inside its environment; see start.py."""

import os
import shutil
from importlib.metadata import version

import numpy as np
import torch

# tokens only, never a tokenizer: transformers 4.40 cannot read a tokenizer.json written by tokenizers 0.23


def load(request):
    """Read an artifact (layout version 1; config.json must carry rope_theta, which transformers 4.40 looks for)."""
    from auto_gptq import AutoGPTQForCausalLM

    torch.set_num_threads(request["threads"])
    model = AutoGPTQForCausalLM.from_quantized(
        request["artifact"],
        device=request["device"],
        # no triton on the CPU, and its GPU kernels would compile; the plain path decodes and multiplies
        use_triton=False,
        use_safetensors=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
    )

    def logits(ids):
        with torch.inference_mode():
            tokens = torch.as_tensor(ids, dtype=torch.long, device=request["device"])[None]
            found = model(input_ids=tokens, use_cache=False)
        return found.logits[0].float().cpu().numpy()

    return logits, facts()


def build(request):
    """Quantize a checkpoint with auto-gptq's own GPTQ."""
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
    from transformers import AutoModelForCausalLM

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
    )
    # float32 on the CPU, where half precision is slow and its Cholesky does not exist
    dtype = torch.float32 if request["device"] == "cpu" else torch.float16
    inner = AutoModelForCausalLM.from_pretrained(request["checkpoint"], torch_dtype=dtype, local_files_only=True)
    inner.eval()
    inner.seqlen = inner.config.max_position_embeddings
    # its from_pretrained refuses to run without CUDA, so the model is wrapped by hand
    model = GPTQ_CAUSAL_LM_MODEL_MAP[inner.config.model_type](inner, False, config)
    tokens = np.load(request["tokens"])
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model.quantize(examples, batch_size=1, use_triton=False, cache_examples_on_gpu=False)
    model.model.half()
    model.save_quantized(request["out"], use_safetensors=True)
    generation = os.path.join(request["checkpoint"], "generation_config.json")
    if os.path.exists(generation):
        shutil.copy(generation, request["out"])
    return facts()


def facts():
    return {
        "package": "auto-gptq",
        "version": version("auto-gptq"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
