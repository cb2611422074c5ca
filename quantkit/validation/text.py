"""The text an artifact is judged on, as windows in which every token is predicted exactly once.

Windows follow lm-evaluation-harness' `loglikelihood_rolling`: each document stands alone; its first window begins
with the start token (BOS, or EOS for a model without one), which is never predicted itself; later windows begin with
the last token of the one before; the last window reaches back so that it is as long as the others.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

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
class EvaluationText:
    """Windows and the counts that perplexities are taken over.

    Attributes:
        name: of the text sets, joined by "+".
        sha256: of the sets' files.
        windows: in document order.
        documents, words, bytes: of the text as the model reads it; words are what lies between white space.
    """

    name: str
    sha256: str
    windows: tuple[Window, ...]
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

    def facts(self) -> dict[str, str | int]:
        """What the record and `validate --json` say of the text."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "documents": self.documents,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
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


def evaluation_text(
    text_sets: Sequence[TextSet],
    tokenizer: Tokenizer,
    *,
    window_tokens: int,
    max_windows: int | None = None,
    seed: int = 0,
) -> EvaluationText:
    """The windows of text sets.

    Args:
        text_sets: judged together, in this order.
        tokenizer: the model's.
        window_tokens: most tokens the model reads at once.
        max_windows: draw documents in seeded order until there are this many windows; all if None.
        seed: of that order.

    Raises:
        RefusedError: fewer than two tokens in all.
    """
    texts = [document_text(document, tokenizer) for text_set in text_sets for document in text_set.documents]
    if max_windows is not None:
        random.Random(seed).shuffle(texts)
    windows: list[Window] = []
    used: list[str] = []
    for text in texts:
        if max_windows is not None and len(windows) >= max_windows:
            break
        if ids := tokenizer.encode(text):
            windows += rolling_windows(ids, tokenizer.start, window_tokens, len(used))
            used.append(text)
    name = "+".join(text_set.name for text_set in text_sets)
    if sum(len(window.targets) for window in windows) < 2:
        raise RefusedError(f"the text set {name} is too short to judge by", where="validation.texts", fix="add text")
    return EvaluationText(
        name,
        joined_sha256([text_set.sha256 for text_set in text_sets]),
        tuple(windows),
        documents=len(used),
        words=sum(len(re.split(r"\s+", text)) for text in used),
        bytes=sum(len(text.encode()) for text in used),
    )
