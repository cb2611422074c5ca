"""A checkpoint's tokenizer as GGUF metadata: SentencePiece with byte fallback, or byte-level BPE.

llama.cpp tokenizes by itself from these keys, so a wrong one silently changes the ids. What is not known is an error.
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.index import read_json
from quantkit.errors import RefusedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0
SENTENCEPIECE_BPE = 2
SPACE = "▁"
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = _LETTERS + r"\p{N}{1,3}" + _REST
_ONE_DIGIT = _LETTERS + r"\p{N}" + _REST
OWN_PATTERN, DIGITS = "ByteLevel", "Digits"


@dataclass(frozen=True)
class Splitting:
    """All that llama.cpp ties to the name of a pre-tokenizer.

    Attributes:
        steps: patterns that tokenizer.json splits by, in order; `OWN_PATTERN` is the byte level's own, `DIGITS` takes
            digits one by one.
        ignore_merges: a split piece that the vocabulary holds is taken whole, whatever the merges say.
    """

    steps: tuple[str, ...]
    ignore_merges: bool = False


PRE_TOKENIZERS = {
    Splitting((OWN_PATTERN,)): "gpt-2",
    Splitting((_THREE_DIGITS,), ignore_merges=True): "llama-bpe",
    Splitting((_THREE_DIGITS,)): "smaug-bpe",
    Splitting((_ONE_DIGIT,)): "qwen2",
    Splitting((DIGITS, OWN_PATTERN)): "smollm",
}
"""`tokenizer.ggml.pre`. llama.cpp's converter finds it by a hash of token ids, which each new vocabulary changes; these
are the rules themselves."""
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# of tokenizer.json's BPE: what neither of llama.cpp's tokenizers has
UNKNOWN_TO_BPE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
PLACED = ("lstrip", "rstrip", "single_word")


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
        pieces, prefix = _sentencepiece(folder / "tokenizer.model", alone=not fast)
        if fast:
            prefix = _prepends(fast, folder)
            _require_same_pieces(pieces, fast, folder)
        kind, pre = "llama", "default"
    elif _is_byte_fallback(fast):
        pieces, prefix = _byte_fallback(fast, folder), _prepends(fast, folder)
        kind, pre = "llama", "default"
    else:
        pieces, merges, prefix = _byte_level(fast, folder), _merges(fast), None
        kind, pre = "gpt2", pre_tokenizer(fast, folder)
    _require_plain_added(fast, settings, folder, kind)
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
    ids: dict[str, int] = {}
    for token, (text, _, _) in sorted(pieces.items()):
        if (before := ids.setdefault(text, token)) != token:
            raise _unlike([f"tokens {before} and {token} are both {text!r}"], folder / "tokenizer.json")
    special = _special(settings, config, ids)
    if kind == "llama" and (unknown := pieces.get(special.get("unknown", -1))):
        pieces[special["unknown"]] = (unknown[0], unknown[1], UNKNOWN)
    if kind == "llama":
        # llama.cpp looks for these in the text before it puts its mark in the place of spaces
        pieces |= {
            token: (text.replace(SPACE, " "), score, number)
            for token, (text, score, number) in pieces.items()
            if number == USER_DEFINED
        }
    full = [pieces.get(token, (f"[PAD{token}]", UNUSED_SCORE, UNUSED)) for token in range(num_rows)]
    ends = {key: full[token][0] for key, token in special.items()}
    add_bos, add_eos = _added_at_ends(fast, settings, kind, ends, folder)
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


def _sentencepiece(path: Path, *, alone: bool) -> tuple[Pieces, bool]:
    """Pieces, and whether a text gets a space in front.

    Args:
        path: tokenizer.model.
        alone: no tokenizer.json is there, so that the file alone says how text is normalized.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise RefusedError("tokenizer.model is damaged", where=str(path), fix="download it again") from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != SENTENCEPIECE_BPE:
        raise RefusedError(
            "tokenizer.model is not of SentencePiece's BPE kind",
            where=str(path),
            fix="GGUF's `llama` tokenizer merges by scores, which only that kind has",
        )
    problems = [
        problem
        for holds, problem in (
            (normalizer.precompiled_charsmap, f"it normalizes text by {normalizer.name or 'a rule of its own'}"),
            (alone and normalizer.remove_extra_whitespaces, "it removes extra spaces (remove_extra_whitespaces)"),
            (not normalizer.escape_whitespaces, "it leaves spaces as they are (escape_whitespaces is off)"),
            (trainer.treat_whitespace_as_suffix, "it puts spaces behind words (treat_whitespace_as_suffix)"),
            (not trainer.byte_fallback, "it has no byte fallback"),
        )
        if holds
    ]
    if problems:
        raise _unlike(problems, path)
    # the types have the same numbers in both
    pieces = {token: (piece.piece, piece.score, int(piece.type)) for token, piece in enumerate(model.pieces)}
    return pieces, bool(normalizer.add_dummy_prefix)


