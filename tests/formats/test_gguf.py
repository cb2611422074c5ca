"""GGUF files held against gguf-py's reader, transformers' decode and the rules as the specification has them."""

import json
import os
import shutil
import struct
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from pydantic import ValidationError
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantkit.checkpoint.index import Checkpoint, open_checkpoint, read_json
from quantkit.checkpoint.layer import Decoder
from quantkit.errors import RefusedError, UnavailableError
from quantkit.files import hash_files
from quantkit.formats import detect, require_same_model
from quantkit.formats.gguf import write
from quantkit.formats.gguf.metadata import architecture_keys, rope_factors
from quantkit.formats.gguf.mixtures import MIXTURES, tensor_type
from quantkit.formats.gguf.names import Model, checkpoint_name, gguf_name, halves, interleave
from quantkit.formats.gguf.read import open_file, open_variants
from quantkit.formats.gguf.tokenizer import (
    DIGITS,
    OWN_PATTERN,
    PRE_TOKENIZERS,
    Splitting,
    _special,
    pre_tokenizer,
    vocabulary,
)
from quantkit.grids.block_bytes import encode
from quantkit.grids.blocks import BlockType
from quantkit.judgement import validate
from quantkit.pipeline import build, plan
from quantkit.plan import plan_lines
from quantkit.progress import Progress
from quantkit.quantize import NEED_IMPORTANCE, GgufSection
from quantkit.recipe import GatesSection, Recipe
from quantkit.report.inspect import inspect_artifact, inspection_lines
from quantkit.solvers import blocks
from quantkit.units import size_text
from quantkit.validation.perplexity import final_states
from quantkit.validation.text import EvaluationText, Window
from quantkit.workdir import work_folder
from tests.tiny import VARIANTS, WORDS, make_text, make_tiny

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 416, "sharded": False}
TYPES = ("Q2_K", "Q4_K_M", "Q8_0")


