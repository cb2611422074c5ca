"""Windows: every token is predicted once, from as much context as the model may read."""

import pytest

from quantkit.validation.text import rolling_windows

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
