"""The HQQ container against an independent decode that shares nothing with the writer but the specification."""

import json

import numpy as np
import pytest
import torch

from quantkit.errors import RefusedError
from quantkit.formats.hqq.linear import decode_linear, encode_linear, pack, unpack
from quantkit.formats.hqq.pickled import write_pickle
from quantkit.formats.hqq.read import open_artifact
from quantkit.formats.hqq.write import HqqFormat
from quantkit.grids.affine import AffineGrid, StridedGrid
from quantkit.qtensor import QuantizedLinear

SHIFTS = {"8bit_u8": [0], "4bit_u8": [4, 0], "2bit_u8": [6, 4, 2, 0], "3bit_32": list(range(27, -1, -3))}
WIDTHS = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2, "3bit_32": 3}


def linear(bits: int, axis: int, *, rows: int = 16, columns: int = 24, size: int = 8) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(bits + axis)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    bias = torch.randn(rows, generator=generator)
    if axis == 0:
        shape = (rows // size, columns)
        scale, zero = (torch.rand(shape, generator=generator).half().float() + 0.5 for _ in range(2))
        return QuantizedLinear(codes, StridedGrid(bits, scale.half().float(), (zero * 3).half().float()), bias)
    shape = (rows, columns // size)
    scale, zero = (torch.rand(shape, generator=generator).half().float() + 0.5 for _ in range(2))
    group = (torch.arange(columns) // size).int()
    return QuantizedLinear(codes, AffineGrid(bits, scale.half().float(), (zero * 3).half().float(), group), bias)


def decoded(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Weights by nested loops over the grouped matrix, from the specification."""
    packing = bytes(tensors["p.packing"]).decode()
    rows, columns = tensors["p.shape"]
    size, axis = int(tensors["p.group_size"]), int(tensors["p.axis"])
    high, wide = (size, rows * columns // size) if axis == 0 else (rows * columns // size, size)
    words, scale, zero = tensors["p.W_q"], tensors["p.scale"].astype(np.float32), tensors["p.zero"].astype(np.float32)
    shifts, mask = SHIFTS[packing], 2 ** WIDTHS[packing] - 1
    grouped = np.zeros((high, wide), np.float32)
    for row in range(high):
        block, place = divmod(row, words.shape[0])
        for column in range(wide):
            code = (int(words[place, column]) >> shifts[block]) & mask
            at = (0, column) if axis == 0 else (row, 0)
            grouped[row, column] = (np.float32(code) - zero[at]) * scale[at]
    return grouped.reshape(rows, columns)


@pytest.mark.parametrize(("packing", "rows", "expected"), [
    ("4bit_u8", [1, 2, 3, 4], [0x13, 0x24]),
    ("2bit_u8", [3, 2, 1, 0], [0xE4]),
    ("3bit_32", [row % 8 for row in range(20)], [0x02982982, 0x0BBCBBCB]),
    ("8bit_u8", [7, 200], [7, 200]),
])  # fmt: skip
def test_golden_words(packing, rows, expected):
    codes = torch.tensor(rows, dtype=torch.uint8)[:, None]
    assert pack(codes, packing).flatten().tolist() == expected
    assert torch.equal(unpack(pack(codes, packing), packing, len(rows)), codes)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_written_decodes_as_the_specification_says(bits, axis):
    source = linear(bits, axis)
    tensors = encode_linear("p", source, 8)
    expected = decoded({name: tensor.numpy() for name, tensor in tensors.items()})
    np.testing.assert_array_equal(source.dequantize().numpy(), expected)
    read = decode_linear("p", tensors)
    assert torch.equal(read.codes_OI, source.codes_OI)
    assert torch.equal(read.dequantize(), source.dequantize())
    assert torch.equal(read.bias_O, source.bias_O.half())
    stored = sum(8 * tensors[f"p.{part}"].nbytes for part in ("W_q", "scale", "zero"))
    assert HqqFormat(bits, 8, axis).stored_bits("p", 16, 24) == stored


def test_shapes_and_keys_are_hqqs():
    tensors = encode_linear("p", linear(3, 1, rows=128, columns=256, size=64), 64)
    assert len(tensors) == 19 + 1
    assert tensors["p.W_q"].shape == (52, 64)
    assert tensors["p.W_q"].dtype == torch.int32
    assert tensors["p.scale"].shape == tensors["p.zero"].shape == (512, 1)
    assert bytes(tensors["p.unpack_view_dtype"].tolist()) == b"torch.int32"
    tensors = encode_linear("p", linear(3, 0, rows=128, columns=256, size=64), 64)
    assert tensors["p.W_q"].shape == (7, 512)
    assert tensors["p.scale"].shape == (1, 512)


def test_three_bits_with_groups_of_64_are_3_7():
    rows = columns = 4096
    stored = HqqFormat(3, 64, 1).stored_bits("p", rows, columns)
    assert stored / (rows * columns) == pytest.approx(3.7, abs=1e-3)


@pytest.mark.parametrize(
    ("part", "value", "what"),
    [
        ("packing", list(b"__import__('os')"), "the packing"),
        ("quant_zero", 1, "quant_zero"),
        ("view_as_float", 1, "view_as_float"),
    ],
)
def test_what_is_not_known_is_refused_and_never_evaluated(part, value, what):
    tensors = encode_linear("p", linear(4, 1), 8)
    tensors[f"p.{part}"] = torch.tensor(value, dtype=torch.uint8)
    with pytest.raises(RefusedError, match=f"p uses {what}"):
        decode_linear("p", tensors)


def damaged(part: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return encode_linear("p", linear(3, 1), 8) | {f"p.{part}": value}


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("packing", torch.tensor(list(b"4bit_u8")), r"W_q is \[5, 8\], where \[24, 8\] belongs"),
        ("nbits", torch.tensor(5), "5 bits along axis 1 are not in the packing 3bit_32"),
        ("nbits", torch.tensor(list(b"1.58")), "shape, nbits, group_size, axis are not two numbers and one each"),
        ("axis", torch.tensor(7), "3 bits along axis 7 are not in the packing 3bit_32"),
        ("group_size", torch.tensor(0), r"\[16, 24\] has no groups of 0 along axis 1"),
        ("group_size", torch.tensor(16), r"\[16, 24\] has no groups of 16 along axis 1"),
        ("shape", torch.tensor([16, 32]), r"W_q is \[5, 8\], where \[7, 8\] belongs"),
        ("W_q", torch.zeros(4, 8, dtype=torch.int32), r"W_q is \[4, 8\], where \[5, 8\] belongs"),
        ("zero", torch.zeros(1, 48), r"zero is \[1, 48\], where \[48, 1\] belongs"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(part, value, message):
    with pytest.raises(RefusedError, match=f"p: {message}"):
        decode_linear("p", damaged(part, value))


DOWN = "model.layers.0.mlp.down_proj"


def down(bits: int = 3, axis: int = 1) -> QuantizedLinear:
    """In the shape that the tiny model's has."""
    return linear(bits, axis, rows=64, columns=96)


@pytest.mark.parametrize("part", ["scale", "zero", "shape", "packing", "nbits", "group_size", "axis"])
def test_a_missing_tensor_is_named(part, tiny_mistral, tmp_path):
    from safetensors.torch import save_file

    tensors = encode_linear(DOWN, down(), 8)
    del tensors[f"{DOWN}.{part}"]
    save_file(tensors, tmp_path / "hqq_model.safetensors")
    (tmp_path / "config.json").write_text((tiny_mistral / "config.json").read_text())
    with pytest.raises(RefusedError, match=rf"down_proj\.{part} is missing"):
        open_artifact(tmp_path)


def codes_of(grids: torch.Tensor, size: int | None) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """8-bit codes of scales or zeros as old releases of hqq made them, their settings, and what they stand for.

    Args:
        grids: [groups, 1].
        size: of groups along axis 0; None is one grid for all.
    """
    values = grids.view(size, -1) if size else grids
    low, high = (values.amin(0), values.amax(0)) if size else (values.min(), values.max())
    scale = ((high - low) / 255).half().float().clamp(min=2**-14)
    zero = (-low / scale).half().float()
    codes = (values / scale + zero).round().clamp(0, 255)
    if size:
        scale, zero = scale[None], zero[None]
    meta = {"nbits": 8, "group_size": size, "shape": grids.shape, "scale": scale.half(), "zero": zero.half(), "axis": 0}
    meta |= {"packing": "8bit_u8", "view_as_float": False}
    return codes.to(torch.uint8), meta, ((codes - zero) * scale).view(grids.shape)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quantized", [(), ("zero",), ("scale", "zero")])
def test_pickles_of_old_releases_are_read(quantized, nested, stacked, tiny_mistral, tmp_path):
    """A table `meta` in each module, zeros and scales that are 8-bit codes themselves, and both in one tensor."""
    if stacked and len(quantized) == 1:
        pytest.skip("tensors of two dtypes do not stack")
    source = down()
    encoded = {name.rsplit(".", 1)[1]: tensor for name, tensor in encode_linear(DOWN, source, 8).items()}
    meta = {"nbits": 3, "group_size": 8, "axis": 1, "packing": "3bit_32", "shape": torch.Size([64, 96])}
    meta |= {"quant_scale": "scale" in quantized, "quant_zero": "zero" in quantized}
    grids = {which: encoded[which].float() for which in ("scale", "zero")}
    for which in ("zero", "scale"):
        if which in quantized:
            # what is stacked has one shape, so zeros have groups then too
            codes, own, grids[which] = codes_of(grids[which], 128 if which == "scale" or stacked else None)
            meta |= {f"{which}_q": codes, f"meta_{which}": own}
        else:
            meta[which] = encoded[which]
    if stacked:
        names = ("zero_q", "scale_q") if quantized else ("zero", "scale")
        meta["zero_scale"] = torch.stack([meta.pop(name) for name in names])
    module = {"W_q": encoded["W_q"], "bias": None, "offload_meta": stacked}
    module |= {"meta": meta} if nested else meta
    torch.save({DOWN: module, "model.norm": {"weight": torch.ones(64)}}, tmp_path / "qmodel.pt")
    (tmp_path / "config.json").write_text((tiny_mistral / "config.json").read_text())
    artifact = open_artifact(tmp_path)
    grid = AffineGrid(3, grids["scale"].view(64, 12), grids["zero"].view(64, 12), source.grid.group_I)
    expected = grid.decode(source.codes_OI)
    torch.testing.assert_close(artifact.read("layers.0")[f"{DOWN}.weight"], expected)
    widths = [8 if which in quantized else 16 for which in ("scale", "zero")]
    assert artifact.bits_per_weight == pytest.approx(3.2 + sum(widths) / 8, rel=0.02)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("packing", "1bit_u8", "zero_q uses the packing '1bit_u8'"),
        ("shape", torch.Size([767, 1]), r"zero_q is \[768, 1\] with scales \[\], which do not make \[767, 1\]"),
        ("scale", torch.ones(3, 1), r"zero_q is \[768, 1\] with scales \[3, 1\]"),
        ("scale", None, "meta_zero has no scale"),
    ],
)
def test_a_quantized_zero_that_does_not_fit_is_refused(key, value, message, tiny_mistral, tmp_path):
    encoded = {name.rsplit(".", 1)[1]: tensor for name, tensor in encode_linear(DOWN, down(), 8).items()}
    codes, own, _ = codes_of(encoded["zero"].float(), None)
    meta = {"nbits": 3, "group_size": 8, "axis": 1, "packing": "3bit_32", "shape": torch.Size([64, 96])}
    meta |= {"quant_zero": True, "zero_q": codes, "meta_zero": own | {key: value}, "scale": encoded["scale"]}
    if key == "scale" and value is not None:
        meta["meta_zero"]["zero"] = value
    torch.save({DOWN: {"W_q": encoded["W_q"], "meta": meta}}, tmp_path / "qmodel.pt")
    (tmp_path / "config.json").write_text((tiny_mistral / "config.json").read_text())
    with pytest.raises(RefusedError, match=message):
        open_artifact(tmp_path).read("layers.0")


def test_a_pickle_reads_like_the_safetensors(tiny_mistral, tmp_path):
    from safetensors.torch import save_file

    from quantkit.checkpoint.index import open_tensors

    tensors = encode_linear(DOWN, down(), 8)
    tensors["model.norm.weight"] = torch.ones(64)
    save_file(tensors, tmp_path / "hqq_model.safetensors")
    write_pickle(open_tensors(tmp_path, stem="hqq_model"), tmp_path / "qmodel.pt")
    (tmp_path / "config.json").write_text((tiny_mistral / "config.json").read_text())
    expected = open_artifact(tmp_path).bits_per_weight
    stored = torch.load(tmp_path / "qmodel.pt", weights_only=True)[DOWN]
    assert (stored["nbits"], stored["packing"], stored["shape"]) == (3, "3bit_32", torch.Size([64, 96]))
    assert stored["unpack_view_dtype"] is torch.int32
    assert stored["stores_quant_config"] is True
    (tmp_path / "hqq_model.safetensors").unlink()
    second = open_artifact(tmp_path)
    assert second.bits_per_weight == expected
    assert torch.equal(second.read("layers.0")[f"{DOWN}.weight"], down().dequantize())


def test_a_pickle_with_anything_else_in_it_is_refused(tiny_mistral, tmp_path):
    class Surprise:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"model.norm": {"weight": Surprise()}}, tmp_path / "qmodel.pt")
    (tmp_path / "config.json").write_text((tiny_mistral / "config.json").read_text())
    with pytest.raises(RefusedError, match=r"qmodel\.pt cannot be read"):
        open_artifact(tmp_path)