def recipe_of(source: Path, text: Path, **quantize: object) -> Recipe:
    return Recipe.of(
        {
            "format": "gguf",
            "model": {"id": str(source)},
            "quantize": {"types": TYPES, "name": "tiny", "license": "apache-2.0"} | quantize,
            "calibration": {"texts": {str(text): 8}, "window_tokens": 16, "activations": "float"},
            "validation": {"texts": (str(text),), "window_tokens": 32, "generated_tokens": 4},
        }
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        kind: make_tiny(folder / kind, kind, **SHAPE | changes | ({"head_dim": 128} if kind == "qwen3" else {}))
        for kind, changes in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def artifacts(sources, text, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_HOME", str(folder / "home"))
        return {
            kind: build(recipe_of(source, text), out=folder / kind, device=CPU, validated=False).out
            for kind, source in sources.items()
        }


def test_every_file_type_of_a_recipe_has_its_mixture():
    (inner,) = GgufSection.model_fields["types"].annotation.__args__[:1]
    assert set(inner.__args__) == MIXTURES.keys()
    assert all(gguf.LlamaFileType(row.number).name == f"MOSTLY_{name}" for name, row in MIXTURES.items())
    assert set(NEED_IMPORTANCE) < MIXTURES.keys()
    assert len(GgufSection().types) == 10


# what llama-quantize gives; "." stands for the base type
NANO = Model("llama", 4, 4, 2, 64, tied=False)
EXPECTED = {
    # file type: base, attn_v of each layer, ffn_down of each layer, attn_output
    "Q2_K": ("Q2_K", "Q3_K Q3_K Q3_K Q3_K", "Q3_K Q3_K Q3_K Q3_K", "Q3_K"),
    "Q3_K_S": ("Q3_K", ". . . .", ". . . .", "."),
    "Q3_K_M": ("Q3_K", "Q5_K Q5_K Q4_K Q4_K", "Q4_K Q4_K Q4_K Q4_K", "Q4_K"),
    "Q3_K_L": ("Q3_K", "Q5_K Q5_K Q5_K Q5_K", "Q5_K Q5_K Q5_K Q5_K", "Q5_K"),
    "Q4_K_S": ("Q4_K", "Q5_K Q5_K Q5_K Q5_K", ". . . .", "."),
    "Q4_K_M": ("Q4_K", ". . Q6_K Q6_K", ". . Q6_K Q6_K", "."),
    "Q5_K_S": ("Q5_K", ". . . .", ". . . .", "."),
    "Q5_K_M": ("Q5_K", ". . Q6_K Q6_K", ". . Q6_K Q6_K", "."),
    "Q6_K": ("Q6_K", ". . . .", ". . . .", "."),
    "Q8_0": ("Q8_0", ". . . .", ". . . .", "."),
}


@pytest.mark.parametrize("file_type", EXPECTED)
def test_types_of_a_four_layer_model(file_type):
    base, values, downs, output = EXPECTED[file_type]

    def found(module: str) -> str:
        return tensor_type(file_type, module, 256, NANO, weighted=True).replace(base, ".")

    layers = [f"model.layers.{index}" for index in range(4)]
    assert " ".join(found(f"{layer}.self_attn.v_proj") for layer in layers) == values
    assert " ".join(found(f"{layer}.mlp.down_proj") for layer in layers) == downs
    assert {found(f"{layer}.self_attn.o_proj") for layer in layers} == {output}
    rest = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")
    assert {found(f"{layer}.{name}") for layer in layers for name in rest} == {"."}
    assert found("model.embed_tokens") == "."
    assert found("lm_head") == ("." if base in ("Q8_0", "Q6_K") else "Q6_K")


# shapes of four layers whose every row is a multiple of 256, and where none is, but each is one of 32
SHAPES = {
    "rows of 256 and 512": {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 416},
    "rows of 96 and 160": {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
}
FALLEN = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@pytest.mark.parametrize("shape", SHAPES)
def test_types_of_every_tensor_in_the_files_of_a_four_layer_model(shape, tmp_path):
    """What gguf-py finds in the ten files: the K-quants they are named for, and what stands for these in short rows."""
    source = make_tiny(tmp_path / "model", "mistral", layers=4, **SHAPES[shape])
    quantize = {"types": tuple(EXPECTED), "imatrix": False, "name": "tiny"}
    recipe = Recipe.of({"format": "gguf", "model": {"id": str(source)}, "quantize": quantize})
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    seen = set()
    for file_type, (base, values, downs, output) in EXPECTED.items():
        expected = {"token_embd": base, "output": base if base in ("Q8_0", "Q6_K") else "Q6_K", "output_norm": "F32"}
        for layer, (value, down) in enumerate(zip(values.split(), downs.split(), strict=True)):
            kinds = dict.fromkeys(("attn_q", "attn_k", "ffn_gate", "ffn_up"), ".")
            kinds |= {"attn_v": value, "ffn_down": down, "attn_output": output}
            kinds |= {"attn_norm": "F32", "ffn_norm": "F32"}
            expected |= {f"blk.{layer}.{role}": kind.replace(".", base) for role, kind in kinds.items()}
        if shape == "rows of 96 and 160":
            expected = {name: FALLEN.get(kind, kind) for name, kind in expected.items()}
        tensors = gguf.GGUFReader(out / f"tiny.{file_type}.gguf").tensors
        found = {tensor.name.removesuffix(".weight"): tensor.tensor_type.name for tensor in tensors}
        assert found == expected, file_type
        seen |= set(found.values())
    assert seen == {"F32", "Q8_0"} | (set(FALLEN.values()) if "96" in shape else set(FALLEN))


@pytest.mark.parametrize("solver", ["search", "gptq"])
def test_a_tensor_is_read_once_and_encoded_once_in_each_type(solver, sources, text, tmp_path, monkeypatch):
    reads, encoded = [], []

    def counted(function: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            note(*args, **keys)
            return function(*args, **keys)

        return call

    def encoding(*args: Any, where: str, **_: Any) -> None:
        encoded.append((where, next(each.name for each in args if isinstance(each, BlockType))))

    for name in ("encode", "solve_by_rows"):
        monkeypatch.setattr(blocks, name, counted(getattr(blocks, name), encoding))
    monkeypatch.setattr(Checkpoint, "read", counted(Checkpoint.read, lambda _, item: reads.append(item)))
    recipe = recipe_of(sources["mistral"], text, types=("Q4_K_S", "Q4_K_M", "Q5_K_M"), solver=solver)
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    held: list[tuple[str, str]] = []
    content: dict[tuple[str, str], set[bytes]] = {}
    for path in out.glob("tiny.Q*.gguf"):
        for tensor in gguf.GGUFReader(path).tensors:
            if tensor.tensor_type.name != "F32":
                module = str(checkpoint_name(tensor.name)).removesuffix(".weight")
                held.append((module, tensor.tensor_type.name))
                content.setdefault(held[-1], set()).add(tensor.data.tobytes())
    assert len(held) == 3 * (2 * 7 + 2)
    assert sorted(encoded) == sorted(set(held))
    assert len(encoded) < len(held)
    assert {len(found) for found in content.values()} == {1}
    assert reads == list(open_checkpoint(sources["mistral"]).items)


# llama-quantize's choice for eight layers with an importance matrix: base, head, embedding, attn_q and attn_k, attn_v,
# attn_output, ffn_down of the first layer, ffn_up of the first and of the second; "." stands for the base type
SMALLEST = {
    "IQ1_M": "IQ1_M  Q5_K Q2_K .       Q2_K IQ2_XXS Q2_K . .",
    "IQ2_XXS": "IQ2_XXS Q5_K Q2_K .    Q2_K .    Q2_K  . .",
    "IQ2_M": "IQ2_S  Q5_K IQ3_S .      IQ3_S IQ3_S IQ3_S . .",
    "IQ3_XXS": "IQ3_XXS Q5_K IQ3_S IQ2_S . IQ3_S .     . .",
    "IQ3_XS": "IQ3_S Q6_K .    IQ3_XXS .   .     .     . IQ3_XXS",
    "IQ3_M": "IQ3_S  Q6_K .     .      Q4_K Q4_K Q4_K  . .",
    "IQ4_XS": "IQ4_XS Q6_K .    .      .    .    .     . .",
}


@pytest.mark.parametrize("file_type", SMALLEST)
def test_types_of_the_i_quants(file_type):
    model = Model("llama", 8, 4, 2, 64, tied=False)
    base, *expected = SMALLEST[file_type].split()
    names = ["lm_head", "model.embed_tokens"] + [
        f"model.layers.{name}"
        for name in (
            "0.self_attn.q_proj",
            "0.self_attn.v_proj",
            "0.self_attn.o_proj",
            "0.mlp.down_proj",
            "0.mlp.up_proj",
            "1.mlp.up_proj",
        )
    ]
    found = [tensor_type(file_type, name, 256, model, weighted=True) for name in names]
    assert [kind.replace(base, ".") if kind == base else kind for kind in found] == expected
    key = tensor_type(file_type, "model.layers.0.self_attn.k_proj", 256, model, weighted=True)
    assert key == found[2]


def test_types_depend_on_depth_heads_and_tying():
    deep = Model("llama", 32, 32, 8, 128, tied=False)
    layers = range(32)

    def of(file_type: str, name: str, model: Model = deep) -> list[str]:
        return [tensor_type(file_type, f"model.layers.{i}.{name}", 4096, model, weighted=True) for i in layers]

    more = [i for i in layers if i < 4 or i >= 28 or (i - 4) % 3 == 2]
    assert [i for i, kind in enumerate(of("Q4_K_M", "mlp.down_proj")) if kind == "Q6_K"] == more
    assert [i for i, kind in enumerate(of("Q3_K_M", "mlp.down_proj")) if kind == "Q5_K"] == [0, 1]
    assert [i for i, kind in enumerate(of("Q4_K_S", "mlp.down_proj")) if kind == "Q5_K"] == [0, 1, 2, 3]
    assert [i for i, kind in enumerate(of("Q4_0", "mlp.down_proj")) if kind == "Q4_1"] == [0, 1, 2, 3]
    assert set(of("Q2_K", "self_attn.v_proj")) == {"Q4_K"}  # four query heads share each value head
    seventy = Model("llama", 80, 64, 8, 128, tied=False)
    assert set(of("Q4_K_S", "self_attn.v_proj", seventy)) == {"Q5_K"}
    tied = Model("qwen2", 32, 32, 8, 128, tied=True)
    assert tensor_type("Q4_K_M", "model.embed_tokens", 4096, tied, weighted=True) == "Q6_K"


def test_rows_that_are_no_multiple_of_256_fall_back():
    found = {name: tensor_type(name, "model.layers.0.mlp.up_proj", 96, NANO, weighted=True) for name in MIXTURES}
    assert found == {
        "Q2_K": "Q4_0", "Q3_K_S": "Q4_0", "Q3_K_M": "Q4_0", "Q3_K_L": "Q4_0", "Q4_K_S": "Q5_0", "Q4_K_M": "Q5_0",
        "Q5_K_S": "Q5_1", "Q5_K_M": "Q5_1", "Q6_K": "Q8_0",
        "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q2_K_S": "Q4_0",
        "F16": "F16", "BF16": "BF16", "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL",
        "IQ2_S": "IQ4_NL", "IQ2_M": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_XS": "IQ4_NL", "IQ3_S": "IQ4_NL",
        "IQ3_M": "IQ4_NL", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_NL",
    }  # fmt: skip
    narrow = {name: tensor_type(name, "model.layers.0.mlp.up_proj", 144, NANO, weighted=True) for name in MIXTURES}
    assert narrow == dict.fromkeys(MIXTURES, "F16") | {"BF16": "BF16"}
    assert tensor_type("Q4_K_M", "lm_head", 144, NANO, weighted=True) == "F16"
    assert tensor_type("Q4_K_M", "lm_head", 96, NANO, weighted=True) == "Q8_0"


def test_names_and_rows_go_there_and_back():
    names = [f"model.layers.7.{inner}.weight" for inner in ("self_attn.k_proj", "mlp.up_proj", "input_layernorm")]
    for name in [*names, "model.layers.0.self_attn.q_proj.bias", "model.norm.weight", "lm_head.weight"]:
        assert checkpoint_name(gguf_name(name)) == name
    assert checkpoint_name("rope_freqs.weight") is None
    assert interleave(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert halves(interleave(torch.arange(24), 2), 2).tolist() == list(range(24))


@pytest.mark.parametrize("kind", VARIANTS)
def test_gguf_py_finds_the_sources_weights(kind, sources, artifacts):
    """Every tensor, decoded by gguf-py and put back by hand into the checkpoint's row order, is near the source's."""
    config = read_json(sources[kind] / "config.json")
    source = open_checkpoint(sources[kind])
    head = 128 if kind == "qwen3" else 64
    seen = set()
    for path in sorted(artifacts[kind].glob("tiny.Q*.gguf")):
        reader = gguf.GGUFReader(path)
        for tensor in reader.tensors:
            if tensor.name == "rope_freqs.weight":
                continue
            name = checkpoint_name(tensor.name)
            seen.add(name)
            decoded = gguf.dequantize(tensor.data, tensor.tensor_type)
            if kind in ("mistral", "llama") and tensor.name.split(".")[2:3] in (["attn_q"], ["attn_k"]):
                count = decoded.shape[0] // head
                order = [h * head + (j // 2 + (j % 2) * (head // 2)) for h in range(count) for j in range(head)]
                undone = np.empty_like(decoded)
                undone[order] = decoded
                decoded = undone
            want = source.tensors.read([name])[name].float().numpy()
            assert decoded.shape == want.shape, name
            error = np.linalg.norm(decoded - want) / max(np.linalg.norm(want), 1e-9)
            assert error < (0.35 if tensor.tensor_type.name == "Q2_K" else 0.25), (tensor.name, error)
            if want.ndim == 1:
                np.testing.assert_array_equal(decoded, want)
    assert seen == set(source.tensors.tensors)
    assert config["tie_word_embeddings"] == ("output.weight" not in {gguf_name(name) for name in seen})


@pytest.mark.parametrize("kind", VARIANTS)
def test_transformers_decodes_the_model_that_our_reader_sees(kind, artifacts, sources):
    """Its loader knows metadata, names and row order by itself; its logits are those of our decode."""
    variant = open_variants(artifacts[kind])["Q4_K_M"]
    tokens = torch.randint(3, 380, (1, 24), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(
        artifacts[kind], gguf_file="tiny.Q4_K_M.gguf", dtype=torch.float32
    ).eval()
    ours = AutoModelForCausalLM.from_pretrained(sources[kind], dtype=torch.float32).eval()
    state = {key: tensor for item in ("embedding", "layers.0", "layers.1", "head") for key, tensor in
             variant.read(item).items()}  # fmt: skip
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    if kind == "llama":
        # it leaves rope_freqs.weight aside; the factors have a test of their own
        theirs.model.rotary_emb = ours.model.rotary_emb
    with torch.inference_mode():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=0, atol=2e-5)


def test_metadata(artifacts, sources):
    data = {}
    for field in gguf.GGUFReader(artifacts["mistral"] / "tiny.Q4_K_M.gguf").fields.values():
        data[field.name] = field.contents()
    tokenizer = AutoTokenizer.from_pretrained(sources["mistral"])
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "general.languages": ["pl"],
        "general.file_type": 15,
        "general.quantization_version": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 256,
        "llama.block_count": 2,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 416,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": tokenizer.chat_template,
        "quantize.imatrix.file": "tiny.imatrix.gguf",
    }
    assert {key: data.get(key) for key in expected} == expected
    assert data["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert data["tokenizer.ggml.tokens"][:384] == tokenizer.convert_ids_to_tokens(range(384))
    assert data["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert str(sources["mistral"].parent) not in str(data)
    tied = gguf.GGUFReader(artifacts["qwen2"] / "tiny.Q8_0.gguf")
    assert "output.weight" not in {tensor.name for tensor in tied.tensors}


def test_the_base_model_and_who_quantized_are_in_the_file(tiny_mistral, artifacts, tmp_path):
    quantize = {"types": ("Q8_0",), "imatrix": False, "base_model": "zuraw/Zuraw-7B", "quantized_by": "speakleash"}
    recipe = Recipe.of({"format": "gguf", "model": {"id": str(tiny_mistral)}, "quantize": quantize})
    (path,) = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out.glob("*.gguf")
    told = {
        "general.base_model.count": 1,
        "general.base_model.0.name": "Zuraw-7B",
        "general.base_model.0.organization": "zuraw",
        "general.base_model.0.repo_url": "https://huggingface.co/zuraw/Zuraw-7B",
        "general.quantized_by": "speakleash",
    }
    for file, expected in ((path, told), (artifacts["mistral"] / "tiny.Q8_0.gguf", {})):
        fields = gguf.GGUFReader(file).fields.values()
        found = {field.name: field.contents() for field in fields}
        assert {key: found[key] for key in found if "base_model" in key or "quantized_by" in key} == expected


def test_llama_3_frequencies_are_those_of_transformers(sources, artifacts):
    config = read_json(sources["llama"] / "config.json")
    model = AutoModelForCausalLM.from_pretrained(sources["llama"])
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = rope_factors(config)
    torch.testing.assert_close(plain / factors, scaled)
    assert len(factors.unique()) > 2
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(artifacts["llama"] / "tiny.Q8_0.gguf").tensors}
    np.testing.assert_array_equal(stored["rope_freqs.weight"].data, factors.numpy())


@pytest.mark.parametrize(
    ("kind", "key", "shape"),
    [
        ("mistral", "num_key_value_heads", {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 8}),
        ("qwen3", "head_dim", {"hidden_size": 256, "head_dim": 128}),
        ("llama", "rms_norm_eps", {"rms_norm_eps": 1e-6}),
    ],
)
def test_what_config_json_leaves_out_has_the_familys_own_value(kind, key, shape, text, tmp_path):
    source = make_tiny(tmp_path / "m", kind, **SHAPE | {"layers": 1} | shape)
    config = read_json(source / "config.json")
    files = []
    for content in (config, {name: value for name, value in config.items() if name != key}):
        (source / "config.json").write_text(json.dumps(content))
        recipe = recipe_of(source, text, types=["Q8_0"])
        out = build(recipe, out=tmp_path / f"out{len(files)}", device=CPU, validated=False).out
        files.append((out / "tiny.Q8_0.gguf").read_bytes())
    assert key in config
    assert files[0] == files[1]


@pytest.mark.parametrize(("said", "expected"), [(-1, {}), (None, {}), ([2, 3], {"padding": 2}), (0, {"padding": 0})])
def test_a_special_token_that_is_none_has_no_id(said, expected):
    assert _special({}, {"pad_token_id": said}, {}) == expected


def test_the_importance_matrix_is_the_mean_square_of_the_float_models_inputs(artifacts, sources, text):
    from quantkit.calibration.tokens import calibration_windows
    from quantkit.checkpoint.tokenizer import load_tokenizer
    from quantkit.texts import load_text_set

    model = AutoModelForCausalLM.from_pretrained(sources["mistral"], dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, inputs, __, name=name: sums.update({name: inputs[0].square().sum((0, 1))})
            )
    tokens = calibration_windows(
        [(load_text_set(str(text), "calibration"), 8)],
        load_tokenizer(sources["mistral"], vocab_size=416),
        window_tokens=16,
        seed=0,
    )
    with torch.inference_mode():
        model(tokens)
    reader = gguf.GGUFReader(artifacts["mistral"] / "tiny.imatrix.gguf")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert reader.get_field("general.type").contents() == "imatrix"
    assert found.keys() == {f"{gguf_name(f'{name}.weight')}.{part}" for name in sums for part in ("in_sum2", "counts")}
    for name, total in sums.items():
        short = gguf_name(f"{name}.weight")
        assert found[f"{short}.counts"].item() == tokens.numel()
        np.testing.assert_allclose(found[f"{short}.in_sum2"][0], total.numpy(), rtol=1e-4, err_msg=name)


def test_one_folder_with_all_variants_judged_and_the_same_bytes_again(sources, text, tmp_path, artifacts):
    recipe = recipe_of(sources["mistral"], text)
    limits = {"Q2_K": GatesSection(perplexity_ratio=1.0)}
    recipe = recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"variant_gates": limits})})
    done = build(recipe, out=tmp_path / "a", device=CPU)
    files = ["tiny.Q2_K.gguf", "tiny.Q4_K_M.gguf", "tiny.Q8_0.gguf", "tiny.imatrix.gguf"]
    names = ["Modelfile", "README.md", "params", "quantkit.json", "template", *files]
    assert sorted(path.name for path in done.out.iterdir()) == sorted(names)
    assert (done.out / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./tiny.Q4_K_M.gguf\nTEMPLATE")
    assert done.record["variants"] == {kind: [f"tiny.{kind}.gguf"] for kind in TYPES}
    validation = done.record["validation"]
    assert [variant["name"] for variant in validation["variants"]] == list(TYPES)
    ratios = [variant["results"][0]["mean_kld"] for variant in validation["variants"]]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[2] < 1e-3 < ratios[0]
    assert [variant["gate"]["passed"] for variant in validation["variants"]] == [False, True, True]
    assert validation["gate"]["failures"][0].startswith("Q2_K: reference: perplexity_ratio")
    assert hash_files(done.out, files) == hash_files(artifacts["mistral"], files)
    again = validate(done.out, model=str(sources["mistral"]), texts=(str(text),), runtime="native", device=CPU)
    assert [result["runtime"] for result in again["variants"][1]["results"]] == ["reference", "llama-cpp"]


def test_a_type_alone_follows_the_stream_as_quantized(sources, text, tmp_path):
    """Interrupted or not: what a finished layer is read back as is what its successors saw."""
    from quantkit.formats.gguf.write import GgufFormat

    recipe = recipe_of(sources["mistral"], text, types=("Q2_K",))
    section = recipe.calibration.model_copy(update={"activations": "quantized"})
    recipe = recipe.model_copy(update={"calibration": section})
    whole = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out

    def fail(*_):
        raise RuntimeError("no further")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GgufFormat, "assemble", fail)
        with pytest.raises(RuntimeError):
            build(recipe, out=tmp_path / "b", device=CPU, validated=False)
    (tmp_path / "b.work" / "items" / "layers.1.safetensors").unlink()
    (tmp_path / "b.work" / "items" / "head.safetensors").unlink()
    build(recipe, out=tmp_path / "b", device=CPU, validated=False)
    files = ["tiny.Q2_K.gguf", "tiny.imatrix.gguf"]
    assert hash_files(whole, files) == hash_files(tmp_path / "b", files)


@pytest.mark.parametrize("weighted", [False, True])
def test_what_was_solved_of_a_layer_is_written_before_the_rest_is(weighted, sources, text, tmp_path, monkeypatch):
    """Of its seven linears in three types, those of one are at work, and those of one more are being written."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def encoding(*arguments: Any, **keys: Any) -> Any:
        alive.append(sum(each() is not None for each in held))
        codes, grid = encode(*arguments, **keys)
        held.append(weakref.ref(codes))
        return codes, grid

    monkeypatch.setattr(blocks, "encode", encoding)
    recipe = recipe_of(sources["mistral"], text, types=("Q2_K", "Q3_K_S", "Q6_K"), imatrix=weighted)
    build(recipe, out=tmp_path / "out", device=CPU, validated=False)
    assert len(held) > 2 * 15
    assert 1 < max(alive) < 2 * 3


def test_several_types_want_the_float_stream(sources, text, tmp_path):
    recipe = recipe_of(sources["mistral"], text)
    section = recipe.calibration.model_copy(update={"activations": "quantized"})
    with pytest.raises(RefusedError) as caught:
        build(recipe.model_copy(update={"calibration": section}), out=tmp_path / "a", device=CPU)
    assert str(caught.value) == (
        "several variants cannot share statistics of a quantized stream, which is different for each\n"
        "  at:  calibration.activations\n"
        '  fix: set it to "float", or let the recipe name a single variant'
    )


def test_without_an_importance_matrix_no_text_is_read(sources, text, tmp_path):
    recipe = recipe_of(sources["mistral"], tmp_path / "absent.jsonl", imatrix=False, types=("Q4_0",))
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    assert [path.name for path in out.glob("*.gguf")] == ["tiny.Q4_0.gguf"]


def test_the_plan_knows_each_files_size(sources, text, artifacts, tmp_path):
    for kind, source in sources.items():
        found = plan(recipe_of(source, text), out=tmp_path / "a", device=CPU, progress=Progress())
        assert list(found.variants) == list(TYPES)
        assert f"  Q2_K            {size_text(found.variants['Q2_K'])}" in plan_lines(found)
        for name, size in found.variants.items():
            real = (artifacts[kind] / f"tiny.{name}.gguf").stat().st_size
            assert abs(real - size) <= 0.01 * real, (kind, name)


def test_a_tokenizer_that_cannot_be_written_stops_the_plan(sources, text, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sources["qwen2"], folder)
    for path in byte_level(tmp_path / "odd", Splitting((r"\w+|\s+",))).iterdir():
        shutil.copyfile(path, folder / path.name)
    with pytest.raises(RefusedError, match=r"no llama\.cpp name for"):
        plan(recipe_of(folder, text), out=tmp_path / "a", device=CPU, progress=Progress())


def test_the_older_form_of_the_importance_matrix(sources, text, tmp_path):
    recipe = recipe_of(sources["mistral"], text, types=("Q8_0",), imatrix_dat=True)
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out / "tiny.imatrix.gguf").tensors}
    content = (out / "tiny.imatrix.dat").read_bytes()
    (entries,), at = struct.unpack_from("<i", content), 4
    assert entries == len(stored) // 2 == 15
    for _ in range(entries):
        (length,) = struct.unpack_from("<i", content, at)
        name = content[at + 4 : at + 4 + length].decode()
        calls, count = struct.unpack_from("<2i", content, at + 4 + length)
        at += 12 + length
        values = np.frombuffer(content, dtype="<f4", count=count, offset=at) / calls
        at += 4 * count
        expected = stored[f"{name}.in_sum2"][0] / stored[f"{name}.counts"].item()
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert content[at:] == struct.pack("<2i", 1, 13) + b"quantkit.json"


def test_sixteen_bits_are_the_sources_own(sources, tmp_path):
    recipe = recipe_of(sources["qwen2"], tmp_path / "absent.jsonl", imatrix=False, types=("BF16", "F16"))
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    source = open_checkpoint(sources["qwen2"])
    for kind in ("F16", "BF16"):
        artifact = open_variants(out)[kind]
        assert artifact.bits_per_weight == 16
        for item in source.items:
            for name, tensor in source.read(item).items():
                expected = tensor.half() if kind == "F16" and tensor.dim() == 2 else tensor
                assert torch.equal(artifact.read(item)[name], expected.float()), name


def test_rows_that_no_block_fits_stay_in_sixteen_bits(tmp_path):
    source = make_tiny(tmp_path / "model", "mistral", **SHAPE | {"intermediate_size": 144})
    recipe = recipe_of(source, tmp_path / "absent.jsonl", imatrix=False, types=("Q4_K_M",))
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "tiny.Q4_K_M.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q4_K")


def test_what_an_encoder_cannot_make_is_refused_by_the_recipe(sources, text):
    for changes, reason in (
        ({"types": ("Q8_0", "Q2_K_S"), "imatrix": False}, "Q2_K_S need imatrix = true"),
        ({"types": ("IQ1_M",), "imatrix": False, "encoder": "ggml"}, "IQ1_M need imatrix = true"),
        ({"encoder": "ggml", "solver": "gptq"}, "has no GPTQ"),
    ):
        with pytest.raises(ValidationError, match=reason):
            recipe_of(sources["mistral"], text, **changes)


def test_ggmls_encoder_is_asked_for_before_the_work_starts(sources, text, tmp_path):
    """In a home without engines the plan says how to get it."""
    for changes in ({"encoder": "ggml", "types": ("Q8_0",)}, {"types": ("IQ2_XXS", "Q8_0")}):
        recipe = recipe_of(sources["mistral"], text, **changes)
        with pytest.raises(UnavailableError, match="llama-cpp is not installed"):
            plan(recipe, out=tmp_path / "a", device=CPU, progress=Progress())


@pytest.fixture
def split(sources, text, tmp_path) -> Path:
    recipe = recipe_of(sources["mistral"], text, types=("Q4_K_M", "Q8_0"), shard_gb=0.0005)
    done = build(recipe, out=tmp_path / "split", device=CPU, validated=False)
    assert done.record["variants"] == {
        "Q4_K_M": [f"tiny.Q4_K_M-0000{number}-of-00002.gguf" for number in (1, 2)],
        "Q8_0": [f"tiny.Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)],
    }
    return done.out


def test_large_files_are_split_as_gguf_split_does(split, artifacts):
    for kind, count in (("Q4_K_M", 2), ("Q8_0", 3)):
        whole = gguf.GGUFReader(artifacts["mistral"] / f"tiny.{kind}.gguf")
        found = {}
        for number in range(count):
            path = split / f"tiny.{kind}-{number + 1:05d}-of-{count:05d}.gguf"
            part = gguf.GGUFReader(path)
            keys = {key: part.get_field(f"split.{key}") for key in ("no", "count", "tensors.count")}
            assert [field.types[0].name for field in keys.values()] == ["UINT16", "UINT16", "INT32"]
            assert [field.contents() for field in keys.values()] == [number, count, len(whole.tensors)]
            assert sum(tensor.n_bytes for tensor in part.tensors) <= 500_000
            assert (part.get_field("tokenizer.ggml.tokens") is not None) == (number == 0)
            found |= {tensor.name: tensor.data.tobytes() for tensor in part.tensors}
        assert found == {tensor.name: tensor.data.tobytes() for tensor in whole.tensors}
    together, apart = open_variants(artifacts["mistral"]), open_variants(split)
    assert list(apart) == ["Q4_K_M", "Q8_0"]
    for item in ("embedding", "layers.1", "head"):
        for name, tensor in together["Q8_0"].read(item).items():
            assert torch.equal(apart["Q8_0"].read(item)[name], tensor), name


def test_parts_that_are_missing_or_strange_are_named(split):
    last = split / "tiny.Q8_0-00003-of-00003.gguf"
    last.rename(split / "elsewhere")
    with pytest.raises(RefusedError, match=r"tiny\.Q8_0-00003-of-00003\.gguf is missing"):
        open_variants(split)
    last.write_bytes((split / "tiny.Q8_0-00002-of-00003.gguf").read_bytes())
    with pytest.raises(RefusedError, match="says that it is another part"):
        open_variants(split)
    (split / "elsewhere").rename(last)
    (split / "tiny.Q8_0-00001-of-00003.gguf").rename(split / "other.gguf")
    with pytest.raises(RefusedError, match="its name is not that of a first file"):
        open_file(split / "other.gguf")
    with pytest.raises(RefusedError, match="its name is not that of a first file"):
        open_variants(split)


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("kind", ["mistral", "llama"])  # llama has a tensor of no item: its rope factors
@pytest.mark.parametrize("moment", ["files", "factors", "tensors", "others"])
def test_a_build_killed_while_it_writes_in_place_ends_in_the_same_bytes(
    kind, moment, sources, text, artifacts, tmp_path, monkeypatch
):
    def kill(*_, **__):
        raise Killed

    def second_time(function):
        calls = iter((function, kill))
        return lambda *arguments: next(calls)(*arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if moment == "files":
            patch.setattr(write, "lay_out", second_time(write.lay_out))
        elif moment == "factors":
            patch.setattr(write, "TypedFiles", kill)
        elif moment == "tensors":
            patch.setattr(os, "fsync", second_time(os.fsync))
        else:
            patch.setattr(write, "write_imatrix", kill)
        with pytest.raises(Killed):
            build(recipe_of(sources[kind], text), out=out, device=CPU, validated=False)
    left = work_folder(out) / "artifact" / ".half.partial"
    left.write_text("what a kill leaves")
    build(recipe_of(sources[kind], text), out=out, device=CPU, validated=False)
    names = sorted(path.name for path in artifacts[kind].iterdir() if path.suffix == ".gguf")
    assert hash_files(out, names) == hash_files(artifacts[kind], names)
    assert not (out / left.name).exists()


def test_a_file_that_was_taken_away_is_made_again(sources, text, artifacts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(write, "write_imatrix", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            build(recipe_of(sources["mistral"], text), out=out, device=CPU, validated=False)
    (work_folder(out) / "artifact" / "tiny.Q4_K_M.gguf").unlink()
    build(recipe_of(sources["mistral"], text), out=out, device=CPU, validated=False)
    assert hash_files(out, ["tiny.Q4_K_M.gguf"]) == hash_files(artifacts["mistral"], ["tiny.Q4_K_M.gguf"])


# what follows is about files of other makers


@pytest.fixture
def damaged(artifacts, tmp_path) -> Path:
    path = tmp_path / "folder" / "model.Q8_0.gguf"
    path.parent.mkdir()
    path.write_bytes((artifacts["mistral"] / "tiny.Q8_0.gguf").read_bytes())
    return path


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_refused(damaged, share):
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(RefusedError, match=r"model\.Q8_0\.gguf is not a GGUF file that can be read"):
        open_file(damaged)


def test_counts_beyond_the_file_take_no_memory(damaged):
    content = bytearray(damaged.read_bytes())
    for at in (8, 16):  # tensors, then keys
        hostile = content.copy()
        hostile[at : at + 8] = struct.pack("<Q", 2**60)
        damaged.write_bytes(hostile)
        with pytest.raises(RefusedError, match="is not a GGUF file that can be read"):
            open_file(damaged)
    at = content.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    hostile = content.copy()
    hostile[at : at + 8] = struct.pack("<Q", 2**59)
    damaged.write_bytes(hostile)
    with pytest.raises(RefusedError, match="it ends within its head"):
        open_file(damaged)


@pytest.fixture(scope="module")
def small(tmp_path_factory, text) -> Path:
    """A whole file; a folder "damaged" beside it is for what is made of it."""
    folder = tmp_path_factory.mktemp("small")
    source = make_tiny(folder / "model", "mistral", **SHAPE | {"hidden_size": 64, "intermediate_size": 64})
    recipe = recipe_of(source, text, types=("Q8_0",), imatrix=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_HOME", str(folder / "home"))
        out = build(recipe, out=folder / "out", device=CPU, validated=False).out
    (out / "damaged").mkdir()
    return out / "tiny.Q8_0.gguf"


FUZZED = EvaluationText("fuzz", "", (Window((1, 5, 6), (5, 6, 7), 0),), (), 1, 1, 1)
EXTREMES = (0, 1, 2, 7, 31, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    edits=strategies.lists(
        strategies.tuples(
            strategies.floats(0, 1),
            strategies.sampled_from(["<B", "<I", "<Q"]),
            strategies.sampled_from(EXTREMES) | strategies.integers(0, 255),
        ),
        min_size=1,
        max_size=4,
    ),
    where=strategies.sampled_from(["start", "keys", "tensors"]),
)
def test_a_damaged_head_is_read_or_refused_in_bounded_memory(small, edits, where):
    """Whatever is written into it: no traceback, and no more memory than a few times the file."""
    content, path = small.read_bytes(), small.parent / "damaged" / small.name
    end = min(tensor.data_offset for tensor in gguf.GGUFReader(small).tensors)
    tensors = content.index(b"token_embd.weight")
    low, high = {"start": (0, 600), "keys": (0, tensors), "tensors": (tensors - 8, end)}[where]
    hostile = bytearray(content)
    for share, code, value in edits:
        at = low + int(share * (high - low - 9))
        struct.pack_into(code, hostile, at, value % 256 ** struct.calcsize(code))
    path.write_bytes(hostile)
    source = open_checkpoint(small.parent.parent / "model")
    tracemalloc.start()
    try:
        for artifact in open_variants(path.parent).values():
            for item in ("embedding", "layers.0", "layers.1", "head"):
                artifact.read(item)
            # what passes these can be run by the model's config
            require_same_model("gguf", artifact, source)
            decoder = Decoder(source.config, source.family, device=CPU, dtype=torch.float32)
            final_states(artifact, FUZZED, decoder, windows_per_batch=1)
    except RefusedError:
        pass
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 20 * len(content)


def rewritten(source: Path, target: Path, *, keys: dict | None = None, tensors: dict | None = None) -> Path:
    """A GGUF file with other values of some keys, and other tensors; None leaves one out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    for name, field in fields.items():
        value = (keys or {}).get(name, field.contents())
        if name != "general.architecture" and value is not None:
            kinds = field.types if isinstance(value, list) else [field.types[-1], None]
            writer.add_key_value(name, value, kinds[0], kinds[1] if len(kinds) > 1 else None)
    for name, value in (keys or {}).items():
        if name not in fields and value is not None:
            kind = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
            writer.add_key_value(name, value, kind[type(value)])
    held = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    held |= {name: (value, None) for name, value in (tensors or {}).items()}
    for name, (value, kind) in held.items():
        if value is not None:
            writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


NOISE = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tensors": {"output_norm.weight": None}}, "output_norm.weight is missing"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "blk.1.ffn_up.weight is missing"),
        ({"tensors": {"blk.0.attn_norm.weight": None}}, "blk.0.attn_norm.weight is missing"),
        ({"tensors": {"blk.0.attn_v.weight": NOISE[:96]}}, "blk.0.attn_v.weight is [96, 256] instead of [128, 256]"),
        ({"tensors": {"blk.0.attn_q.weight": NOISE[:128]}}, "blk.0.attn_q.weight is [128, 256] instead of [256, 256]"),
        ({"tensors": {"blk.1.attn_output.weight": NOISE[:, :64]}}, "blk.1.attn_output.weight is [256, 64] instead of"),
        ({"tensors": {"blk.0.attn_q.bias": NOISE[0, :32]}}, "blk.0.attn_q.bias is [32] instead of [256]"),
        ({"tensors": {"blk.0.attn_q.scale": NOISE[0, :1]}}, "blk.0.attn_q.scale is unknown"),
        ({"tensors": {"output.weight": NOISE[:100]}}, "output.weight is [100, 256] instead of [416, 256]"),
        ({"keys": {"llama.attention.head_count": 8}}, "attn_q.weight is [256, 256] instead of [512, 256]"),
        ({"keys": {"llama.attention.head_count_kv": 4}}, "attn_k.weight is [128, 256] instead of [256, 256]"),
        ({"keys": {"llama.attention.key_length": 32}}, "keys and values have heads of different widths"),
        ({"keys": {"llama.rope.dimension_count": 32}}, "the rotary code turns a part of each head"),
        ({"keys": {"llama.attention.head_count_kv": 3}}, "4 query heads share 3 key heads"),
        ({"keys": {"llama.block_count": 2**31}}, "block_count is 2147483648"),
    ],
)
def test_what_contradicts_the_files_own_metadata_is_refused_before_any_work(
    changes, reason, artifacts, sources, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("quantkit.judgement.run_reference", None)
    (tmp_path / "a").mkdir()
    rewritten(artifacts["mistral"] / "tiny.Q8_0.gguf", tmp_path / "a" / "other.Q8_0.gguf", **changes)
    with pytest.raises(RefusedError) as caught:
        validate(tmp_path / "a", model=str(sources["mistral"]), texts=(str(text),), runtime="reference", device=CPU)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("mistral", {"keys": {"llama.rope.freq_base": 5e5}}, "llama.rope.freq_base is 500000.0, the model's 10000.0"),
        ("mistral", {"keys": {"llama.context_length": 512}}, "llama.context_length is 512, the model's 256"),
        (
            "mistral",
            {"keys": {"llama.attention.layer_norm_rms_epsilon": 1e-6}},
            "llama.attention.layer_norm_rms_epsilon is",
        ),
        (
            "mistral",
            {"keys": {"llama.rope.scaling.factor": 4.0}},
            "llama.rope.scaling.type is linear, the model's none",
        ),
        ("mistral", {"tensors": {"blk.0.attn_v.bias": NOISE[0, :128]}}, "and the model has no such tensor"),
        ("mistral", {"tensors": {"rope_freqs.weight": NOISE[0, :32]}}, "rope_freqs.weight scales the rotary"),
        ("llama", {"tensors": {"rope_freqs.weight": None}}, "rope_freqs.weight scales the rotary"),
        ("qwen2", {"tensors": {"blk.0.attn_q.bias": None}}, "model.layers.0.self_attn.q_proj.bias is missing"),
        ("qwen3", {"tensors": {"blk.1.attn_k_norm.weight": None}}, "model.layers.1.self_attn.k_norm.weight is missing"),
    ],
)
def test_what_contradicts_the_model_it_is_held_against_is_refused_before_any_work(
    kind, changes, reason, artifacts, sources, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("quantkit.judgement.run_reference", None)
    (tmp_path / "a").mkdir()
    rewritten(artifacts[kind] / "tiny.Q8_0.gguf", tmp_path / "a" / "other.Q8_0.gguf", **changes)
    with pytest.raises(RefusedError) as caught:
        validate(tmp_path / "a", model=str(sources[kind]), texts=(str(text),), runtime="reference", device=CPU)
    assert reason in str(caught.value)


def test_a_file_of_another_architecture_or_a_rewritten_one(artifacts, sources, text, tmp_path):
    for name, kind in (("same", "llama"), ("other", "mistral")):
        (tmp_path / name).mkdir()
        rewritten(artifacts["llama"] / "tiny.Q8_0.gguf", tmp_path / name / "other.Q8_0.gguf")
        if name == "same":
            found = open_file(tmp_path / name / "other.Q8_0.gguf")
            require_same_model("gguf", found, open_checkpoint(sources[kind]))
            continue
        with pytest.raises(RefusedError, match="rope_freqs"):
            validate(tmp_path / name, model=str(sources[kind]), texts=(str(text),), runtime="reference", device=CPU)
    with pytest.raises(RefusedError, match=r"general\.architecture is llama, the model's qwen2"):
        require_same_model("gguf", found, open_checkpoint(sources["qwen2"]))


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (LINEAR, {"type": "linear", "factor": 4.0}),
        (YARN, {"type": "yarn", "factor": 4.0, "original_context_length": 64}),
        (
            YARN | {"beta_fast": 32, "beta_slow": 1.0, "attention_factor": 1.5, "truncate": True},
            {
                "type": "yarn",
                "factor": 4.0,
                "original_context_length": 64,
                "attn_factor": pytest.approx(1.5 / (1 + 0.1 * np.log(4))),
            },
        ),
        (
            YARN | {"mscale": 0.5, "mscale_all_dim": 1.0},
            {
                "type": "yarn",
                "factor": 4.0,
                "original_context_length": 64,
                "attn_factor": pytest.approx((1 + 0.05 * np.log(4)) / (1 + 0.1 * np.log(4)) ** 2),
            },
        ),
    ],
)
def test_rotary_scaling_in_the_file(rope, expected, text, tmp_path):
    source = make_tiny(tmp_path / "model", "mistral", **SHAPE, rope_parameters=rope)
    recipe = recipe_of(source, text, types=("Q8_0",), imatrix=False)
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    fields = gguf.GGUFReader(out / "tiny.Q8_0.gguf").fields
    start = "llama.rope.scaling."
    assert {name.removeprefix(start): field.contents() for name, field in fields.items() if start in name} == expected
    assert require_same_model("gguf", open_file(out / "tiny.Q8_0.gguf"), open_checkpoint(source)) is None
    factor = next(name for name in fields if name.endswith("rope.scaling.factor"))
    other = rewritten(out / "tiny.Q8_0.gguf", tmp_path / "other.Q8_0.gguf", keys={factor: 2.0})
    with pytest.raises(RefusedError, match=r"rope\.scaling\.factor is 2\.0, the model's 4\.0"):
        require_same_model("gguf", open_file(other), open_checkpoint(source))


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "GGUF has no keys for the rotary scaling 'dynamic'"),
        (YARN | {"beta_fast": 16, "beta_slow": 2.0}, "GGUF cannot say beta_fast = 16, beta_slow = 2.0 of yarn rotary"),
        (YARN | {"truncate": False}, "GGUF cannot say truncate = False of yarn rotary scaling"),
        (LINEAR | {"beta_fast": 16}, "GGUF cannot say beta_fast = 16 of linear rotary scaling"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "GGUF cannot say partial_rotary_factor = 0.5"),
    ],
)
def test_rotary_scaling_that_cannot_be_said(rope, reason, sources):
    config = read_json(sources["mistral"] / "config.json") | {"rope_parameters": rope}
    with pytest.raises(RefusedError, match=reason):
        architecture_keys(config, Model.of(config))
    plain = {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 1.0}
    assert architecture_keys(config | {"rope_parameters": plain}, Model.of(config))["rope.freq_base"] == 5.0


