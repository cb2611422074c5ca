"""Random checkpoints of any size, for benches that measure time and memory and nothing else."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MistralConfig

from quantkit.checkpoint.index import describe_model
from tests.tiny import make_tokenizer


def make_model(folder: Path, *, layers: int, hidden: int, feed_forward: int, vocabulary: int = 384) -> None:
    """A random Mistral of the wanted size in a folder that is there."""
    heads = max(hidden // 128, 1)
    config = MistralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        max_position_embeddings=4096,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(folder)
    _fill(folder)


def make_shape(folder: Path, shape: Path, *, layers: int) -> None:
    """A random model as a folder with a config.json describes it, in another, but for the number of its layers."""
    config = json.loads((shape / "config.json").read_text(encoding="utf-8"))
    changed = config | {"num_hidden_layers": layers, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    _fill(folder)


def _fill(folder: Path) -> None:
    """Tokenizer and random bfloat16 weights beside a config.json, an item in each file: more is not in memory.

    mlx-lm opens files whose names begin with "model", and no others.
    """
    make_tokenizer(folder)
    checkpoint = describe_model(folder)
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(shape).bfloat16()
        return (torch.randn(shape, generator=generator) * 0.5 / shape[-1] ** 0.5).bfloat16()

    weight_map: dict[str, str] = {}
    for item in checkpoint.items:
        file, names = f"model-{item}.safetensors", checkpoint.names(item)
        tensors = {name: drawn(name, checkpoint.tensors.tensors[name].shape) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
