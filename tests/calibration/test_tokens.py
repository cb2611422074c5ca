"""Calibration windows: equal length, the start token first, running text behind it, no document twice."""

import pytest
import torch

from quantkit.calibration.statistics import BLOCK, DEVIATION, HESSIAN, SQUARES, Statistics
from quantkit.calibration.tokens import calibration_windows
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import RefusedError
from quantkit.texts import Document, TextSet
from tests.tiny import WORDS


@pytest.fixture
def tokenizer(tiny_mistral):
    return load_tokenizer(tiny_mistral, vocab_size=384)


def text_set(name: str = "own", documents: int = 6) -> TextSet:
    return TextSet(name, "0" * 64, tuple(Document(f"{number}. {WORDS}") for number in range(documents)))


def test_windows_are_running_text_behind_the_start_token(tokenizer):
    windows = calibration_windows([(text_set(), 5)], tokenizer, window_tokens=12, seed=0)
    assert windows.shape == (5, 12)
    assert windows.dtype == torch.int64
    assert (windows[:, 0] == 1).all()
    running = windows[:, 1:].flatten().tolist()
    documents = [[*tokenizer.encode(document.text), 2] for document in text_set().documents]
    first = next(ids for ids in documents if ids[: len(running)] == running[: len(ids)])
    rest = running[len(first) :]
    assert any(ids[: len(rest)] == rest[: len(ids)] for ids in documents if ids != first)


def test_the_seed_decides_the_order(tokenizer):
    draws = [calibration_windows([(text_set(), 4)], tokenizer, window_tokens=12, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_chat_goes_through_the_template(tokenizer):
    chat = TextSet("chat", "0" * 64, (Document(messages=(("user", "Dokąd?"), ("assistant", "Wisła płynie."))),) * 9)
    (window,) = calibration_windows([(chat, 1)], tokenizer, window_tokens=16, seed=0).tolist()
    expected = tokenizer.encode("[INST] Dokąd? [/INST] Wisła płynie.</s>")
    assert window[1 : 1 + len(expected)] == expected[:15]
    assert window.count(1) == 1


def test_a_text_that_is_too_short(tokenizer):
    with pytest.raises(RefusedError) as caught:
        calibration_windows([(text_set("krótki.txt", 1), 40)], tokenizer, window_tokens=64, seed=0)
    assert str(caught.value) == (
        "the text set krótki.txt gives 0 windows of 64 tokens, not 40\n"
        "  at:  calibration.texts\n"
        "  fix: ask for fewer or shorter windows, or add text"
    )


def test_no_windows_at_all(tokenizer):
    with pytest.raises(RefusedError, match="no calibration windows are asked for"):
        calibration_windows([], tokenizer, window_tokens=16, seed=0)


@pytest.mark.parametrize("width", [12, 2 * BLOCK, 2 * BLOCK + 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_sums_over_all_tokens(dtype, width):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 7, width, generator=generator).to(dtype) for _ in range(2)]
    exact = [batch + torch.randn(batch.shape, generator=generator).to(dtype) for batch in batches]
    statistics = Statistics(frozenset({HESSIAN, DEVIATION, SQUARES}))
    for batch, other in zip(batches, exact, strict=True):
        statistics.add(batch, other)
    statistics.complete()
    x = torch.cat(batches).flatten(0, 1).float()
    difference = torch.cat(
        [(other.float() - batch.float()).flatten(0, 1) for batch, other in zip(batches, exact, strict=True)]
    )
    assert statistics.num_tokens == 42
    torch.testing.assert_close(statistics.mean_square(), x.square().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.hessian(), x.T @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(statistics.deviation(), difference.T @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_of_one_narrow_linear_the_product_with_the_deviation_is_summed(dtype, error):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator).to(dtype)
    batch = torch.randn(40, 7, 12, generator=generator).to(dtype)
    exact = (batch + 0.1 * torch.randn(batch.shape, generator=generator)).to(dtype)
    statistics = Statistics(frozenset({HESSIAN, DEVIATION}), weights=[weight])
    statistics.add(batch[:30], exact[:30])
    statistics.add(batch[30:], exact[30:])
    statistics.complete()
    x = batch.flatten(0, 1).double()
    expected = weight.double() @ (exact.flatten(0, 1).double() - x).T @ x
    found = statistics.deviation()
    assert found.shape == (5, 12)
    assert (found - expected).norm() < error * expected.norm()
    torch.testing.assert_close(statistics.hessian().double(), x.T @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [(6,), (5, 2)], ids=["half as many outputs", "two linears"])
def test_of_others_the_deviation_itself_is_summed(rows):
    weights = [torch.ones(each, 12) for each in rows]
    statistics = Statistics(frozenset({HESSIAN, DEVIATION}), weights=weights)
    statistics.add(torch.ones(3, 12), 3 * torch.ones(3, 12))
    statistics.complete()
    torch.testing.assert_close(statistics.deviation(), torch.full((12, 12), 6.0))
