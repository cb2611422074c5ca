"""Perplexity, divergence and agreement against the whole model's logits, one window at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.index import open_checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.source import head_tensors
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.texts import Document, TextSet
from quantkit.validation import perplexity
from quantkit.validation.compare import logits_result
from quantkit.validation.generation import greedy_answer, repeats_endlessly
from quantkit.validation.perplexity import (
    CHUNK_POSITIONS,
    chunk_positions,
    compare,
    compare_logits,
    final_states,
    losses,
    perplexities,
    room_for,
)
from quantkit.validation.text import evaluation_text
from tests.tiny import make_tiny

CPU = torch.device("cpu")
TEXTS = (
    "Zażółć gęślą jaźń.",
    "Wisła płynie po polskiej krainie, a dokąd? " * 3,
    "Pchnąć w tę łódź jeża\nlub ośm skrzyń fig.",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, and the same with some noise on its weights."""
    first, second = (make_tiny(tmp_path_factory.mktemp("models") / name, "mistral") for name in "ab")
    model = AutoModelForCausalLM.from_pretrained(second, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.1
        tensor.data += noise.bfloat16()
    model.save_pretrained(second, max_shard_size="60KB")
    return first, second


def text_of(folder, limit=16):
    tokenizer = load_tokenizer(folder, vocab_size=384)
    text_set = TextSet("own", "0" * 64, tuple(Document(text) for text in TEXTS))
    return evaluation_text([(text_set, None)], tokenizer, window_tokens=limit), tokenizer


def judged(folder, text, batch=4):
    checkpoint = open_checkpoint(folder)
    decoder = Decoder(checkpoint.config, checkpoint.family, device=CPU, dtype=torch.float32)
    return final_states(checkpoint, text, decoder, windows_per_batch=batch), decoder.head(head_tensors(checkpoint))


def plain_logits(folder, text) -> torch.Tensor:
    """Log-probabilities [N, V] from the whole model, window by window, without padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for window in text.windows:
        with torch.no_grad():
            logits = model(torch.tensor([window.inputs])).logits[0]
        rows.append(logits[-len(window.targets) :])
    return torch.cat(rows).double().log_softmax(-1)


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_losses_are_the_whole_models(models, batch):
    text, _ = text_of(models[0])
    found = losses(*judged(models[0], text, batch), text.targets)
    expected = -plain_logits(models[0], text)[range(text.tokens), text.targets]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_divergence_and_agreement_are_the_whole_models(models):
    text, _ = text_of(models[0])
    found = compare(judged(models[0], text), judged(models[1], text), text.targets)
    first, second = plain_logits(models[0], text), plain_logits(models[1], text)
    torch.testing.assert_close(found.divergence, (first.exp() * (first - second)).sum(-1), rtol=1e-3, atol=1e-5)
    assert found.agrees.tolist() == (first.argmax(-1) == second.argmax(-1)).tolist()
    assert 0 < found.agrees.double().mean() < 1
    torch.testing.assert_close(found.loss, -second[range(text.tokens), text.targets], rtol=1e-5, atol=1e-5)


def test_a_model_does_not_diverge_from_itself(models):
    text, _ = text_of(models[0])
    found = compare(judged(models[0], text), judged(models[0], text), text.targets)
    assert found.divergence.abs().max() < 1e-6
    assert found.agrees.all()


def test_logits_of_a_bfloat16_model_are_not_rounded_before_they_are_compared():
    """States and heads in bf16 against float64; a bf16 product alone would be wrong in the second digit."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2 * CHUNK_POSITIONS + 7, 64, generator=generator)
    head = torch.randn(384, 64, generator=generator) * 0.7
    noise = torch.randn(head.shape, generator=generator) * 0.02
    pair = [(states.bfloat16(), matrix.bfloat16()) for matrix in (head, head + noise)]
    wanted = torch.randint(0, 384, (len(states),), generator=generator)
    first, second = ((inner.double() @ matrix.double().t()).log_softmax(-1) for inner, matrix in pair)

    found = compare(pair[0], pair[1], wanted.tolist())
    torch.testing.assert_close(found.divergence, (first.exp() * (first - second)).sum(-1), rtol=1e-4, atol=1e-6)
    assert found.agrees.tolist() == (first.argmax(-1) == second.argmax(-1)).tolist()
    rows = range(len(states))
    torch.testing.assert_close(found.reference_loss, -first[rows, wanted], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses(*pair[1], wanted.tolist()), -second[rows, wanted], rtol=1e-5, atol=1e-5)
    logits = (pair[1][0].double() @ pair[1][1].double().t()).float()
    wide = (pair[0][0], pair[0][1].float())
    seen = compare_logits(wide, logits, wanted.tolist(), room_for(wide[1], copies=3))
    assert seen.divergence == pytest.approx(found.divergence, abs=1e-6)
    padded = torch.nn.functional.pad(logits, (0, 5), value=99.0)
    again = compare_logits(wide, padded, wanted.tolist(), room_for(wide[1], copies=3))
    assert torch.equal(again.divergence, seen.divergence)


def test_a_large_vocabulary_is_gone_through_in_smaller_chunks(models, monkeypatch):
    """Fewer positions at once, so that logits take no more memory; what comes out is the same."""
    assert [chunk_positions(vocabulary) for vocabulary in (384, 32768, 151936, 10**9)] == [256, 256, 55, 1]
    text, _ = text_of(models[0])
    pair = judged(models[0], text), judged(models[1], text)
    whole = compare(*pair, text.targets)
    monkeypatch.setattr(perplexity, "CHUNK_LOGITS", 5 * pair[0][1].shape[0])
    assert 5 == chunk_positions(pair[0][1].shape[0]) < text.tokens
    found = compare(*pair, text.targets)
    for part in ("reference_loss", "loss", "divergence"):
        torch.testing.assert_close(getattr(found, part), getattr(whole, part), rtol=1e-4, atol=1e-5)
    assert found.agrees.tolist() == whole.agrees.tolist()


def test_a_reader_whose_logits_are_not_finite_has_failed(models):
    text, _ = text_of(models[0])
    states, head = judged(models[0], text)
    whole = [states.float() @ head.float().t()]
    logits = [part.numpy() for part in whole[0].split([len(window.targets) for window in text.windows])]
    reference = SimpleNamespace(states_ND=states, head_VD=head)
    assert logits_result("reader", logits, reference, text)["status"] == "ok"
    logits[1][0, 0] = float("nan")
    found = logits_result("reader", logits, reference, text)
    assert (found["status"], found["reason"]) == ("failed", "its ppl_per_token is inf: logits are not finite")


def test_perplexities_are_taken_over_tokens_words_and_bytes(models):
    text, _ = text_of(models[0])
    nats = torch.full((text.tokens,), 2.0, dtype=torch.float64)
    found = perplexities(nats, text)
    words = sum(len(part.split()) for part in TEXTS) + 1  # the trailing space of one text ends in an empty word
    assert text.words == words
    assert found["ppl_per_token"] == pytest.approx(math.exp(2))
    assert found["ppl_per_word"] == pytest.approx(math.exp(2 * text.tokens / words))
    assert found["bits_per_byte"] == pytest.approx(2 * text.tokens / math.log(2) / len("".join(TEXTS).encode()))


def test_greedy_answer_is_the_whole_models(models):
    checkpoint = open_checkpoint(models[0])
    tokenizer = load_tokenizer(models[0], vocab_size=384)
    decoder = Decoder(checkpoint.config, checkpoint.family, device=CPU, dtype=torch.float32)
    answer = greedy_answer(checkpoint, decoder, tokenizer, prompt="Dokąd?", num_tokens=6)
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    ids = [1, *tokenizer.encode("[INST] Dokąd? [/INST]")]
    said = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    assert answer.text == tokenizer.decode(said)
    assert answer.finite


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], False),
        ([9, *[7] * 16], True),
        ([9, *[7] * 15], False),
        ([3, 8, *[0] * 9], False),
        ([3, *[1, 2, 3] * 5], True),
        ([1, 2, 3] * 5, False),
        ([5, *list(range(8)) * 4], True),
        (list(range(9)) * 4, False),
    ],
)
def test_endless_repetition(ids, expected):
    assert repeats_endlessly(ids) is expected
