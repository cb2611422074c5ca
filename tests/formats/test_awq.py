"""The AWQ GEMM layout against an independent decode that shares nothing with the writer but the specification."""

import json

import numpy as np
import pytest
import torch

from quantkit.errors import RefusedError
from quantkit.formats import detect
from quantkit.formats.awq import AwqFormat, decode_linear, encode_linear, open_artifact, require_gemm
from quantkit.grids.affine import AffineGrid, AffineRule
from quantkit.qtensor import QuantizedLinear

# where a column of eight stands in its word
NIBBLE_OF_COLUMN = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}


def field(words: np.ndarray, row: int, column: int) -> int:
    return (int(words[row, column // 8]) >> (4 * NIBBLE_OF_COLUMN[column % 8])) & 15


def plain_decode(tensors: dict, name: str, group_size: int) -> np.ndarray:
    """float32 [O, I] from the stored words, one element at a time."""
    qweight = tensors[f"{name}.qweight"].numpy().view(np.uint32)
    qzeros = tensors[f"{name}.qzeros"].numpy().view(np.uint32)
    scales = tensors[f"{name}.scales"].numpy().astype(np.float32)
    weight = np.empty((scales.shape[1], qweight.shape[0]), dtype=np.float32)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            group = i // group_size
            code, zero = field(qweight, i, o), field(qzeros, group, o)
            weight[o, i] = scales[group, o] * np.float32(code - zero)
    return weight


def random_linear(*, rows: int = 32, columns: int = 64, bias: bool = False) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, 2, generator=generator) * 0.1 + 0.01).half().float()
    zero = torch.randint(0, 16, (rows, 2), generator=generator).float()
    assert {0.0, 15.0} <= set(zero.flatten().tolist()), "both ends of the zeros are there"
    groups = torch.arange(columns, dtype=torch.int32) // (columns // 2)
    return QuantizedLinear(codes, AffineGrid(4, scale, zero, groups), torch.randn(rows) if bias else None)


@pytest.mark.parametrize("bias", [False, True])
def test_independent_decode_gives_the_solved_weights(bias):
    linear = random_linear(bias=bias)
    tensors = encode_linear("p", linear)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert shapes == {
        "p.qweight": ((64, 4), torch.int32),
        "p.qzeros": ((2, 4), torch.int32),
        "p.scales": ((2, 32), torch.float16),
        **({"p.bias": ((32,), torch.float16)} if bias else {}),
    }
    np.testing.assert_array_equal(plain_decode(tensors, "p", 32), linear.dequantize().numpy())


def test_the_word_of_the_specification():
    """Columns 0..7 holding the codes 0..7; zeros are stored as they are, without GPTQ's -1."""
    codes = (torch.arange(32, dtype=torch.uint8) % 8).unsqueeze(1).repeat(1, 32)
    zero = (torch.arange(32) % 8).float().unsqueeze(1)
    grid = AffineGrid(4, torch.ones(32, 1), zero, torch.zeros(32, dtype=torch.int32))
    tensors = encode_linear("p", QuantizedLinear(codes, grid))
    assert {int(word) for word in tensors["p.qweight"].flatten()} == {0x75316420}
    assert {int(word) for word in tensors["p.qzeros"].flatten()} == {0x75316420}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reading_back_is_exact(dtype):
    linear = random_linear()
    tensors = encode_linear("p", linear)
    tensors["p.scales"] = tensors["p.scales"].to(dtype)
    read = decode_linear("p", tensors)
    assert torch.equal(read.codes_OI, linear.codes_OI)
    assert torch.equal(read.grid.zero_OG, linear.grid.zero_OG)
    assert torch.equal(read.grid.scale_OG, linear.grid.scale_OG.to(dtype).float())


def test_a_group_on_one_side_of_zero_is_not_clipped():
    """Zeros 0 and 15 are both storable, so such a group has all its codes."""
    rule = AffineRule(4, symmetric=False)
    for sign, wanted in ((1, 0), (-1, 15)):
        weight = sign * (torch.rand(32, 6, dtype=torch.float64) + 0.1)
        scale, zero = rule.fit(weight, torch.ones(32, dtype=torch.float64))
        assert (zero == wanted).all()
        assert (weight - (rule.encode(weight, scale, zero) - zero) * scale).abs().max() <= scale.max() * 0.51


def test_groups_out_of_place_cannot_be_written():
    linear = random_linear()
    grid = AffineGrid(4, linear.grid.scale_OG, linear.grid.zero_OG, linear.grid.group_I.flip(0))
    with pytest.raises(AssertionError, match="no g_idx"):
        encode_linear("p", QuantizedLinear(linear.codes_OI, grid))


def test_settings_carry_what_readers_need():
    assert AwqFormat(128).settings(["model.layers.0.mlp.down_proj"]) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "format": "gemm",
        "modules_to_not_convert": None,
    }


def test_skipped_linears_are_named_for_readers_that_match_substrings():
    """Of names inside a layer, or of full ones."""
    modules = [f"model.layers.{i}.mlp.{name}_proj" for i in range(12) for name in ("up", "down")]
    skip = ("mlp.down_proj", "layers.1.mlp.up_proj")
    named = AwqFormat(128, skip=skip).settings(modules)["modules_to_not_convert"]
    assert named == ["mlp.down_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    assert not [(one, other) for one in named for other in named if one != other and one in other]


def test_shapes_that_do_not_fit_are_named_with_the_remedy():
    shapes = [("model.layers.0.mlp.down_proj", 64, 250), ("model.layers.0.mlp.up_proj", 250, 64)]
    assert AwqFormat(32).problems(shapes) == [
        "model.layers.0.mlp.down_proj: in_features 250 is not divisible by group_size 32; "
        'leave it in 16 bits with quantize.skip = ["mlp.down_proj"]',
        "model.layers.0.mlp.up_proj: out_features 250 is not divisible by 32, which the kernels need; "
        'leave it in 16 bits with quantize.skip = ["mlp.up_proj"]',
    ]
    assert AwqFormat(32, skip=("mlp.down_proj", "mlp.up_proj")).problems(shapes) == []


def test_stored_bits_are_those_of_the_file():
    stored = sum(tensor.nbytes for tensor in encode_linear("p", random_linear()).values())
    assert AwqFormat(32).stored_bits("p", 32, 64) == 8 * stored


def test_other_layouts_are_refused():
    require_gemm({"quant_method": "awq", "version": "GEMM", "w_bit": 4})
    with pytest.raises(RefusedError, match="says layout gemv and 3 bits and no zero points"):
        require_gemm({"version": "gemv", "bits": 3, "zero_point": False})


def test_older_folders_are_told_by_their_own_settings_file(tiny_mistral, tmp_path):
    from safetensors.torch import save_file

    config = json.loads((tiny_mistral / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 32, "version": "GEMM"}))
    tensors = encode_linear("model.layers.0.mlp.up_proj", random_linear(rows=96))
    save_file(tensors, tmp_path / "awq_model_w4_g32.safetensors")
    assert detect(tmp_path) == "awq"
    assert open_artifact(tmp_path).bits_per_weight == 4 + 20 / 32
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, tmp_path / "awq_model_w4_g32.safetensors")
    with pytest.raises(RefusedError, match=r"up_proj\.scales is missing"):
        open_artifact(tmp_path)
