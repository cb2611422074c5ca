"""What a plan says of a model that is only described, and what methods state of their memory."""

import shutil
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.index import describe_model
from quantkit.errors import RefusedError
from quantkit.methods import METHODS
from quantkit.pipeline import build, plan
from quantkit.plan import make_plan
from quantkit.progress import Progress
from quantkit.recipe import Recipe, find_recipe, load_recipe
from tests.tiny import make_tiny

CPU = torch.device("cpu")
HERE = ("seconds", "disk_free_bytes", "memory_free_bytes")
SHAPES = Path(__file__).parent.parent / "bench" / "shapes"


def recipe_of(model: Path, form: str, **tables) -> Recipe:
    texts = {"texts": {"polish-core": 4}, "window_tokens": 64}
    base = {"calibration": texts, "validation": {"window_tokens": 64}}
    return Recipe.of({"format": form, "model": {"id": str(model)}} | base | tables)


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch):
    """The rate of this machine is of no interest here."""
    monkeypatch.setattr("quantkit.plan._rate", lambda dtype, device: 1e12)


@pytest.mark.parametrize(("family", "form"), [("mistral", "gptq"), ("mistral", "mlx"), ("qwen3", "exl2")])
def test_a_config_alone_is_planned_as_the_model_would_be(family, form, tmp_path):
    model = make_tiny(tmp_path / "model", family, hidden_size=128, intermediate_size=256)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    known, described = (
        plan(recipe_of(folder, form), out=tmp_path / "out", device=CPU, progress=Progress()).facts()
        for folder in (model, bare)
    )
    assert {key: value for key, value in known.items() if key not in HERE} == {
        key: value for key, value in described.items() if key not in HERE
    }


def test_what_is_only_described_is_not_built(tmp_path):
    shutil.copy(SHAPES / "mistral-7b" / "config.json", tmp_path)
    with pytest.raises(RefusedError, match=r"neither model\.safetensors nor"):
        build(recipe_of(tmp_path, "gptq"), out=tmp_path / "out", device=CPU)


def test_what_is_only_described_is_planned_whatever_this_machine_holds(tmp_path, monkeypatch):
    model = make_tiny(tmp_path / "model", "mistral", hidden_size=128, intermediate_size=256)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    monkeypatch.setattr("quantkit.plan.free_bytes", lambda device: 0)
    assert plan(recipe_of(bare, "hqq"), out=tmp_path / "out", device=CPU, progress=Progress()).memory_free_bytes == 0
    with pytest.raises(RefusedError, match="of memory on cpu"):
        plan(recipe_of(model, "hqq"), out=tmp_path / "out", device=CPU, progress=Progress())


@pytest.mark.parametrize("shape", sorted(each.name for each in SHAPES.iterdir()))
def test_operations_of_the_shipped_shapes(shape, tmp_path):
    recipe, checkpoint = load_recipe(find_recipe("bielik-7b-instruct-v0.1/gptq")), describe_model(SHAPES / shape)
    method = METHODS[recipe.format](recipe.quantize, checkpoint.config)
    found = make_plan(recipe, checkpoint, method, out=tmp_path, device=CPU)
    # 2 T per weight of the linears, and attention; a hundredth of the weights is in neither
    assert found.operations["forward"] == pytest.approx(2 * found.tokens * found.parameters, rel=0.08)


def test_trials_of_channel_scales_take_memory(tmp_path):
    """AWQ's peak is its stack of candidates: more of them, more memory, up to the most that go together.

    Of each, 16 bytes a weight while it is rounded, or as much again while it is walked, beside the 4 that it leaves.
    """
    model = make_tiny(tmp_path / "model", "mistral", hidden_size=256, intermediate_size=1024)
    taken = [
        plan(
            recipe_of(model, "awq", quantize={"scaling_steps": steps}),
            out=tmp_path / "out",
            device=CPU,
            progress=Progress(),
        ).memory_bytes
        for steps in (0, 1, 20)
    ]
    largest = 2 * 256 * 1024
    assert taken[0] < taken[1] < taken[2]
    assert (41 - 3) * largest * 4 < taken[2] - taken[1] < (41 - 3) * largest * 13
