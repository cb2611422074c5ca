"""The MLX container against an independent decode that shares nothing with the writer but the specification."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.calibration.tokens import calibration_windows
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import RefusedError
from quantkit.formats.mlx import MlxFormat, decode_linear, encode_linear, open_artifact, recognizes
from quantkit.grids.affine import BiasGrid, BiasRule
from quantkit.pipeline import build
from quantkit.qtensor import QuantizedLinear
from quantkit.recipe import Recipe
from quantkit.solvers.rtn import RoundToNearest
from quantkit.texts import load_text_set
from tests.tiny import WORDS, make_tiny

CPU = torch.device("cpu")


def linear(bits: int, *, rows: int = 6, columns: int = 64, size: int = 32, dtype=torch.float16) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.randn(rows, columns // size, generator=generator) * 0.1).to(dtype)
    bias = torch.randn(rows, columns // size, generator=generator).to(dtype)
    grid = BiasGrid.of(bits, scale, bias, (torch.arange(columns) // size).int())
    return QuantizedLinear(codes, grid, torch.randn(rows, generator=generator))


def decoded(tensors: dict[str, torch.Tensor], bits: int, size: int) -> np.ndarray:
    """Weights from single bits of each row's little-endian byte stream."""
    words = tensors["p.weight"].numpy()
    assert words.dtype == np.uint32
    single = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = (single.reshape(words.shape[0], -1, bits).astype(np.int64) << np.arange(bits)).sum(-1)
    scales, biases = (np.repeat(tensors[f"p.{part}"].float().numpy(), size, axis=1) for part in ("scales", "biases"))
    return codes.astype(np.float32) * scales + biases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_what_is_written_decodes_as_the_specification_says(bits, dtype):
    source = linear(bits, dtype=dtype)
    tensors = encode_linear("p", source, dtype)
    np.testing.assert_array_equal(source.dequantize().numpy(), decoded(tensors, bits, 32))
    read = decode_linear("p", tensors, {"bits": bits, "group_size": 32, "mode": "affine"})
    assert torch.equal(read.codes_OI, source.codes_OI)
    assert torch.equal(read.dequantize(), source.dequantize())
    again = encode_linear("p", read, dtype)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    stored = sum(8 * tensors[f"p.{part}"].nbytes for part in ("weight", "scales", "biases"))
    assert MlxFormat(bits, 32, lambda name: bits, dtype).stored_bits("p", 6, 64) == stored


@pytest.mark.parametrize(
    ("bits", "values", "sign", "words"),
    [
        (3, [float(value % 8) for value in range(32)], 1, [0x77053977, 0x39770539, 0x05397705]),
        (3, [-float(value % 8) for value in range(32)], -1, [0x77053977, 0x39770539, 0x05397705]),
        (4, [float(value % 16) for value in range(32)], 1, [0x89ABCDEF, 0x01234567, 0x89ABCDEF, 0x01234567]),
    ],
)
def test_rounding_to_nearest_gives_mlxs_golden_words(bits, values, sign, words):
    quantized = RoundToNearest(bits, 32, torch.float16).quantize(torch.tensor([values]))
    tensors = encode_linear("p", quantized, torch.float16)
    assert tensors["p.scales"].tolist() == [[-sign]]
    assert tensors["p.biases"].tolist() == [[sign * (2**bits - 1)]]
    if sign > 0:
        assert [int(word) for word in tensors["p.weight"].view(torch.int32).numpy().view(np.uint32)[0]] == words
    torch.testing.assert_close(quantized.dequantize(), torch.tensor([values]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fitted_grid_is_what_the_file_holds(dtype):
    weight = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    rule = BiasRule(4, candidates=5, stored=dtype)
    scale, zero = rule.fit(weight, torch.rand(64))
    codes = rule.encode(weight, scale, zero).to(torch.uint8)
    grid = rule.grid(scale[:, None], zero[:, None], torch.zeros(64, dtype=torch.int32))
    assert torch.equal(grid.scale_OG.to(dtype).float(), grid.scale_OG)
    seen_by_solver = ((codes - zero) * scale).T
    torch.testing.assert_close(grid.decode(codes.T.contiguous()), seen_by_solver, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "p is in the mode 'mxfp4'"),
        ({"bits": 8, "group_size": 32, "mode": "affine"}, "p has 8 words per row; 64 codes of 8 bits need 16"),
    ],
)
def test_what_does_not_fit_is_refused(settings, what):
    with pytest.raises(RefusedError, match=what):
        decode_linear("p", encode_linear("p", linear(4), torch.float16), settings)


