"""The GPTQ container against an independent decode that shares nothing with the writer but the specification."""

import numpy as np
import pytest
import torch

from quantkit.errors import RefusedError
from quantkit.formats.gptq import GptqFormat, decode_linear, encode_linear, zero_version
from quantkit.grids.affine import AffineGrid, AffineRule
from quantkit.qtensor import QuantizedLinear

SYMMETRIC_ZERO_WORDS = {
    2: [0x55555555],
    3: [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D],
    4: [0x77777777],
    8: [0x7F7F7F7F],
}


def field(words: np.ndarray, index: int, bits: int) -> int:
    """One code of a column of words, read bit by bit, lowest first."""
    value = 0
    for bit in range(bits):
        at = index * bits + bit
        value |= ((int(words[at // 32]) >> (at % 32)) & 1) << bit
    return value


def plain_decode(tensors: dict, name: str, bits: int) -> np.ndarray:
    """float32 [O, I] from the stored words, one element at a time."""
    qweight = tensors[f"{name}.qweight"].numpy().view(np.uint32)
    qzeros = tensors[f"{name}.qzeros"].numpy().view(np.uint32)
    scales = tensors[f"{name}.scales"].numpy().astype(np.float32)
    g_idx = tensors[f"{name}.g_idx"].numpy()
    weight = np.empty((scales.shape[1], len(g_idx)), dtype=np.float32)
    for o in range(weight.shape[0]):
        for i, group in enumerate(g_idx):
            zero = (field(qzeros[group], o, bits) + 1) % 2**bits
            weight[o, i] = scales[group, o] * np.float32(field(qweight[:, o], i, bits) - zero)
    return weight


def random_linear(bits: int, *, symmetric: bool, shuffled: bool = False, rows: int = 32, columns: int = 64):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, 2, generator=generator) * 0.1 + 0.01).half().float()
    zero = torch.full((rows, 2), float(2 ** (bits - 1)))
    if not symmetric:
        zero = torch.randint(1, 2**bits, (rows, 2), generator=generator).float()
    groups = torch.arange(columns, dtype=torch.int32) // 32
    if shuffled:
        groups = groups[torch.randperm(columns, generator=generator)]
    return QuantizedLinear(codes, AffineGrid(bits, scale, zero, groups))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shuffled", [False, True])
def test_independent_decode_gives_the_solved_weights(bits, symmetric, shuffled):
    linear = random_linear(bits, symmetric=symmetric, shuffled=shuffled)
    tensors = encode_linear("p", linear)
    assert tensors["p.qweight"].shape == (64 * bits // 32, 32)
    assert tensors["p.qzeros"].shape == (2, 32 * bits // 32)
    assert tensors["p.scales"].dtype == torch.float16
    np.testing.assert_array_equal(plain_decode(tensors, "p", bits), linear.dequantize().numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("with_g_idx", [True, False])
def test_reading_back_is_exact(bits, with_g_idx):
    linear = random_linear(bits, symmetric=False, shuffled=with_g_idx)
    tensors = encode_linear("p", linear)
    if not with_g_idx:
        del tensors["p.g_idx"]
    read = decode_linear("p", tensors, {"bits": bits, "group_size": 32, "checkpoint_format": "gptq"})
    assert torch.equal(read.codes_OI, linear.codes_OI)
    assert torch.equal(read.dequantize(), linear.dequantize())


@pytest.mark.parametrize("bits", SYMMETRIC_ZERO_WORDS)
def test_symmetric_zeros_are_the_words_every_reader_knows(bits):
    tensors = encode_linear("p", random_linear(bits, symmetric=True))
    words = [word & 0xFFFFFFFF for word in tensors["p.qzeros"][0].tolist()]
    assert words == SYMMETRIC_ZERO_WORDS[bits] * (len(words) // len(SYMMETRIC_ZERO_WORDS[bits]))


def test_version_2_stores_the_zero_itself():
    tensors = encode_linear("p", random_linear(4, symmetric=True))
    read = decode_linear("p", tensors, {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"})
    assert (read.grid.zero_OG == 7).all()


def test_dynamic_rules_stand_over_the_folders_own_settings():
    """As gptqmodel writes mixed widths: the first rule that fits, with or without a "+:"."""
    settings = {"bits": 4, "group_size": 32, "dynamic": {r"-:^lm_head$": {}, r"+:^p$": {"bits": 8}, r"q": {"bits": 2}}}
    for name, bits in (("p", 8), ("q", 2), ("r", 4)):
        linear = random_linear(bits, symmetric=True)
        read = decode_linear(name, encode_linear(name, linear), settings)
        assert torch.equal(read.dequantize(), linear.dequantize())


def test_contradicting_layouts_are_refused():
    assert zero_version({}) == 1
    with pytest.raises(RefusedError, match="names the layout gptq and gptq_v2"):
        zero_version({"format": "gptq", "checkpoint_format": "gptq_v2"})
    with pytest.raises(RefusedError, match="names the layout marlin"):
        zero_version({"checkpoint_format": "marlin"})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_zeros_never_wrap(bits):
    """A group of positive weights alone wants a zero of 0, which version 1 cannot hold without a borrow."""
    rule = AffineRule(bits, symmetric=False, lowest_zero=1)
    weight = torch.rand(32, 6, dtype=torch.float64) + 0.1
    scale, zero = rule.fit(weight, torch.ones(32, dtype=torch.float64))
    assert (zero == 1).all()
    decoded = (rule.encode(weight, scale, zero) - zero) * scale
    assert (weight - decoded).abs().max() <= scale.max() * 0.51  # nothing is clipped


def test_settings_carry_what_readers_need():
    settings = GptqFormat(4, 128, True, "group-aware", 0.01).settings([])
    assert {key: settings[key] for key in ("quant_method", "bits", "group_size", "desc_act", "sym", "lm_head")} == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    assert settings["checkpoint_format"] == settings["format"] == "gptq"
    assert GptqFormat(4, 128, True, "activation", 0.01).settings([])["desc_act"] is True
    assert "dynamic" not in settings


def test_skipped_linears_are_named_for_readers():
    modules = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
    settings = GptqFormat(4, 128, True, "group-aware", 0.01, skip=("mlp.down_proj",)).settings(modules)
    assert settings["dynamic"] == {
        r"-:^model\.layers\.0\.mlp\.down_proj$": {},
        r"-:^model\.layers\.1\.mlp\.down_proj$": {},
    }
    assert settings["modules_in_block_to_quantize"] == [["self_attn.q_proj"]]
    one = GptqFormat(4, 128, True, "group-aware", 0.01, skip=("layers.1.mlp.down_proj",)).settings(modules)
    assert one["modules_in_block_to_quantize"] == [["self_attn.q_proj"], ["model.layers.0.mlp.down_proj"]]


def test_shapes_that_do_not_fit_are_named_with_the_remedy():
    shapes = [("model.layers.0.mlp.down_proj", 64, 8602), ("model.layers.0.self_attn.q_proj", 64, 128)]
    wide = GptqFormat(4, 128, True, "group-aware", 0.01)
    assert wide.problems(shapes) == [
        "model.layers.0.mlp.down_proj: in_features 8602 is not divisible by group_size 128; "
        'leave it in 16 bits with quantize.skip = ["mlp.down_proj"]'
    ]
    one_group = GptqFormat(4, -1, True, "natural", 0.01)
    assert one_group.problems(shapes) == [
        "model.layers.0.mlp.down_proj: [64, 8602] is not in multiples of 32, which the packing needs; "
        'leave it in 16 bits with quantize.skip = ["mlp.down_proj"]'
    ]
    assert GptqFormat(4, 128, True, "natural", 0.01, skip=("mlp.down_proj",)).problems(shapes) == []


def test_stored_bits_are_those_of_the_file():
    linear = random_linear(3, symmetric=True)
    stored = sum(tensor.nbytes for tensor in encode_linear("p", linear).values())
    assert GptqFormat(3, 32, True, "natural", 0.01).stored_bits("p", 32, 64) == 8 * stored
