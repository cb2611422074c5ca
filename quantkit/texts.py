"""Named sets of Polish text, and files of one's own, with hashes and splits.

`polish-core` and `polish-plus` ship with quantkit, whole and without their chats. The others are fetched by name at run
time, at a pinned commit where one is known.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import RefusedError
from quantkit.files import sha256_of
from quantkit.home import shipped
from quantkit.hub import HubText, fetch_text_files

Split = Literal["calibration", "validation"]


@dataclass(frozen=True)
class ShippedText:
    """A set that travels with quantkit.

    Attributes:
        files: of each split.
        chats: documents that are chats are in it; a model without a chat template can be given no such.
    """

    files: dict[str, str]
    chats: bool = True


CORE = {"calibration": "calibration.jsonl", "validation": "validation.jsonl"}
PLUS = {"calibration": "plus.jsonl"}
SHIPPED = {
    "polish-core": ShippedText(CORE),
    "polish-core-documents": ShippedText(CORE, chats=False),
    "polish-plus": ShippedText(PLUS),
    "polish-plus-documents": ShippedText(PLUS, chats=False),
}
MOST_DOCUMENTS = 20_000  # taken from a fetched set; more than any recipe uses
COMMIT = re.compile("[0-9a-f]{40}")  # behind the @ of a name
BOM = "\ufeff"  # what some editors begin a file with; no part of its text


def _either(*files: str) -> dict[str, tuple[str, ...]]:
    """Files of a set that is one piece."""
    return {"calibration": files, "validation": files}


# sets by name that are fetched; files are taken in order until there are enough documents
HUB_TEXTS = {
    "nkjp1m": HubText(
        "ipipan/nkjp1m",
        {
            "calibration": ("nkjp1m_train.jsonl.gz",),
            "validation": ("nkjp1m_test.jsonl.gz", "nkjp1m_dev.jsonl.gz"),
        },
        licence="CC-BY-4.0",
        # its only upload so far
        revision="20b5dcbdbc4776c1412131c0b06b319eac97ef8b",
    ),
    "wikipedia-pl": HubText("wikimedia/wikipedia", _either("20231101.pl/*.parquet"), licence="CC-BY-SA-3.0 and GFDL"),
    "poleval2018": HubText("enelpol/poleval2018_task3_test_10k", _either("*corpus.txt"), licence="none stated"),
}


@dataclass(frozen=True)
class Document:
    """One document: plain `text`, or chat `messages` (role and content) to be rendered with the model's template."""

    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    register: str = ""

    @property
    def content(self) -> str:
        """The words alone, for counting and hashing."""
        return self.text or "\n".join(content for _, content in self.messages)


@dataclass(frozen=True)
class TextSet:
    """Documents under a name.

    Attributes:
        name: a set's name as the recipe has it, or the file's name for one's own text.
        sha256: of the files it was read from; of a file's hash and what was left out for a part of one.
        documents: in file order.
        revision: commit on the Hub, for fetched sets.
    """

    name: str
    sha256: str
    documents: tuple[Document, ...]
    revision: str | None = None


def load_text_set(name: str, split: Split) -> TextSet:
    """A text set by name or path.

    Args:
        name: a name of `SHIPPED` or `HUB_TEXTS`, the latter with `@` and a commit hash where a recipe pins it, or the
            path of a .jsonl or .txt file, which may be packed with gzip.
        split: which half of a set that has two; other sets are one piece.

    Raises:
        RefusedError: unknown name, invalid UTF-8, a malformed line, or nothing in it.
        UnavailableError: the set must be fetched and cannot be.
    """
    require_known(name, split)
    if _on_hub(name):
        return _fetched(name, split)
    path = _path(name, split)
    documents = read_documents(path)
    if name not in SHIPPED:
        return TextSet(path.name, sha256_of(path), tuple(documents))
    wanted = (document for document in documents if SHIPPED[name].chats or not document.messages)
    return TextSet(name, _shipped_sha256(name, split), tuple(wanted))


def _on_hub(name: str) -> bool:
    return name.partition("@")[0] in HUB_TEXTS


def _path(name: str, split: Split) -> Path:
    return shipped("calibration") / SHIPPED[name].files[split] if name in SHIPPED else Path(name)


