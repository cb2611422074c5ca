"""Reading ahead: an item is read while the one before it is solved, and is refused in its own turn."""

import shutil
from threading import Event

import pytest
import torch

from quantkit.checkpoint.index import Checkpoint
from quantkit.errors import RefusedError
from quantkit.pipeline import build
from quantkit.progress import Progress
from quantkit.recipe_files import load_recipe
from tests.test_bad_input import spoil_a_weight

CPU = torch.device("cpu")


def test_an_item_is_read_while_the_one_before_it_is_solved(own_recipe, tmp_path, monkeypatch):
    """Each waits for the other: what is read before or after, and not meanwhile, waits in vain."""
    real, reading, solved, waited = Checkpoint.read, Event(), Event(), []

    def read(checkpoint, item):
        if item == "layers.1":
            reading.set()
            waited.append(solved.wait(60))
        return real(checkpoint, item)

    def heard(facts):
        if "layers.0" in facts.name and not solved.is_set():
            waited.append(reading.wait(60))
            solved.set()

    monkeypatch.setattr(Checkpoint, "read", read)
    build(load_recipe(own_recipe), out=tmp_path / "a", device=CPU, validated=False, progress=Progress(linear=heard))
    assert waited == [True, True]


def test_what_is_wrong_with_an_item_read_ahead_is_said_once_it_is_its_turn(
    own_recipe, tiny_mistral, tmp_path, monkeypatch
):
    model = shutil.copytree(tiny_mistral, tmp_path / "model")
    spoil_a_weight(model)  # in layers.1
    real, refused, heard = Checkpoint.read, Event(), []

    def read(checkpoint, item):
        try:
            return real(checkpoint, item)
        except RefusedError:
            refused.set()
            raise

    def solved(facts):
        heard.append((facts.name.split(".")[2], refused.wait(0 if heard else 60)))

    monkeypatch.setattr(Checkpoint, "read", read)
    recipe = load_recipe(own_recipe, model=str(model))
    with pytest.raises(RefusedError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight holds 1 value\(s\) that are NaN"):
        build(recipe, out=tmp_path / "a", device=CPU, validated=False, progress=Progress(linear=solved))
    assert heard == [("0", True)] * 7, "the layer before it was solved whole"
    assert not (tmp_path / "a").exists()