def test_overrides_of_a_module_stand_over_the_folders_own():
    settings = {"bits": 4, "group_size": 32, "mode": "affine", "p": {"bits": 6, "group_size": None}, "q": False}
    read = decode_linear("p", encode_linear("p", linear(6), torch.float16), settings)
    assert torch.equal(read.codes_OI, linear(6).codes_OI)


def test_in_features_that_no_group_divides_are_named():
    written = MlxFormat(4, 64, lambda name: 4, torch.float16)
    assert written.problems([("model.layers.0.mlp.down_proj", 64, 96), ("lm_head", 70, 64)]) == [
        "model.layers.0.mlp.down_proj: in_features 96 is not divisible by group_size 64; leave it in 16 bits with "
        'quantize.skip = ["mlp.down_proj"]'
    ]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{number}. {WORDS * 3}"}) for number in range(12)))
    return path


def recipe_of(source, text, **quantize) -> Recipe:
    return Recipe.of(
        {
            "format": "mlx",
            "model": {"id": str(source)},
            "quantize": {"group_size": 32, "scale_candidates": 2, **quantize},
            "calibration": {"texts": {str(text): 8}, "window_tokens": 16},
        }
    )


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_quantized_and_mixtures_keep_their_rule(tied, text, tmp_path):
    kind = "qwen3" if tied else "mistral"
    source = make_tiny(tmp_path / "m", kind, layers=8, vocab_size=416, tie_word_embeddings=tied)
    recipe = recipe_of(source, text, mixed="mixed_3_6")
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    raised = {name for name, value in config["quantization"].items() if isinstance(value, dict)}
    layers = {0, 3, 6, 7}  # the first and last eighth, and every third between
    assert raised == {
        f"model.layers.{index}.{name}" for index in layers for name in ("self_attn.v_proj", "mlp.down_proj")
    } | (set() if tied else {"lm_head"})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert ("lm_head.scales" in index["weight_map"]) is not tied
    assert "model.embed_tokens.scales" in index["weight_map"]
    assert "model.layers.0.input_layernorm.scales" not in index["weight_map"]
    assert recognizes(out, config)
    artifact = open_artifact(out)
    widths = {
        name: artifact.tensors.tensors[f"{name}.weight"].shape[1] * 32 // columns
        for name, columns in (("model.embed_tokens", 64), ("model.layers.0.self_attn.v_proj", 64))
    }
    assert widths == {"model.embed_tokens": 3, "model.layers.0.self_attn.v_proj": 6}
    assert 3 + 1 < artifact.bits_per_weight < 6 + 1


def test_the_head_is_solved_for_its_own_inputs(text, tmp_path):
    """Its output error over the calibration tokens, against what the weights alone give."""
    source = make_tiny(tmp_path / "m", "mistral", vocab_size=416)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = load_tokenizer(source, vocab_size=416)
    parts = [(load_text_set(str(text), "calibration"), 8)]
    ids = calibration_windows(parts, tokenizer, window_tokens=16, seed=0)
    with torch.no_grad():
        states = model.model(ids).last_hidden_state.flatten(0, 1)
        exact = states @ model.lm_head.weight.T
    errors = {}
    for solver in ("gptq", "least-squares", "round-to-nearest"):
        recipe = recipe_of(source, text, bits=4, solver=solver)
        out = build(recipe, out=tmp_path / solver, device=CPU, validated=False).out
        found = open_artifact(out).read("head")["lm_head.weight"]
        errors[solver] = float((states @ found.T - exact).square().mean())
    assert errors["gptq"] < 0.8 * errors["least-squares"] < 0.8 * errors["round-to-nearest"]
