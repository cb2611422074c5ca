"""A checkpoint's tokenizer as GGUF metadata: SentencePiece with byte fallback, or byte-level BPE.

llama.cpp tokenizes by itself from these keys, so a wrong one silently changes the ids. What is not known is an error.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.index import read_json
from quantkit.errors import RefusedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0
SENTENCEPIECE_BPE = 2
SPACE = "▁"

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    (): "gpt-2",  # ByteLevel with its own pattern alone
    (_LETTERS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_LETTERS + r"\p{N}" + _REST,): "qwen2",
    ("digits",): "smollm",
}
"""`tokenizer.ggml.pre` by the patterns that tokenizer.json splits by, in order, before the bytes."""


@dataclass(frozen=True)
class Vocabulary:
    """What goes under `tokenizer.*`.

    Attributes:
        model: "llama" (SentencePiece) or "gpt2" (byte-level BPE).
        pre: name of the pre-tokenizer.
        tokens, types: one per row of the embedding.
        scores: likewise; None for byte-level BPE.
        merges: None for SentencePiece.
        special: ids by key, such as {"bos": 1}.
        add_bos, add_eos: whether a text gets them.
        add_space_prefix: whether a text gets a space in front; None for byte-level BPE.
        chat_template: None where the model has none.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str | None


def vocabulary(folder: Path, config: dict[str, Any], num_rows: int) -> Vocabulary:
    """The tokenizer of a checkpoint's folder.

    Args:
        folder: the checkpoint.
        config: its config.json.
        num_rows: of the embedding; ids that the tokenizer leaves out become unused tokens.

    Raises:
        RefusedError: it is of a kind, or splits text in a way, that llama.cpp is not known to have.
    """
    fast = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else {}
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    merges = None
    if (folder / "tokenizer.model").exists():
        pieces, prefix = _sentencepiece(folder / "tokenizer.model")
        kind, pre = "llama", "default"
    elif _is_byte_fallback(fast):
        pieces, prefix = _byte_fallback(fast), _prepends(fast)
        kind, pre = "llama", "default"
    else:
        pieces, merges, prefix = _byte_level(fast, folder), _merges(fast), None
        kind, pre = "gpt2", pre_tokenizer(fast, folder)
    for token, (text, is_special) in _added(fast, settings).items():
        known = pieces.get(token)
        if known is None or (known[0] == text and known[2] == NORMAL):
            pieces[token] = (text, ADDED_SCORE, CONTROL if is_special else USER_DEFINED)
    if pieces and max(pieces) >= num_rows:
        raise RefusedError(
            f"the tokenizer has an id {max(pieces)}, the embedding {num_rows} rows",
            where=str(folder),
            fix="tokenizer and weights are of different models; download both again",
        )
    special = _special(settings, config, {text: token for token, (text, _, _) in pieces.items()})
    if kind == "llama" and (unknown := pieces.get(special.get("unknown", -1))):
        pieces[special["unknown"]] = (unknown[0], unknown[1], UNKNOWN)
    full = [pieces.get(token, (f"[PAD{token}]", UNUSED_SCORE, UNUSED)) for token in range(num_rows)]
    add_bos, add_eos = _added_at_ends(fast, settings, kind)
    return Vocabulary(
        kind,
        pre,
        [text for text, _, _ in full],
        [number for _, _, number in full],
        [score for _, score, _ in full] if kind == "llama" else None,
        merges,
        special,
        add_bos,
        add_eos,
        prefix,
        _chat_template(folder, settings),
    )


Pieces = dict[int, tuple[str, float, int]]
"""Text, score and type by id."""


def _sentencepiece(path: Path) -> tuple[Pieces, bool]:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise RefusedError("tokenizer.model is damaged", where=str(path), fix="download it again") from None
    if model.trainer_spec.model_type != SENTENCEPIECE_BPE:
        raise RefusedError(
            "tokenizer.model is not of SentencePiece's BPE kind",
            where=str(path),
            fix="GGUF's `llama` tokenizer merges by scores, which only that kind has",
        )
    # the types have the same numbers in both
    pieces = {token: (piece.piece, piece.score, int(piece.type)) for token, piece in enumerate(model.pieces)}
    return pieces, bool(model.normalizer_spec.add_dummy_prefix)


