"""What a build does on a GPU beside computing: what lies there, what waits in the host's memory, how it goes on.

Every format is built on the same GPU in `tests.test_formats`; where there is none it is a pretended one.
"""

import pytest
import torch

from quantkit import keeping
from quantkit.checkpoint.spill import Kept, Spill, free_bytes
from quantkit.pipeline import Job, Progress, build, build_all, plan
from quantkit.recipe_files import load_recipe
from tests.interruption import interrupted
from tests.pretended_gpu import MEMORY
from tests.test_formats import hashes


def test_the_pretended_gpu_keeps_its_tensors_apart(pretended):
    there, here = torch.arange(6.0, device=pretended).view(2, 3), torch.arange(6.0).view(2, 3)
    assert there.is_cuda
    assert torch.equal((there @ there.t()).cpu(), here @ here.t())
    assert torch.equal(there.new_tensor([1.0, 2.0]).cpu(), torch.tensor([1.0, 2.0]))
    assert there.to("cpu").sum() == there.sum().item() == 15
    there[:, torch.tensor([0, 2])] = 7
    assert there.tolist() == [[7.0, 1.0, 7.0], [7.0, 4.0, 7.0]]
    for mixed in (
        lambda: there + here,
        lambda: here.add_(there),
        lambda: torch.cat([here, there]),
        lambda: here[there],
    ):
        with pytest.raises(RuntimeError, match="meets a GPU's"):
            mixed()
    with pytest.raises(RuntimeError):
        there.numpy()


def test_the_pretended_gpu_refuses_what_a_gpu_sums_in_any_order(pretended):
    place, number = torch.tensor([0, 0, 1], device=pretended), torch.ones(3, device=pretended)
    for unordered in (
        lambda: number.index_add_(0, place, number),
        lambda: number.scatter_add(0, place, number),
        lambda: number.scatter_reduce(0, place, number, "sum"),
        lambda: number.index_put_((place,), number, accumulate=True),
        lambda: number.scatter(0, place, number, reduce="add"),
        lambda: torch.bincount(place, number),
        lambda: number.cumsum(0),
    ):
        with pytest.raises(RuntimeError, match="in another order every time"):
            unordered()
    assert place.cumsum(0).tolist() == [0, 0, 1]
    assert torch.bincount(place).tolist() == [2, 1]
    assert number.scatter_reduce(0, place, number, "amin").tolist() == [1.0, 1.0, 1.0]


def test_a_build_goes_on_after_an_interruption(own_recipe, gpu, tmp_path):
    recipe = load_recipe(own_recipe)
    whole = build(recipe, out=tmp_path / "whole", device=gpu, validated=False)
    with interrupted(keeping, "write_item", after=2):
        build(recipe, out=tmp_path / "out", device=gpu, validated=False)
    done = build(recipe, out=tmp_path / "out", device=gpu, validated=False)
    assert hashes(done.out) == hashes(whole.out)
    assert done.record["environment"]["device_model"] == torch.cuda.get_device_name(gpu)
    assert done.record["build"]["peak_memory_bytes"].keys() == {"host", "device"}


@pytest.mark.parametrize("free_bytes", [0, 1 << 40])
def test_what_finds_no_room_waits_in_the_hosts_memory(free_bytes, own_recipe, gpu, tmp_path, monkeypatch):
    recipe = load_recipe(own_recipe, ("compute.windows_per_batch=1",))
    whole = build(recipe, out=tmp_path / "whole", device=gpu, validated=False)
    left, plain = [], Spill.keep

    def keep(self, tensor) -> Kept:
        kept = plain(self, tensor)
        left.append(tensor.is_cuda and not kept.held.is_cuda and kept.tensor().is_cuda)
        return kept

    monkeypatch.setattr(Spill, "keep", keep)
    monkeypatch.setattr("quantkit.checkpoint.spill.free_bytes", lambda device: free_bytes)
    done = build(recipe, out=tmp_path / "out", device=gpu, validated=False)
    assert set(left) == {free_bytes == 0}
    assert hashes(done.out) == hashes(whole.out)


def test_what_torch_holds_and_does_not_use_is_free(pretended, monkeypatch):
    counts = {f"{kind}_bytes": {"all": {"current": held}} for kind, held in (("reserved", 700), ("allocated", 200))}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: counts)
    assert free_bytes(pretended) == MEMORY + 500


def test_builds_that_go_together_give_the_bytes_of_each_alone(own_recipe, gpu, tmp_path):
    changes = {"quantized": (), "float": ("calibration.activations=float", "quantize.asymmetric=0")}
    recipes = {name: load_recipe(own_recipe, change) for name, change in changes.items()}
    together = build_all([Job(name, each, tmp_path / name) for name, each in recipes.items()], device=gpu)
    for (name, recipe), outcome in zip(recipes.items(), together, strict=True):
        alone = build(recipe, out=tmp_path / f"{name} alone", device=gpu, validated=False)
        assert hashes(outcome.build.out) == hashes(alone.out)


def test_a_plan_tries_a_search_there(own_recipe, gpu, tmp_path):
    recipe = load_recipe(own_recipe, ("format=mlx", 'quantize={solver="least-squares",group_size=32}'))
    assert plan(recipe, out=tmp_path / "out", device=gpu, progress=Progress()).seconds > 0
