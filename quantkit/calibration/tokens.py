"""Calibration windows: documents in a seeded order, cut into equal runs of tokens.

Every window begins with the start token, as text does when a model serves it; what follows is the running text of
one text set, documents separated by the end token. Shape legend: W windows, T tokens.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.checkpoint.tokenizer import Tokenizer
from quantkit.errors import RefusedError
from quantkit.texts import Document, TextSet


def document_text(document: Document, tokenizer: Tokenizer) -> str:
    """The document as the model reads it, without a leading start token; chat turns go through its template."""
    return tokenizer.render(document.messages) if document.messages else document.text


def calibration_windows(
    parts: Sequence[tuple[TextSet, int]], tokenizer: Tokenizer, *, window_tokens: int, seed: int
) -> Tensor:
    """int64 [W, T]: the windows of every text set in turn.

    Args:
        parts: text sets, and how many windows to take from each.
        tokenizer: the model's.
        window_tokens: T, the start token included.
        seed: order in which each set's documents are drawn.

    Raises:
        RefusedError: a set is too short.
    """
    windows: list[list[int]] = []
    for text_set, wanted in parts:
        documents = list(text_set.documents)
        random.Random(seed).shuffle(documents)
        found = _windows(documents, wanted, tokenizer, window_tokens)
        if len(found) < wanted:
            raise RefusedError(
                f"the text set {text_set.name} gives {len(found)} windows of {window_tokens} tokens, not {wanted}",
                where="calibration.texts",
                fix="ask for fewer or shorter windows, or add text",
            )
        windows += found
    if not windows:
        raise RefusedError(
            "no calibration windows are asked for",
            where="calibration.texts",
            fix='set texts = { "polish-core" = 64 }',
        )
    return torch.tensor(windows, dtype=torch.int64)


def _windows(documents: list[Document], wanted: int, tokenizer: Tokenizer, window_tokens: int) -> list[list[int]]:
    separator = [] if tokenizer.eos is None else [tokenizer.eos]
    windows: list[list[int]] = []
    running: list[int] = []
    for document in documents:
        ids = tokenizer.encode(document_text(document, tokenizer))
        running += ids if ids[-1:] == separator else ids + separator
        while len(running) >= window_tokens - 1 and len(windows) < wanted:
            windows.append([tokenizer.start, *running[: window_tokens - 1]])
            running = running[window_tokens - 1 :]
        if len(windows) == wanted:
            break
    return windows