def test_what_does_not_fit_is_named():
    shapes = [("model.layers.0.mlp.down_proj", 64, 90), ("model.layers.0.mlp.up_proj", 90, 64)]
    assert HqqFormat(3, 64, 1).problems(shapes) == [
        "model.layers.0.mlp.down_proj: in_features 90 is not divisible by group_size 64; leave it in 16 bits with "
        'quantize.skip = ["mlp.down_proj"]'
    ]
    assert len(HqqFormat(3, 64, 0).problems(shapes)) == 1
    assert HqqFormat(3, 64, 1, skip=("mlp.down_proj",)).problems(shapes) == []
    assert "do not fill bytes of 4 codes" in HqqFormat(2, 64, 1).problems([("m", 3, 64)])[0]


def test_transformers_refuses_the_folder_instead_of_inventing_weights(tiny_mistral, tmp_path):
    from transformers import AutoModelForCausalLM

    from quantkit.pipeline import build
    from quantkit.recipe import Recipe

    recipe = Recipe.of({"format": "hqq", "model": {"id": str(tiny_mistral)}, "quantize": {"group_size": 32}})
    out = build(recipe, out=tmp_path / "out", device=torch.device("cpu"), validated=False).out
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "hqq"
    # without hqq beside it transformers would stop at that key; the file's name must stop it as well
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(out)
