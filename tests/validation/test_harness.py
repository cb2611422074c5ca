"""Word perplexity against lm-evaluation-harness on the same file and model."""

import json

import pytest
import torch

from quantkit.checkpoint.index import open_checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.source import head_tensors
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.texts import load_text_set
from quantkit.validation.perplexity import final_states, losses, perplexities
from quantkit.validation.text import evaluation_text

LIMIT = 256
TASK = """task: own_text
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {path}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_word_perplexity_is_the_harness_own(nano, tmp_path, monkeypatch):
    # no skipping: `make test-slow` installs the extra `harness`, and a comparison that was not made is no comparison
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    documents = [document.text for document in load_text_set("polish-core", "validation").documents if document.text]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    (tmp_path / "own_text.yaml").write_text(TASK.format(path=own), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(nano, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(nano)
    # without it the harness lets the tokenizer add a BOS of its own, which it then also predicts
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LIMIT, batch_size=1, add_bos_token=False)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = evaluator.simple_evaluate(harness, tasks=["own_text"], task_manager=manager, bootstrap_iters=0)
    expected = found["results"]["own_text"]

    checkpoint = open_checkpoint(nano)
    tokenizer = load_tokenizer(nano, vocab_size=checkpoint.config["vocab_size"])
    text = evaluation_text([(load_text_set(str(own), "validation"), None)], tokenizer, window_tokens=LIMIT)
    decoder = Decoder(checkpoint.config, checkpoint.family, device=torch.device("cpu"), dtype=torch.float32)
    states = final_states(checkpoint, text, decoder, windows_per_batch=8)
    ours = perplexities(losses(states, decoder.head(head_tensors(checkpoint)), text.targets), text)
    assert ours["ppl_per_word"] == pytest.approx(expected["word_perplexity,none"], rel=1e-3)
    assert ours["bits_per_byte"] == pytest.approx(expected["bits_per_byte,none"], rel=1e-3)