def test_a_head_beyond_all_measure_is_refused(small, monkeypatch):
    open_file(small)
    monkeypatch.setattr("quantkit.formats.gguf.header.MAX_HEAD_BYTES", 4096)
    with pytest.raises(RefusedError, match="its head is longer than 4096 bytes"):
        open_file(small)


def test_inspect_shows_every_variant_and_reads_one_file_alone(artifacts, sources, text):
    whole = inspect_artifact(artifacts["mistral"], verify=True)
    assert whole["changed"] == []
    assert [variant["name"] for variant in whole["variants"]] == list(TYPES)
    sizes = [(artifacts["mistral"] / f"tiny.{kind}.gguf").stat().st_size for kind in TYPES]
    assert [variant["size_bytes"] for variant in whole["variants"]] == sizes
    bits = [variant["bits_per_weight"] for variant in whole["variants"]]
    assert bits == sorted(bits)
    assert whole["bits_per_weight"] == pytest.approx(sum(bits) / 3)
    assert {tensor["file"] for tensor in whole["tensors"]} == {f"tiny.{kind}.gguf" for kind in TYPES}
    lines = inspection_lines(whole)
    assert all(any(line.startswith(f"  {kind}") for line in lines) for kind in TYPES)
    path = artifacts["mistral"] / "tiny.Q4_K_M.gguf"
    alone = inspect_artifact(path, verify=False)
    assert (alone["artifact"], alone["record"], alone["size_bytes"]) == (path.name, None, sizes[1])
    assert [variant["name"] for variant in alone["variants"]] == ["Q4_K_M"]
    result = validate(path, model=str(sources["mistral"]), texts=(str(text),), runtime="reference", device=CPU)
    assert [variant["name"] for variant in result["variants"]] == ["Q4_K_M"]
    with pytest.raises(RefusedError, match="no artifact by itself"):
        inspect_artifact(artifacts["mistral"] / "Modelfile", verify=False)