def _unlike(problems: list[str], path: Path) -> RefusedError:
    """What to raise where llama.cpp's tokenizer would not do what the checkpoint's does."""
    return RefusedError(
        f"llama.cpp would split text into other tokens than {path.name} does: " + "; ".join(problems),
        where=str(path),
        fix="no key of GGUF says this; publish the model in another format, or with a tokenizer that does without",
    )


def _require_same_pieces(pieces: Pieces, fast: dict[str, Any], folder: Path) -> None:
    """Stop where tokenizer.model and tokenizer.json, which transformers goes by, have other pieces."""
    if not _is_byte_fallback(fast):
        raise RefusedError(
            "tokenizer.model is a SentencePiece model, tokenizer.json none with byte fallback",
            where=str(folder),
            fix="they are of different models; download both again",
        )
    of_id = {token: text for text, token in fast["model"]["vocab"].items()}
    other = [token for token, (text, _, _) in pieces.items() if of_id.get(token, text) != text]
    if other:
        raise RefusedError(
            f"token {other[0]} is {pieces[other[0]][0]!r} in tokenizer.model and {of_id[other[0]]!r} in tokenizer.json",
            where=str(folder),
            fix="they are of different models; download both again",
        )


def _is_byte_fallback(fast: dict[str, Any]) -> bool:
    model = fast.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def _byte_fallback(fast: dict[str, Any], folder: Path) -> Pieces:
    """Pieces of a SentencePiece model that is there as tokenizer.json only.

    llama.cpp merges the pair whose joint piece has the highest score; tokenizer.json the pair that stands first among
    its merges. So the score is minus the rank of the first merge that makes a piece, which is the same order if every
    pair that makes a piece is a merge, and those of one piece stand together.
    """
    model = fast["model"]
    pairs = _pairs(model["merges"])
    made: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        made.setdefault("".join(pair), rank)
    problems = _odd_bpe(model) + (["ignore_merges is on"] if model.get("ignore_merges") else [])
    if sum("".join(one) != "".join(other) for one, other in itertools.pairwise(pairs)) >= max(len(made), 1):
        problems.append("merges of one piece stand apart")
    known, merges = model["vocab"], {tuple(pair) for pair in pairs}
    absent = [
        f"{text[:cut]} {text[cut:]}"
        for text in made
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known and (text[:cut], text[cut:]) not in merges
    ]
    if absent:
        problems.append(f"{len(absent)} pair(s) make a piece but are no merge, such as {absent[0]!r}")
    pieces: Pieces = {}
    for text, token in known.items():
        if BYTE_PIECE.fullmatch(text):
            pieces[token] = (text, 0.0, BYTE)
        else:
            pieces[token] = (text, -float(made.get(text, len(made))), NORMAL)
    if (count := sum(number == BYTE for _, _, number in pieces.values())) != 256:
        problems.append(f"{count} of 256 bytes have a token")
    if problems:
        raise _unlike(problems, folder / "tokenizer.json")
    return pieces


def _odd_bpe(model: dict[str, Any]) -> list[str]:
    """What tokenizer.json's BPE does that llama.cpp's does not."""
    return [f"{key} is {model[key]!r}" for key in UNKNOWN_TO_BPE if model.get(key)]


