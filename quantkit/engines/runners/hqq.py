# mypy: ignore-errors
"""hqq, inside its environment; see start.py."""

import glob
import os

import torch
from start import causal_logits, versions


def load(request):
    """Read an artifact with hqq's own modules: safetensors by the override that the model card shows, or qmodel.pt."""
    from hqq.models.hf.base import AutoHQQHFModel
    from safetensors.torch import load_file

    torch.set_num_threads(request["threads"])
    files = sorted(glob.glob(os.path.join(request["artifact"], "*.safetensors")))

    class SafeHQQ(AutoHQQHFModel):
        @classmethod
        def get_weight_file(cls, folder):
            return files[0] if files else super().get_weight_file(folder)

        @classmethod
        def load_weights(cls, folder, map_location=None):
            if not files:
                return super().load_weights(folder, map_location)
            modules = {}
            for path in files:
                for name, tensor in load_file(path).items():
                    module, part = name.rsplit(".", 1)
                    modules.setdefault(module, {})[part] = tensor
            # the head of a model with tied embeddings is no module of its own in the file
            modules.setdefault("lm_head", modules["model.embed_tokens"])
            return modules

    model = SafeHQQ.from_quantized(request["artifact"], compute_dtype=torch.float16, device=request["device"])

    return causal_logits(model, request["device"]), versions("hqq", "torch", "transformers")


def build(request):
    """Quantize a checkpoint with hqq's own solver; it sees the weights alone."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    # its own pool of threads times torch's makes it many times slower
    torch.set_num_threads(request["threads"])
    settings = request["settings"]
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=torch.float16, local_files_only=True)
    config = BaseQuantizeConfig(nbits=settings["bits"], group_size=settings["group_size"], axis=settings["axis"])
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device=request["device"])
    AutoHQQHFModel.save_quantized(model, request["out"])
    return versions("hqq", "torch", "transformers")
