"""The pack-quantized layout against an independent decode that shares nothing with the writer but the description."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quantkit.errors import RefusedError
from quantkit.formats import detect
from quantkit.formats.compressed_tensors import (
    CompressedTensorsFormat,
    decode_linear,
    encode_linear,
    open_artifact,
    weight_arguments,
)
from quantkit.grids.affine import AffineGrid
from quantkit.qtensor import QuantizedLinear

MODULE = "model.layers.0.mlp.up_proj"


def random_linear(bits: int, *, symmetric: bool, rows: int = 32, columns: int = 96) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, columns // 32, generator=generator) * 0.1 + 0.01).bfloat16().float()
    zero = torch.full((rows, columns // 32), float(2 ** (bits - 1)))
    if not symmetric:
        zero = torch.randint(0, 2**bits, (rows, columns // 32), generator=generator).float()
    groups = torch.arange(columns, dtype=torch.int32) // 32
    return QuantizedLinear(codes, AffineGrid(bits, scale, zero, groups))


def settings(bits: int, *, symmetric: bool = True) -> dict:
    return CompressedTensorsFormat(bits, 32, symmetric, torch.bfloat16).settings([])


def plain_field(words: np.ndarray, position: int, bits: int) -> int:
    """The field at a position of a row of words, read bit by bit, lowest first."""
    found = 0
    for bit in range(bits):
        word, shift = divmod(position * bits + bit, 32)
        found |= ((int(words[word]) >> shift) & 1) << bit
    return found


def plain_decode(tensors: dict, bits: int) -> np.ndarray:
    """float32 [O, I], one element at a time: scale * (q - zero), both counted from -2**(bits-1)."""
    packed = tensors["p.weight_packed"].numpy().view(np.uint32)
    scale = tensors["p.weight_scale"].float().numpy()
    rows, columns = tensors["p.weight_shape"].tolist()
    half = 2 ** (bits - 1)
    weight = np.empty((rows, columns), dtype=np.float32)
    for o in range(rows):
        for i in range(columns):
            group = i * scale.shape[1] // columns
            zero = 0
            if "p.weight_zero_point" in tensors:
                words = tensors["p.weight_zero_point"].numpy().view(np.uint32)[:, group]
                zero = plain_field(words, o, bits) - half
            weight[o, i] = scale[o, group] * np.float32(plain_field(packed[o], i, bits) - half - zero)
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_independent_decode_gives_the_solved_weights(bits, symmetric):
    linear = random_linear(bits, symmetric=symmetric)
    tensors = encode_linear("p", linear, symmetric=symmetric, dtype=torch.bfloat16)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    zeros = {"p.weight_zero_point": ((bits, 3), torch.int32)}
    assert shapes == {
        "p.weight_packed": ((32, 3 * bits), torch.int32),
        "p.weight_scale": ((32, 3), torch.bfloat16),
        "p.weight_shape": ((2,), torch.int64),
        **({} if symmetric else zeros),
    }
    np.testing.assert_array_equal(plain_decode(tensors, bits), linear.dequantize().numpy())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_reading_back_is_exact(bits, symmetric):
    linear = random_linear(bits, symmetric=symmetric)
    tensors = encode_linear("p", linear, symmetric=symmetric, dtype=torch.bfloat16)
    read = decode_linear("p", tensors, settings(bits, symmetric=symmetric))
    assert torch.equal(read.codes_OI, linear.codes_OI)
    assert torch.equal(read.dequantize(), linear.dequantize())


def test_rows_that_end_inside_a_run_and_an_activation_order_are_read():
    """Others write both: here 40 inputs, whose 160 bits fill five words, and groups in no order."""
    whole = encode_linear("p", random_linear(4, symmetric=True), symmetric=True, dtype=torch.bfloat16)
    group_I = torch.randperm(40, generator=torch.Generator().manual_seed(0)) % 2
    cut = {
        "p.weight_packed": whole["p.weight_packed"][:, :5].contiguous(),
        "p.weight_scale": whole["p.weight_scale"][:, :2],
        "p.weight_shape": torch.tensor([32, 40]),
        "p.weight_g_idx": group_I.to(torch.int32),
    }
    found = decode_linear("p", cut, settings(4)).dequantize()
    codes = decode_linear("p", whole, settings(4)).codes_OI[:, :40].float()
    assert torch.equal(found, (codes - 8) * whole["p.weight_scale"].float()[:, group_I])


def test_the_group_that_names_a_module_stands_before_the_one_for_all():
    groups = {
        "a": {"targets": ["re:.*down_proj$"], "weights": {"num_bits": 8}},
        "b": {"targets": ["Linear"], "weights": {"num_bits": 4}},
    }
    assert weight_arguments("model.layers.0.mlp.down_proj", {"config_groups": groups})["num_bits"] == 8
    assert weight_arguments(MODULE, {"config_groups": groups})["num_bits"] == 4
    with pytest.raises(RefusedError, match="no config group is about"):
        weight_arguments(MODULE, {"config_groups": {"a": groups["a"]}})


def test_settings_carry_what_readers_need():
    found = CompressedTensorsFormat(4, -1, False, torch.float16, skip=("down_proj",)).settings(
        ["model.layers.0.mlp.down_proj", MODULE]
    )
    assert (found["quant_method"], found["format"]) == ("compressed-tensors", "pack-quantized")
    assert found["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    weights = found["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["symmetric"]) == ("channel", None, False)


def test_shapes_that_do_not_fit_are_named_with_the_remedy():
    shapes = [("model.layers.0.mlp.down_proj", 64, 250), (MODULE, 250, 64)]
    down = "model.layers.0.mlp.down_proj: in_features 250 is not divisible by group_size 32; "
    up = f"{MODULE}: [250, 64] is not in multiples of 32, which the packing needs; "
    remedies = [f'leave it in 16 bits with quantize.skip = ["mlp.{name}_proj"]' for name in ("down", "up")]
    assert CompressedTensorsFormat(4, 32, False, torch.bfloat16).problems(shapes) == [
        down + remedies[0],
        up + remedies[1],
    ]
    assert CompressedTensorsFormat(4, 32, True, torch.bfloat16).problems(shapes) == [down + remedies[0]]


def test_other_layouts_and_missing_parts_are_refused(tiny_mistral, tmp_path):
    config = json.loads((tiny_mistral / "config.json").read_text()) | {"quantization_config": settings(4)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    linear = random_linear(4, symmetric=True, rows=96, columns=64)
    tensors = encode_linear(MODULE, linear, symmetric=True, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    assert detect(tmp_path) == "compressed-tensors"
    assert open_artifact(tmp_path).bits_per_weight == 4 + 16 / 32 + 128 / (64 * 96)
    del tensors[f"{MODULE}.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RefusedError, match=r"up_proj\.weight_scale is missing"):
        open_artifact(tmp_path)
    config["quantization_config"]["format"] = "float-quantized"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="the layout is float-quantized"):
        open_artifact(tmp_path)
