"""The EXL2 container against an independent decode that shares nothing with the writer but the specification."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit import keeping, pipeline
from quantkit.errors import RefusedError
from quantkit.files import hash_files, sha256_of
from quantkit.formats.bitstream import pack
from quantkit.formats.exl2 import (
    PARTS,
    Exl2Format,
    decode_linear,
    encode_linear,
    expected_biases,
    least_bits,
    open_variants,
)
from quantkit.grids.exl2 import Exl2Grid, Mixture
from quantkit.grids.exl2_options import HEADS
from quantkit.pipeline import build
from quantkit.qtensor import QuantizedLinear
from quantkit.recipe import Recipe
from quantkit.report.record import artifact_files
from quantkit.solvers.exl2_measure import OptionTrial
from quantkit.workdir import Workdir
from tests.interruption import interrupted
from tests.tiny import make_text, make_tiny

CPU = torch.device("cpu")
THETA = 500000.0  # not what a reader takes that finds none
# one column, the codes i mod 2^b
PACKED = {
    2: (16, "e4e4e4e4"),
    3: (32, "88fac688 c688fac6 fac688fa"),
    4: (8, "76543210"),
    5: (32, "8a418820 c5a92839 ca307b9a 38bdab49 ffbbcdeb"),
    6: (16, "440c2040 a2481c61 3ce34c2c"),
    8: (4, "03020100"),
}


def golden() -> QuantizedLinear:
    """The specification's example: 192 in, 32 out, a group of 32 channels of every width."""
    groups = tuple((bits, 32) for bits in (8, 6, 5, 4, 3, 2))
    order = 35 * torch.arange(192) % 192
    row, column = torch.arange(192)[:, None], torch.arange(32)
    stored = (7 * row + 3 * column) % torch.tensor([2**bits for bits, size in groups for _ in range(size)])[:, None]
    codes = torch.empty(32, 192, dtype=torch.uint8)
    codes[:, order] = stored.t().to(torch.uint8)
    code = (1 + (5 * torch.arange(6)[:, None] + column) % 16).to(torch.uint8)
    scale_max = torch.tensor([0.5, 0.25, 0.1, 0.05, 0.0123, 0.00071]).half().float()
    return QuantizedLinear(codes, Exl2Grid(groups, scale_max, code, order))


