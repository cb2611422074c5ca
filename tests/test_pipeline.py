"""The whole run on a tiny model: the artifact's folder, its record, resume, refusal and identical bytes."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit.errors import RefusedError, RunFailedError, UnavailableError
from quantkit.files import hash_files
from quantkit.formats.sidecars import COPIED
from quantkit.home import quantkit_home
from quantkit.judgement import validate
from quantkit.machine import peak_memory_bytes
from quantkit.pipeline import build, plan
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from quantkit.report.record import read_record, write_record
from quantkit.validation import reference
from quantkit.workdir import work_folder
from tests.commands import ROOT, forked
from tests.interruption import until
from tests.tiny import WORDS, make_text, make_tiny

CPU = torch.device("cpu")
LEFT_IN_CYCLES = ROOT / "tests" / "left_in_cycles.py"
NOT_REPRODUCIBLE = ("quantkit.json", "README.md")


@pytest.fixture
def text_file(tmp_path) -> Path:
    return make_text(tmp_path / "text.jsonl")


@pytest.fixture
def recipe(tiny_mistral, text_file) -> Recipe:
    return Recipe.of(
        {
            "format": "gptq",
            "model": {"id": str(tiny_mistral)},
            "quantize": {"group_size": 32, "scale_candidates": 4},
            "calibration": {"texts": {str(text_file): 8}, "window_tokens": 16},
            "validation": {"texts": (str(text_file),), "window_tokens": 32, "generated_tokens": 3},
        }
    )


def changed(recipe: Recipe, section: str, **keys: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=keys)})


def hashes(folder: Path) -> dict[str, str]:
    return hash_files(folder, sorted(p.name for p in folder.iterdir() if p.name not in NOT_REPRODUCIBLE))


@pytest.mark.parametrize("name", ["awq", "exl2"])
def test_weights_are_not_left_to_the_collector_of_cycles(name, text_file, tmp_path):
    """The command line hardly ever lets it run: what a layer leaves in cycles would stay, layer by layer."""
    recipes = []
    for layers in (1, 2, 4):  # with the first comes what is imported
        recipe = {
            "format": name,
            "model": {"id": str(make_tiny(tmp_path / f"{layers} layers", "mistral", layers=layers))},
            "quantize": {} if name == "exl2" else {"group_size": 32},
            "calibration": {"texts": {str(text_file): 8}, "window_tokens": 16},
        }
        recipes.append(json.dumps(recipe))
    # elsewhere: what here is a skeleton without memory has some, see `conftest`
    done = forked(LEFT_IN_CYCLES.read_text(encoding="utf-8"), str(tmp_path), *recipes)
    assert done.returncode == 0, done.stderr
    _, of_two, of_four = map(int, done.stdout.split())
    assert of_four == of_two


def test_the_folder_holds_what_is_published_and_nothing_else(recipe, tmp_path):
    out = tmp_path / "out" / "tiny-GPTQ"
    done = build(recipe, out=out, device=CPU)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantize_config.json",
        "quantkit.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["tiny-GPTQ"]
    record = json.loads((out / "quantkit.json").read_text())
    assert record == done.record
    assert record["validation"]["gate"] == {"passed": True, "failures": []}
    assert len(record["build"]["items"]["layers.1"]["linears"]) == 7
    everything = "".join(p.read_text() for p in out.iterdir() if p.suffix in (".json", ".md", ".jinja"))
    assert str(tmp_path) not in everything
    assert str(recipe.model.id) not in everything


def test_the_same_recipe_gives_the_same_bytes(recipe, tmp_path):
    first = build(recipe, out=tmp_path / "a", device=CPU, validated=False)
    second = build(recipe, out=tmp_path / "b", device=CPU, validated=False)
    assert hashes(first.out) == hashes(second.out)
    assert first.record["fingerprint"] == second.record["fingerprint"]
    other = build(changed(recipe, "quantize", bits=3), out=tmp_path / "c", device=CPU, validated=False)
    assert other.record["fingerprint"] != first.record["fingerprint"]


WEIGHTS = {"read", "load", "solve", "pack", "write"}
WALKED = {"embed", "forward", "statistics", "factorise", "advance"}


@pytest.mark.parametrize(
    ("name", "activations", "group", "stages"),
    [
        ("gptq", "quantized", {"group_size": 32}, WEIGHTS | WALKED),
        ("exl2", "float", {}, WEIGHTS | WALKED),
        ("hqq", "quantized", {"group_size": 32}, WEIGHTS),
    ],
)
def test_the_record_says_where_the_time_went(name, activations, group, stages, tiny_mistral, text_file, tmp_path):
    given = {
        "format": name,
        "model": {"id": str(tiny_mistral)},
        "quantize": group,
        "calibration": {"texts": {str(text_file): 8}, "window_tokens": 16, "activations": activations},
    }
    built = build(Recipe.of(given), out=tmp_path / "a", device=CPU, validated=False).record["build"]
    items = built["items"].values()
    assert set().union(*(item["seconds"] for item in items)) == stages
    assert all(seconds >= 0 for item in items for seconds in item["seconds"].values())
    for item in items:
        # all linears of a stage share one factor, and the item's time is split between making and using it
        made = sum(linear["factorise_s"] for linear in item["linears"])
        assert item["seconds"].get("factorise", 0.0) == pytest.approx(made)
    # what is written behind is written while the next is solved
    own = sum(seconds for item in items for stage, seconds in item["seconds"].items() if stage != "write")
    assert own <= built["seconds"]["quantize"]


def test_weights_on_disk_beat_rounding_and_match_the_losses(recipe, tmp_path):
    """The artifact's decoded weights are near the source's, and no nearer than 4 bits allow."""
    from quantkit.formats.gptq import open_artifact

    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    artifact = open_artifact(out)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.id, dtype=torch.float32)
    for index in range(2):
        for name, tensor in artifact.read(f"layers.{index}").items():
            source = model.get_parameter(name).detach()
            error = (tensor.float() - source).norm() / source.norm()
            low, high = (0, 1e-3) if "norm" in name else (0.01, 0.3)
            assert low <= error < high, (name, float(error))


def test_a_second_run_has_nothing_to_do(recipe, tmp_path):
    first = build(recipe, out=tmp_path / "a", device=CPU)
    before = {path.name: path.stat().st_mtime_ns for path in first.out.iterdir()}
    second = build(recipe, out=tmp_path / "a", device=CPU)
    assert second.reused
    assert {path.name: path.stat().st_mtime_ns for path in first.out.iterdir()} == before


def test_a_build_killed_before_validation_is_only_validated(recipe, tmp_path):
    build(recipe, out=tmp_path / "a", device=CPU, validated=False)
    again = build(recipe, out=tmp_path / "a", device=CPU)
    assert again.reused
    assert again.record["validation"]["gate"]["passed"]


def without_template(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(
    ("keys", "expected", "message"),
    [
        ({"texts": {"polish-cor": "all"}}, RefusedError, "no text set 'polish-cor'"),
        (
            {"texts": {"wikipedia-pl": 4}},
            UnavailableError,
            "cannot fetch text set wikimedia/wikipedia at revision main",
        ),
        ({"window_tokens": 257}, RefusedError, "257 tokens per window are more than the model's 256"),
        ({"generated_tokens": 1}, RefusedError, "the model has no chat template"),
    ],
)
def test_a_validation_that_cannot_be_made_is_refused_before_the_work(recipe, tmp_path, keys, expected, message):
    model = without_template(Path(recipe.model.id), tmp_path / "model")
    recipe = changed(changed(recipe, "model", id=str(model)), "validation", generated_tokens=0)
    broken, out = changed(recipe, "validation", **keys), tmp_path / "a"
    with pytest.raises(expected, match=message):
        plan(broken, out=out, device=CPU, progress=Progress())
    with pytest.raises(expected, match=message):
        build(broken, out=out, device=CPU)
    assert not out.exists()
    assert not work_folder(out).exists()
    assert build(broken, out=out, device=CPU, validated=False).record["validation"] is None
    assert build(recipe, out=out, device=CPU).record["validation"]["gate"]["passed"], "it was only not judged"


@pytest.mark.parametrize("section", ["calibration", "validation"])
def test_a_model_without_a_chat_template_is_given_documents(section, recipe, tmp_path):
    model = without_template(Path(recipe.model.id), tmp_path / "model")
    recipe = changed(changed(recipe, "model", id=str(model)), "validation", generated_tokens=0)
    wanted, out = {"calibration": 2, "validation": "all"}[section], tmp_path / "a"
    # calibration reads documents in a drawn order until it has enough: so many that a chat is among them
    whole = {"polish-core": 200 if section == "calibration" else wanted}
    with pytest.raises(RefusedError, match="the text has chats in it"):
        build(changed(recipe, section, texts=whole), out=out, device=CPU)
    assert not out.exists()
    done = build(changed(recipe, section, texts={"polish-core-documents": wanted}), out=out, device=CPU)
    assert done.record["validation"]["gate"]["passed"]


def test_validation_text_is_read_once_and_only_where_it_is_used(recipe, tmp_path, monkeypatch):
    from quantkit import making

    plain, read = making.load_text_set, []
    note = {"calibration": lambda _: None, "validation": read.append}
    monkeypatch.setattr(making, "load_text_set", lambda name, split: note[split](name) or plain(name, split))
    build(recipe, out=tmp_path / "a", device=CPU, validated=False)
    assert len(read) == 0
    build(recipe, out=tmp_path / "a", device=CPU)
    assert len(read) == 1
    build(recipe, out=tmp_path / "a", device=CPU)
    assert len(read) == 1


def test_a_model_without_chat_is_judged_without_the_question_where_no_recipe_asks_it(recipe, tmp_path):
    model = without_template(Path(recipe.model.id), tmp_path / "model")
    recipe = changed(changed(recipe, "model", id=str(model)), "validation", generated_tokens=0)
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    (out / "quantkit.json").unlink()
    result = validate(out, model=str(model), texts=recipe.validation.texts, runtime="reference", device=CPU)
    assert result["variants"][0]["results"][0]["answer"] is None
    assert result["gate"]["passed"]


def test_a_recipe_that_was_refused_does_not_stand_in_the_way_of_the_mended_one(recipe, text_file, tmp_path):
    short = changed(recipe, "calibration", texts={str(text_file): 4000})
    with pytest.raises(RefusedError, match="windows of 16 tokens, not 4000"):
        build(short, out=tmp_path / "a", device=CPU)
    assert not build(recipe, out=tmp_path / "a", device=CPU, validated=False).reused


def test_a_record_with_the_keys_of_another_version_is_refused(recipe, tmp_path):
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    record = read_record(out)
    record["recipe"]["validation"]["max_windows"] = None
    write_record(out, record)
    with pytest.raises(RefusedError) as caught:
        validate(out, model=recipe.model.id, texts=(), runtime="reference", device=CPU)
    assert str(caught.value) == (
        "the artifact's recipe is of another version of quantkit: validation.max_windows\n"
        "  at:  quantkit.json\n"
        "  fix: judge it by a recipe of today: `quantkit build` with the same --out"
    )


def test_another_recipe_in_the_same_folder_is_refused_with_the_difference(recipe, tmp_path):
    build(recipe, out=tmp_path / "a", device=CPU, validated=False)
    plan(recipe, out=tmp_path / "a", device=CPU, progress=Progress())
    for run in (build, plan):
        with pytest.raises(RefusedError) as caught:
            run(changed(recipe, "quantize", bits=3, damping=0.05), out=tmp_path / "a", device=CPU, progress=Progress())
        assert str(caught.value) == (
            "the folder belongs to another build:\n"
            "  recipe.quantize.bits: 4 -> 3\n"
            "  recipe.quantize.damping: 0.01 -> 0.05\n"
            f"  at:  {tmp_path / 'a'}\n"
            "  fix: choose another --out, or build with --fresh, which throws the earlier build away"
        )
    notes = tmp_path / "a" / "notes.md"
    notes.write_text("of nobody's record")
    with pytest.raises(RefusedError, match=r"not in the record:\n  notes\.md\n"):
        build(changed(recipe, "quantize", bits=3), out=tmp_path / "a", device=CPU, fresh=True, validated=False)
    assert notes.read_text() == "of nobody's record"
    notes.unlink()
    fresh = build(changed(recipe, "quantize", bits=3), out=tmp_path / "a", device=CPU, fresh=True, validated=False)
    assert fresh.record["recipe"]["quantize"]["bits"] == 3


def test_a_folder_of_somebody_else_is_never_overwritten(recipe, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(RefusedError, match="exists and is no artifact of quantkit"):
            build(recipe, out=tmp_path / "a", device=CPU, fresh=fresh)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "years of work"


def test_an_item_is_written_while_the_next_is_solved(recipe, tmp_path, monkeypatch):
    from threading import Event

    from quantkit.formats.placed import Shards

    real, begun, waited = Shards.write, Event(), []

    def write(shards, tensors):
        if any("layers.0" in name for name in tensors):
            waited.append(begun.wait(60))
        return real(shards, tensors)

    def solved(facts):
        if "layers.1" in facts.name:
            begun.set()

    monkeypatch.setattr(Shards, "write", write)
    build(recipe, out=tmp_path / "a", device=CPU, validated=False, progress=Progress(linear=solved))
    assert waited == [True]
    monkeypatch.setattr(Shards, "write", real)
    whole = build(recipe, out=tmp_path / "b", device=CPU, validated=False)
    assert hashes(tmp_path / "a") == hashes(whole.out)


def test_a_last_item_that_cannot_be_written_is_no_artifact(recipe, tmp_path, monkeypatch):
    from quantkit.formats.placed import Shards

    real = Shards.write

    def full_at_the_head(shards, tensors):
        if "model.norm.weight" in tensors:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(shards, tensors)

    monkeypatch.setattr(Shards, "write", full_at_the_head)
    with pytest.raises(RunFailedError, match="the disk is full"):
        build(recipe, out=tmp_path / "a", device=CPU, validated=False)
    assert not (tmp_path / "a").exists()


def test_an_item_file_that_was_lost_is_made_again(recipe, tmp_path, monkeypatch):
    from quantkit.formats.gptq import GptqFormat

    def fail(*_):
        raise RuntimeError("no further")

    with monkeypatch.context() as patch:
        patch.setattr(GptqFormat, "assemble", fail)
        with pytest.raises(RuntimeError):
            build(recipe, out=tmp_path / "a", device=CPU, validated=False)
    items = work_folder(tmp_path / "a") / "items"
    (items / "layers.0.safetensors").unlink()
    (items / "head.safetensors").write_bytes(b"cut")
    build(recipe, out=tmp_path / "a", device=CPU, validated=False)
    whole = build(recipe, out=tmp_path / "b", device=CPU, validated=False)
    assert hashes(tmp_path / "a") == hashes(whole.out)


def test_everything_that_is_copied_is_hashed(recipe, tmp_path, tiny_mistral):
    source = Path(shutil.copytree(tiny_mistral, tmp_path / "source"))
    for name in COPIED:
        if not (source / name).exists() and not name.startswith("tokenizer") and not name.endswith(".json"):
            (source / name).write_text(f"{name}\n")
    (source / "generation_config.json").write_text("{}")
    first = build(changed(recipe, "model", id=str(source)), out=tmp_path / "a", device=CPU, validated=False)
    copied = [path.name for path in first.out.iterdir() if path.name in COPIED]
    assert {"LICENSE", "NOTICE", "merges.txt", "generation_config.json"} <= set(copied)
    known = first.record["source"]["sha256"]
    assert {name: known[name] for name in copied} == hash_files(first.out, copied)
    (source / "LICENSE").write_text("another")
    with pytest.raises(RefusedError, match=r"source\.LICENSE"):
        build(changed(recipe, "model", id=str(source)), out=tmp_path / "a", device=CPU, validated=False)


def test_memory_of_an_engines_process_is_known():
    program = "held = bytearray(700_000_000); held[::4096] = bytes(len(held[::4096]))"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert peak_memory_bytes(CPU, engine=True)["engine"] > 700_000_000
    assert "engine" not in peak_memory_bytes(CPU)


def test_gates_that_fail_are_in_the_record_and_the_card(recipe, tmp_path):
    from quantkit.recipe import GatesSection

    strict = changed(recipe, "validation", gates=GatesSection(perplexity_ratio=1.0, top1_agreement=1.0))
    done = build(changed(strict, "quantize", bits=2), out=tmp_path / "a", device=CPU)
    gate = done.record["validation"]["gate"]
    assert not gate["passed"]
    assert any("top1_agreement" in failure and "< 1" in failure for failure in gate["failures"])
    assert "Did not pass the recipe's gates" in (tmp_path / "a" / "README.md").read_text()


def test_an_edited_artifact_is_not_validated(recipe, tmp_path):
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    with pytest.raises(RunFailedError) as caught:
        validate(out, model=recipe.model.id, texts=(), runtime="reference", device=CPU)
    assert "config.json: changed" in caught.value.what


def test_validate_writes_into_the_record(recipe, tmp_path):
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    result = validate(out, model=recipe.model.id, texts=recipe.validation.texts, runtime="reference", device=CPU)
    assert read_record(out)["validation"] == result
    assert result["variants"][0]["results"][0]["status"] == "ok"


def test_another_text_shows_its_verdict_and_leaves_the_recorded_one(recipe, tmp_path):
    """Not by another name, and not by the same name with other content."""
    out = build(recipe, out=tmp_path / "a", device=CPU).out
    before = (out / "quantkit.json").read_bytes(), (out / "README.md").read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "easy.txt").write_text("la " * 200)
    (tmp_path / "other" / "text.jsonl").write_text(json.dumps({"text": "la " * 200}))
    for name in ("easy.txt", "other/text.jsonl"):
        told: list[str] = []
        result = validate(
            out,
            model=recipe.model.id,
            texts=(str(tmp_path / name),),
            runtime="reference",
            device=CPU,
            say=told.append,
        )
        assert result["text"]["name"] == Path(name).name
        assert told == ["judged on other texts than the recipe's: the verdict in the record stays as it was"]
        assert ((out / "quantkit.json").read_bytes(), (out / "README.md").read_bytes()) == before


def test_a_build_judges_again_where_the_text_of_its_recipe_has_changed(recipe, tmp_path, text_file):
    out = build(recipe, out=tmp_path / "a", device=CPU).out
    extra = tmp_path / "calibration.jsonl"
    extra.write_bytes(text_file.read_bytes())
    first = read_record(out)
    apart = changed(recipe, "calibration", texts={str(extra): 8})
    out = build(apart, out=tmp_path / "b", device=CPU).out
    text_file.write_text(json.dumps({"text": WORDS * 9}))
    assert (
        build(apart, out=out, device=CPU, validated=False).record["validation"]["text"] == first["validation"]["text"]
    )
    again = build(apart, out=out, device=CPU)
    assert again.reused
    assert again.record["validation"]["text"]["sha256"] == again.record["validation_texts"][0]["sha256"]
    assert again.record["validation"]["text"] != first["validation"]["text"]
    assert build(apart, out=out, device=CPU).record == again.record


def test_an_engine_that_is_not_there_is_not_run_and_says_how_to_mend_it(recipe, tmp_path):
    out = build(recipe, out=tmp_path / "a", device=CPU).out
    result = validate(out, model=recipe.model.id, texts=recipe.validation.texts, runtime="native", device=CPU)
    kept, native = result["variants"][0]["results"]
    assert (kept["runtime"], kept["status"]) == ("reference", "ok")  # of the build; on the same text it stays
    assert (native["runtime"], native["status"]) == ("gptqmodel", "not run")
    assert native["reason"] == "gptqmodel is not installed: `quantkit engines install gptqmodel`"
    assert result["gate"]["passed"]
    with pytest.raises(RefusedError, match="no engine named 'gptq-model'"):
        validate(out, model=recipe.model.id, texts=recipe.validation.texts, runtime="gptq-model", device=CPU)
    # its failure would stay in the record, and the gate fail from then on
    with pytest.raises(RefusedError, match="llama-cpp does not read gptq") as caught:
        validate(out, model=recipe.model.id, texts=recipe.validation.texts, runtime="llama-cpp", device=CPU)
    assert caught.value.where == "--runtime"
    assert len(read_record(out)["validation"]["variants"][0]["results"]) == 2


def test_a_home_that_cannot_be_written_is_refused_before_an_artifact_is_hashed(recipe, tmp_path, monkeypatch):
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("quantkit.judgement.require_unchanged", None)
    with pytest.raises(RefusedError, match="quantkit's own folder cannot be written"):
        validate(out, model=recipe.model.id, texts=(), runtime="reference", device=CPU)


def test_an_engine_that_breaks_fails_the_gate_and_nothing_else_is_lost(recipe, tmp_path):
    """A real runner in this interpreter, which has none of the packages that it needs."""
    from quantkit.engines import env
    from quantkit.validation.gate import judge

    environment = env.environment_of(env.find_engine("gptqmodel"))
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (environment / env.MARKER).write_text("{}")
    asked = changed(recipe, "validation", require=("reference", "gptqmodel"))
    out = build(asked, out=tmp_path / "a", device=CPU, validated=False).out
    result = validate(out, model=recipe.model.id, texts=recipe.validation.texts, runtime="both", device=CPU)
    ours, theirs = result["variants"][0]["results"]
    assert (ours["runtime"], ours["status"]) == ("reference", "ok")
    assert (theirs["runtime"], theirs["status"]) == ("gptqmodel", "failed")
    assert theirs["reason"].startswith("the engine gptqmodel failed at evaluate (exit code 1): ImportError: ")
    assert str(tmp_path) not in theirs["reason"]
    assert result["gate"] == {"passed": False, "failures": [f"gptqmodel: required, but {theirs['reason']}"]}
    assert judge([ours, theirs], {}, ["reference"], result["reference"]) == [f"gptqmodel: {theirs['reason']}"]
    assert read_record(out)["validation"] == result


def test_what_appears_in_the_place_of_an_artifact_is_not_replaced(recipe, tmp_path):
    out = tmp_path / "a"

    def drop(facts) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("precious")

    with pytest.raises(RunFailedError, match=r"there appeared in its place: mine\.txt") as caught:
        build(recipe, out=out, device=CPU, validated=False, progress=Progress(linear=drop))
    assert caught.value.where == str(out)
    assert (out / "mine.txt").read_text() == "precious"
    out.rename(tmp_path / "mine")
    solved: list[str] = []
    heard = Progress(linear=lambda facts: solved.append(facts.name))
    done = build(recipe, out=out, device=CPU, validated=False, progress=heard)
    assert solved == []
    assert not (done.out / "mine.txt").exists()
    assert hashes(done.out) == hashes(build(recipe, out=tmp_path / "b", device=CPU, validated=False).out)


def of_its_own(recipe: Recipe, folder: Path) -> tuple[Recipe, Path]:
    """The recipe on a copy of its model, and a shard of that."""
    copied = Path(shutil.copytree(recipe.model.id, folder))
    return changed(recipe, "model", id=str(copied)), next(copied.glob("*.safetensors"))


def test_a_source_that_changes_under_a_build_ends_it_and_what_was_finished_before_counts(recipe, tmp_path):
    whole = hashes(build(recipe, out=tmp_path / "whole", device=CPU, validated=False).out)
    recipe, shard = of_its_own(recipe, tmp_path / "m")
    good = shard.read_bytes()

    def overwrite(facts) -> None:
        if facts.name.startswith("model.layers.1."):
            # written behind the solver
            until(lambda: "layers.0" in (work_folder(tmp_path / "a") / "journal.json").read_text())
            shard.write_bytes(good)  # the same bytes, as far as anyone who reads them can tell

    with pytest.raises(RunFailedError, match=f"the source changed while it was read: {shard.name}") as caught:
        build(recipe, out=tmp_path / "a", device=CPU, progress=Progress(linear=overwrite))
    assert caught.value.where == str(tmp_path / "m")
    steps: list[str] = []
    heard = Progress(linear=lambda facts: steps.append(facts.name))
    assert hashes(build(recipe, out=tmp_path / "a", device=CPU, validated=False, progress=heard).out) == whole
    assert steps
    assert not any(name.startswith("model.layers.0.") for name in steps), "finished before"


def test_what_was_measured_of_a_source_that_has_changed_is_not_kept(recipe, tmp_path):
    recipe, shard = of_its_own(recipe, tmp_path / "m")
    content = recipe.model_dump(mode="json", exclude={"quantize"}) | {"format": "exl2"}

    def steps(what: str, done: int, total: int) -> None:
        if (what, done) == ("measure", 2):
            os.utime(shard)

    with pytest.raises(RunFailedError, match="the source changed while it was read"):
        build(Recipe.of(content), out=tmp_path / "a", device=CPU, progress=Progress(steps=steps))
    assert [path.stem for path in (work_folder(tmp_path / "a") / "notes").iterdir()] == ["layers.0"]


def test_a_source_that_changes_while_it_is_judged_by_is_no_reference(recipe, tmp_path, monkeypatch):
    recipe, shard = of_its_own(recipe, tmp_path / "m")
    plain = reference.final_states

    def states(*given, **settings):
        os.utime(shard)
        return plain(*given, **settings)

    monkeypatch.setattr(reference, "final_states", states)
    with pytest.raises(RunFailedError, match="the source changed while it was read"):
        build(recipe, out=tmp_path / "a", device=CPU)
    assert not list(quantkit_home().glob("cache/reference/*.safetensors"))
    assert read_record(tmp_path / "a")["validation"] is None


def test_a_source_that_gives_no_numbers_is_what_is_wrong(recipe, tmp_path, tiny_mistral):
    folder = shutil.copytree(tiny_mistral, tmp_path / "m")
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
    weights = load_file(shard)
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 3e38)
    save_file(weights, shard)
    content = recipe.model_dump(mode="json") | {"model": {"id": str(folder)}, "format": "gguf"}
    asked = Recipe.of(content | {"quantize": {"types": ["BF16"]}})
    with pytest.raises(RunFailedError, match=r"the source model's own ppl_per_token on the text .* is inf") as caught:
        build(asked, out=tmp_path / "a", device=CPU)
    assert caught.value.where == "m"


def test_validate_takes_a_folder_without_a_record(recipe, tmp_path):
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    (out / "quantkit.json").unlink()
    with pytest.raises(RefusedError, match="no record that names its source"):
        validate(out, model=None, texts=recipe.validation.texts, runtime="reference", device=CPU)
    result = validate(out, model=recipe.model.id, texts=recipe.validation.texts, runtime="reference", device=CPU)
    assert result["variants"][0]["results"][0]["ratio"] < 1.5
    assert not (out / "quantkit.json").exists()


@pytest.mark.parametrize(
    ("name", "stated_in"), [("gptq_model-4bit-32g", "config.json"), ("wagi", "quantize_config.json")]
)
def test_validate_takes_weights_under_a_name_of_their_own(recipe, tmp_path, name, stated_in):
    """AutoGPTQ calls the file gptq_model-<bits>bit-<group>g, and once stated the settings beside config.json alone."""
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    of_ours = validate(out, model=recipe.model.id, texts=recipe.validation.texts, runtime="reference", device=CPU)
    for extra in ("quantkit.json", "README.md"):
        (out / extra).unlink()
    (out / "model.safetensors").rename(out / f"{name}.safetensors")
    config = json.loads((out / "config.json").read_text())
    settings = {key: config["quantization_config"][key] for key in ("bits", "group_size", "desc_act", "sym")}
    config["quantization_config"] = settings | {"quant_method": "gptq", "model_file_base_name": name}
    if stated_in == "quantize_config.json":
        del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "quantize_config.json").write_text(json.dumps(settings))
    found = validate(out, model=recipe.model.id, texts=recipe.validation.texts, runtime="reference", device=CPU)
    variant, expected = found["variants"][0], of_ours["variants"][0]
    assert variant["files"] == [f"{name}.safetensors"]
    assert variant["bits_per_weight"] == expected["bits_per_weight"]
    for key in ("ratio", "mean_kld", "top1_agreement"):
        assert variant["results"][0][key] == expected["results"][0][key]


def test_validate_refuses_another_reference(recipe, tmp_path):
    from tests.tiny import make_tiny

    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    other = make_tiny(tmp_path / "other", "mistral", seed=5)
    with pytest.raises(RefusedError, match="is not the model this artifact was made from"):
        validate(out, model=str(other), texts=recipe.validation.texts, runtime="reference", device=CPU)
