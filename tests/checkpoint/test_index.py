"""Checkpoints that are not what they should be: one error, naming file and remedy."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.families import item_of
from quantkit.checkpoint.index import open_checkpoint, weights_stem
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import RefusedError


@pytest.fixture
def folder(tiny_mistral, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_mistral, tmp_path / "model")


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refusal(folder) -> str:
    with pytest.raises(RefusedError) as caught:
        open_checkpoint(folder)
    assert caught.value.fix
    return caught.value.what


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def test_a_good_checkpoint_opens(folder):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.items == ["embedding", "layers.0", "layers.1", "head"]
    assert len(shards(folder)) > 1
    names = [name for item in checkpoint.items for name in checkpoint.names(item)]
    assert sorted(names) == sorted(checkpoint.tensors.tensors)


def test_items_of_tensors():
    assert item_of("model.layers.12.mlp.up_proj.weight") == "layers.12"
    assert item_of("model.embed_tokens.weight") == "embedding"
    assert item_of("model.norm.weight") == item_of("lm_head.weight") == "head"


def test_missing_shard(folder):
    name = shards(folder)[0].name
    shards(folder)[0].unlink()
    assert refusal(folder) == f"shard {name} is missing"


def test_a_pipe_is_no_shard(folder):
    """Nobody writes to it: who opened it would wait for ever."""
    path = shards(folder)[0]
    path.unlink()
    os.mkfifo(path)
    assert refusal(folder) == f"shard {path.name} is missing"


@pytest.mark.parametrize("left", [0, 4, 100, -10])
def test_truncated_shard(folder, left):
    path = shards(folder)[0]
    path.write_bytes(path.read_bytes()[:left])
    assert refusal(folder).startswith(f"shard {path.name} cannot be read: ")


def test_index_naming_an_absent_tensor(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = shards(folder)[0].name
    path.write_text(json.dumps(index))
    assert refusal(folder) == (
        f"model.safetensors.index.json names model.layers.9.mlp.up_proj.weight in {shards(folder)[0].name}, "
        "but it is not there"
    )


def test_only_pickles(folder):
    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert refusal(folder) == "the checkpoint holds only pickles (pytorch_model.bin), which can run code when opened"


def test_no_weights_at_all(folder):
    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    assert refusal(folder) == "neither model.safetensors nor model.safetensors.index.json is there"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder, bad):
    path = next(path for path in shards(folder) if "model.layers.1.mlp.up_proj.weight" in load_file(path))
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = bad
    save_file(tensors, path, metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    checkpoint.read("layers.0")
    with pytest.raises(RefusedError) as caught:
        checkpoint.read("layers.1")
    assert caught.value.what == "model.layers.1.mlp.up_proj.weight holds 1 value(s) that are NaN or infinite"
    assert path.name in caught.value.where


def test_unknown_architecture(folder):
    edit(folder / "config.json", model_type="mamba")
    assert refusal(folder) == "unknown architecture: model_type is 'mamba'"


def test_code_of_its_own(folder):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.X"})
    assert refusal(folder) == "the checkpoint asks to run code of its own (auto_map, trust_remote_code)"


def test_quantized_already(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    assert refusal(folder) == "the source model is quantized already"


def test_config_missing_or_broken(folder):
    (folder / "config.json").write_text("{")
    assert refusal(folder).startswith("config.json is not JSON")
    (folder / "config.json").write_text("")
    assert refusal(folder).startswith("config.json is not JSON")
    for content in ("[" * 200_000, f'{{"n": {"9" * 5000}}}'):
        (folder / "config.json").write_text(content)
        assert refusal(folder).startswith("config.json is not JSON")
    (folder / "config.json").unlink()
    assert refusal(folder) == "config.json is missing"
    (folder / "config.json").mkdir()
    assert refusal(folder) == "config.json cannot be read: Is a directory"


def test_a_file_in_place_of_the_folder(folder):
    assert refusal(folder / "tokenizer.json") == f"not a folder: {folder / 'tokenizer.json'}"


@pytest.mark.parametrize("name", ["silu", "swish", None])
def test_names_of_silu(folder, name):
    edit(folder / "config.json", hidden_act=name)
    assert open_checkpoint(folder).num_layers == 2


@pytest.mark.parametrize("name", ["gelu", "relu", ["silu"]])
def test_another_activation(folder, name):
    edit(folder / "config.json", hidden_act=name)
    assert refusal(folder) == (f"config.json says hidden_act = {name!r}; a MistralForCausalLM has silu in every engine")


def test_a_layer_that_is_missing(folder):
    edit(folder / "config.json", num_hidden_layers=3)
    assert refusal(folder) == "model.layers.2.input_layernorm.weight is missing (9 of 30 expected tensors are)"


def test_tokenizer_missing(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RefusedError, match="the tokenizer is missing"):
        load_tokenizer(folder, vocab_size=384)


def test_tokenizer_of_another_model(folder):
    with pytest.raises(RefusedError) as caught:
        load_tokenizer(folder, vocab_size=300)
    assert caught.value.what == "the tokenizer has 384 tokens, the embedding 300 rows"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": []}'),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE"}}'),
        ("tokenizer.json", '{"version": "1.0", "truncation'),
        ("tokenizer.json", "[" * 200_000),
        ("tokenizer_config.json", "[]"),
        ("config.json", '{"model_type": "mistral", "rope_parameters": {"rope_type": "yarn"}}'),
    ],
)
def test_broken_tokenizer(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(RefusedError) as caught:
        load_tokenizer(folder, vocab_size=384)
    assert caught.value.what.startswith("the tokenizer cannot be loaded: ")
    assert len(caught.value.what.splitlines()) == 1
    assert caught.value.fix == "take the tokenizer files and config.json from the model's own repository"


@pytest.mark.parametrize("key", ["sliding_window", "eos_token_id"])
def test_a_config_that_transformers_refuses_when_it_loads_a_tokenizer(folder, key):
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", key: "x"}))
    with pytest.raises(RefusedError, match=f"config.json is refused by transformers: .*{key}") as caught:
        load_tokenizer(folder, vocab_size=384)
    assert caught.value.where == str(folder / "config.json")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors"], "model"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "model"),
        (["gptq_model-4bit-128g.safetensors"], "gptq_model-4bit-128g"),
        (["model.safetensors", "gptq_model-4bit-128g.safetensors"], "model"),
        (["w.safetensors.index.json", "w-00001-of-00002.safetensors", "w-00002-of-00002.safetensors"], "w"),
        (["pytorch_model.bin"], "model"),
        ([], "model"),
    ],
)
def test_weights_under_another_name_are_found(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).touch()
    assert weights_stem(tmp_path) == expected


def test_weights_of_two_names_are_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(RefusedError) as caught:
        weights_stem(tmp_path)
    assert str(caught.value) == (
        "2 files could be the weights: a, b\n"
        f"  at:  {tmp_path}\n"
        "  fix: keep those of one conversion, or add model.safetensors.index.json"
    )
