"""Folders whose tensors do not fit each other, their settings or the model: each is refused in one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.cli import app
from quantkit.errors import QuantkitError
from quantkit.formats import READERS
from quantkit.pipeline import build
from quantkit.recipe import Recipe
from tests.tiny import make_text, make_tiny

DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
NORM = "model.layers.1.input_layernorm.weight"
QUANTIZE = {
    "gptq": {"group_size": 32, "scale_candidates": 0, "asymmetric": 0.0},
    "awq": {"group_size": 32, "scaling_steps": 0, "scale_candidates": 0},
    "compressed-tensors": {"group_size": 32, "scale_candidates": 0, "symmetric": False},
    "hqq": {"group_size": 32, "bits": 4},
    "mlx": {"group_size": 32, "solver": "least-squares"},
    "exl2": {"bits": [4.5], "scale_candidates": 1, "measure_tokens": 16},
}
Change = Callable[[dict], object]


def cut(name: str, *, rows: int | None = None, columns: int | None = None) -> Change:
    return lambda tensors: tensors.update({name: tensors[name][:rows, :columns].contiguous()})


def without(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


def settings(**changes) -> Change:
    def change(config: dict) -> None:
        for key in {"quantization", "quantization_config"} & config.keys():
            found = config[key]
            (found["config_groups"]["group_0"]["weights"] if "config_groups" in found else found).update(changes)

    return change


def beyond(name: str) -> Change:
    return lambda tensors: tensors[name].fill_(100)


def swapped(one: str, other: str) -> Change:
    """Every part of a linear under the other's name."""

    def change(tensors: dict) -> None:
        for name in [name for name in tensors if name.startswith(f"{one}.")]:
            twin = name.replace(one, other)
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    return change


