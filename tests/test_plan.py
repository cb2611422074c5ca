"""What a plan says of a model that is only described, and what methods state of their memory."""

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tomlkit
import torch

from bench.models import make_model
from bench.processes import measured
from quantkit.checkpoint.index import describe_model
from quantkit.errors import RefusedError
from quantkit.methods import METHODS
from quantkit.pipeline import build, plan
from quantkit.plan import make_plan, plan_lines
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from quantkit.recipe_files import find_recipe, list_recipes, load_recipe
from tests.commands import ROOT
from tests.test_pipeline import hashes
from tests.tiny import make_tiny

CPU = torch.device("cpu")
HERE = ("seconds", "disk_free_bytes", "memory_free_bytes", "host_free_bytes")
SHAPES = Path(__file__).parent.parent / "bench" / "shapes"


def recipe_of(model: Path, form: str, **tables) -> Recipe:
    texts = {"texts": {"polish-core": 4}, "window_tokens": 64}
    base = {"calibration": texts, "validation": {"window_tokens": 64}}
    return Recipe.of({"format": form, "model": {"id": str(model)}} | base | tables)


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch):
    """The rate of this machine is of no interest here."""
    monkeypatch.setattr("quantkit.estimate._rate", lambda dtype, device: 1e12)


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
    # what text comes to is known by the tokenizer, which is not there
    assert described.pop("judging_bytes") < known.pop("judging_bytes")
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


def planned(shape: str, name: str, ranks: int = 1, device: torch.device = CPU, **changes: str):
    changed = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    recipe = load_recipe(find_recipe(f"bielik-7b-instruct-v0.1/{name}"), tuple(changed))
    checkpoint = describe_model(SHAPES / shape)
    method = METHODS[recipe.format](recipe.quantize, checkpoint.config)
    return make_plan(recipe, checkpoint, method, out=SHAPES, device=device, ranks=ranks, timed=device == CPU)


@pytest.mark.parametrize("name", [name for name in list_recipes() if not name.startswith("bielik-nano/")])
def test_every_shipped_recipe_can_be_planned(name, tmp_path):
    """Of the shape of a 7B; one that extends another has gates for variants that it does not make."""
    recipe, checkpoint = load_recipe(find_recipe(name)), describe_model(SHAPES / "mistral-7b")
    method = METHODS[recipe.format](recipe.quantize, checkpoint.config)
    assert make_plan(recipe, checkpoint, method, out=tmp_path, device=CPU).artifact_bytes > 0


@pytest.mark.parametrize(("name", "known", "strange"), [("gguf", "IQ2_XXS", "Q9_K"), ("exl2", "2.25bpw", "tiny")])
def test_gates_of_what_the_format_knows_may_be_left_over(name, known, strange):
    """From a recipe that was extended, or types that --set took out; of other names nobody knows what was meant."""
    gates = "{{ {} = {{ mean_kld = 1.0 }} }}"
    assert planned("mistral-7b", name, validation__variant_gates=gates.format(f'"{known}"')).linears
    with pytest.raises(RefusedError, match=f"makes no variant '{strange}'"):
        planned("mistral-7b", name, validation__variant_gates=gates.format(strange))


def test_ranks_divide_the_activations_and_the_time_and_nothing_else(monkeypatch):
    one, two, four = (planned("mistral-7b", "gptq", ranks) for ranks in (1, 2, 4))
    recipe = load_recipe(find_recipe("bielik-7b-instruct-v0.1/gptq"))
    # in front of the layer and in its widest stage, in bfloat16; a batch of another's is in hand
    activations = one.tokens * (4096 + 14336) * 2
    travelling = recipe.compute.windows_per_batch * recipe.calibration.window_tokens * 14336 * 2
    assert one.rank_bytes - two.rank_bytes == activations // 2 - travelling
    assert two.rank_bytes - four.rank_bytes == activations // 4
    assert one.operations == four.operations
    # on a CPU they share the memory
    assert (one.memory_bytes, four.memory_bytes) == (one.rank_bytes, 4 * four.rank_bytes)
    monkeypatch.setattr("quantkit.plan.free_bytes", lambda device: 0)
    assert planned("mistral-7b", "gptq", 4, torch.device("cuda")).memory_bytes == four.rank_bytes


def test_time_with_ranks_is_that_of_who_has_most_to_do(monkeypatch):
    monkeypatch.setattr("quantkit.estimate.os.cpu_count", lambda: 64)
    one, two, eight = (planned("mistral-7b", "gptq", ranks, compute__threads="8") for ranks in (1, 2, 8))
    assert one.seconds / 2 < two.seconds < one.seconds / 2 * 1.05
    # down_proj is solved by one, whoever waits
    assert one.seconds / 8 * 1.1 < eight.seconds < one.seconds / 4
    monkeypatch.setattr("quantkit.estimate.os.cpu_count", lambda: 16)
    assert planned("mistral-7b", "gptq", 8, compute__threads="8").seconds == pytest.approx(4 * eight.seconds)