def _shipped_sha256(name: str, split: Split) -> str:
    whole = sha256_of(_path(name, split))
    return whole if SHIPPED[name].chats else hashlib.sha256(f"{whole} without chats".encode()).hexdigest()


def require_known(name: str, split: Split, *, where: str = "") -> None:
    """Stop at a name that means no text set; nothing is read or fetched.

    Args:
        name: of a text set, or a file.
        split: the half of it that is wanted.
        where: the name stands, if not in the recipe.

    Raises:
        RefusedError: no set and no file of that name, a set without that half, or what is behind @ is no commit.
    """
    where = where or f"{split}.texts"
    base, at, revision = name.partition("@")
    if base in HUB_TEXTS:
        if at and not COMMIT.fullmatch(revision):
            raise RefusedError(
                f"{name!r} does not name a commit", where=where, fix=f"write {base}@ and the 40 hex digits of one"
            )
        return
    if name in SHIPPED:
        if split not in SHIPPED[name].files:
            fix = "use polish-core, or polish-core-documents"
            raise RefusedError(f"the text set {name} has no {split} half", where=where, fix=fix)
        return
    # unlike Path's, os's test has an answer for what can be no path, such as a name that is too long
    if Path(name).name.removesuffix(".gz").endswith((".jsonl", ".txt")) and os.path.isfile(name):
        return
    known = ", ".join([*SHIPPED, *HUB_TEXTS])
    raise RefusedError(
        f"no text set {name!r}",
        where=where,
        fix=f"use one of {known}, or the path of a .jsonl or .txt file that exists",
    )


def at_hand(name: str) -> bool:
    """Whether a text set need not be fetched."""
    return name in SHIPPED or own_text(name)


def own_text(name: str) -> bool:
    """Whether a name means a file of one's own, so that its content alone says which text it is."""
    return name not in SHIPPED and not _on_hub(name)


def known_sha256(name: str, split: Split) -> str | None:
    """The hash that `load_text_set` gives; None for a set that it would fetch or refuse for its name."""
    if _on_hub(name):
        return None
    try:
        require_known(name, split)
    except RefusedError:
        return None
    return _shipped_sha256(name, split) if name in SHIPPED else sha256_of(_path(name, split))


def joined_sha256(hashes: Sequence[str]) -> str:
    """The hash of text sets that are judged together, from theirs."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a file, which may be packed with gzip.

    * .jsonl: each line a document with `text` or `messages`, or a sentence with `tokens`, of which a text's
      consecutive ones are put together;
    * .parquet: each row's `text`;
    * .txt: one document of plain text; one per line where the name ends in `corpus.txt`, as PolEval's does.

    Raises:
        RefusedError: naming file and line.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        documents = _from_parquet(path)
    else:
        try:
            text = _unpacked(path).decode("utf-8").removeprefix(BOM)
        except UnicodeDecodeError as error:
            raise RefusedError(
                f"not valid UTF-8 at byte {error.start}", where=str(path), fix="save the file as UTF-8"
            ) from None
        content = text.replace("\r\n", "\n").replace("\r", "\n")
        # not splitlines: JSON strings and prose may hold other characters that it breaks lines at
        lines = content.split("\n")
        if name.endswith(".jsonl"):
            documents = iter(_from_json_lines(lines, str(path)))
        elif name.endswith("corpus.txt"):
            documents = (Document(line) for line in lines if line.strip())
        else:
            documents = iter([Document(content.strip())] if content.strip() else [])
    first = next(documents, None)
    if first is None:
        raise RefusedError("there is no text in it", where=str(path), fix="give a file with at least one document")
    yield first
    yield from documents


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise RefusedError(
            f"it cannot be unpacked: {error}", where=str(path), fix="it is truncated or damaged; get it again"
        ) from None


def _from_json_lines(lines: list[str], path: str) -> list[Document]:
    """Documents of JSONL; consecutive sentences of one source text are one."""
    entries = [
        (f"{path}:{number}", _entry(line, f"{path}:{number}")) for number, line in enumerate(lines, 1) if line.strip()
    ]
    documents = []
    for text_id, group in groupby(entries, key=lambda found: _source_text(found[1])):
        if text_id is None:
            documents += [_document(entry, where) for where, entry in group]
        else:
            documents.append(Document(_running_text([_sentence(entry, where) for where, entry in group])))
    return documents


def _entry(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    # no JSON, a number of thousands of digits, or nested more deeply than Python reads
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise _no_document(where)
    return entry


def _source_text(entry: dict[str, Any]) -> str | None:
    """Which text a sentence of NKJP is from; None for what is no such sentence."""
    text_id = entry.get("nkjp_text") if "tokens" in entry else None
    return text_id if isinstance(text_id, str) else None


def _document(entry: dict[str, Any], where: str) -> Document:
    register = str(entry.get("register", ""))
    if "messages" in entry:
        turns = _turns(entry["messages"], where)
        _require_unicode((part for turn in turns for part in turn), where)
        return Document(messages=turns, register=register)
    if "tokens" in entry:
        return Document(_sentence(entry, where).text, register=register)
    text = entry.get("text")
    if not isinstance(text, str) or not text.strip():
        raise _no_document(where)
    _require_unicode([text], where)
    return Document(text, register=register)


def _turns(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    """(role, content) of each message of a chat."""
    try:
        turns = tuple((turn["role"], turn["content"]) for turn in messages)
    except (KeyError, TypeError):
        turns = ()
    if not turns or not all(isinstance(part, str) for turn in turns for part in turn):
        raise _no_document(where)
    return turns


def _require_unicode(texts: Iterable[str], where: str) -> None:
    """Stop at half of a surrogate pair: JSON can escape one, but no tokenizer takes it."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise RefusedError(
            f"not valid Unicode text: \\u{half:04x} is half of a surrogate pair",
            where=where,
            fix="write the whole character, or leave it out",
        ) from None


