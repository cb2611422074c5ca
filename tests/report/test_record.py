"""The record: its schema, what tells of an edit, and where the licence comes from."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from quantkit.errors import RefusedError, RunFailedError
from quantkit.formats import READERS
from quantkit.judgement import validate
from quantkit.pipeline import build
from quantkit.provenance import finished_record
from quantkit.publish import publish
from quantkit.recipe import Recipe
from quantkit.report.card import keep
from quantkit.report.inspect import inspect_artifact, inspection_lines
from quantkit.report.record import changed_files, read_record, write_record
from quantkit.sources import stated_licence
from tests.report.records import HASH, record_of, variant
from tests.tiny import WORDS

ROOT = Path(__file__).parent.parent.parent
SCHEMA = ROOT / "docs" / "record.schema.json"


@pytest.mark.parametrize("name", sorted(READERS))
def test_the_published_schema_takes_a_record_and_nothing_else(name):
    jsonschema = pytest.importorskip("jsonschema", reason="of the development environment")
    checker = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))
    record = record_of(name) | {"seal": "0" * 64}
    checker.validate(record)
    broken = [
        record | {"surprise": 1},
        record | {"fingerprint": "short"},
        {key: value for key, value in record.items() if key != "source"},
        record | {"outputs": [{"name": "a", "size_bytes": -1, "sha256": "0" * 64}]},
    ]
    assert [checker.is_valid(one) for one in broken] == [False] * 4


def test_an_edited_record_is_named(tmp_path):
    keep(tmp_path, record_of("gptq"))
    path = tmp_path / "quantkit.json"
    content = json.loads(path.read_text("utf-8"))
    content["validation"]["variants"][0]["results"][0]["mean_kld"] = 0.0
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(RunFailedError, match=r"quantkit\.json was edited after it was written"):
        read_record(tmp_path)


def test_a_record_that_lacks_something_says_what(tmp_path):
    record = record_of("gptq")
    keep(tmp_path, record)
    del record["source"]["sha256"]
    keep(tmp_path, record)
    with pytest.raises(RefusedError, match=r"source\.sha256: Field required"):
        read_record(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"schema": 1}', "edited", "incomplete"])
def test_a_record_that_cannot_be_read_says_which_folder_to_remove(content, tmp_path):
    """Building again alone ends at the same record, with --fresh too."""
    out = tmp_path / "a"
    out.mkdir()
    if content == "incomplete":
        write_record(out, {key: value for key, value in record_of("gptq").items() if key != "source"})
    else:
        edited = keep(out, record_of("gptq")) | {"fingerprint": "0" * 64}
        (out / "quantkit.json").write_text(json.dumps(edited) if content == "edited" else content, encoding="utf-8")
    for fresh in (False, True):
        with pytest.raises((RefusedError, RunFailedError)) as caught:
            finished_record(out, dict, fresh=fresh)
        assert f"remove the folder {out} and build the artifact again" in caught.value.fix
    shutil.rmtree(out)
    assert finished_record(out, dict, fresh=False) is None


@pytest.mark.parametrize("name", ["notes.md", "deep/.hidden", ".git"])
def test_fresh_replaces_what_was_changed_and_never_what_is_not_in_the_record(name, tmp_path):
    outputs = [{"name": file, "size_bytes": 1, "sha256": HASH} for file in ("config.json", "model.safetensors")]
    record = keep(tmp_path, record_of("gptq", outputs=outputs))
    (tmp_path / "config.json").write_text("changed")
    (tmp_path / "README.md").write_text("changed")
    (tmp_path / ".gitattributes").touch()
    assert finished_record(tmp_path, lambda: record["identity"], fresh=True) is None
    with pytest.raises(RunFailedError, match=r"config\.json: changed\n  model\.safetensors: missing\n") as caught:
        finished_record(tmp_path, lambda: record["identity"], fresh=False)
    assert caught.value.fix == "build it again with --fresh, or restore the files"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(RefusedError) as refused:
        finished_record(tmp_path, lambda: record["identity"], fresh=True)
    assert str(refused.value) == (
        f"--fresh would delete what is not in the record:\n  {name}\n"
        f"  at:  {tmp_path}\n"
        "  fix: move it elsewhere, or choose another folder with --out"
    )


def test_a_file_that_is_not_in_the_record_is_to_be_moved_away(tmp_path):
    """--fresh would refuse it."""
    record = keep(tmp_path, record_of("gptq", outputs=[]))
    (tmp_path / "notes.md").touch()
    with pytest.raises(RunFailedError) as caught:
        finished_record(tmp_path, lambda: record["identity"], fresh=False)
    assert caught.value.fix == "move what is not in the record elsewhere"


def test_what_json_cannot_hold_is_null_in_a_record_that_counts_as_unedited(tmp_path):
    record = record_of("gptq", outputs=[])
    for linear, loss in zip(
        record["build"]["items"]["layers.0"]["linears"], (float("nan"), float("inf")), strict=False
    ):
        linear["loss"] = loss
    kept = keep(tmp_path, record)
    read = read_record(tmp_path)
    assert read == kept
    assert [linear["loss"] for linear in read["build"]["items"]["layers.0"]["linears"][:3]] == [None, None, 1e-3]
    assert "NaN" not in (tmp_path / "quantkit.json").read_text()


def test_an_edited_card_is_named(tmp_path):
    record = keep(tmp_path, record_of("gptq", outputs=[]))
    assert changed_files(tmp_path, record) == []
    with (tmp_path / "README.md").open("a", encoding="utf-8") as file:
        file.write("Najlepszy model świata.\n")
    assert changed_files(tmp_path, record) == ["README.md: changed"]


def test_the_branch_without_weights_names_those_that_have_them(tmp_path):
    published = {"repo": "an-org/Zuraw-7B-EXL2", "revision": "main", "left_out": {}, "pictures": []}
    sizes = variant("4.0bpw", 4.25, 1.01), variant("6.0bpw", 6.25, 1.0)
    keep(tmp_path, record_of("exl2", *sizes, variants={}, outputs=[], published=published))
    found = inspect_artifact(tmp_path, verify=True)
    assert (found["format"], found["variants"], found["changed"]) == ("exl2", [], [])
    assert [branch["name"] for branch in found["branches"]] == ["4.0bpw", "6.0bpw"]
    lines = inspection_lines(found)
    start = lines.index(
        "weights           none here: `hf download an-org/Zuraw-7B-EXL2 --revision BRANCH` fetches them, BRANCH one of"
    )
    assert lines[start + 1 : start + 3] == [
        "  4.0bpw          4.25 GB, 4.250 bits a weight",
        "  6.0bpw          6.25 GB, 6.250 bits a weight",
    ]
    options = {"repo": None, "revision": "main", "private": True, "dry_run": True}
    for command in (
        lambda: publish(tmp_path, **options),
        lambda: validate(tmp_path, model=None, texts=(), runtime="reference", device=torch.device("cpu")),
    ):
        with pytest.raises(RefusedError, match=r"has them on branches, 4\.0bpw, 6\.0bpw(.|\n)*--revision 4\.0bpw"):
            command()


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: cc-by-nc-4.0\nlanguage: [pl]\n---\n# Bielik\n", {"license": "cc-by-nc-4.0"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: own\n---\n", {"license": "other", "license_name": "own"}),
        ("---\nlanguage: pl\n---\n", {}),
        ("# no front matter\n\n---\nlicense: mit\n---\n", {}),
        ("---\n- a list\n---\n", {}),
    ],
)
def test_the_licence_is_the_one_that_the_sources_card_states(card, licence, tmp_path):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert stated_licence(tmp_path) == licence


def test_a_card_that_is_not_yaml_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(RefusedError, match="front matter"):
        stated_licence(tmp_path)


def test_a_build_copies_the_sources_licence_and_refuses_another(tiny_mistral, tmp_path):
    source = shutil.copytree(tiny_mistral, tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 20, encoding="utf-8")
    content = {
        "format": "gptq",
        "model": {"id": str(source)},
        "quantize": {"group_size": 32, "scale_candidates": 0},
        "calibration": {"texts": {str(text): 4}, "window_tokens": 16},
    }
    other = Recipe.of(content | {"release": {"license": "apache-2.0"}})
    with pytest.raises(RefusedError, match=r"the recipe says apache-2\.0, the model's own card cc-by-nc-4\.0"):
        build(other, out=tmp_path / "out", device=torch.device("cpu"))
    done = build(Recipe.of(content), out=tmp_path / "out", device=torch.device("cpu"), validated=False)
    assert done.record == read_record(tmp_path / "out")
    assert done.record["source"]["license"] == "cc-by-nc-4.0"
    assert "\nlicense: cc-by-nc-4.0\n" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_nothing_is_verified_without_a_record(tiny_mistral, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 20, encoding="utf-8")
    content = {
        "format": "gptq",
        "model": {"id": str(tiny_mistral)},
        "quantize": {"group_size": 32, "scale_candidates": 0},
        "calibration": {"texts": {str(text): 4}, "window_tokens": 16},
    }
    out = build(Recipe.of(content), out=tmp_path / "out", device=torch.device("cpu"), validated=False).out
    assert inspect_artifact(out, verify=True)["changed"] == []
    (out / "quantkit.json").unlink()
    found = inspect_artifact(out, verify=True)
    assert found["changed"] == ["quantkit.json: missing"]
    assert "verify            quantkit.json: missing" in inspection_lines(found)
    assert inspect_artifact(out, verify=False)["changed"] == []
