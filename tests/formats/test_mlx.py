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
from quantkit.solvers.weights import relative_error
from quantkit.texts import load_text_set
from tests.tiny import make_text, make_tiny

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
    assert tensors["p.weight"].tolist() == [words]
    torch.testing.assert_close(quantized.dequantize(), torch.tensor([values]))


# what mx.quantize of mlx 0.32.4 makes of `uneven()`: words and scale of each row; the first row's negative end is the
# larger, the second's positive one, so the scales have both signs
MX_QUANTIZE = {
    2: ([0xD8B762D9, 0x2D98B621], [0x21D99887, 0xD9887766], [0.625, -1.34375]),
    3: ([0xDE544EF1, 0x6343EB19, 0x33BCA89D], [0xF2A6981F, 0xE595303E, 0xCB2A609D], [0.25, -0.53759765625]),
    4: (
        [0x4A18E5C3, 0xE4B28F6D, 0x8E5C2907, 0x28F6C3A1],
        [0xC3A2907F, 0x2908F6E5, 0x8F6E5C3B, 0xE5D4B291],
        [0.125, -0.2442626953125],
    ),
    5: (
        [0x050EAB06, 0x48F99A3D, 0xC80EDA2C, 0x827F1582, 0x1C3CCC9A],
        [0xAA3901FE, 0xFF3369C1, 0x64F52482, 0x6187DBC5, 0xE2B27B12],
        [0.0625, -0.12213134765625],
    ),
    6: (
        [0x20ED6C4B, 0xF6743AA1, 0xDD1B478F, 0x302A601C, 0xDA437FA5, 0x1A2F98CC],
        [0xC69407BD, 0x9DD3C4DA, 0x1E605FF9, 0xB95323AC, 0x89C283F6, 0xE95CCFB4],
        [0.030487060546875, -0.059722900390625],
    ),
    8: (
        [0xF258C82E, 0x3AAB1181, 0x8EFF64D5, 0xE147B81D, 0x2A9A0071, 0x7DEE54C4, 0xD136A70D, 0x198AFA60],
        [0x95007BF7, 0xC833AE1A, 0xFB66E24D, 0x1E990480, 0x51CC37B3, 0x84FF6AE6, 0xB7229D09, 0xEA55D13C],
        [0.00748443603515625, -0.01468658447265625],
    ),
}


def uneven() -> torch.Tensor:
    """[2, 32], exact in float16 and bfloat16."""
    at = torch.arange(32)
    return torch.stack([((at * 37 + 11) % 64 - 40) / 32, ((at * 29 + 5) % 64 - 20) / 16])


def test_the_loss_is_of_what_is_written():
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    quantized = RoundToNearest(3, 32, torch.bfloat16).quantize(weight)
    off = (quantized.dequantize().double() - weight.double()).square().sum()
    assert relative_error(weight, quantized) == pytest.approx(float(off / weight.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", MX_QUANTIZE)
def test_rounding_to_nearest_equals_mx_quantize_to_the_bit(bits, dtype):
    tensors = encode_linear("p", RoundToNearest(bits, 32, dtype).quantize(uneven()), dtype)
    *words, scales = MX_QUANTIZE[bits]
    assert tensors["p.weight"].tolist() == words
    # bfloat16 scales are the same numbers with fewer digits
    assert torch.equal(tensors["p.scales"], torch.tensor(scales)[:, None].to(dtype))
    assert tensors["p.biases"].tolist() == [[-1.25], [2.6875]]


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


def test_another_mode_is_refused():
    with pytest.raises(RefusedError, match="the mode is 'mxfp4'"):
        decode_linear("p", encode_linear("p", linear(4), torch.float16), {"bits": 4, "group_size": 32, "mode": "mxfp4"})


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
    return make_text(tmp_path / "text.jsonl")


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


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_an_end_that_is_skipped_stays_dense_in_file_and_config_alike(module, text, tmp_path):
    source = make_tiny(tmp_path / "m", "mistral", vocab_size=416)
    recipe = recipe_of(source, text, skip=[module.removeprefix("model.")])
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    assert json.loads((out / "config.json").read_text())["quantization"][module] is False
    tensors = open_artifact(out).tensors
    dense = f"{module}.weight"
    assert [name for name in tensors.tensors if name.startswith(f"{module}.")] == [dense]
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).get_parameter(dense)
    torch.testing.assert_close(tensors.read([dense])[dense].float(), expected.detach(), rtol=1e-3, atol=1e-6)


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