def test_an_unknown_architecture_is_named(damaged):
    damaged.write_bytes(damaged.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(RefusedError, match="unknown architecture 'gemma'"):
        open_file(damaged)


def test_a_folder_of_somebody_else_is_told_by_its_files(damaged, sources, text):
    assert detect(damaged.parent) == "gguf"
    result = validate(
        damaged.parent, model=str(sources["mistral"]), texts=(str(text),), runtime="reference", device=CPU
    )
    assert [(variant["name"], variant["files"]) for variant in result["variants"]] == [("Q8_0", ["model.Q8_0.gguf"])]
    assert result["variants"][0]["results"][0]["mean_kld"] < 1e-3


def byte_level(folder: Path, splitting: Splitting, *, text: str = WORDS, vocab_size: int = 300) -> Path:
    """A byte-level tokenizer that splits so; its merges know no splitting, so that how a text is split shows."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if step == DIGITS
        else pre_tokenizers.Split(Regex(step), "isolated")
        for step in splitting.steps
        if step != OWN_PATTERN
    ]
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=OWN_PATTERN in splitting.steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, own])
    tokenizer.normalizer = normalizers.NFC()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    fast.save_pretrained(folder)
    change_json(folder / "tokenizer.json", model={"ignore_merges": splitting.ignore_merges})
    return folder


def change_json(path: Path, **changes: dict) -> None:
    """Update tables of a JSON file; what is no table is replaced."""
    content = read_json(path)
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) and content.get(key) else value
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@pytest.mark.parametrize(("splitting", "name"), PRE_TOKENIZERS.items(), ids=PRE_TOKENIZERS.values())
def test_byte_level_bpe(splitting, name, tmp_path):
    words = vocabulary(byte_level(tmp_path / name, splitting), {}, 320)
    assert (words.model, words.pre, words.scores, words.add_space_prefix) == ("gpt2", name, None, None)
    assert (words.add_bos, words.add_eos) == (False, False)
    eos = words.special["eos"]
    assert (words.tokens[eos], words.types[eos]) == ("<|im_end|>", 3)
    assert words.tokens[-1] == "[PAD319]"
    assert words.types[-1] == 5
    assert all(left + right in words.tokens for left, right in (merge.split(" ") for merge in words.merges))
    assert len(words.merges) > 20


def test_an_unknown_pre_tokenizer_says_how_to_add_it(tmp_path):
    folder = byte_level(tmp_path / "odd", Splitting((r"\w+|\s+",)))
    with pytest.raises(RefusedError) as caught:
        vocabulary(folder, {}, 320)
    assert "no llama.cpp name for" in caught.value.what
    assert "PRE_TOKENIZERS" in caught.value.fix
    (qwen,) = (splitting for splitting, name in PRE_TOKENIZERS.items() if name == "qwen2")
    fast = read_json(byte_level(tmp_path / "qwen", qwen) / "tokenizer.json")
    assert pre_tokenizer(fast, folder) == "qwen2"
    with pytest.raises(RefusedError, match=r"no llama\.cpp name for.*Lowercase"):
        pre_tokenizer(fast | {"normalizer": {"type": "Lowercase"}}, folder)
    with pytest.raises(RefusedError, match=r'no llama\.cpp name for.*"ignore_merges": true'):
        pre_tokenizer(fast | {"model": fast["model"] | {"ignore_merges": True}}, folder)
    # the right pattern with a second split behind it is not the same thing
    fast["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = True
    with pytest.raises(RefusedError, match=r"no llama\.cpp name for"):
        pre_tokenizer(fast, folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix is '</w>'"),
        ({"model": {"dropout": 0.1}}, "dropout is 0.1"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}}, "it puts tokens around"),
        ({"added_tokens": [{"id": 7, "content": "<x>", "lstrip": True}]}, "'<x>' has lstrip = true"),
        ({"added_tokens": [{"id": 310, "content": "a"}]}, "and 310 are both 'a'"),
    ],
)
def test_what_llama_cpp_would_do_otherwise_is_refused(changes, reason, tmp_path):
    (gpt2,) = (splitting for splitting, name in PRE_TOKENIZERS.items() if name == "gpt-2")
    folder = byte_level(tmp_path / "a", gpt2)
    change_json(folder / "tokenizer.json", **changes)
    with pytest.raises(RefusedError, match=r"llama\.cpp would split text into other tokens") as caught:
        vocabulary(folder, {}, 320)
    assert reason in caught.value.what


def test_a_byte_without_a_token_is_refused(tmp_path):
    (gpt2,) = (splitting for splitting, name in PRE_TOKENIZERS.items() if name == "gpt-2")
    folder = byte_level(tmp_path / "a", gpt2)
    words = read_json(folder / "tokenizer.json")["model"]["vocab"]
    del words["Ä"]
    content = read_json(folder / "tokenizer.json")
    content["model"]["vocab"] = words
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RefusedError, match="1 of 256 bytes have no token"):
        vocabulary(folder, {}, 320)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """A SentencePiece tokenizer with both of its files."""
    from quantkit.nano.settings import NanoSettings
    from quantkit.nano.training import make_tokenizer

    folder = tmp_path_factory.mktemp("pieces")
    make_tokenizer(folder, [WORDS] * 20, NanoSettings(vocab_size=360))
    return folder


def test_sentencepiece_from_its_model_and_from_tokenizer_json(pieces, tmp_path):
    """With tokenizer.model the scores are its own; without, ranks of merges, which order pieces the same way."""
    config = {"bos_token_id": 1, "eos_token_id": 2}
    real = vocabulary(pieces, config, 364)
    assert (real.model, real.add_space_prefix, real.add_bos, real.add_eos) == ("llama", True, True, False)
    assert real.special == {"bos": 1, "eos": 2, "unknown": 0}
    assert real.types[:3] + real.types[3:259] + real.types[360:] == [2, 3, 3] + [6] * 256 + [5] * 4
    folder = shutil.copytree(pieces, tmp_path / "json")
    (folder / "tokenizer.model").unlink()
    made = vocabulary(folder, config, 364)
    assert (made.tokens, made.types, made.special) == (real.tokens, real.types, real.special)
    found = [i for i in range(259, 360) if len(real.tokens[i]) > 1]
    assert sorted(found, key=lambda i: -real.scores[i]) == sorted(found, key=lambda i: -made.scores[i])


def train_pieces(folder: Path, **changes: object) -> Path:
    """tokenizer.model alone, trained with other settings than Llama's."""
    import io

    import sentencepiece

    model = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "remove_extra_whitespaces": False}
    settings |= {"normalization_rule_name": "identity", "hard_vocab_limit": False, "minloglevel": 2} | changes
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([WORDS] * 20), model_writer=model, **settings)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "it normalizes text by nmt_nfkc_cf"),
        ({"remove_extra_whitespaces": True}, "it removes extra spaces"),
        ({"treat_whitespace_as_suffix": True}, "it puts spaces behind words"),
        ({"byte_fallback": False, "vocab_size": 60}, "it has no byte fallback"),
        ({"model_type": "unigram"}, "not of SentencePiece's BPE kind"),
    ],
)
def test_a_sentencepiece_model_that_does_more_than_llamas_is_refused(changes, reason, tmp_path):
    plain = vocabulary(train_pieces(tmp_path / "plain"), {}, 400)
    assert (plain.model, plain.pre, plain.add_space_prefix) == ("llama", "default", True)
    assert not vocabulary(train_pieces(tmp_path / "bare", add_dummy_prefix=False), {}, 400).add_space_prefix
    with pytest.raises(RefusedError, match=reason):
        vocabulary(train_pieces(tmp_path / "odd", **changes), {}, 400)


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}


