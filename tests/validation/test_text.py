"""Windows: every token is predicted once, from as much context as the model may read; samples fill their windows."""

from collections import Counter
from itertools import islice

import pytest

from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import RefusedError
from quantkit.texts import Document, TextSet
from quantkit.validation.text import evaluation_text, rolling_windows, sampled_documents
from tests.tiny import WORDS

START = -1


@pytest.mark.parametrize("limit", [1, 2, 5, 8, 100])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 10, 11, 23])
def test_every_token_is_predicted_once_and_follows_what_was_read(length, limit):
    ids = list(range(length))
    windows = rolling_windows(ids, START, limit)
    assert [token for window in windows for token in window.targets] == ids
    text = [START, *ids]
    for window in windows:
        assert len(window.inputs) <= limit
        for back, target in enumerate(reversed(window.targets)):
            read = window.inputs[: len(window.inputs) - back]
            at = text.index(target)
            assert list(read) == text[at - len(read) : at]


def test_the_last_window_reaches_back_to_full_length():
    windows = rolling_windows(list(range(11)), START, 4)
    assert [len(window.inputs) for window in windows] == [4, 4, 4]
    assert [len(window.targets) for window in windows] == [4, 4, 3]
    assert windows[2].inputs == (6, 7, 8, 9)


@pytest.fixture(scope="module")
def tokenizer(tiny_mistral):
    return load_tokenizer(tiny_mistral, vocab_size=384)


def text_set(*texts: str) -> TextSet:
    return TextSet("własny", "0" * 64, tuple(Document(text) for text in texts), "f" * 40)


SHORT = text_set(*(f"{number}. {WORDS[: 20 + 7 * (number % 9)]}" for number in range(60)))
LONG = text_set(*(f"{number}. {WORDS[::-1] * 12}" for number in range(3)))


@pytest.mark.parametrize("texts", [SHORT, LONG])
@pytest.mark.parametrize("limit", [64, 200])
def test_a_sample_fills_its_windows_and_loses_no_word(texts, limit, tokenizer):
    found = list(sampled_documents(texts, tokenizer, window_tokens=limit, seed=0))
    lengths = [len(tokenizer.encode(text)) for text in found]
    assert max(lengths) <= limit
    # the longest words have a token for every byte here
    assert min(lengths[:-1], default=limit) > limit - 12
    assert len(lengths) > 1
    expected = Counter(word for document in texts.documents for word in document.text.split())
    assert Counter(word for text in found for word in text.split()) == expected


def test_a_word_that_no_window_holds_stays_whole(tokenizer):
    found = list(sampled_documents(text_set("raz " + "ż" * 300 + " dwa"), tokenizer, window_tokens=32, seed=0))
    assert found == ["raz", "ż" * 300, "dwa"]


def test_a_whole_set_and_a_sample_of_another(tokenizer):
    """The one document by document, the other in just so many windows, figures per word as of documents."""
    text = evaluation_text([(LONG, None), (SHORT, 5)], tokenizer, window_tokens=64, seed=3)
    whole, sample = text.parts
    assert (whole.sampled, sample.sampled, sample.windows, sample.revision) == (False, True, 5, "f" * 40)
    assert len(text.windows) == whole.windows + 5
    assert text.documents == 3 + 5
    for window in text.windows[-5:]:
        assert window.inputs[0] == tokenizer.start
        assert 64 - 12 < len(window.targets) <= 64
    drawn = list(islice(sampled_documents(SHORT, tokenizer, window_tokens=64, seed=3), 5))
    alone = evaluation_text([(LONG, None), (text_set(*drawn), None)], tokenizer, window_tokens=64)
    assert alone.windows == text.windows
    assert (alone.words, alone.bytes) == (text.words, text.bytes)


def test_the_seed_draws_the_sample(tokenizer):
    texts = [evaluation_text([(SHORT, 4)], tokenizer, window_tokens=64, seed=seed) for seed in (0, 0, 1)]
    assert texts[0].fingerprint == texts[1].fingerprint != texts[2].fingerprint
    whole = [evaluation_text([(SHORT, None)], tokenizer, window_tokens=64, seed=seed) for seed in (0, 1)]
    assert whole[0].fingerprint == whole[1].fingerprint


def test_a_set_that_is_too_short_for_its_sample(tokenizer):
    with pytest.raises(RefusedError) as caught:
        evaluation_text([(text_set("Jeż śpi.", "Wisła płynie."), 3)], tokenizer, window_tokens=64)
    assert str(caught.value) == (
        "the text set własny gives 1 windows of up to 64 tokens, not 3\n"
        "  at:  validation.texts\n"
        '  fix: ask for at most 1 windows, or for "all" of it'
    )
