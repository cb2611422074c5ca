"""Named sets of Polish text, and files of one's own, with hashes and splits.

`polish-core` and `polish-plus` ship with quantkit. The others are fetched by name at run time, at a pinned commit where
one is known.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantkit.errors import RefusedError
from quantkit.home import shipped
from quantkit.hub import HubText, fetch_text_files

Split = Literal["calibration", "validation"]

# sets that travel with quantkit: the file of each split
SHIPPED: dict[str, dict[str, str]] = {
    "polish-core": {"calibration": "calibration.jsonl", "validation": "validation.jsonl"},
    "polish-plus": {"calibration": "plus.jsonl"},
}
MOST_DOCUMENTS = 20_000  # taken from a fetched set; more than any recipe uses

# sets by name that are fetched; `files` are taken in order until there are enough documents
HUB_TEXTS = {
    "nkjp1m": HubText("ipipan/nkjp1m", ("*.parquet", "*.jsonl", "*.tsv"), licence="CC-BY-4.0"),
    "wikipedia-pl": HubText("wikimedia/wikipedia", ("20231101.pl/*.parquet",), licence="CC-BY-SA-3.0 and GFDL"),
    "poleval2018": HubText("enelpol/poleval2018_task3_test_10k", ("*corpus.txt",), licence="none stated"),
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
        name: a set's name, or the file's name for one's own text.
        sha256: of the files it was read from.
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
        name: a name of `SHIPPED` or `HUB_TEXTS`, or the path of a .jsonl or .txt file.
        split: which half of a shipped set; other sets are one piece.

    Raises:
        RefusedError: unknown name, invalid UTF-8, a malformed line, or nothing in it.
        UnavailableError: the set must be fetched and cannot be.
    """
    if name in SHIPPED:
        if split not in SHIPPED[name]:
            raise RefusedError(f"the text set {name} has no {split} half", fix="use polish-core")
        path = shipped("calibration") / SHIPPED[name][split]
        return TextSet(name, _sha256(path), tuple(read_documents(path)))
    if name in HUB_TEXTS:
        return _fetched(name)
    path = Path(name)
    if path.suffix not in (".jsonl", ".txt") or not path.is_file():
        known = ", ".join([*SHIPPED, *HUB_TEXTS])
        raise RefusedError(
            f"no text set {name!r}",
            fix=f"use one of {known}, or the path of a .jsonl or .txt file that exists",
        )
    return TextSet(path.name, _sha256(path), tuple(read_documents(path)))


def own_text(name: str) -> bool:
    """Whether a name means a file of one's own, so that its content alone says which text it is."""
    return name not in SHIPPED and name not in HUB_TEXTS


def known_sha256(name: str, split: Split) -> str | None:
    """The hash that `load_text_set` gives; None for a set that it would fetch.

    Raises:
        RefusedError: as there.
    """
    return None if name in HUB_TEXTS else load_text_set(name, split).sha256


def joined_sha256(hashes: Sequence[str]) -> str:
    """The hash of text sets that are judged together, from theirs."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a file: JSONL with `text` or `messages`, parquet with `text`, or one document of plain text.

    A plain text file whose name ends in `corpus.txt` holds one document per line, as PolEval's does.

    Raises:
        RefusedError: naming file and line.
    """
    if path.suffix == ".parquet":
        documents = list(_from_parquet(path))
    else:
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RefusedError(
                f"not valid UTF-8 at byte {error.start}", where=str(path), fix="save the file as UTF-8"
            ) from None
        lines = content.splitlines()
        if path.suffix == ".jsonl":
            documents = [_from_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        elif path.name.endswith("corpus.txt"):
            documents = [Document(line) for line in lines if line.strip()]
        else:
            documents = [Document(content.strip())] if content.strip() else []
    if not documents:
        raise RefusedError("there is no text in it", where=str(path), fix="give a file with at least one document")
    yield from documents


def _from_json(line: str, where: str) -> Document:
    problem = 'a line must be {"text": "..."} or {"messages": [{"role": ..., "content": ...}, ...]}'
    try:
        entry = json.loads(line)
        register = str(entry.get("register", ""))
        if "messages" in entry:
            turns = tuple((str(turn["role"]), str(turn["content"])) for turn in entry["messages"])
            if turns:
                return Document(messages=turns, register=register)
        elif isinstance(entry.get("text"), str) and entry["text"].strip():
            return Document(entry["text"], register=register)
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
        pass
    raise RefusedError("the line is not a document", where=where, fix=problem)


def _from_parquet(path: Path) -> Iterator[Document]:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches(batch_size=256, columns=["text"]):
        for text in batch.column("text").to_pylist():
            if text and text.strip():
                yield Document(text)


def _fetched(name: str) -> TextSet:
    documents: list[Document] = []
    digest = hashlib.sha256()
    revision = None
    for fetched in fetch_text_files(HUB_TEXTS[name]):
        revision = fetched.revision
        digest.update(_sha256(fetched.path).encode())
        documents += read_documents(fetched.path)
        if len(documents) >= MOST_DOCUMENTS:
            break
    return TextSet(name, digest.hexdigest(), tuple(documents[:MOST_DOCUMENTS]), revision)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
