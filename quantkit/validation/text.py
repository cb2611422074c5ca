"""The text an artifact is judged on, as windows in which every token is predicted exactly once.

Windows follow lm-evaluation-harness' `loglikelihood_rolling`: each document stands alone; its first window begins
with the start token (BOS, or EOS for a model without one), which is never predicted itself; later windows begin with
the last token of the one before; the last window reaches back so that it is as long as the others.

A sample of a text set is running text, its documents one after the other, cut between words into texts that fill a
window each and stand alone like documents: so figures per word mean the same on both, and the harness finds them too.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.calibration.tokens import document_text
from quantkit.checkpoint.tokenizer import Tokenizer
from quantkit.errors import RefusedError
from quantkit.texts import TextSet, joined_sha256


@dataclass(frozen=True)
class Window:
    """Tokens that go through the model together.

    Attributes:
        inputs: token ids the model reads.
        targets: what its last len(targets) positions must predict.
        document: which document it is from.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    document: int


@dataclass(frozen=True)
class Part:
    """Facts of one text set of an evaluation text.

    Attributes:
        name, sha256, revision: as of the `TextSet`.
        windows: how many there are.
        sampled: they are a sample, not the whole set.
    """

    name: str
    sha256: str
    revision: str | None
    windows: int
    sampled: bool


@dataclass(frozen=True)
class EvaluationText:
    """Windows and the counts that perplexities are taken over.

    Attributes:
        name: of the text sets, joined by "+".
        sha256: of the sets' files.
        windows: in document order.
        parts: the sets it is made of.
        documents, words, bytes: of the text as the model reads it; words are what lies between white space.
    """

    name: str
    sha256: str
    windows: tuple[Window, ...]
    parts: tuple[Part, ...]
    documents: int
    words: int
    bytes: int

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(len(window.targets) for window in self.windows)

    @property
    def targets(self) -> list[int]:
        """Every predicted token, in window order."""
        return [token for window in self.windows for token in window.targets]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the windows themselves: two texts of the same fingerprint are the same work."""
        content = [[window.inputs, len(window.targets)] for window in self.windows]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What the record and `validate --json` say of the text."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "documents": self.documents,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
            "parts": [asdict(part) for part in self.parts],
        }


def rolling_windows(ids: Sequence[int], start: int, limit: int, document: int = 0) -> list[Window]:
    """Windows of one document of at most `limit` input tokens.

    Args:
        ids: the document's token ids, without the start token.
        start: id of the start token.
        limit: most tokens the model may read at once.
    """
    first = tuple(ids[:limit])
    windows = [Window((start, *first[:-1]), first, document)]
    done = limit
    while done < len(ids):
        stop = min(done + limit, len(ids))
        windows.append(Window(tuple(ids[stop - limit - 1 : stop - 1]), tuple(ids[done:stop]), document))
        done = stop
    return windows


def sampled_documents(text_set: TextSet, tokenizer: Tokenizer, *, window_tokens: int, seed: int) -> Iterator[str]:
    """A text set's documents in seeded order, an empty line between two, cut into texts of as many words as fit.

    Each but the last has `window_tokens` tokens, or fewer by less than a word. A single word of more stays whole.
    """
    documents = list(text_set.documents)
    random.Random(seed).shuffle(documents)
    words: list[str] = []
    for document in documents:
        more = re.findall(r"\s*\S+", f"\n\n{document_text(document, tokenizer).lstrip()}")
        # not a whole long document at once: all that has been gathered is encoded again and again
        for first in range(0, len(more), window_tokens):
            words += more[first : first + window_tokens]
            while (fitting := _fitting(words, tokenizer, window_tokens)) < len(words):
                yield _text(words[: max(fitting, 1)])
                words = words[max(fitting, 1) :]
    if words:
        yield _text(words)


def _text(words: list[str]) -> str:
    return "".join(words).strip()


def _fitting(words: list[str], tokenizer: Tokenizer, limit: int) -> int:
    """How many words from the first make at most `limit` tokens."""

    def num_tokens(num_words: int) -> int:
        return len(tokenizer.encode(_text(words[:num_words])))

    # so many words that fit, and so many that do not, with their tokens
    low, less, high, more = 0, 0, len(words), num_tokens(len(words))
    if more <= limit:
        return high
    while high - low > 1:
        # tokens are spread about evenly: half as many steps as halving takes
        tried = low + round((limit + 0.5 - less) * (high - low) / (more - less))
        tried = min(max(tried, low + 1), high - 1)
        found = num_tokens(tried)
        if found <= limit:
            low, less = tried, found
        else:
            high, more = tried, found
    return low


def evaluation_text(
    parts: Sequence[tuple[TextSet, int | None]], tokenizer: Tokenizer, *, window_tokens: int, seed: int = 0
) -> EvaluationText:
    """The windows of text sets.

    Args:
        parts: text sets, judged together in this order, and how many windows to sample of each; None takes all
            documents of it as they are.
        tokenizer: the model's.
        window_tokens: most tokens the model reads at once.
        seed: of the samples.

    Raises:
        RefusedError: fewer windows than are to be sampled, or fewer than two tokens in all.
    """
    windows: list[Window] = []
    used: list[str] = []
    facts = []
    for text_set, wanted in parts:
        before = len(windows)
        if wanted is None:
            texts: Iterator[str] = (document_text(document, tokenizer) for document in text_set.documents)
        else:
            texts = sampled_documents(text_set, tokenizer, window_tokens=window_tokens, seed=seed)
        for text in texts:
            if ids := tokenizer.encode(text):
                windows += rolling_windows(ids, tokenizer.start, window_tokens, len(used))
                used.append(text)
            if wanted is not None and len(windows) - before >= wanted:
                break
        found = len(windows) - before
        if wanted is not None and found < wanted:
            raise RefusedError(
                f"the text set {text_set.name} gives {found} windows of up to {window_tokens} tokens, not {wanted}",
                where="validation.texts",
                fix=f'ask for at most {found} windows, or for "all" of it',
            )
        facts.append(Part(text_set.name, text_set.sha256, text_set.revision, found, wanted is not None))
    name = "+".join(text_set.name for text_set, _ in parts)
    if sum(len(window.targets) for window in windows) < 2:
        raise RefusedError(f"the text set {name} is too short to judge by", where="validation.texts", fix="add text")
    return EvaluationText(
        name,
        joined_sha256([text_set.sha256 for text_set, _ in parts]),
        tuple(windows),
        tuple(facts),
        documents=len(used),
        words=sum(len(re.split(r"\s+", text)) for text in used),
        bytes=sum(len(text.encode()) for text in used),
    )