@pytest.mark.parametrize(
    ("normalizer", "splitter", "prefixed"),
    [
        ({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, None, False),
        (None, METASPACE | {"prepend_scheme": "always"}, True),
        (None, METASPACE | {"prepend_scheme": "first"}, True),
        (None, METASPACE | {"prepend_scheme": "never"}, False),
    ],
)
def test_ways_with_spaces(normalizer, splitter, prefixed, pieces, tmp_path):
    folder = shutil.copytree(pieces, tmp_path / "a")
    content = read_json(folder / "tokenizer.json") | {"normalizer": normalizer, "pre_tokenizer": splitter}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert vocabulary(folder, {}, 364).add_space_prefix is prefixed
    (folder / "tokenizer.model").unlink()
    assert vocabulary(folder, {}, 364).add_space_prefix is prefixed


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": {"type": "NFKC"}}, "it prepares text by"),
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"split": True}}, "it prepares text by"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "it prepares text by"),
        ({"model": {"ignore_merges": True}}, "ignore_merges is on"),
        ({"added_tokens": [{"id": 299, "content": "<x>", "normalized": True}]}, "'<x>' has normalized = true"),
    ],
)
def test_byte_fallback_that_does_more_than_llamas_is_refused(changes, reason, pieces, tmp_path):
    folder = shutil.copytree(pieces, tmp_path / "a")
    (folder / "tokenizer.model").unlink()
    change_json(folder / "tokenizer.json", **changes)
    with pytest.raises(RefusedError) as caught:
        vocabulary(folder, {}, 364)
    assert reason in caught.value.what


