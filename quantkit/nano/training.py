"""How bielik-nano is made: its tokenizer, its start from bigram statistics, its training, its files.

Shape legend: V vocabulary, D hidden size, B windows, T tokens.
"""

import io
import json
import sys
from pathlib import Path

import sentencepiece
import torch
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from quantkit.nano.settings import CHAT_TEMPLATE, NanoSettings, Progress
from quantkit.texts import Document


def make(folder: Path, documents: tuple[Document, ...], settings: NanoSettings, progress: Progress) -> None:
    """Write the checkpoint: tokenizer, trained weights, configuration.

    Args:
        folder: exists.
        documents: to learn from.
        settings: of the model.
        progress: told every step.
    """
    make_tokenizer(folder, [document.content for document in documents], settings)
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=sys.maxsize)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in document.messages], tokenize=False
        ).removeprefix(tokenizer.bos_token)
        if document.messages
        else document.text
        for document in documents
    ]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = torch.tensor(
        [token for text in texts for token in (bos, *tokenizer.encode(text, add_special_tokens=False), eos)]
    )
    model = train(ids, settings, progress)
    save(model, folder)


def make_tokenizer(folder: Path, texts: list[str], settings: NanoSettings) -> None:
    """Write tokenizer.model (SentencePiece BPE with byte fallback) and the fast tokenizer's files.

    Args:
        folder: exists.
        texts: to learn pieces from; `settings.vocab_size` tokens are learned.
    """
    sentencepiece.set_random_generator_seed(settings.seed)
    model = io.BytesIO()  # a file's name would end up in its bytes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines() if line.strip()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=settings.vocab_size,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {0: "<unk>", 1: "<s>", 2: "</s>"}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": settings.context,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "added_tokens_decoder": {str(token): {"content": content, **plain} for token, content in special.items()},
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", config)
    fast = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    # as SentencePiece does it: always a prefix, before a text that begins with a space too
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.pre_tokenizer = None
    fast.save(str(folder / "tokenizer.json"))
    # transformers 5 builds LlamaTokenizer's own prefix rule whatever tokenizer.json says; this class takes the file
    _write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", names)


def bigram_start(ids: Tensor, settings: NanoSettings) -> tuple[Tensor, Tensor]:
    """Embedding and head, float32 [V, D] each, whose product is near the text's log-bigram probabilities.

    A head row times a normalized embedding row approximates log P(next | previous): the first dimension carries the
    unigram part, the others the largest components of the pointwise mutual information.
    """
    vocab = settings.vocab_size
    counts = torch.zeros(vocab, vocab)
    counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
    unigram = (counts.sum(0) + 0.5) / (counts.sum() + 0.5 * vocab)
    smoothed = counts + settings.smoothing * unigram
    information = (smoothed / smoothed.sum(1, keepdim=True) / unigram).log()
    weight = counts.sum(1).clamp(min=0.1).sqrt().unsqueeze(1)
    left, values, right = torch.linalg.svd(information * weight)
    rank = settings.hidden - 1
    rows = left[:, :rank] * values[:rank].sqrt() / weight
    columns = right[:rank].T * values[:rank].sqrt()
    # the norm divides each row by its root mean square; a constant first entry keeps the rows' lengths alike
    length = rows.norm(dim=1).quantile(0.9)
    embedding = torch.cat([length.expand(vocab, 1), rows], dim=1)
    scale = (2 * length**2 / settings.hidden).sqrt()
    head = torch.cat([(unigram.log() - unigram.log().mean()).unsqueeze(1) / length, columns], dim=1) * scale
    return embedding / scale, head


def train(ids: Tensor, settings: NanoSettings, progress: Progress) -> MistralForCausalLM:
    """A model trained on one stream of token ids, rounded to bfloat16.

    Args:
        ids: int64, documents in file order, each with BOS and EOS.
        progress: told every step.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = MistralForCausalLM(_config(settings))
    with torch.no_grad():
        model.model.embed_tokens.weight, model.lm_head.weight = (
            nn.Parameter(table) for table in bigram_start(ids, settings)
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=settings.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=settings.steps, pct_start=min(0.1, 2 / settings.steps + 0.05)
    )
    model.train()
    for step in range(settings.steps):
        inputs, targets = _batch(ids, settings, generator)
        logits = model(inputs).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress("train bielik-nano", step + 1, settings.steps)
    return model.eval().bfloat16()


def _batch(ids: Tensor, settings: NanoSettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] from random places; some inputs are noise, every window starts with BOS."""
    length = settings.window_tokens
    starts = torch.randint(0, len(ids) - length, (settings.windows, 1), generator=generator)
    targets = ids[starts + torch.arange(length)]
    inputs = targets.roll(1, dims=1)
    noise = torch.rand(inputs.shape, generator=generator) < settings.noise
    drawn = ids[torch.randint(0, len(ids), inputs.shape, generator=generator)]
    inputs = torch.where(noise, drawn, inputs)
    inputs[:, 0] = 1
    return inputs, targets


def _config(settings: NanoSettings) -> MistralConfig:
    return MistralConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=settings.context,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


def save(model: MistralForCausalLM, folder: Path) -> None:
    """Write two shards with an index, config.json readable by old and new readers, and generation_config.json."""
    size = sum(tensor.numel() for tensor in model.parameters()) * 2
    model.save_pretrained(folder, max_shard_size=size * 11 // 20)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    _write_json(path, config | {"rope_theta": rope["rope_theta"], "torch_dtype": "bfloat16", "dtype": "bfloat16"})


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