def test_a_70b_that_one_small_card_cannot_hold_fits_four(monkeypatch):
    monkeypatch.setattr("quantkit.plan.free_bytes", lambda device: 40 * 10**9)
    cuda = torch.device("cuda")
    one, four = (planned("llama-3-70b", "gptq", ranks, cuda) for ranks in (1, 4))
    assert one.memory_bytes > one.memory_free_bytes > four.memory_bytes


def test_a_search_on_some_windows_is_handed_a_batch_at_a_time():
    gptq, awq = ([planned("mistral-7b", name, ranks).rank_bytes for ranks in (1, 8)] for name in ("gptq", "awq"))
    assert awq == pytest.approx(gptq, rel=1e-3)


def free(monkeypatch, *, gpu_gb: int, host_gb: int) -> None:
    monkeypatch.setattr(
        "quantkit.plan.free_bytes", lambda device: (gpu_gb if device.type == "cuda" else host_gb) * 10**9
    )


def test_activations_that_do_not_fit_the_gpu_wait_in_the_hosts_memory(monkeypatch):
    cuda = torch.device("cuda")
    free(monkeypatch, gpu_gb=40, host_gb=128)
    found = planned("llama-3-70b", "gptq", device=cuda)
    assert found.spills
    assert found.reserve_bytes < 40e9 < found.memory_bytes
    # in front of the layer and in its widest stage, but for two batches
    recipe = load_recipe(find_recipe("bielik-7b-instruct-v0.1/gptq"))
    at_work = 2 * recipe.compute.windows_per_batch * recipe.calibration.window_tokens
    assert found.waiting_bytes == (found.tokens - at_work) * (8192 + 28672) * 2
    assert "GB of activations wait in the host's" in "\n".join(plan_lines(found))
    free(monkeypatch, gpu_gb=80, host_gb=128)
    assert not planned("llama-3-70b", "gptq", device=cuda).spills
    free(monkeypatch, gpu_gb=40, host_gb=10)
    assert not planned("llama-3-70b", "gptq", device=cuda).fits
    # page-locked blocks may be rounded up to twice their size
    assert not replace(found, host_free_bytes=2 * found.waiting_bytes - 1).fits
    assert replace(found, host_free_bytes=2 * found.waiting_bytes).fits
    free(monkeypatch, gpu_gb=8, host_gb=128)
    short = planned("llama-3-70b", "gptq", device=cuda)
    assert not short.fits
    assert planned("llama-3-70b", "gptq").reserve_bytes == 0


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_build_whose_activations_wait_elsewhere_gives_the_same_bytes(name, tmp_path, monkeypatch):
    model = make_tiny(tmp_path / "model", "mistral", hidden_size=128, intermediate_size=256)
    recipe, spilled = recipe_of(model, name, compute={"windows_per_batch": 1}), []
    build(recipe, out=tmp_path / "there", device=CPU, validated=False)

    def free_bytes(device: torch.device) -> int:
        spilled.append(device)
        return 0

    monkeypatch.setattr("quantkit.plan.has_own_memory", lambda device: True)
    monkeypatch.setattr("quantkit.checkpoint.spill.free_bytes", free_bytes)
    build(recipe, out=tmp_path / "elsewhere", device=CPU, validated=False)
    assert spilled
    assert hashes(tmp_path / "there") == hashes(tmp_path / "elsewhere")


def test_ranks_for_which_memory_does_not_suffice_are_refused(tmp_path, monkeypatch):
    model = make_tiny(tmp_path / "model", "mistral", hidden_size=128, intermediate_size=256)

    def run(ranks: int):
        recipe = recipe_of(model, "gptq", validation={"texts": {"polish-core": 1}, "window_tokens": 64})
        return plan(recipe, out=tmp_path / "out", device=CPU, progress=Progress(), ranks=ranks)

    needed = run(1).memory_bytes
    monkeypatch.setattr("quantkit.plan.free_bytes", lambda device: needed)
    with pytest.raises(RefusedError, match="for each of 2 ranks") as caught:
        run(2)
    assert "fewer ranks" in caught.value.fix
    assert run(1).memory_free_bytes == needed


def test_what_memory_does_not_suffice_to_judge_is_refused_before_the_work(tmp_path, monkeypatch):
    model, out = make_tiny(tmp_path / "model", "mistral", vocab_size=65536), tmp_path / "out"
    recipe = recipe_of(model, "hqq", quantize={"group_size": 32})
    found = plan(recipe, out=out, device=CPU, progress=Progress())
    assert found.judging_bytes > found.memory_bytes
    monkeypatch.setattr("quantkit.plan.free_bytes", lambda device: found.judging_bytes - 1)
    with pytest.raises(RefusedError, match="judging the artifact needs") as caught:
        build(recipe, out=out, device=CPU)
    assert "--no-validate" in caught.value.fix
    assert not out.exists()
    assert build(recipe, out=out, device=CPU, validated=False).record["validation"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("vocabulary", "windows"), [(384, 4), (131072, 4), (8192, "all")])
