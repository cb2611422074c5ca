"""One artifact made by two processes: the bytes of one, and an end of both where one ends."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from quantkit.calibration.statistics import BLOCK
from quantkit.errors import RefusedError
from quantkit.job import Job
from quantkit.launch import start
from quantkit.pipeline import build, build_all
from quantkit.ranks import Ranks, owners
from quantkit.recipe import Recipe
from quantkit.report.record import read_record
from quantkit.workdir import work_folder
from tests.commands import COMMAND, ROOT, quantkit
from tests.test_build_all import FURTHER
from tests.test_formats import CASES, hashes
from tests.tiny import make_text, make_tiny

CPU = torch.device("cpu")
PATIENCE_S = 240
COMMON = "gptq"
# builds, one after another, whatever recipes and folders it is given
BUILDS = """
import json, sys
from pathlib import Path

import torch

from quantkit.job import Job
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
# what Python runs first in every process: rank 1 is to come to grief in front of a layer
FAILS = """
import os

if os.environ.get("RANK") == "1":
    from quantkit import stream
    from quantkit.errors import UnavailableError

    plain = stream._Stream._layer

    def layer(self, name, source):
        if name == "layers.1":
            if os.environ["GRIEF"] == "kill":
                os.kill(os.getpid(), 9)
            raise UnavailableError("a layer that only rank 1 stumbles over", where=name)
        return plain(self, name, source)

    stream._Stream._layer = layer
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("source")
    text = make_text(folder / "text.jsonl")
    # sums of several blocks, the last of them a short one
    return make_tiny(folder / "m", "qwen2", vocab_size=416, intermediate_size=2 * BLOCK + 96), text


def recipe_of(name: str, source: tuple[Path, Path]) -> dict[str, object]:
    model, text = source
    form, quantize = (CASES | FURTHER)[name]
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


@pytest.mark.slow
def test_two_ranks_make_the_bytes_of_one_in_every_format(source, tmp_path):
    require_equal_bytes(sorted(CASES | FURTHER), source, tmp_path)


def building(source, folder: Path) -> list[str]:
    """Arguments of a build into `out` beside the recipe."""
    recipe, out = str(written(source, folder)), str(folder / "out")
    return ["build", recipe, "--out", out, "--device", "cpu", "--no-validate", "--json"]


def test_two_ranks_make_the_bytes_of_one(source, tmp_path):
    done = quantkit(*building(source, tmp_path), "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["environment"]["ranks"] == 2
    one = build(Recipe.of(recipe_of(COMMON, source)), out=tmp_path / "one", device=CPU, validated=False)
    assert hashes(tmp_path / "out") == hashes(one.out)
    assert json.loads(done.stdout)["fingerprint"] == one.record["fingerprint"]


def test_ranks_exit_as_one_process_would_and_one_of_them_says_why(source, tmp_path):
    done = quantkit(*building(source, tmp_path), "--ranks", "2", "--set", "calibration.window_tokens=100000")
    assert done.returncode == 2
    assert (done.stderr.count("error: "), done.stderr.count("error on rank")) in ((1, 0), (0, 1)), done.stderr
    assert "100000 tokens per window are more than the model's" in done.stderr
    assert done.stdout == ""


def test_a_number_of_ranks_that_torchrun_did_not_start_is_refused(source, tmp_path):
    done = quantkit(*building(source, tmp_path), "--ranks", "3", TORCHELASTIC_RUN_ID="none", WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2
    assert "error: --ranks 3, and torchrun has started 2" in done.stderr


# what a rank does, by its number
ACTS = """
import os, sys, time
from quantkit.launch import end_with_launcher
end_with_launcher()
sys.path[:] = []
acts = sys.argv[1:]
exec(acts[int(os.environ["RANK"])])
"""


def acting(*acts: str) -> list[str]:
    return [sys.executable, "-c", ACTS, *acts]


def test_the_exit_code_of_each_rank_is_known(monkeypatch):
    monkeypatch.setattr("quantkit.launch.GRACE_S", 0.5)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert start(2, acting("pass", "time.sleep(1)")) == {0: 0, 1: 0}
    # those that go on when one has failed are stopped, and have no code
    assert start(2, acting("time.sleep(600)", "sys.exit(4)")) == {1: 4}
    assert start(3, acting("time.sleep(600)", "os.kill(os.getpid(), 9)", "pass"))[1] == -9


# starts two ranks that say who they are and then do nothing
IDLE = """
import json, sys
from quantkit.launch import start
start(2, json.loads(sys.argv[1]))
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_who_started_it(by):
    # each in one write: print() makes two where PYTHONUNBUFFERED is set, and two ranks' would mix
    idle = acting(*["os.write(1, b'%d\\n' % os.getpid()); time.sleep(600)"] * 2)
    launcher = subprocess.Popen(
        [sys.executable, "-c", IDLE, json.dumps(idle)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    ranks: list[psutil.Process] = []
    try:
        ranks += [psutil.Process(int(launcher.stdout.readline())) for _ in range(2)]
        assert all(rank.is_running() for rank in ranks)
        launcher.send_signal(by)
        assert launcher.wait() == -by
        assert psutil.wait_procs(ranks, timeout=20)[1] == []
    finally:
        launcher.kill()
        launcher.wait()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
        launcher.stdout.close()


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
@pytest.mark.parametrize("own", [True, False], ids=["--ranks", "torchrun"])
@pytest.mark.parametrize(("grief", "code", "resumed"), [("raise", 4, 1), ("kill", -9, 2)])
def test_both_end_where_one_does_and_the_same_command_goes_on(source, tmp_path, own, grief, code, resumed):
    command, out = building(source, tmp_path), tmp_path / "out"
    early = tmp_path / "early"
    early.mkdir()
    (early / "sitecustomize.py").write_text(FAILS)
    variables = {"PYTHONPATH": os.pathsep.join((str(early), str(ROOT))), "GRIEF": grief}
    if own:
        done = quantkit(*command, "--ranks", "2", **variables)
        found, stdout, stderr = done.returncode, done.stdout, done.stderr
    else:
        found, stdout, stderr = on_two(tmp_path, COMMAND, *command, **variables)
    # torchrun has one code for all that can go wrong
    assert found == (code if own else 1), stderr
    assert not stdout
    assert not out.exists()
    told = "error on rank 1: a layer that only rank 1" if grief == "raise" else "another process of the build has ended"
    assert stderr.count(told) == 1, stderr
    killed = stderr.count("error: rank 1 of 2 was killed by SIGKILL")
    assert killed == (own and grief == "kill")
    assert stderr.count("error: ") + stderr.count("error on rank") == 1 + killed
    items = json.loads((work_folder(out) / "journal.json").read_text())["items"]
    assert "embedding" in items
    assert "layers.1" not in items
    stdout = quantkit(*command, "--ranks", str(resumed)).stdout
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
