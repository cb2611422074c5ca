"""What exllamav2's runner does before the package: on a machine without CUDA that much can be seen."""

import json
from importlib.util import module_from_spec, spec_from_file_location

import pytest

from quantkit.engines.runtime import RUNNERS


@pytest.fixture(scope="module")
def runner():
    spec = spec_from_file_location("exllamav2_runner", RUNNERS / "exllamav2.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