def test_merges_that_scores_cannot_order_are_refused(pieces, tmp_path):
    folder = shutil.copytree(pieces, tmp_path / "a")
    (folder / "tokenizer.model").unlink()
    content = read_json(folder / "tokenizer.json")
    model = content["model"]
    words, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    first, last = next(merge for merge in merges if len(merge[0]) == 2 and merge[0][1] + merge[1] not in words)
    words[first[1] + last] = 399
    other = [(first[1], last), (first[0], first[1] + last)]
    place = merges.index((first, last))
    for changed, reason in (
        (merges, "1 pair(s) make a piece but are no merge"),
        (merges + other, "merges of one piece stand apart"),
        (other[:1] + merges[:place] + other[1:] + merges[place:], None),
    ):
        model["merges"] = changed
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        if reason is None:
            vocabulary(folder, {}, 400)
            continue
        with pytest.raises(RefusedError) as caught:
            vocabulary(folder, {}, 400)
        assert reason in caught.value.what


def test_two_tokenizers_in_one_folder_are_refused(pieces, sources, tmp_path):
    folder = shutil.copytree(pieces, tmp_path / "a")
    shutil.copyfile(sources["mistral"] / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(RefusedError, match=r"in tokenizer\.model and .* in tokenizer\.json"):
        vocabulary(folder, {}, 416)


def test_an_id_beyond_the_embedding_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="the embedding 200 rows"):
        vocabulary(byte_level(tmp_path / "a", Splitting((OWN_PATTERN,))), {}, 200)