def mixed(rows: int, groups: tuple[tuple[int, int], ...], seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    columns = sum(size for _, size in groups)
    order = torch.randperm(columns, generator=generator)
    tops = torch.tensor([2**bits for bits, size in groups for _ in range(size)], dtype=torch.float32)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    codes[:, order] = (torch.rand(rows, columns, generator=generator) * tops).to(torch.uint8)
    code = torch.randint(1, 17, (len(groups), rows), generator=generator, dtype=torch.uint8)
    scale_max = (torch.rand(len(groups), generator=generator) * 0.03).half().float()
    bias = torch.randn(rows, generator=generator)
    return QuantizedLinear(codes, Exl2Grid(groups, scale_max, code, order), bias)


def decoded(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """float16 [in, out] bit by bit, from the specification."""
    words = tensors["p.q_weight"].view(np.uint32)
    nibbles = tensors["p.q_scale"].view(np.uint32)
    table, inverse = tensors["p.q_groups"].tolist(), tensors["p.q_invperm"].tolist()
    largest = tensors["p.q_scale_max"]
    stored = []
    for group in range(len(table) // 2):
        bits, first = table[2 * group], table[2 * group + 1]
        stop = table[2 * group + 3] if 2 * group + 3 < len(table) else words.shape[0]
        unit = np.float16(largest[group] * np.float16(1 / 256))
        for i in range((stop - first) * 32 // bits):
            row = []
            for column in range(words.shape[1]):
                code = 0
                for bit in range(bits):
                    at = i * bits + bit
                    code |= (int(words[first + at // 32, column]) >> at % 32 & 1) << bit
                nibble = int(nibbles[group, column // 8]) >> 4 * (column % 8) & 15
                scale = np.float16(np.float16((nibble + 1) ** 2) * unit)
                row.append(np.float16(np.float16(code - 2 ** (bits - 1)) * scale))
            stored.append(row)
    assert len(stored) == len(inverse)
    return np.array([stored[place] for place in inverse], dtype=np.float16)


def as_numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def words(array: np.ndarray) -> str:
    return " ".join(f"{word:08x}" for word in array.view(np.uint32))


@pytest.mark.parametrize("bits", PACKED)
def test_golden_words(bits):
    number, expected = PACKED[bits]
    column = torch.arange(32)[:, None] % 2**bits
    found = words(pack(column, bits)[:, 0].numpy())
    assert found.split()[: number * bits // 32] == expected.split()


def test_the_golden_matrix_in_the_file():
    arrays = as_numpy(encode_linear("p", golden()))
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "p.q_weight": ("int32", (28, 32)),
        "p.q_scale": ("int32", (6, 4)),
        "p.q_scale_max": ("float16", (6,)),
        "p.q_groups": ("int16", (12,)),
        "p.q_invperm": ("int32", (192,)),
    }
    assert arrays["p.q_groups"].tolist() == [8, 0, 6, 8, 5, 14, 4, 19, 3, 23, 2, 26]
    assert {row: words(arrays["p.q_weight"][row, :4]) for row in (0, 8, 14, 19, 23, 26)} == {
        0: "150e0700 18110a03 1b140d06 1e171009",
        8: "fcd6e9e0 bfe31aa3 42ef4b66 05fb7c29",
        14: "87cab8e0 4dfc4543 122dd1a6 d85f5e09",
        19: "1a3c5e70 4d6f81a3 7092b4d6 a3c5e709",
        23: "b829cbb8 53977053 2ee0a72e c14e5dc1",
        26: "6c6c6c6c 1b1b1b1b c6c6c6c6 b1b1b1b1",
    }
    assert words(arrays["p.q_scale"][0]) == "76543210 fedcba98 76543210 fedcba98"
    assert words(arrays["p.q_scale"][1]) == "cba98765 43210fed cba98765 43210fed"
    assert words(arrays["p.q_scale"][5]) == "0fedcba9 87654321 0fedcba9 87654321"
    assert [f"{bits:04x}" for bits in arrays["p.q_scale_max"].view(np.uint16)] == [
        "3800",
        "3400",
        "2e66",
        "2a66",
        "224c",
        "11d1",
    ]
    assert arrays["p.q_invperm"][:8].tolist() == [0, 11, 22, 33, 44, 55, 66, 77]
    assert {name: sha256(array) for name, array in arrays.items()} == {
        "p.q_weight": "04d4ae0fff651455",
        "p.q_scale": "cadc9289bc51382d",
        "p.q_scale_max": "16d4379b19eeae6b",
        "p.q_groups": "ad97e32ddacffa8d",
        "p.q_invperm": "7cab84f3dc3d9e96",
    }


def test_the_golden_matrix_decoded():
    weight = decode_linear("p", encode_linear("p", golden())).dequantize().t().contiguous()
    assert torch.equal(weight, golden().dequantize().t())
    found = {at: float(weight[at]) for at in ((0, 0), (1, 0), (2, 5), (35, 0), (100, 7), (191, 31))}
    assert found == {
        (0, 0): -0.25,
        (1, 0): -0.099609375,
        (2, 5): 2.8828125,
        (35, 0): -0.236328125,
        (100, 7): -0.020751953125,
        (191, 31): -0.000453948974609375,
    }
    assert float(weight.double().sum()) == 1845.1715183258057
    assert float(weight.double().abs().sum()) == 13240.101852416992
    assert sha256(weight.half().numpy()) == "466d1b7b5b3b2d78"
    assert sha256(decoded(as_numpy(encode_linear("p", golden())))) == "466d1b7b5b3b2d78"


@pytest.mark.parametrize(
    "groups",
    [
        ((8, 32),),
        ((6, 64), (6, 32)),
        ((5, 32), (3, 128), (3, 32)),
        ((4, 64), (2, 64), (2, 32)),
        ((8, 32), (6, 32), (5, 32), (4, 32), (3, 32), (2, 32)),
    ],
)
@pytest.mark.parametrize("rows", [32, 37])
def test_what_is_written_decodes_as_the_specification_says(groups, rows):
    source = mixed(rows, groups, seed=rows + len(groups))
    tensors = encode_linear("p", source)
    weight = decoded(as_numpy(tensors))
    np.testing.assert_array_equal(source.dequantize().t().numpy(), weight[:, :rows].astype(np.float32))
    assert weight.shape[1] == -(-rows // 32) * 32
    assert not weight[:, rows:].any(), "what is padded decodes to nothing"
    read = decode_linear("p", tensors)
    assert torch.equal(read.codes_OI[:rows], source.codes_OI)
    assert torch.equal(read.dequantize().t(), torch.from_numpy(weight).float())
    assert read.grid.groups == groups
    assert torch.equal(read.bias_O, tensors["p.bias"])


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("q_groups", [6, 0, 8, 8, 5, 14, 4, 19, 3, 23, 2, 26], "its groups have the widths"),
        ("q_groups", [8, 0, 7, 8, 5, 14, 4, 19, 3, 23, 2, 26], "its groups have the widths"),
        ("q_groups", [8, 0, 6, 6, 5, 14, 4, 19, 3, 23, 2, 26], "its groups start at the rows"),
        ("q_groups", [8, 1, 6, 8, 5, 14, 4, 19, 3, 23, 2, 26], "its groups start at the rows"),
        ("q_groups", [8, 0, 6, 8, 5, 14, 4, 19, 3, 23, 2, 28], "its groups start at the rows"),
        ("q_groups", [8, 0, 6, 8, 5], r"q_groups is \[5\], not two numbers for each group"),
        ("q_groups", [], r"q_groups is \[0\]"),
        ("q_invperm", [0] * 192, "q_invperm is no permutation"),
        ("q_invperm", [*range(191), -1], "q_invperm is no permutation"),
        ("q_invperm", list(range(160)), r"q_invperm is \[160\], where \[192\] belongs"),
        ("q_scale_max", [0.5] * 5, r"q_scale_max is \[5\], where \[6\] belongs"),
        ("q_scale_max", [0.5] * 5 + [float("nan")], "q_scale_max holds values that are not finite"),
        ("q_scale", [[0] * 4] * 5, r"q_scale is \[5, 4\], where \[6, 4\] belongs"),
        ("q_scale", [[0] * 3] * 6, r"q_scale is \[6, 3\], where \[6, 4\] belongs"),
        ("q_weight", [0] * 28, r"q_weight is \[28\]"),
        ("q_weight", [[0] * 24] * 28, r"q_weight is \[28, 24\]"),
        ("bias", [0.0] * 31, r"bias is \[31\], where \[32\] belongs"),
    ],
)
def test_what_no_reader_walks_through_is_refused(part, values, message):
    tensors = encode_linear("p", golden()) | {"p.bias": torch.zeros(32)}
    decode_linear("p", tensors)
    tensors[f"p.{part}"] = torch.tensor(values, dtype=tensors[f"p.{part}"].dtype)
    with pytest.raises(RefusedError, match=message) as caught:
        decode_linear("p", tensors)
    assert caught.value.where == "p"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_or_of_another_dtype_is_named(part):
    tensors = encode_linear("p", golden())
    with pytest.raises(RefusedError, match=f"p is damaged: {part} is missing"):
        decode_linear("p", {name: tensor for name, tensor in tensors.items() if name != f"p.{part}"})
    with pytest.raises(RefusedError, match=f"p is damaged: {part} holds float32, where "):
        decode_linear("p", tensors | {f"p.{part}": tensors[f"p.{part}"].float()})


LAYER = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def shapes(**changes: tuple[int, int]) -> list[tuple[str, int, int]]:
    found = {f"model.layers.0.{name}": shape for name, shape in LAYER.items()} | {"lm_head": (415, 64)}
    return [(name, *shape) for name, shape in (found | changes).items()] + [("model.embed_tokens", 415, 64)]


def test_what_the_reader_cannot_take_is_a_problem():
    form = Exl2Format((4.0,), HEADS[6], 6, 415)
    assert form.problems(shapes()) == [], "a head is padded, whatever its rows"
    name = "model.layers.0.self_attn.q_proj"
    assert form.problems(shapes(**{name: (95, 64)})) == [f"{name}: out_features 95 is not divisible by 32"]
    assert form.problems(shapes(**{name: (96, 72)})) == [
        f"{name}: in_features 72 is not divisible by 32, the smallest group"
    ]
    assert form.problems(shapes(**{name: (96, 2**16)})) == [f"{name}: in_features 65536 is more than 65535"]
    (line,) = Exl2Format((2.05, 4.0), HEADS[6], 6, 415).problems(shapes())
    least = least_bits({name: (rows, columns) for name, rows, columns in shapes()})
    assert line == f"quantize.bits = 2.05 is below {least:.3f}, the least that the mixtures allow"


def test_a_sub_layer_is_stored_as_a_whole_or_not_at_all():
    form = Exl2Format((4.0,), HEADS[6], 6, 415)
    for name in LAYER:
        left = [shape for shape in shapes() if not shape[0].endswith(name)]
        assert form.problems(left) == [
            f"model.layers.0.{name} is missing: exllamav2 takes a sub-layer as a whole or not at all"
        ]
    for name, shape in (("gate_proj", (128, 64)), ("up_proj", (64, 64)), ("down_proj", (64, 64))):
        (line,) = form.problems(shapes(**{f"model.layers.0.mlp.{name}": shape}))
        assert line.startswith("model.layers.0.mlp: gate_proj and up_proj have "), name
        assert line.endswith("; they must agree")


def test_biases_are_those_that_the_reader_expects():
    names = {f"model.layers.0.{name}.weight" for name in LAYER} | {"model.norm.weight", "lm_head.weight"}
    qkv = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"]
    qwen2 = Exl2Format((4.0,), HEADS[6], 6, 415, expected_biases({"model_type": "qwen2"}))
    plain = Exl2Format((4.0,), HEADS[6], 6, 415, expected_biases({"model_type": "llama", "mlp_bias": True}))
    told = Exl2Format((4.0,), HEADS[6], 6, 415, expected_biases({"model_type": "llama", "attention_bias": True}))
    biased = names | {f"{module}.bias" for module in qkv}
    assert plain.tensor_problems(names) == qwen2.tensor_problems(biased) == []
    assert plain.tensor_problems(biased) == [f"{module}: exllamav2 expects no bias there" for module in sorted(qkv)]
    assert qwen2.tensor_problems(names) == [f"{module}: exllamav2 expects a bias there" for module in sorted(qkv)]
    assert told.tensor_problems(biased) == ["model.layers.0.self_attn.o_proj: exllamav2 expects a bias there"]
    for module in ("lm_head", "model.layers.0.mlp.up_proj", "model.norm"):
        assert told.tensor_problems(biased | {"model.layers.0.self_attn.o_proj.bias", f"{module}.bias"}) == [
            f"{module}: exllamav2 expects no bias there"
        ]


def test_stored_bits_are_those_of_the_file():
    for groups in (((8, 32), (6, 64), (2, 32)), ((4, 128),)):
        tensors = encode_linear("p", mixed(37, groups, seed=1))
        stored = sum(8 * tensor.nbytes for name, tensor in tensors.items() if name != "p.bias")
        parts = " ".join(f"{bits}:{size / 128}/{size}" for bits, size in groups)
        assert Mixture.of(parts).stored_bits(37, 128) == stored


def recipe_for(source, text, *, activations="float", **quantize) -> Recipe:
    return Recipe.of(
        {
            "format": "exl2",
            "model": {"id": str(source)},
            "quantize": {"scale_candidates": 4, "measure_tokens": 64} | quantize,
            "calibration": {"texts": {str(text): 8}, "window_tokens": 16, "activations": activations},
            "validation": {"texts": [str(text)], "window_tokens": 32, "generated_tokens": 0},
        }
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Tied, with biases, and a vocabulary that is no multiple of 32."""
    rope = {"rope_type": "default", "rope_theta": THETA}
    folder = tmp_path_factory.mktemp("source") / "m"
    return make_tiny(folder, "qwen2", vocab_size=415, tie_word_embeddings=True, rope_parameters=rope)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def built(source, text, tmp_path_factory):
    return build(recipe_for(source, text, bits=[4.0, 5.0, 8.0]), out=tmp_path_factory.mktemp("out") / "a", device=CPU)


def test_a_folder_for_each_target_and_one_measurement(built):
    names = ["4.0bpw", "5.0bpw", "8.0bpw"]
    assert built.record["variants"] == {name: [f"{name}/output.safetensors"] for name in names}
    assert [path.name for path in sorted(built.out.iterdir()) if path.is_dir()] == names
    judged = built.record["validation"]["variants"]
    assert [variant["name"] for variant in judged] == names
    losses = [variant["results"][0]["mean_kld"] for variant in judged]
    assert losses[0] > losses[1] > losses[2] < 0.01
    for name in names:
        config = json.loads((built.out / name / "config.json").read_text())
        assert config["quantization_config"] == {
            "quant_method": "exl2",
            "version": "0.3.2",
            "bits": float(name.removesuffix("bpw")),
            "head_bits": 6,
            "calibration": {"rows": 8, "length": 16, "dataset": "text.jsonl"},
        }
        assert config["rope_theta"] == THETA
        assert [path.name for path in (built.out / name).glob("*.safetensors")] == ["output.safetensors"]


def test_measurements_have_the_converters_keys_and_choices_keep_to_the_target(built):
    content = json.loads((built.out / "measurement.json").read_text())
    measured = content["measurement"]
    blocks = [f"model.layers.{layer}.{block}" for layer in (0, 1) for block in ("self_attn", "mlp")]
    assert measured == {name: measured[name] for name in blocks} | {"model.norm.norm": None, "lm_head.linear": None}
    assert content["last_module_idx"] == len(["embedding", *measured]) - 1, "places of modules as exllamav2 has them"
    for name in blocks:
        sizes, accuracies = zip(*((row["total_bits"], row["accuracy"]) for row in measured[name]), strict=True)
        assert len(sizes) > 8
        assert sorted(set(sizes)) == list(sizes), "the next option is the larger"
        assert sorted(set(accuracies)) == list(accuracies), "and the better one"
    assert measured[blocks[1]][0].keys() == {"accuracy", "total_bits", "gate_proj", "up_proj", "down_proj"}
    least, most = (
        {name: choose(measured[name], key=lambda row: row["total_bits"]) for name in blocks} for choose in (min, max)
    )
    listed = {
        "group_size": {"5": 32, "3": 32},
        "bits": [5, 3],
        "bits_prop": [0.05, 0.95],
        "scale_bits": 4,
    }
    assert listed in [row["down_proj"] for row in measured[blocks[1]]]
    assert all(most[name]["accuracy"] > least[name]["accuracy"] for name in blocks)
    weights = 2 * sum(rows * columns for rows, columns in LAYER.values())
    for name, chosen in content["allocations"].items():
        artifact = open_variants(built.out)[name]
        infos = artifact.tensors.tensors
        stored = 8 * sum(
            info.size_bytes
            for tensor, info in infos.items()
            if tensor.rsplit(".", 1)[1].startswith("q_") and "lm_head" not in tensor
        )
        assert stored == sum(measured[block][option]["total_bits"] for block, option in chosen["options"].items())
        assert stored / weights == pytest.approx(chosen["bits_per_weight"], rel=1e-12)
        assert chosen["bits_per_weight"] <= float(name.removesuffix("bpw"))
        assert chosen["noise"] == chosen["bound"], "the best by proof"
        recorded = built.record["build"]["allotments"][name]
        assert recorded == {key: chosen[key] for key in ("bits_per_weight", "noise", "bound")}


def test_the_files_hold_what_the_specification_lists(built, source):
    parts = ("q_weight", "q_invperm", "q_scale", "q_scale_max", "q_groups")
    expected = {"model.embed_tokens.weight", "model.norm.weight"} | {f"lm_head.{part}" for part in parts}
    for layer in (0, 1):
        prefix = f"model.layers.{layer}."
        expected |= {f"{prefix}{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"{prefix}{linear}.{part}" for linear in LAYER for part in parts}
        expected |= {f"{prefix}self_attn.{letter}_proj.bias" for letter in "qkv"}
    variants = open_variants(built.out)
    for name, artifact in variants.items():
        with safe_open(built.out / name / "output.safetensors", framework="np") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert arrays.keys() == expected
        assert {array.dtype.name for key, array in arrays.items() if not key.rsplit(".", 1)[1].startswith("q_")} == {
            "float16"
        }
        assert arrays["lm_head.q_weight"].shape[1] == 416
        read = {
            key: tensor
            for item in ("embedding", "layers.0", "layers.1", "head")
            for key, tensor in artifact.read(item).items()
        }
        for module in {key.rsplit(".", 1)[0] for key in arrays if key.endswith(".q_weight")}:
            weight = decoded({f"p.{part}": arrays[f"{module}.{part}"] for part in parts}).astype(np.float32).T
            np.testing.assert_array_equal(
                read[f"{module}.weight"].numpy(), weight[:415] if module == "lm_head" else weight
            )
        assert artifact.bits_per_weight > float(name.removesuffix("bpw")) - 1


def test_one_variant_of_several_is_the_same_as_alone(built, source, text, tmp_path):
    alone = build(recipe_for(source, text, bits=[5.0]), out=tmp_path / "b", device=CPU, validated=False)
    assert hash_files(alone.out, ["5.0bpw/output.safetensors"]) == hash_files(built.out, ["5.0bpw/output.safetensors"])


def test_an_earlier_measurement_allots_as_the_first_did(built, source, text, tmp_path):
    recipe = recipe_for(source, text, bits=[5.0], measurement=str(built.out / "measurement.json"))
    again = build(recipe, out=tmp_path / "b", device=CPU)
    assert hash_files(again.out, ["5.0bpw/output.safetensors"]) == hash_files(built.out, ["5.0bpw/output.safetensors"])
    assert "measure" in built.record["build"]["seconds"]
    assert "measure" not in again.record["build"]["seconds"]
    assert again.record["recipe"]["quantize"]["measurement"] == "measurement.json"
    assert str(tmp_path) not in (again.out / "quantkit.json").read_text()
    measurement = built.out / "measurement.json"
    assert again.record["identity"]["read"] == {"quantize.measurement": sha256_of(measurement)}


def theirs(content: dict) -> dict:
    """A measurement as exllamav2 writes it, without choices and with other bits; here with some that are not ours."""
    rows = content["measurement"]
    kept = {
        key: None if options is None else [{**row, "total_bits": row["total_bits"] + 7} for row in options]
        for key, options in rows.items()
    }
    odd = {"group_size": {"7": 128}, "bits": [7], "bits_prop": [1.0], "scale_bits": 4}
    linears = ("q_proj", "k_proj", "v_proj", "o_proj")
    plain = {"group_size": {"4": 64}, "bits": [4], "bits_prop": [1.0], "scale_bits": 4}
    kept["model.layers.0.self_attn"] += [
        {"accuracy": 0.9999999, "total_bits": 1, **dict.fromkeys(linears, odd)},
        {"accuracy": 0.9999999, "total_bits": 1, **dict.fromkeys(linears, plain)},
        {"accuracy": float("nan"), "total_bits": 1, **dict.fromkeys(linears, plain)},
        {"accuracy": 0.5, "total_bits": 1, "q_proj": plain},
        "row",
    ]
    return {"measurement": kept, "last_module_idx": content["last_module_idx"]}


def test_a_measurement_of_exllamav2_is_taken_as_far_as_it_fits(built, source, text, tmp_path):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(theirs(json.loads((built.out / "measurement.json").read_text())), indent=4))
    said: list[str] = []
    progress = pipeline.Progress(stage=said.append)
    recipe = recipe_for(source, text, bits=[6.0], measurement=str(path))
    made = build(recipe, out=tmp_path / "c", device=CPU, validated=False, progress=progress)
    assert [line for line in said if line.endswith("; 4 that do not fit are ignored")]
    (artifact,) = open_variants(made.out).values()
    first = artifact.tensors.read(["model.layers.0.self_attn.q_proj.q_groups"])
    # the option that claims to be all but exact, at the bits that it really takes
    assert first["model.layers.0.self_attn.q_proj.q_groups"].tolist() == [4, 0]
    assert made.record["build"]["allotments"]["6.0bpw"]["bits_per_weight"] <= 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("[]", "not a JSON object"),
        ("{}", r"no option of model\.layers\.0\.self_attn was measured"),
        (
            '{"measurement": {"model.layers.0.self_attn": null}}',
            r"no option of model\.layers\.0\.self_attn was measured",
        ),
    ],
)
def test_a_file_that_is_no_measurement_is_refused_at_plan(content, message, source, text, tmp_path):
    path = tmp_path / "measurement.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RefusedError, match=message):
        pipeline.plan(
            recipe_for(source, text, measurement=str(path)),
            out=tmp_path / "c",
            device=CPU,
            progress=pipeline.Progress(),
        )


@pytest.mark.parametrize("place", ["measuring", "solving"])
def test_a_build_of_several_variants_that_was_killed_ends_in_the_same_bytes(
    place, built, source, text, tmp_path, monkeypatch
):
    recipe, out = recipe_for(source, text, bits=[4.0, 5.0, 8.0]), tmp_path / "d"
    owner, name = {"measuring": (Workdir, "note"), "solving": (keeping, "write_item")}[place]
    measured, measure = [], OptionTrial.measure

    def counted(self, layer, *arguments):
        measured.append(layer.index)
        return measure(self, layer, *arguments)

    monkeypatch.setattr(OptionTrial, "measure", counted)
    with interrupted(owner, name, after=1):
        build(recipe, out=out, device=CPU, validated=False)
    assert build(recipe, out=out, device=CPU, validated=False).record["fingerprint"] == built.record["fingerprint"]
    # of the layer that was measured when it was killed nothing is left
    assert measured == {"measuring": [0, 1, 1], "solving": [0, 1]}[place]
    files = [name for name in artifact_files(built.out) if name not in ("README.md", "quantkit.json")]
    assert len(files) > 3 * 2
    assert hash_files(out, files) == hash_files(built.out, files)
    assert artifact_files(out) == artifact_files(built.out)


def test_a_variants_folder_is_an_artifact_of_its_own(built):
    alone, among = open_variants(built.out / "5.0bpw"), open_variants(built.out)
    assert list(alone) == ["5.0bpw"]
    assert torch.equal(
        alone["5.0bpw"].read("layers.1")["model.layers.1.mlp.up_proj.weight"],
        among["5.0bpw"].read("layers.1")["model.layers.1.mlp.up_proj.weight"],
    )


def test_plan_refuses_what_no_mixture_reaches(source, text, tmp_path):
    recipe = recipe_for(source, text, bits=[2.0, 4.0])
    with pytest.raises(RefusedError, match=re.escape("quantize.bits = 2.0 is below")):
        pipeline.plan(recipe, out=tmp_path / "c", device=CPU, progress=pipeline.Progress())


def test_plan_refuses_biases_that_the_reader_does_not_expect(text, tmp_path):
    biased = make_tiny(tmp_path / "m", "llama", mlp_bias=True)
    with pytest.raises(RefusedError, match=r"model\.layers\.0\.mlp\.down_proj: exllamav2 expects no bias there"):
        pipeline.plan(recipe_for(biased, text), out=tmp_path / "c", device=CPU, progress=pipeline.Progress())


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_without_a_part_is_refused_when_it_is_opened(part, tmp_path):
    tensors = encode_linear("model.layers.0.mlp.up_proj", golden())
    del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    save_file(tensors, tmp_path / "output.safetensors")
    settings = {"quant_method": "exl2", "bits": 4.0}
    sizes = {
        "hidden_size": 192,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 32,
    }
    config = sizes | {"model_type": "mistral", "num_hidden_layers": 1, "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match=rf"up_proj\.{part} is missing"):
        open_variants(tmp_path)


@pytest.mark.parametrize("bits", [None, "4", True])
def test_a_folder_whose_bits_are_no_number_is_refused(bits, tmp_path):
    settings = {"quant_method": "exl2", "bits": bits}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "quantization_config": settings}))
    with pytest.raises(RefusedError, match="not a number"):
        open_variants(tmp_path)


def test_several_targets_want_the_float_stream(source, text, tmp_path):
    recipe = recipe_for(source, text, bits=[4.0, 5.0], activations="quantized")
    with pytest.raises(RefusedError, match="several variants cannot share"):
        pipeline.plan(recipe, out=tmp_path / "c", device=CPU, progress=pipeline.Progress())
