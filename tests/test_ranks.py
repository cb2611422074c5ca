"""One artifact made by two processes: the bytes of one, and an end of both where one ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.artifact import Job
from quantkit.calibration.statistics import BLOCK
from quantkit.errors import RefusedError
from quantkit.pipeline import build, build_all
from quantkit.ranks import Ranks, owners
from quantkit.recipe import Recipe
from quantkit.report.record import read_record
from quantkit.workdir import work_folder
from tests.commands import ROOT, quantkit
from tests.test_build_all import FLOAT
from tests.test_formats import CASES, hashes
from tests.tiny import WORDS, make_tiny

CPU = torch.device("cpu")
PATIENCE_S = 240
COMMON = ("gptq", "gguf-float")
# builds, one after another, whatever recipes and folders it is given
BUILDS = """
import json, sys
from pathlib import Path

import torch

from quantkit.artifact import Job
from quantkit.pipeline import build_all
from quantkit.ranks import joined
from quantkit.recipe import Recipe

with joined(torch.device("cpu")) as ranks:
    for recipe, out in json.loads(sys.argv[1]):
        job = Job("job", Recipe.of(recipe), Path(out))
        (outcome,) = build_all([job], device=torch.device("cpu"), validated=False, ranks=ranks)
        if outcome.error is not None:
            raise outcome.error
"""
# the command, in which rank 1 comes to grief in front of a layer
FAILS = """
import os, sys
from quantkit import stream
from quantkit.errors import RunFailedError

plain = stream._solve_item

def solve_item(checkpoint, name, *rest):
    if name == "layers.1" and os.environ["RANK"] == "1":
        if os.environ["GRIEF"] == "kill":
            os.kill(os.getpid(), 9)
        raise RunFailedError("a layer that only rank 1 stumbles over", where=name)
    return plain(checkpoint, name, *rest)

if "GRIEF" in os.environ:
    stream._solve_item = solve_item
from quantkit.cli import main
main()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("source")
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{number}. {WORDS * 3}"}) for number in range(12)))
    # sums of several blocks, the last of them a short one
    return make_tiny(folder / "m", "qwen2", vocab_size=416, intermediate_size=2 * BLOCK + 96), text


def recipe_of(name: str, source: tuple[Path, Path]) -> dict[str, object]:
    model, text = source
    form, quantize = (CASES | FLOAT)[name]
    return {
        "format": form,
        "model": {"id": str(model)},
        "quantize": quantize,
        "calibration": {
            "texts": {str(text): 9},
            "window_tokens": 16,
            "activations": "float" if name.endswith("-float") else "quantized",
        },
        # five batches: the ranks do not have as many, and sums in another order show
        "compute": {"windows_per_batch": 2},
        "validation": {"texts": [str(text)], "window_tokens": 32, "generated_tokens": 0},
    }


def started(folder: Path, program: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """A program as two ranks."""
    script = folder / "program.py"
    script.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=surroundings
    )


def on_two(folder: Path, program: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    process = started(folder, program, *arguments, **variables)
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def require_equal_bytes(names, source, folder: Path) -> None:
    recipes = {name: recipe_of(name, source) for name in names}
    code, _, stderr = on_two(
        folder, BUILDS, json.dumps([(recipe, str(folder / "two" / name)) for name, recipe in recipes.items()])
    )
    assert code == 0, stderr
    for name, recipe in recipes.items():
        one = build(Recipe.of(recipe), out=folder / "one" / name, device=CPU, validated=False)
        assert hashes(folder / "two" / name) == hashes(one.out), name
        record = read_record(folder / "two" / name)
        assert (record["environment"]["ranks"], one.record["environment"]["ranks"]) == (2, 1)
        assert record["fingerprint"] == one.record["fingerprint"]


def test_two_ranks_make_the_bytes_of_one(source, tmp_path):
    require_equal_bytes(COMMON, source, tmp_path)


@pytest.mark.slow
def test_two_ranks_make_the_bytes_of_one_in_every_format(source, tmp_path):
    require_equal_bytes(sorted((CASES | FLOAT).keys() - set(COMMON)), source, tmp_path)


def written(source, folder: Path) -> Path:
    """The recipe as a file."""
    path = folder / "recipe.toml"
    recipe = recipe_of("gptq", source)
    lines = [f'format = "{recipe.pop("format")}"']
    for table, keys in recipe.items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {toml(value)}" for key, value in keys.items()]
    path.write_text("\n".join(lines))
    return path


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{key}" = {toml(each)}' for key, each in value.items()) + " }"
    return json.dumps(value)


@pytest.mark.slow
@pytest.mark.parametrize(("grief", "resumed"), [("raise", 1), ("kill", 2)])
def test_both_end_where_one_does_and_the_same_command_goes_on(source, tmp_path, grief, resumed):
    path, out = written(source, tmp_path), tmp_path / "out"
    command = ("build", str(path), "--out", str(out), "--device", "cpu", "--no-validate", "--json")
    code, stdout, stderr = on_two(tmp_path, FAILS, *command, GRIEF=grief)
    assert code != 0
    assert not stdout
    assert not out.exists()
    told = "error on rank 1: a layer that only rank 1" if grief == "raise" else "another process of the build has ended"
    assert stderr.count("error: ") + stderr.count("error on rank") == stderr.count(told) == 1
    items = json.loads((work_folder(out) / "journal.json").read_text())["items"]
    assert "embedding" in items
    assert "layers.1" not in items
    if resumed == 2:
        code, stdout, stderr = on_two(tmp_path, FAILS, *command)
        assert code == 0, stderr
    else:
        stdout = quantkit(*command).stdout
    assert json.loads(stdout)["environment"]["ranks"] == resumed
    one = build(Recipe.of(recipe_of("gptq", source)), out=tmp_path / "one", device=CPU, validated=False)
    assert hashes(out) == hashes(one.out)


def test_work_is_dealt_by_its_size():
    assert owners([3.0, 1.0, 1.0, 1.0], 2) == [0, 1, 1, 1]
    assert owners([], 2) == []
    assert owners([1.0, 5.0], 1) == [0, 0]


def test_batches_are_dealt_in_turn():
    assert [list(Ranks(rank, 3).dealt(range(7))) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_what_ranks_cannot_make_together_is_refused_at_once(source, tmp_path):
    two = Ranks(0, 2)
    recipe = Recipe.of(recipe_of("gptq", source))
    with pytest.raises(RefusedError, match="one artifact together, not 2"):
        build_all([Job("a", recipe, tmp_path / "a"), Job("b", recipe, tmp_path / "b")], device=CPU, ranks=two)
    engine = recipe.model_copy(update={"engine": "auto-gptq"})
    with pytest.raises(RefusedError, match="auto-gptq is one process"):
        build_all([Job("a", engine, tmp_path / "a")], device=CPU, ranks=two)
    assert not list(tmp_path.iterdir())


def test_a_command_that_several_processes_cannot_share_is_refused():
    done = quantkit("recipes", TORCHELASTIC_RUN_ID="none", WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-3:] == [
        "error: recipes is the work of one process, and torchrun has started 2",
        "  at:  torchrun",
        "  fix: start quantkit recipes without torchrun; only build is divided",
    ]
