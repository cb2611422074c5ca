"""A Hub model's plan needs no weights: what is fetched for it, and what a wrong model is told, over real HTTP."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import files
from quantkit.errors import RefusedError
from quantkit.pipeline import plan
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from quantkit.sources import describe_checkpoint, open_source
from tests.commands import quantkit
from tests.hub_server import HubServer, Repo
from tests.tiny import make_tiny

NAME = "an-org/tiny"


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Shards of more than the 100 kB with which the Hub's client asks for a header."""
    return make_tiny(tmp_path_factory.mktemp("wide") / "m", "mistral", intermediate_size=1024, sharded=False)


def put(hub: HubServer, folder: Path) -> None:
    files = {path.name: (path.read_bytes(), path.suffix == ".safetensors") for path in folder.iterdir()}
    hub.repos[NAME] = Repo(private=False)
    hub.repos[NAME].commit("main", files)


def test_a_plan_fetches_headers_and_no_weights(hub, wide, own_recipe, tmp_path):
    out = ("--out", str(tmp_path / "a"), "--json")
    put(hub, wide)
    done = quantkit("plan", str(own_recipe), "--model", NAME, *out, **hub.variables())
    assert done.returncode == 0, done.stderr
    size = (wide / "model.safetensors").stat().st_size
    assert size > 800_000
    assert hub.served["model.safetensors"] <= 100_001
    fetched = json.loads(done.stdout)
    local = json.loads(quantkit("plan", str(own_recipe), "--model", str(wide), *out, **hub.variables()).stdout)
    for key in ("linears", "parameters", "artifact_bytes", "disk_bytes", "memory_bytes", "source_bytes"):
        assert fetched[key] == local[key], key
    # what a plan fetched serves the build; then the cache is enough for a plan
    built = quantkit(
        "build", str(own_recipe), "--model", NAME, "--out", str(tmp_path / "a"), "--no-validate", **hub.variables()
    )
    assert built.returncode == 0, built.stderr
    hub.requests.clear()
    again = quantkit("plan", str(own_recipe), "--model", NAME, *out, HF_HUB_OFFLINE="1", **hub.variables())
    assert json.loads(again.stdout)["parameters"] == fetched["parameters"]
    assert not hub.requests


def test_an_artifact_is_judged_against_the_commit_that_it_was_made_from(hub, tiny_mistral, own_recipe, tmp_path):
    """Also where its recipe names none and the repository has gone on."""
    put(hub, tiny_mistral)
    made_from = hub.repos[NAME].branches["main"]
    out = tmp_path / "a"
    arguments = ("build", str(own_recipe), "--model", NAME, "--out", str(out), "--no-validate")
    built = quantkit(*arguments, **hub.variables())
    assert built.returncode == 0, built.stderr
    assert made_from in built.stderr
    hub.repos[NAME].commit("main", {"config.json": (b"{}", False)})
    text = str(tmp_path / "text.txt")
    judged = quantkit("validate", str(out), "--text", text, "--json", **hub.variables())
    assert judged.returncode == 0, judged.stderr
    assert json.loads(judged.stdout)["variants"]


def test_a_hub_model_that_is_refused_at_plan(hub, tiny_mistral, own_recipe, tmp_path):
    folder = shutil.copytree(tiny_mistral, tmp_path / "m")
    shard = sorted(folder.glob("*.safetensors"))[0]
    out = ("--out", str(tmp_path / "a"))
    whole = shard.read_bytes()
    shard.write_bytes(b"no header at all")
    put(hub, folder)
    done = quantkit("plan", str(own_recipe), "--model", NAME, *out, **hub.variables())
    assert done.returncode == 2
    assert f"error: {shard.name} of {NAME} is no safetensors file" in done.stderr
    shard.unlink()
    put(hub, folder)
    done = quantkit("plan", str(own_recipe), "--model", NAME, *out, **hub.variables())
    assert done.returncode == 2
    assert f"error: shard {shard.name} is missing" in done.stderr
    shard.write_bytes(whole)
    put(hub, folder)
    hub.faults.append(["GET .*safetensors$", 500, 99])
    done = quantkit("plan", str(own_recipe), "--model", NAME, *out, **hub.variables())
    assert done.returncode == 4, done.stderr
    assert f"error: cannot fetch {NAME} at revision" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["/no/such/model", "./no-such-model", "../no-such-model", "an-org/tiny/"])
