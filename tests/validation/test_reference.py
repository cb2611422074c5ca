"""What is kept of reference models: found again, and not without end."""

import os

import pytest
import torch

from quantkit.checkpoint.index import open_checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.home import quantkit_home
from quantkit.texts import Document, TextSet
from quantkit.validation import reference
from quantkit.validation.reference import Settings, run_reference
from quantkit.validation.text import evaluation_text
from tests.tiny import WORDS


@pytest.fixture
def run(tiny_mistral):
    """Runs the model under a fingerprint, as a judgement does."""
    checkpoint, tokenizer = open_checkpoint(tiny_mistral), load_tokenizer(tiny_mistral, vocab_size=384)
    text = evaluation_text([(TextSet("own", "0" * 64, (Document(WORDS),)), None)], tokenizer, window_tokens=32)
    decoder = Decoder(checkpoint.config, checkpoint.family, device=torch.device("cpu"), dtype=torch.float32)
    settings = Settings(windows_per_batch=2, prompt="Dokąd?", generated_tokens=2)
    return lambda name: run_reference(checkpoint, text, decoder, tokenizer, settings, fingerprint=name)


def kept() -> set[str]:
    folder = quantkit_home() / "cache" / "reference"
    states, answers = ({path.stem for path in folder.glob(f"*.{kind}")} for kind in ("safetensors", "json"))
    assert states == answers
    return states


def used_before(name: str, hours: int) -> None:
    path = quantkit_home() / "cache" / "reference" / f"{name}.safetensors"
    then = path.stat().st_mtime - 3600 * hours
    os.utime(path, (then, then))


def test_what_was_kept_is_what_was_computed(run, monkeypatch):
    computed = run("a")
    monkeypatch.setattr(reference, "final_states", None)  # not again
    again = run("a")
    assert torch.equal(again.states_ND, computed.states_ND)
    assert torch.equal(again.head_VD, computed.head_VD)
    assert again.answer == computed.answer
    assert computed.answer is not None


def test_what_was_used_longest_ago_goes(run, monkeypatch):
    size = run("a").states_ND.nbytes
    run("b")
    assert kept() == {"a", "b"}
    monkeypatch.setattr(reference, "KEPT_BYTES", int(2.5 * size))
    used_before("a", 3)
    used_before("b", 2)
    run("a")  # used again, though written first
    run("c")
    assert kept() == {"a", "c"}
    monkeypatch.setattr(reference, "KEPT_BYTES", 0)
    used_before("a", 3)
    used_before("c", 2)
    run("d")
    assert kept() == {"d"}, "what was just computed stays, however large"