def _no_document(where: str) -> RefusedError:
    fix = 'a line must be {"text": "..."} or {"messages": [{"role": ..., "content": ...}, ...]}'
    return RefusedError("the line is not a document", where=where, fix=fix)


@dataclass(frozen=True)
class _Sentence:
    """`follows_on`: nothing stands between it and the sentence before it."""

    text: str
    paragraph: str | None
    follows_on: bool


def _sentence(entry: dict[str, Any], where: str) -> _Sentence:
    """A tokenized sentence as it was written: `nps` says of each token that no space precedes it."""
    tokens, glued = entry["tokens"], entry.get("nps")
    if (
        not isinstance(tokens, list)
        or not isinstance(glued, list)
        or not all(isinstance(token, str) for token in tokens)
        or not tokens
        or len(tokens) != len(glued)
    ):
        raise RefusedError(
            "the line is not a tokenized sentence",
            where=where,
            fix='it must have "tokens": [...] and "nps": [...] of the same length, true where no space precedes',
        )
    _require_unicode(tokens, where)
    text = "".join(token if near else f" {token}" for token, near in zip(tokens, glued, strict=True))
    return _Sentence(text.strip(), entry.get("nkjp_par"), bool(glued[0]))


def _running_text(sentences: list[_Sentence]) -> str:
    """Sentences of one text in a row, a line for each paragraph."""
    text = sentences[0].text
    for before, after in pairwise(sentences):
        between = "\n" if after.paragraph != before.paragraph else "" if after.follows_on else " "
        text += between + after.text
    return text


def _from_parquet(path: Path) -> Iterator[Document]:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches(batch_size=256, columns=["text"]):
        for text in batch.column("text").to_pylist():
            if text and text.strip():
                yield Document(text)


def _fetched(name: str, split: Split) -> TextSet:
    base, _, revision = name.partition("@")
    documents: list[Document] = []
    digest = hashlib.sha256()
    commit = None
    for fetched in fetch_text_files(HUB_TEXTS[base], split, revision or None):
        commit = fetched.revision
        digest.update(sha256_of(fetched.path).encode())
        # of a large file no more than that is read
        documents += islice(read_documents(fetched.path), MOST_DOCUMENTS - len(documents))
        if len(documents) == MOST_DOCUMENTS:
            break
    assert documents, "a file without a document is refused, and so is a set without a file"
    return TextSet(name, digest.hexdigest(), tuple(documents), commit)