def test_a_path_at_which_there_is_nothing_is_not_looked_for_on_the_hub(hub, name, own_recipe, tmp_path):
    # what `validate` opens a model with
    with pytest.raises(RefusedError) as caught:
        open_source(name, None, Progress())
    assert (caught.value.what, caught.value.where) == (f"no such folder: {name}", "model.id")
    done = quantkit("plan", str(own_recipe), "--model", name, "--out", str(tmp_path / "a"), **hub.variables())
    assert (done.returncode, done.stderr) == (2, f"error: {caught.value}\n")
    assert not hub.requests


def test_a_folder_has_no_revision(hub, tiny_mistral, own_recipe, tmp_path):
    """Nor has what lies where it is run under the name of a Hub model: which is meant, nobody knows."""
    revision = "0" * 40
    own_recipe.write_text(own_recipe.read_text().replace("[model]\n", f'[model]\nrevision = "{revision}"\n'))
    arguments = (str(own_recipe), "--out", str(tmp_path / "a"))
    for command in ("plan", "build"):
        done = quantkit(command, *arguments, **hub.variables())
        assert done.returncode == 2
        assert f"error: {tiny_mistral} is not on the Hub, so it has no revision {revision}" in done.stderr
        assert "at:  model.revision" in done.stderr
    # a model that replaces the recipe's has not its revision
    done = quantkit("plan", *arguments, "--model", str(tiny_mistral), **hub.variables())
    assert done.returncode == 0, done.stderr


def test_a_revision_that_the_hub_does_not_have(hub, tiny_mistral, tmp_path, own_recipe):
    """It is named by its own key, and a model that is not there by that of the model."""
    put(hub, tiny_mistral)
    revision = "0" * 40
    for name, key in ((NAME, "model.revision"), ("an-org/none", "model.id")):
        said = own_recipe.read_text().replace(str(tiny_mistral), name)
        pinned = tmp_path / "pinned.toml"
        pinned.write_text(said.replace("[model]\n", f'[model]\nrevision = "{revision}"\n'))
        done = quantkit("plan", str(pinned), "--out", str(tmp_path / "a"), **hub.variables())
        assert done.returncode == 2, done.stderr
        assert f"error: the Hub has no {name} at revision {revision}: " in done.stderr
        assert f"at:  {key}\n" in done.stderr


def test_a_head_that_is_tied_to_the_embedding_and_another(tmp_path):
    folder = make_tiny(tmp_path / "m", "qwen2", tie_word_embeddings=True, sharded=False)
    path = folder / "model.safetensors"
    weights = load_file(path)
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, path)
    open_source(str(folder), None, Progress())
    save_file(weights | {"lm_head.weight": embedding + 1}, path)
    for opened in (open_source, describe_checkpoint):
        with pytest.raises(RefusedError, match="says tie_word_embeddings, but"):
            opened(str(folder), None, Progress())


def test_a_plan_hashes_nothing(tiny_mistral, tmp_path, monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} was hashed")

    monkeypatch.setattr(files, "sha256_of", refuse)
    recipe = Recipe.of(
        {
            "format": "gptq",
            "model": {"id": str(tiny_mistral)},
            "quantize": {"group_size": 32},
            "calibration": {"window_tokens": 16},
            "validation": {"window_tokens": 32},
        }
    )
    found = plan(recipe, out=tmp_path / "a", device=torch.device("cpu"), progress=Progress())
    assert found.linears == 14