def _is_byte_fallback(fast: dict[str, Any]) -> bool:
    model = fast.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def _byte_fallback(fast: dict[str, Any]) -> Pieces:
    """Pieces of a SentencePiece model that is there as tokenizer.json only.

    llama.cpp merges the pair whose joint piece has the highest score; tokenizer.json the pair that stands first among
    its merges. So the score is minus the rank of the first merge that makes a piece.
    """
    model = fast["model"]
    made: dict[str, int] = {}
    for rank, pair in enumerate(_pairs(model["merges"])):
        made.setdefault("".join(pair), rank)
    pieces: Pieces = {}
    for text, token in model["vocab"].items():
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            pieces[token] = (text, 0.0, BYTE)
        else:
            pieces[token] = (text, -float(made.get(text, len(made))), NORMAL)
    return pieces


def _prepends(fast: dict[str, Any]) -> bool:
    """Whether tokenizer.json puts a space in front of a text."""
    normalizers = _flat(fast.get("normalizer"), "normalizers")
    if any(step.get("type") == "Prepend" for step in normalizers):
        return True
    splitters = _flat(fast.get("pre_tokenizer"), "pretokenizers")
    return any(step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never" for step in splitters)


def _byte_level(fast: dict[str, Any], folder: Path) -> Pieces:
    model = fast.get("model") or {}
    if model.get("type") != "BPE":
        raise RefusedError(
            f"GGUF has no tokenizer of the kind {model.get('type')!r}",
            where=str(folder / "tokenizer.json"),
            fix="SentencePiece BPE (tokenizer.model) and byte-level BPE can be written",
        )
    return {token: (text, 0.0, NORMAL) for text, token in model["vocab"].items()}


def _merges(fast: dict[str, Any]) -> list[str]:
    # a space inside a piece, which only added tokens have, is spelled as the byte alphabet spells it
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _pairs(fast["model"]["merges"])]


def _pairs(merges: list[Any]) -> list[list[str]]:
    """tokenizer.json writes a merge as a pair, older ones as "a b"."""
    return [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in merges]


def pre_tokenizer(fast: dict[str, Any], folder: Path) -> str:
    """The name under which llama.cpp splits text as tokenizer.json does.

    Raises:
        RefusedError: there is none in the table.
    """
    steps = _flat(fast.get("pre_tokenizer"), "pretokenizers")
    patterns: list[str] = []
    known = bool(steps) and steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space")
    for step in steps[:-1]:
        if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"].get("Regex", ""))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append("digits")
        else:
            known = False
    # llama.cpp normalizes nothing; NFC, which Qwen asks for, changes only text with combining accents
    known = known and all(step.get("type") == "NFC" for step in _flat(fast.get("normalizer"), "normalizers"))
    # with a pattern of its own the byte level splits once more
    own = bool(steps) and steps[-1].get("use_regex", True)
    name = PRE_TOKENIZERS.get(tuple(patterns)) if known else None
    if name is None or own != (name in ("gpt-2", "smollm")):
        raise RefusedError(
            "the tokenizer splits text in a way that quantkit has no llama.cpp name for: "
            + json.dumps({key: fast.get(key) for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)[:400],
            where=str(folder / "tokenizer.json"),
            fix="add its patterns with llama.cpp's name for them to PRE_TOKENIZERS in "
            "quantkit/formats/gguf/tokenizer.py, and compare token ids with llama.cpp's on text of every kind",
        )
    return name


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return list(step[inner]) if step.get("type") == "Sequence" else [step]


def _added(fast: dict[str, Any], settings: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Text and whether it is special, of tokens beside the model's own, by id."""
    found = {int(token): entry for token, entry in (settings.get("added_tokens_decoder") or {}).items()}
    found |= {int(entry["id"]): entry for entry in fast.get("added_tokens") or []}
    return {token: (str(entry["content"]), bool(entry.get("special"))) for token, entry in found.items()}


def _added_at_ends(fast: dict[str, Any], settings: dict[str, Any], kind: str) -> tuple[bool, bool]:
    if fast:
        for step in _flat(fast.get("post_processor"), "processors"):
            if step.get("type") == "TemplateProcessing":
                single = step["single"]
                return "SpecialToken" in single[0], "SpecialToken" in single[-1]
        return False, False
    return bool(settings.get("add_bos_token", kind == "llama")), bool(settings.get("add_eos_token", False))


def _special(settings: dict[str, Any], config: dict[str, Any], ids: dict[str, int]) -> dict[str, int]:
    """Ids of special tokens: as the tokenizer names them, else as config.json does."""
    found = {}
    for key, token_name in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items():
        named = settings.get(f"{token_name}_token")
        text = named.get("content") if isinstance(named, dict) else named
        token = ids.get(text) if text else config.get(f"{token_name}_token_id")
        if isinstance(token, list):
            token = token[0]
        if token is not None:
            found[key] = int(token)
    return found


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template
