# mypy: ignore-errors
"""exllamav2, inside its environment; see start.py. It compiles its CUDA code when it is first imported."""

import os
from importlib.metadata import version

import numpy as np
import torch


def load(request):
    """Read one folder, an artifact's or a variant's, with exllamav2's own loader."""
    # without flash-attn its SDPA path gives causal text no mask: every token would see those after it
    os.environ["EXLLAMA_NO_SDPA"] = "1"
    # one that is there but broken is not caught
    os.environ["EXLLAMA_NO_FLASH_ATTN"] = "1"
    from exllamav2 import ExLlamaV2, ExLlamaV2Config

    files = request["files"]
    config = ExLlamaV2Config(os.path.join(request["artifact"], os.path.dirname(files[0]) if files else ""))
    longest = int(np.load(request["lengths"]).max())
    config.max_seq_len = config.max_input_len = longest + 32
    config.max_attention_size = config.max_seq_len**2
    config.max_batch_size = 1
    config.no_graphs = True
    model = ExLlamaV2(config)
    model.load()
    words = config.vocab_size

    def logits(ids):
        with torch.inference_mode():
            # the embedding is on the CPU by design; columns beyond the vocabulary are padding
            found = model.forward(torch.as_tensor(ids, dtype=torch.long)[None])
        return found[0, :, :words].float().cpu().numpy()

    return logits, facts()


def facts():
    return {
        "package": "exllamav2",
        "version": version("exllamav2"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
