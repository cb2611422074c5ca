"""Whole builds of every family and of checkpoints with odd shapes: built, judged, read back."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.families import FAMILIES
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import RefusedError
from quantkit.formats.gptq import open_artifact
from quantkit.pipeline import build
from quantkit.recipe import Recipe
from tests.tiny import VARIANTS, WORDS, make_tiny, make_tokenizer

CPU = torch.device("cpu")
# Bielik derivatives have an intermediate size of 8602, which no packing of 32 codes holds
ODD = {"intermediate_size": 250, "vocab_size": 419}
ALL_OF_MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def recipe_of(source, text, **quantize) -> Recipe:
    return Recipe.of(
        {
            "format": "gptq",
            "model": {"id": str(source)},
            "quantize": {"group_size": 32, "scale_candidates": 4, **quantize},
            "calibration": {"texts": {str(text): 8}, "window_tokens": 16},
            "validation": {
                "texts": [str(text)],
                "window_tokens": 32,
                "generated_tokens": 0,
                "gates": {"perplexity_ratio": 1.05, "mean_kld": 0.05},
            },
        }
    )


@pytest.fixture
def text(tmp_path):
    """Documents and conversations."""
    path = tmp_path / "text.jsonl"
    turns = [{"role": "user", "content": "Dokąd płynie Wisła?"}, {"role": "assistant", "content": WORDS}]
    lines = [{"text": f"{number}. {WORDS * 3}"} for number in range(8)] + [{"messages": turns}] * 4
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "sharded"), [(torch.bfloat16, True), (torch.float32, False)], ids=["bf16-sharded", "fp32-single"]
)
def test_every_family_builds_and_is_judged(model_type, dtype, sharded, text, tmp_path):
    source = make_tiny(tmp_path / "m", model_type, dtype=dtype, sharded=sharded, vocab_size=416, **VARIANTS[model_type])
    done = build(recipe_of(source, text), out=tmp_path / "out", device=CPU)
    verdict = done.record["validation"]
    assert verdict["gate"] == {"passed": True, "failures": []}
    ours = verdict["variants"][0]["results"][0]["ppl_per_token"]
    assert ours == pytest.approx(whole_model_perplexity(source, done.out, text), rel=1e-4)


def whole_model_perplexity(source, out, text) -> float:
    """Of the decoded weights in transformers' own whole model, documents cut as docs/numerics.md says."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    artifact = open_artifact(out)
    weights = {}
    for item in ("embedding", "layers.0", "layers.1", "head"):
        weights |= {name: tensor.float() for name, tensor in artifact.read(item).items()}
    missing = model.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}, "only a tied head is left out"
    assert not missing.unexpected_keys
    tokenizer = load_tokenizer(source, vocab_size=model.config.vocab_size)
    nats = count = 0
    for line in text.read_text().splitlines():
        document = json.loads(line)
        turns = [(turn["role"], turn["content"]) for turn in document.get("messages", [])]
        ids = tokenizer.encode(document["text"] if "text" in document else tokenizer.render(turns))
        for start in range(0, len(ids), 32):
            targets = ids[start : start + 32]
            before = [tokenizer.start, *ids][: start + 1][-(32 + 1 - len(targets)) :]
            inputs = torch.tensor([(before + targets)[:-1]])
            with torch.no_grad():
                logits = model(inputs).logits[0, -len(targets) :]
            nats += torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
            count += len(targets)
    return float(torch.tensor(nats / count).exp())


def test_odd_widths_are_refused_with_the_remedy_and_the_remedy_works(text, tmp_path):
    source = make_tiny(tmp_path / "m", "mistral", **ODD)
    with pytest.raises(RefusedError) as caught:
        build(recipe_of(source, text), out=tmp_path / "out", device=CPU)
    assert "model.layers.0.mlp.down_proj: in_features 250 is not divisible by group_size 32" in caught.value.what
    assert 'quantize.skip = ["mlp.down_proj"]' in caught.value.what
    done = build(recipe_of(source, text, skip=ALL_OF_MLP), out=tmp_path / "out", device=CPU)
    assert done.record["validation"]["gate"]["passed"]
    assert len(done.record["build"]["items"]["layers.1"]["linears"]) == 4


def test_tokens_that_were_added_for_chatml_stay_whole(text, tmp_path):
    source = make_tiny(tmp_path / "m", "mistral", vocab_size=416)
    make_tokenizer(source, chatml=True)
    tokenizer = load_tokenizer(source, vocab_size=416)
    rendered = tokenizer.render([("user", "Cześć")], answer=True)
    assert rendered == "<|im_start|>user\nCześć<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(rendered)
    opening, closing = tokenizer.encode("<|im_start|>"), tokenizer.encode("<|im_end|>")
    assert [len(opening), len(closing)] == [1, 1]
    assert [ids.count(opening[0]), ids.count(closing[0])] == [2, 1]
    assert tokenizer.eos == closing[0]
    done = build(recipe_of(source, text), out=tmp_path / "out", device=CPU)
    assert done.record["validation"]["gate"]["passed"]
    again = load_tokenizer(done.out, vocab_size=416)
    assert again.encode(rendered) == ids
