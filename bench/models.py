"""Random checkpoints of any size, for benches that measure time and memory and nothing else."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MistralConfig

from tests.tiny import make_tokenizer


def make_model(folder: Path, *, layers: int, hidden: int, feed_forward: int, vocabulary: int = 384) -> None:
    """A random Mistral of the wanted size, saved layer by layer so that making it takes no more than a layer.

    mlx-lm opens files whose names begin with "model", and no others.
    """
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
    make_tokenizer(folder)
    key_rows = config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_rows, hidden),
        "self_attn.v_proj": (key_rows, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (feed_forward, hidden),
        "mlp.up_proj": (feed_forward, hidden),
        "mlp.down_proj": (hidden, feed_forward),
    }
    generator = torch.Generator().manual_seed(0)
    weight_map = {}

    def keep(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.5 / columns**0.5).bfloat16()

    keep(
        "model-ends.safetensors",
        {
            "model.embed_tokens.weight": drawn(vocabulary, hidden),
            "lm_head.weight": drawn(vocabulary, hidden),
            "model.norm.weight": torch.ones(hidden).bfloat16(),
        },
    )
    for index in range(layers):
        prefix = f"model.layers.{index}"
        norms = {
            f"{prefix}.{name}.weight": torch.ones(hidden).bfloat16()
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        keep(
            f"model-layer-{index}.safetensors",
            norms | {f"{prefix}.{name}.weight": drawn(*shape) for name, shape in shapes.items()},
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