def _prepends(fast: dict[str, Any], folder: Path) -> bool:
    """Whether tokenizer.json puts a space in front of a text.

    Of Metaspace's schemes, "first" is taken as "always": llama.cpp has one way, a space behind special tokens too.

    Raises:
        RefusedError: it does anything else to a text, or splits it.
    """
    normalizers = _flat(fast.get("normalizer"), "normalizers")
    splitters = _flat(fast.get("pre_tokenizer"), "pretokenizers")
    if not splitters and normalizers in ([PREPEND, REPLACE], [REPLACE]):
        return PREPEND in normalizers
    if not normalizers and len(splitters) == 1 and splitters[0].get("type") == "Metaspace":
        (step,) = splitters
        if step.get("replacement") == SPACE and step.get("split") is False:
            return bool(step.get("prepend_scheme") != "never")
    found = json.dumps({key: fast.get(key) for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)
    raise _unlike([f"it prepares text by {found[:400]}"], folder / "tokenizer.json")


def _byte_level(fast: dict[str, Any], folder: Path) -> Pieces:
    from tokenizers.pre_tokenizers import ByteLevel

    model = fast.get("model") or {}
    if model.get("type") != "BPE":
        raise RefusedError(
            f"GGUF has no tokenizer of the kind {model.get('type')!r}",
            where=str(folder / "tokenizer.json"),
            fix="SentencePiece BPE (tokenizer.model) and byte-level BPE can be written",
        )
    absent = sum(letter not in model["vocab"] for letter in ByteLevel.alphabet())
    if problems := _odd_bpe(model) + ([f"{absent} of 256 bytes have no token"] if absent else []):
        raise _unlike(problems, folder / "tokenizer.json")
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
    last = steps[-1] if steps else {}
    known = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    found = [_pattern(step) for step in steps[:-1]] + ([OWN_PATTERN] if last.get("use_regex", True) else [])
    # llama.cpp normalizes nothing; NFC, which Qwen asks for, changes only text with combining accents
    known = known and all(step.get("type") == "NFC" for step in _flat(fast.get("normalizer"), "normalizers"))
    splitting = Splitting(tuple(found), bool((fast.get("model") or {}).get("ignore_merges")))
    name = PRE_TOKENIZERS.get(splitting) if known else None
    if name is None:
        shown: dict[str, Any] = {"ignore_merges": splitting.ignore_merges}
        shown |= {key: fast.get(key) for key in ("normalizer", "pre_tokenizer")}
        raise RefusedError(
            "the tokenizer splits text in a way that quantkit has no llama.cpp name for: "
            + json.dumps(shown, ensure_ascii=False)[:400],
            where=str(folder / "tokenizer.json"),
            fix="add its patterns with llama.cpp's name for them to PRE_TOKENIZERS in "
            "quantkit/formats/gguf/tokenizer.py, and compare token ids with llama.cpp's on text of every kind",
        )
    return name


def _pattern(step: dict[str, Any]) -> str:
    """What one step before the bytes splits by; empty, which no table has, for what is not a plain split."""
    if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", ""))
    return DIGITS if step.get("type") == "Digits" and step.get("individual_digits") else ""


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return list(step[inner]) if step.get("type") == "Sequence" else [step]


def _added(fast: dict[str, Any], settings: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Text and whether it is special, of tokens beside the model's own, by id."""
    found = {int(token): entry for token, entry in (settings.get("added_tokens_decoder") or {}).items()}
    found |= {int(entry["id"]): entry for entry in fast.get("added_tokens") or []}
    return {token: (str(entry["content"]), bool(entry.get("special"))) for token, entry in found.items()}


def _require_plain_added(fast: dict[str, Any], settings: dict[str, Any], folder: Path, kind: str) -> None:
    """Stop at added tokens that are found in a text otherwise than llama.cpp finds them: as they are, anywhere."""
    entries = [*(settings.get("added_tokens_decoder") or {}).values(), *(fast.get("added_tokens") or [])]
    problems = [f"{entry['content']!r} has {key} = true" for entry in entries for key in PLACED if entry.get(key)]
    if kind == "llama" and _flat(fast.get("normalizer"), "normalizers"):
        # it would be looked for behind a space only, as the normalizer writes it
        problems += [f"{entry['content']!r} has normalized = true" for entry in entries if entry.get("normalized")]
    if problems:
        raise _unlike(list(dict.fromkeys(problems)), folder / ("tokenizer.json" if fast else "tokenizer_config.json"))


def _added_at_ends(
    fast: dict[str, Any], settings: dict[str, Any], kind: str, ends: dict[str, str], folder: Path
) -> tuple[bool, bool]:
    """Whether a text gets the start token in front, and the end token behind.

    Args:
        ends: texts of the two, by "bos" and "eos".
        fast, settings, kind, folder: the tokenizer.

    Raises:
        RefusedError: it gets something else.
    """
    if not fast:
        return bool(settings.get("add_bos_token", kind == "llama")), bool(settings.get("add_eos_token", False))
    steps = [step for step in _flat(fast.get("post_processor"), "processors") if step.get("type") != "ByteLevel"]
    if not steps:
        return False, False
    around = steps[0].get("single") if len(steps) == 1 and steps[0].get("type") == "TemplateProcessing" else None
    texts = [(part.get("SpecialToken") or {}).get("id") for part in around or []]
    for bos, eos in itertools.product((False, True), repeat=2):
        if texts == [ends.get("bos", "")] * bos + [None] + [ends.get("eos", "")] * eos:
            return bos, eos
    shown = json.dumps(steps, ensure_ascii=False)[:300]
    raise _unlike([f"it puts tokens around a text: {shown}"], folder / "tokenizer.json")


def _special(settings: dict[str, Any], config: dict[str, Any], ids: dict[str, int]) -> dict[str, int]:
    """Ids of special tokens: as the tokenizer names them, else as config.json does."""
    found = {}
    for key, token_name in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items():
        named = settings.get(f"{token_name}_token")
        text = named.get("content") if isinstance(named, dict) else named
        token = ids.get(text) if text else config.get(f"{token_name}_token_id")
        if isinstance(token, list):
            token = token[0]
        # some say -1 where there is none
        if token is not None and int(token) >= 0:
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
