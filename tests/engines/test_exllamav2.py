"""What exllamav2's runner and its bench do around the package: on a machine without CUDA that much can be seen."""

import json
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from safetensors.torch import save_file

from bench.gpu.exl2 import loaded_weights, unpack
from quantkit.engines.runtime import RUNNERS
from quantkit.formats.exl2 import decode_linear, encode_linear, open_variants
from quantkit.grids.exl2 import Exl2Grid
from quantkit.qtensor import QuantizedLinear


@pytest.fixture(scope="module")
def runner():
    spec = spec_from_file_location("start", RUNNERS / "start.py")
    start = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "start", start)
        spec.loader.exec_module(start)
        yield start.engine_of(RUNNERS / "exllamav2.py")


COMMON = [
    *("-i", "checkpoint", "-o", "scratch/work", "-nr", "-hb", "8", "-c", "text.parquet"),
    *("-r", "64", "-l", "512", "-mr", "16", "-ml", "512"),
]


def test_the_converter_measures_once_and_quantizes_for_each_target(runner):
    request = {"out": "out", "settings": {"bits": [3.0, 4.25], "head_bits": 8, "measurement": None}}
    assert runner.conversions(request, "checkpoint", "text.parquet", 64, 512, "scratch") == [
        ([*COMMON, "-om", "scratch/measurement.json"], "scratch/measurement.json"),
        ([*COMMON, "-m", "scratch/measurement.json", "-b", "3.0", "-cf", "out/3.0bpw"], "out/3.0bpw/config.json"),
        ([*COMMON, "-m", "scratch/measurement.json", "-b", "4.25", "-cf", "out/4.25bpw"], "out/4.25bpw/config.json"),
    ]


def test_a_measurement_that_is_there_is_used(runner):
    request = {"out": "out", "settings": {"bits": 4, "head_bits": 8, "measurement": "m.json"}}
    ((arguments, made),) = runner.conversions(request, "checkpoint", "text.parquet", 64, 512, "scratch")
    assert arguments == [*COMMON, "-m", "m.json", "-b", "4", "-cf", "out/4.0bpw"]
    assert made == "out/4.0bpw/config.json"


@pytest.mark.parametrize(
    ("config", "theta"),
    [
        ({"rope_parameters": {"rope_theta": 1e6}}, 1e6),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}}, 5e5),
        ({}, 10000.0),
    ],
)
def test_the_converter_sees_the_rope_theta_of_the_source(runner, config, theta, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "model.safetensors", "model.safetensors.index.json"):
        (source / name).write_text(name)
    seen = tmp_path / "seen"
    assert runner.with_rope_theta(str(source), str(seen)) == str(seen)
    assert json.loads((seen / "config.json").read_text()) == config | {"rope_theta": theta}
    assert json.loads((source / "config.json").read_text()) == config
    assert sorted(path.name for path in seen.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (seen / "model.safetensors").read_text() == "model.safetensors"


def random_linear(rows: int, columns: int, seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    groups = ((4, 32), (3, columns - 32))
    order = torch.randperm(columns, generator=generator)
    codes = torch.randint(0, 8, (rows, columns), generator=generator, dtype=torch.uint8)
    code = torch.randint(1, 17, (2, rows), generator=generator, dtype=torch.uint8)
    return QuantizedLinear(codes, Exl2Grid(groups, torch.tensor([0.03, 0.05]).half().float(), code, order))


def test_weights_as_exllamav2_holds_them_make_the_same_mlp(tmp_path):
    shapes = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
    linears = {f"model.layers.0.mlp.{name}": random_linear(*shape, seed=shape[0]) for name, shape in shapes.items()}
    tensors = {key: part for name, linear in linears.items() for key, part in encode_linear(name, linear).items()}
    save_file(tensors, tmp_path / "output.safetensors")
    settings = {"quant_method": "exl2", "bits": 4.0}
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
    }
    config = sizes | {"model_type": "mistral", "num_hidden_layers": 1, "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (artifact,) = open_variants(tmp_path).values()
    held = {name.rpartition(".")[2]: weight.double() for name, weight in loaded_weights(artifact).items()}
    plain = {name.rpartition(".")[2]: decode_linear(name, tensors).dequantize().double().t() for name in linears}
    inputs = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs = [
        (torch.nn.functional.silu(inputs @ each["gate_proj"]) * (inputs @ each["up_proj"])) @ each["down_proj"]
        for each in (plain, held)
    ]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not any(torch.equal(plain[name], held[name]) for name in shapes)
    stored = encode_linear("p", linears["model.layers.0.mlp.down_proj"])
    stored["p.q_invperm"] = torch.arange(96, dtype=torch.int32)  # what is left once the permutation is taken out
    assert torch.equal(held["down_proj"], decode_linear("p", stored).dequantize().double().t())


def test_a_wheel_is_unpacked_to_import_from(tmp_path):
    wheel = tmp_path / "a_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a_package/__init__.py", "")
    assert (unpack(wheel, tmp_path / "there") / "a_package" / "__init__.py").is_file()
