"""Several recipes in one pass: the bytes of single builds, what is shared done once, and nobody lost with another."""

import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from quantkit import pipeline, source_pass
from quantkit.calibration.statistics import Statistics
from quantkit.checkpoint.families import FAMILIES
from quantkit.checkpoint.index import Checkpoint, TensorFolder
from quantkit.checkpoint.layer import DecoderLayer
from quantkit.errors import RefusedError, RunFailedError, UnavailableError
from quantkit.footprint import Footprint, in_passes, together_bytes
from quantkit.job import Job
from quantkit.lock import locked
from quantkit.pipeline import build, build_all, plan_all
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from quantkit.validation import reference
from quantkit.workdir import work_folder
from tests.commands import forked
from tests.test_formats import CASES, hashes
from tests.tiny import make_text, make_tiny

CPU = torch.device("cpu")
FURTHER = {
    "gguf-float": ("gguf", {"types": ["Q4_K_M", "Q6_K"], "solver": "gptq"}),
    "exl2-float": ("exl2", {"bits": [4.0, 5.0]}),
    "awq-float": ("awq", CASES["awq"][1] | {"asymmetric": 0.0}),
    "gptq-float": ("gptq", {"group_size": 32, "asymmetric": 0.0}),
    "compressed-tensors-float": ("compressed-tensors", {"group_size": 32, "asymmetric": 0.0}),
    "gptq-compared-whole": ("gptq", {"group_size": 32, "asymmetric_every": 1}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("source")
    text = make_text(folder / "text.jsonl")
    return make_tiny(folder / "m", "qwen2", vocab_size=416), text


def recipe_of(name: str, source: tuple[Path, Path], **calibration: object) -> Recipe:
    model, text = source
    form, quantize = (CASES | FURTHER)[name]
    activations = "float" if name.endswith("-float") else "quantized"
    return Recipe.of(
        {
            "format": form,
            "model": {"id": str(model)},
            "quantize": quantize,
            "calibration": {"texts": {str(text): 8}, "window_tokens": 16, "activations": activations} | calibration,
            "compute": {"windows_per_batch": 3},
            "validation": {"texts": [str(text)], "window_tokens": 32, "generated_tokens": 0},
        }
    )


def jobs_of(names, source, folder: Path) -> list[Job]:
    return [Job(name, recipe_of(name, source), folder / name) for name in names]


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """Hashes of single builds by name, made when they are first asked for."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def hashes_of(name: str) -> dict[str, str]:
        if name not in made:
            out = build(recipe_of(name, source), out=folder / name, device=CPU, validated=False).out
            made[name] = hashes(out)
        return made[name]

    return hashes_of


def errors_of(outcomes) -> dict[str, Exception]:
    return {outcome.name: outcome.error for outcome in outcomes if outcome.error}


def test_every_format_has_the_bytes_of_its_single_build(source, alone, tmp_path):
    names = [*CASES, *FURTHER]
    outcomes = build_all(jobs_of(names, source, tmp_path), device=CPU, validated=False)
    assert errors_of(outcomes) == {}
    assert [outcome.name for outcome in outcomes] == names
    assert [name for name in names if hashes(tmp_path / name) != alone(name)] == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == sorted(names)
    again = build_all(jobs_of(names, source, tmp_path), device=CPU, validated=False)
    assert all(outcome.build.reused for outcome in again)


def test_tensors_are_read_once_and_the_unquantized_model_is_run_once(source, tmp_path, monkeypatch):
    """Of those that compare with some windows in it, and of those that take all: once each, for all of them."""
    names = ["gptq", "hqq-gptq", "gguf-float", "gptq-float", "gptq-compared-whole", "hqq"]
    reads, walks, sums = Counter(), Counter(), Counter()
    plain_read, plain_walk, plain_add = TensorFolder.read, DecoderLayer.walk, Statistics.add

    def read(self, wanted):
        wanted = list(wanted)
        reads.update(wanted if self.folder == source[0] else ())
        return plain_read(self, wanted)

    def walk(self, *arguments):
        walks[self.index] += 1
        return plain_walk(self, *arguments)

    def add(self, inputs, exact_inputs=None):
        sums[self.needs] += 1
        plain_add(self, inputs, exact_inputs)

    monkeypatch.setattr(TensorFolder, "read", read)
    monkeypatch.setattr(DecoderLayer, "walk", walk)
    monkeypatch.setattr(Statistics, "add", add)
    assert errors_of(build_all(jobs_of(names, source, tmp_path), device=CPU, validated=False)) == {}
    assert {name: number for name, number in reads.items() if number != 1} == {}
    batches, layers, stages = 3, 2, len(FAMILIES["qwen2"].stages)
    # three quantized streams and two of the unquantized model
    assert dict(walks) == dict.fromkeys(range(layers), 5 * batches)
    # one set of sums for the two that live on the unquantized stream, and what the head reads for gguf
    assert sums == {
        frozenset({"hessian", "squares"}): layers * stages * batches + batches,
        frozenset({"hessian", "deviation"}): 3 * layers * stages * batches,
    }


def test_all_artifacts_are_judged_by_one_run_of_the_source(source, tmp_path, monkeypatch):
    """Its states are made once and kept, whatever the formats; each artifact is run for itself."""
    runs = Counter()
    plain = reference.final_states

    def final_states(source, *arguments, **options):
        runs["source" if isinstance(source, Checkpoint) else "artifacts"] += 1
        return plain(source, *arguments, **options)

    monkeypatch.setattr(reference, "final_states", final_states)
    names = ["gptq", "hqq", "mlx"]
    assert errors_of(build_all(jobs_of(names, source, tmp_path), device=CPU)) == {}
    assert runs == {"source": 1, "artifacts": len(names)}


def test_exl2_is_measured_beside_the_others_and_solved_after_them(source, tmp_path, monkeypatch):
    reads = Counter()
    plain_read = TensorFolder.read

    def read(self, wanted):
        wanted = list(wanted)
        reads.update(wanted if self.folder == source[0] else ())
        return plain_read(self, wanted)

    monkeypatch.setattr(TensorFolder, "read", read)
    assert (
        errors_of(build_all(jobs_of(["exl2-float", "gguf-float"], source, tmp_path), device=CPU, validated=False)) == {}
    )
    assert {reads[name] for name in reads if name.startswith("model.layers.")} == {2}


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from quantkit import workdir
from quantkit.job import Job
from quantkit.pipeline import build_all
from quantkit.recipe import Recipe

left, plain = int(sys.argv[2]), workdir.Workdir.finish

def finish(self, *arguments):
    global left
    plain(self, *arguments)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

workdir.Workdir.finish = finish
jobs = [Job(name, Recipe.of(content), Path(out)) for name, content, out in json.loads(sys.argv[1])]
build_all(jobs, device=torch.device("cpu"), validated=False)
"""


def test_a_killed_build_goes_on_and_ends_in_the_same_bytes(source, alone, tmp_path):
    names = ["gptq", "gguf-float", "awq-float"]
    jobs = jobs_of(names, source, tmp_path)
    given = [(job.name, job.recipe.model_dump(mode="json"), str(job.out)) for job in jobs]
    done = forked(KILLED, json.dumps(given), "5")
    assert done.returncode < 0
    assert all(work_folder(job.out).exists() for job in jobs)
    solved = []
    outcomes = build_all(jobs, device=CPU, validated=False, progress=Progress(linear=solved.append))
    assert errors_of(outcomes) == {}
    # each writes behind its own work, so that which five items were kept is not certain: layers are among them
    assert (
        0 < len({facts.name.partition(".self_attn")[0] for facts in solved if "q_proj" in facts.name}) < 2 * len(jobs)
    )
    assert [name for name in names if hashes(tmp_path / name) != alone(name)] == []


def test_one_that_fails_midway_is_reported_and_the_others_are_whole(source, alone, tmp_path, monkeypatch):
    from quantkit.formats.hqq.write import HqqFormat

    plain = HqqFormat.encode_item

    def fail(self, item):
        if item.name == "layers.0":
            raise RunFailedError("no further")
        return plain(self, item)

    names = ["gptq", "hqq-gptq", "mlx"]
    with monkeypatch.context() as patch:
        patch.setattr(HqqFormat, "encode_item", fail)
        outcomes = build_all(jobs_of(names, source, tmp_path), device=CPU)
    assert {name: error.what for name, error in errors_of(outcomes).items()} == {"hqq-gptq": "no further"}
    assert [outcome.build is None for outcome in outcomes] == [False, True, False]
    assert all(outcome.build.record["validation"] for outcome in outcomes if outcome.build)
    again = build_all(jobs_of(names, source, tmp_path), device=CPU, validated=False)
    assert [outcome.build.reused for outcome in again] == [True, False, True]
    assert [name for name in names if hashes(tmp_path / name) != alone(name)] == []


def test_what_is_refused_before_it_begins_does_not_stop_the_others(source, alone, tmp_path):
    good, held, wrong, foreign, away = jobs_of(["gptq", "hqq", "mlx", "gptq-float", "gguf"], source, tmp_path)
    wrong = Job("mlx", recipe_of("mlx", source, window_tokens=1024), wrong.out)
    away = Job(
        "gguf",
        away.recipe.model_copy(update={"quantize": away.recipe.quantize.model_copy(update={"encoder": "ggml"})}),
        away.out,
    )
    foreign.out.mkdir()
    (foreign.out / "thesis.txt").write_text("years of work")
    with locked(held.out):
        outcomes = build_all([held, wrong, good, foreign, away], device=CPU, validated=False)
    errors = errors_of(outcomes)
    assert {name: type(error) for name, error in errors.items()} == {
        "hqq": RunFailedError,
        "mlx": RefusedError,
        "gptq-float": RefusedError,
        "gguf": UnavailableError,
    }
    assert "quantkit engines install llama-cpp" in str(errors["gguf"])
    assert hashes(good.out) == alone("gptq")


def test_passes_hold_as_many_as_memory_allows():
    stream = {"stream": ("text",), "stream_alone": 10, "stream_shared": 25}
    own, compares, other = Footprint(("m",), 5, 20), Footprint(("m",), 5, 30, **stream), Footprint(("n",), 5, 20)
    upstream = Footprint(None, 0, 100)
    fixed = together_bytes([Footprint(("m",), 0, 0)])
    assert together_bytes([own]) == fixed + 25
    assert together_bytes([own, compares]) == fixed + 5 + 5 + 30 + 10
    assert together_bytes([own, compares, compares]) == fixed + 3 * 5 + 30 + 25
    everything = [own, compares, other, compares, upstream, upstream]
    assert in_passes(everything, fixed + 1000) == [[0, 1, 3], [2], [4], [5]]
    assert in_passes(everything, fixed + 50) == [[0, 1], [2], [3], [4], [5]]
    assert in_passes(everything, 0) == [[0], [1], [2], [3], [4], [5]]


def test_bytes_do_not_depend_on_how_many_passes_there_are(source, alone, tmp_path, monkeypatch):
    taken = []

    class Counted(source_pass.SourcePass):
        def __init__(self, checkpoint):
            taken.append(checkpoint)
            super().__init__(checkpoint)

    names = ["gptq", "hqq-gptq", "gguf-float"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "SourcePass", Counted)
        patch.setattr(pipeline, "in_passes", lambda builds, free: [[0, 2], [1]])
        assert errors_of(build_all(jobs_of(names, source, tmp_path), device=CPU, validated=False)) == {}
    assert len(taken) == 2
    assert [name for name in names if hashes(tmp_path / name) != alone(name)] == []


def test_the_plan_counts_what_runs_side_by_side(source, tmp_path):
    jobs = jobs_of(["gptq", "hqq-gptq", "gguf-float"], source, tmp_path)
    found = plan_all(
        [*jobs, Job("bad", recipe_of("mlx", source).model_copy(update={"engine": "hqq"}), tmp_path)],
        device=CPU,
        progress=Progress(),
    )
    assert list(found.plans) == ["gptq", "hqq-gptq", "gguf-float"]
    assert list(found.errors) == ["bad"]
    assert found.passes == [["gptq", "hqq-gptq", "gguf-float"]]
    assert found.memory_bytes > max(each.memory_bytes for each in found.plans.values())
    assert found.disk_bytes == sum(each.disk_bytes for each in found.plans.values())
    assert json.loads(json.dumps(found.facts()))["passes"] == found.passes


@pytest.fixture
def shelf(source, tmp_path) -> Path:
    """A checkout's recipes folder with two good recipes of a model and one with a key of its own."""
    model, text = source
    folder = tmp_path / "recipes" / "tiny"
    folder.mkdir(parents=True)
    common = f"""[model]
id = "{model}"
[calibration]
window_tokens = 16
texts = {{ "{text}" = 4 }}
[validation]
window_tokens = 32
generated_tokens = 0
texts = ["{text}"]
"""
    (folder / "base.toml").write_text(common)
    for name, keys in {"gptq": 'format = "gptq"', "hqq": 'format = "hqq"', "mlx": 'format = "mlx"'}.items():
        size = "[quantize]\ngroup_size = 32\n"
        (folder / f"{name}.toml").write_text(f'extends = "base.toml"\n{keys}\n{size}')
    return folder.parent


PROGRAM = """
import sys
from pathlib import Path
import quantkit.recipe_files
shelf = Path(sys.argv.pop(1))
quantkit.recipe_files.shipped = lambda name: shelf
from quantkit.cli import main
main()
"""


def test_the_command_builds_all_and_exits_as_the_worst_of_them(shelf, tmp_path):
    out, junit = tmp_path / "artifacts", tmp_path / "all.xml"
    common = ("--out", str(out), "--device", "cpu", "--junit", str(junit))
    done = forked(PROGRAM, str(shelf), "build", "tiny/all", *common, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: each["record"]["format"] for name, each in found["artifacts"].items()} == {
        "gptq": "gptq",
        "hqq": "hqq",
        "mlx": "mlx",
    }
    assert found["artifacts"]["mlx"]["folder"] == str(out / "m-MLX")
    assert found["errors"] == {}
    assert sorted(path.name for path in out.iterdir()) == ["m-GPTQ", "m-HQQ", "m-MLX"]
    assert [suite.get("name") for suite in ElementTree.parse(junit).iter("testsuite")] == ["m-GPTQ", "m-HQQ", "m-MLX"]
    # 4 bits lose little, 3 bits more; a key that one format does not have
    changes = ("--set", "validation.gates.top1_agreement=0.999", "--set", "quantize.damping=0.01")
    worse = forked(PROGRAM, str(shelf), "build", "tiny/all", *common, *changes)
    assert worse.returncode == 2, worse.stderr
    assert "error: hqq: 1 problem(s) in the recipe:\n  quantize.damping: unknown key" in worse.stderr
    assert "error: gptq: the artifact is kept but may not be published:\n  reference: top1_agreement" in worse.stderr
    assert worse.stdout.count("FAILED") == 1
    gate = forked(PROGRAM, str(shelf), "build", "tiny/all", *common, *changes[:2])
    assert gate.returncode == 3, gate.stderr
    assert "Traceback" not in worse.stderr + gate.stderr


def test_plan_all_says_what_goes_together(shelf, tmp_path):
    done = forked(PROGRAM, str(shelf), "plan", "tiny/all", "--out", str(tmp_path / "a"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "pass 1            gptq, hqq, mlx" in done.stdout
    missing = forked(PROGRAM, str(shelf), "plan", "tinny/all")
    assert missing.returncode == 2
    assert "error: no recipes of a model 'tinny'\n  fix: did you mean tiny/all?" in missing.stderr
