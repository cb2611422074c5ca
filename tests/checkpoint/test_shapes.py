"""Which tensors of which shapes a config.json calls for: transformers' own models, and what a wrong checkpoint is told.

Everything is found in headers, before anything is read or computed.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.checkpoint.families import FAMILIES, side_lengths, weight_sides
from quantkit.checkpoint.index import TensorFolder, open_checkpoint
from quantkit.errors import RefusedError
from tests.checkpoint.test_index import edit
from tests.tiny import VARIANTS, make_tiny

SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "max_position_embeddings": 128,
}
SAID = [
    {},
    {"head_dim": 8},
    {"num_key_value_heads": 2},
    {"tie_word_embeddings": True},
    {"attention_bias": True},
    {"mlp_bias": True},
]


@pytest.mark.parametrize("said", SAID, ids=json.dumps)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_calls_for_the_tensors_that_its_model_has(model_type, said):
    """What config.json leaves out has the family's own value."""
    config = SIZES | said
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    family = FAMILIES[model_type]
    lengths = side_lengths(config, family, where="")
    sides = weight_sides(config, family, where="")
    found = {name: tuple(lengths[side] for side in named) for name, named in sides.items()}
    assert found == {name: tuple(weight.shape) for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good checkpoint in one file."""
    return make_tiny(tmp_path_factory.mktemp("whole") / "m", "llama", sharded=False, **VARIANTS["llama"])


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def headers_only(monkeypatch):
    """No tensor may be read."""

    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorFolder, "read", refuse)


def replace(folder, name, tensor) -> None:
    """Put a tensor into the checkpoint's file under a name."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: tensor}, path, metadata={"format": "pt"})


def refusal(folder) -> str:
    with pytest.raises(RefusedError) as caught:
        open_checkpoint(folder)
    return caught.value.what


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"intermediate_size": 128},
            "model.layers.0.mlp.down_proj.weight has shape [64, 96]; config.json calls for [64, 128] (hidden, inner)",
        ),
        (
            {"vocab_size": 500},
            "lm_head.weight has shape [384, 64]; config.json calls for [500, 64] (vocabulary, hidden)",
        ),
        (
            {"num_key_value_heads": 4},
            "model.layers.0.self_attn.k_proj.weight has shape [32, 64]; config.json calls for [64, 64] (keys, hidden)",
        ),
        ({"num_hidden_layers": 10**9}, "config.json says num_hidden_layers = 1000000000, more than 4096"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias is missing (8 of 29 expected tensors are)"),
        *(
            ({key: bad}, f"config.json says {key} = {bad!r}, which is no size")
            for key in SIZES
            for bad in (None, 0, "64")
        ),
    ],
)
def test_a_config_of_another_model(changes, what, folder, headers_only):
    edit(folder / "config.json", **changes)
    assert refusal(folder) == what


def test_an_embedding_with_fewer_rows(folder, headers_only):
    replace(folder, "model.embed_tokens.weight", torch.zeros(300, 64))
    assert refusal(folder) == (
        "model.embed_tokens.weight has shape [300, 64]; config.json calls for [384, 64] (vocabulary, hidden)"
    )


def test_eight_bit_floats_are_no_source(folder, headers_only):
    replace(folder, "model.layers.1.mlp.up_proj.weight", torch.zeros(96, 64).to(torch.float8_e4m3fn))
    assert refusal(folder) == (
        "model.layers.1.mlp.up_proj.weight is stored as F8_E4M3; a source's weights are F32 or F16 or BF16"
    )


def test_a_tensor_that_is_no_part_of_the_model(folder, headers_only):
    replace(folder, "model.layers.0.self_attn.q_proj.bias", torch.zeros(64))
    assert refusal(folder) == (
        "model.layers.0.self_attn.q_proj.bias is no part of a LlamaForCausalLM as config.json describes it"
    )


def test_rotary_buffers_of_old_checkpoints_are_ignored(folder, headers_only):
    names = open_checkpoint(folder).tensors.tensors.keys()
    for index in range(2):
        replace(folder, f"model.layers.{index}.self_attn.rotary_emb.inv_freq", torch.ones(8))
    assert open_checkpoint(folder).tensors.tensors.keys() == names


@pytest.mark.parametrize("weight_map", [["model.norm.weight"], {"model.norm.weight": 1}, None])
def test_an_index_that_maps_nothing(weight_map, folder, headers_only):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(folder) == f"{path.name} has no weight_map from names of tensors to names of files"