# format, what is done to its tensors, what to its config.json, and the line that says so
DAMAGES = [
    ("awq", cut(f"{DOWN}.qzeros", rows=2), None, f"{DOWN}.qzeros is I32 [2, 8], where I32 or U32 [3, 8] belongs"),
    ("awq", cut(f"{DOWN}.scales", columns=32), None, f"{DOWN}.scales is F16 [3, 32], where .* [3, 64] belongs"),
    ("awq", cut(f"{DOWN}.qweight", rows=48), None, f"{DOWN}.qweight is I32 [48, 8], where .* [96, 8] belongs"),
    ("awq", None, settings(group_size=64), " is .*, where .* belongs"),
    ("awq", None, lambda config: config.update(quantization_config="awq"), "quantization_config is no table"),
    ("awq", None, settings(group_size=None), "the settings say group_size = None, which is none of -1, 16,"),
    ("awq", without(f"{UP}.scales"), None, f"{UP}.scales is missing"),
    ("awq", without(f"{UP}.qweight"), None, f"{UP}.qweight is missing"),
    ("gptq", cut(f"{DOWN}.qzeros", rows=2), None, f"{DOWN}.qzeros is I32 [2, 8], where .* [3, 8] belongs"),
    ("gptq", cut(f"{DOWN}.scales", columns=32), None, f"{DOWN}.scales is F16 [3, 32], where .* [3, 64] belongs"),
    ("gptq", cut(f"{DOWN}.qweight", rows=6), None, f"{DOWN}.qweight is I32 [6, 64], where .* [12, 64] belongs"),
    ("gptq", beyond(f"{DOWN}.g_idx"), None, f"{DOWN} puts input channels into groups beyond its 3"),
    ("gptq", None, settings(group_size=64), " is .*, where .* belongs"),
    ("gptq", None, settings(bits=8), " is .*, where .* belongs"),
    ("gptq", None, settings(bits="4"), "the settings say bits = '4', which is none of 2, 3, 4, 8"),
    ("gptq", without(f"{UP}.qweight"), None, f"{UP}.qweight is missing"),
    (
        "compressed-tensors",
        cut(f"{DOWN}.weight_zero_point", rows=4),
        None,
        f"{DOWN}.weight_zero_point is I32 [4, 3], where .* [8, 3] belongs",
    ),
    (
        "compressed-tensors",
        cut(f"{DOWN}.weight_scale", columns=2),
        None,
        f"{DOWN}.weight_scale is BF16 [64, 2], where .* [64, 3] belongs",
    ),
    (
        "compressed-tensors",
        cut(f"{DOWN}.weight_packed", columns=6),
        None,
        f"{DOWN}.weight_packed is I32 [64, 6], where .* [64, 12] belongs",
    ),
    ("compressed-tensors", beyond(f"{DOWN}.weight_shape"), None, f"{DOWN}.weight_shape says [100, 100], which are not"),
    ("compressed-tensors", None, settings(group_size=64), " is .*, where .* belongs"),
    ("compressed-tensors", None, settings(num_bits=8), " is .*, where .* belongs"),
    ("compressed-tensors", without(f"{UP}.weight_packed"), None, f"{UP}.weight_packed is missing"),
    ("mlx", without(f"{UP}.weight"), None, f"{UP}.weight is missing"),
    ("mlx", without(f"{UP}.biases"), None, f"{UP}.biases is missing"),
    ("mlx", without(f"{UP}.scales"), None, f"{UP}.scales is missing"),
    ("mlx", without(f"{UP}.scales", f"{UP}.biases"), None, f"{UP}.scales is missing"),
    ("mlx", cut(f"{UP}.weight", columns=4), None, f"{UP}.weight is U32 [96, 4], where U32 [96, 8] belongs"),
    ("mlx", None, settings(group_size=None), "the settings say group_size = None, which is none of 32, 64, 128"),
    ("mlx", None, settings(group_size=64), " is .*, where .* belongs"),
    ("mlx", None, settings(mode="mxfp4"), "the mode is 'mxfp4'"),
    ("hqq", beyond(f"{DOWN}.shape"), None, f"{DOWN}.shape says [100, 100], where [64, 96] belongs"),
    ("hqq", cut(f"{DOWN}.W_q", rows=4), None, f"{DOWN}: W_q is [4, 32], where [96, 32] belongs"),
    ("hqq", without(f"{DOWN}.W_q"), None, f"{DOWN}.W_q is missing"),
    ("exl2", without(f"{UP}.q_invperm"), None, f"{UP}.q_invperm is missing"),
    ("exl2", cut(f"{UP}.q_weight", columns=64), None, f"{UP}.q_weight is I32 [.*, 64], where I32 [.*, 96] belongs"),
    ("exl2", cut(f"{DOWN}.q_scale", columns=4), None, f"{DOWN}.q_scale is I32 [.*, 4], where I32 [.*, 8] belongs"),
    ("exl2", beyond(f"{DOWN}.q_groups"), None, f"{DOWN} is damaged: its groups have the widths [100, 100"),
    ("exl2", swapped(UP, DOWN), None, "q_weight is I32 [.*], where I32 [.*] belongs"),
    *(
        (name, change, None, message)
        for name in QUANTIZE
        for change, message in (
            (without(NORM), f"{NORM} is missing (1 of the model's 21 tensors are)"),
            (without("model.norm.weight"), "model.norm.weight is missing"),
        )
    ),
    *(
        (name, without("model.embed_tokens.weight"), None, "model.embed_tokens.weight is missing")
        for name in QUANTIZE
        if name != "mlx"
    ),
    *((name, cut("model.embed_tokens.weight", rows=9), None, "[9, 64], where") for name in ("gptq", "hqq", "exl2")),
    *(
        (name, None, lambda config: config.pop("hidden_size"), "hidden_size = None, which is no")
        for name in ("gptq", "mlx")
    ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    # as many rows as every format's packing takes
    return make_tiny(tmp_path_factory.mktemp("source") / "m", "mistral", vocab_size=384)


@pytest.fixture(scope="module")
def artifacts(source, tmp_path_factory) -> Callable[[str], Path]:
    """Each format's artifact, built when it is first asked for, without a record so that no hash speaks first."""
    folder = tmp_path_factory.mktemp("artifacts")
    text = make_text(folder / "text.jsonl")

    def artifact(name: str) -> Path:
        if not (folder / name).exists():
            calibration = {"texts": {str(text): 4}, "window_tokens": 16}
            recipe = {"format": name, "model": {"id": str(source)}, "quantize": QUANTIZE[name]}
            out = build(
                Recipe.of(recipe | {"calibration": calibration}),
                out=folder / name,
                device=torch.device("cpu"),
                validated=False,
            ).out
            (out / "quantkit.json").unlink()
        return folder / name

    return artifact


def damaged(folder: Path, tensors: Change | None, config: Change | None) -> Path:
    """The folder with what is in its files changed; returns it."""
    weights, stated = next(folder.rglob("*.safetensors")), next(folder.rglob("config.json"))
    if tensors is not None:
        found = load_file(weights)
        tensors(found)
        save_file(found, weights)
        index = weights.with_name(f"{weights.name}.index.json")
        if index.exists():
            content = json.loads(index.read_text())
            content["weight_map"] = dict.fromkeys(found, weights.name)
            index.write_text(json.dumps(content))
    if config is not None:
        content = json.loads(stated.read_text())
        config(content)
        stated.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "tensors", "config", "message"), DAMAGES, ids=[f"{each[0]}: {each[3]}" for each in DAMAGES]
)
def test_what_does_not_fit_is_refused_in_one_line(name, tensors, config, message, artifacts, source, tmp_path):
    from typer.testing import CliRunner

    folder = damaged(Path(shutil.copytree(artifacts(name), tmp_path / "copy")), tensors, config)
    text = tmp_path / "no.txt"
    text.write_text("")
    done = CliRunner().invoke(app, ["validate", str(folder), "--model", str(source), "--text", str(text)])
    # the text, which is none, is never read, but where only decoding tells
    if not matches(message, done.exception):
        from quantkit.formats import open_variants

        for artifact in open_variants(name, folder).values():
            with pytest.raises(QuantkitError) as caught:
                artifact.read("layers.0")
            done.exception = caught.value
    assert matches(message, done.exception), done.exception
    assert done.exception.exit_code == 2


def matches(message: str, error: BaseException | None) -> bool:
    if not isinstance(error, QuantkitError):
        return False
    place = 0
    for part in message.split(".*"):
        place = error.what.find(part, place)
        if place < 0:
            return False
    return True


def test_every_format_is_damaged():
    # GGUF has damages of its own in test_gguf; what is missing is the same for all, shapes are each format's own
    assert {each[0] for each in DAMAGES if "missing" not in each[3]} == READERS.keys() - {"gguf"}
