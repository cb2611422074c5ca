"""Tiny random checkpoints of every family, with a real byte-fallback tokenizer trained on a few Polish words."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = "Zażółć gęślą jaźń. Pchnąć w tę łódź jeża lub ośm skrzyń fig. Wisła płynie po polskiej krainie, a dokąd? "
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# every family of the table, with what is special about it
VARIANTS = {
    "mistral": {},
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
}
# sizes that do not follow from others, where a reader may think that they do: heads are not hidden / heads wide in the
# families that state it, and a vocabulary is no multiple of 32
UNEVEN = {"vocab_size": 419, "hidden_size": 128, "intermediate_size": 256, "sharded": False}
WIDE_HEADS = {"head_dim": 64}
UNEVEN_VARIANTS = {
    kind: UNEVEN | changes | ({} if kind == "qwen2" else WIDE_HEADS) for kind, changes in VARIANTS.items()
}


def make_tokenizer(folder: Path, *, vocab_size: int = 384, chatml: bool = False) -> None:
    """A BPE tokenizer with byte fallback, 256 byte tokens and Llama's way with spaces.

    Args:
        folder: where to write.
        vocab_size: of the trained part.
        chatml: two more tokens and a template that uses them, as in Bielik-11B-v2.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    if chatml:
        fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
        fast.chat_template = CHATML
    fast.save_pretrained(folder)


def make_text(path: Path) -> Path:
    """A JSONL file of twelve documents."""
    path.write_text("\n".join(json.dumps({"text": f"{number}. {WORDS * 3}"}) for number in range(12)))
    return path


def make_tiny(
    folder: Path,
    model_type: str,
    *,
    layers: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = True,
    seed: int = 0,
    **changes: object,
) -> Path:
    """A checkpoint folder; hidden 64, feed-forward 96, four query and two key heads unless `changes` say otherwise."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(model_type, **(shape | changes))
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            scale = 0.5 / tensor.shape[-1] ** 0.5 if tensor.dim() == 2 else 0.1
            noise = torch.randn(tensor.shape) * scale
            # uneven channels, so that scales, orders and clipping have something to do
            tensor.copy_(1 + noise if "norm" in name else noise * (1 + 3 * torch.rand(tensor.shape[-1]) ** 4))
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    make_tokenizer(folder)
    config_path = folder / "config.json"
    content = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(content | {"dtype": str(dtype).removeprefix("torch.")}))
    return folder