def test_judging_takes_no_more_than_was_planned(vocabulary, windows, tmp_path):
    """A small layer under a large vocabulary, where heads and logits are what takes memory.

    The last is of many chunks of 8 MB, between which glibc puts small pieces: made anew for each, they took 3.6 GB.
    """
    model, text = tmp_path / "model", ROOT / "calibration" / "validation.jsonl"
    model.mkdir()
    make_model(model, layers=1, hidden=256, feed_forward=512, vocabulary=vocabulary)
    content = {
        "format": "hqq",
        "model": {"id": str(model)},
        "validation": {"texts": {str(text): windows}},
        "compute": {"threads": 2},
    }
    peak, needed = peak_and_plan(content, tmp_path, judged=True)
    assert 0.7 * needed < peak < needed


def peak_and_plan(content: dict, folder: Path, ranks: int = 1, *, judged: bool = False) -> tuple[float, int]:
    """Bytes that a build's process takes at most, and what its plan says of each rank, or of judging."""
    (folder / "recipe.toml").write_text(tomlkit.dumps(content))
    command = ["build", str(folder / "recipe.toml"), "--out", str(folder / "out"), "--device", "cpu"]
    given = [sys.executable, "-m", "quantkit", *command, "--ranks", str(ranks)]
    given += [] if judged else ["--no-validate"]
    peak_gb = measured(given, os.environ | {"PYTHONPATH": str(ROOT)})["peak_gb"]
    found = plan(Recipe.of(content), out=folder / "other", device=CPU, progress=Progress(), ranks=ranks)
    return peak_gb * 1e9, found.judging_bytes if judged else found.rank_bytes


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["gptq", "round-to-nearest"])
def test_a_search_for_channel_scales_takes_no_more_than_was_planned(solver, tmp_path):
    model, text = tmp_path / "model", ROOT / "calibration" / "calibration.jsonl"
    model.mkdir()
    make_model(model, layers=1, hidden=2048, feed_forward=5632)
    content = {
        "format": "awq",
        "model": {"id": str(model)},
        "quantize": {"asymmetric": 0.0, "solver": solver},
        "calibration": {"texts": {str(text): 8}, "window_tokens": 256},
        "compute": {"threads": 2},
    }
    peak, needed = peak_and_plan(content, tmp_path)
    assert 0.75 * needed < peak < needed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "asymmetric", "batch"), [(1, 0, 8), (1, 0, 32), (2, 0, 8), (1, 0.5, 8), (1, 0.5, 32)]
)
def test_what_a_rank_takes_is_what_was_planned(ranks, asymmetric, batch, tmp_path):
    """Activations of large batches, which the C library gives back at once; one rank's plan would be 1.2 of two's."""
    model, text = tmp_path / "model", ROOT / "calibration" / "calibration.jsonl"
    model.mkdir()
    make_model(model, layers=1, hidden=256, feed_forward=1024)
    content = {
        "format": "gptq",
        "model": {"id": str(model)},
        "quantize": {"asymmetric": asymmetric},
        "calibration": {"texts": {str(text): 64}, "window_tokens": 1024},
        "compute": {"threads": 1, "windows_per_batch": batch},
    }
    peak, needed = peak_and_plan(content, tmp_path, ranks)
    assert 0.88 * needed < peak < needed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("calibration.texts={}", "no calibration windows are asked for"),
        ('calibration.texts={"polish-core"=0}', "no calibration windows are asked for"),
        ('calibration.texts={"KEYS"=1}', "the line is not a document"),
        ('calibration.texts={"BYTES"=1}', "not valid UTF-8 at byte"),
        ('calibration.texts={"EMPTY"=1}', "there is no text in it"),
        ('calibration.texts={"SHORT"=1}', "gives 0 windows of 16 tokens, not 1"),
        ('validation.require=["gptqmodle"]', "no engine named 'gptqmodle'"),
        ("validation.variant_gates={Q4={mean_kld=1.0}}", "the recipe makes no variant 'Q4'"),
        ('quantize.skip=["down_prj"]', "no linear's name ends in 'down_prj'"),
        ('quantize.skip=["_proj"]', "nothing is left to be quantized"),
    ],
)
def test_what_would_fail_later_is_refused_now(change, message, own_recipe, tmp_path):
    contents = {"KEYS": b'{"txt": "a"}', "BYTES": "zażółć".encode("cp1250"), "EMPTY": b"\n", "SHORT": b'{"text": "a"}'}
    for name, content in contents.items():
        path = tmp_path / f"{name.lower()}.jsonl"
        path.write_bytes(content)
        change = change.replace(name, str(path))
    with pytest.raises(RefusedError, match=re.escape(message)):
        plan(load_recipe(own_recipe, (change,)), out=tmp_path / "out", device=CPU, progress=Progress())


def test_a_folder_below_a_file_is_refused_now(own_recipe, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RefusedError, match="file is a file, not a folder"):
        plan(load_recipe(own_recipe), out=tmp_path / "file" / "out", device=CPU, progress=Progress())


def test_a_trial_takes_no_more_threads_than_there_are_cores(own_recipe, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("quantkit.plan._seconds", lambda *_: seen.append(torch.get_num_threads()))
    recipe = load_recipe(own_recipe, (f"compute.threads={os.cpu_count() + 5}",))
    plan(recipe, out=tmp_path / "out", device=CPU, progress=Progress())
    assert seen == [os.cpu_count()]
