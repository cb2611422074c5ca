"""Files that have their size before anything is solved: the bytes of those that are joined, written in any order."""

import pytest
import torch
from safetensors.torch import load_file

from quantkit.checkpoint.index import TensorInfo
from quantkit.formats.placed import SPELLED, lay_out, size_bits
from quantkit.formats.shards import indexed, merge, write_item

ITEMS = {
    "embedding": {"e": torch.arange(15, dtype=torch.bfloat16).reshape(3, 5)},
    "layers.0": {"b": torch.arange(7, dtype=torch.int32), "a": torch.ones(3, dtype=torch.float16)},
    "layers.1": {
        "d": torch.arange(4, dtype=torch.int64),
        "c": torch.zeros(0, 2, dtype=torch.float16),
        "n": torch.tensor(3, dtype=torch.int32),
        "w": torch.arange(6, dtype=torch.int32).view(torch.uint32).reshape(2, 3),
        "f": torch.tensor([250, 3], dtype=torch.uint8),
    },
}
PLANNED = {
    item: [TensorInfo(name, SPELLED[tensor.dtype], tuple(tensor.shape), "") for name, tensor in tensors.items()]
    for item, tensors in ITEMS.items()
}


@pytest.fixture
def joined(tmp_path):
    """What `merge` makes of them, by shard size."""

    def make(max_shard_bytes):
        folder = tmp_path / "joined"
        folder.mkdir()
        for name, tensors in ITEMS.items():
            write_item(tmp_path / f"{name}.safetensors", tensors)
        items = [tmp_path / f"{name}.safetensors" for name in ITEMS]
        return {path.name: path.read_bytes() for path in merge(items, folder, max_shard_bytes=max_shard_bytes)}

    return make


@pytest.mark.parametrize("max_shard_bytes", [10**9, 70, 1])
def test_the_bytes_are_those_of_joined_items(max_shard_bytes, joined, tmp_path):
    folder = tmp_path / "placed"
    folder.mkdir()
    placed = lay_out(folder, PLANNED, max_shard_bytes=max_shard_bytes)
    assert placed.fresh
    sizes = {file: (folder / file).stat().st_size for file in placed.files}
    for item, tensors in reversed(ITEMS.items()):
        for name, tensor in reversed(tensors.items()):
            assert placed.write({name: tensor}) == {}
        placed.keep(item)
    assert sizes == {file: (folder / file).stat().st_size for file in placed.files}
    assert {path.name: path.read_bytes() for path in indexed(folder)} == joined(max_shard_bytes)
    assert not list(folder.glob(".*"))


def test_what_an_earlier_run_wrote_is_there_again(tmp_path):
    first = lay_out(tmp_path, PLANNED, max_shard_bytes=70)
    first.write(ITEMS["layers.1"])
    again = lay_out(tmp_path, PLANNED, max_shard_bytes=70)
    assert not again.fresh
    found = again.read("layers.1")
    assert found.keys() == ITEMS["layers.1"].keys()
    for name, tensor in ITEMS["layers.1"].items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    (tmp_path / min(again.files)).unlink()
    assert lay_out(tmp_path, PLANNED, max_shard_bytes=70).fresh, "a kill came between the files"


def test_a_file_can_be_read_by_the_library_before_it_is_full(tmp_path):
    placed = lay_out(tmp_path, PLANNED, max_shard_bytes=10**9)
    placed.write(ITEMS["layers.0"])
    (file,) = placed.files
    read = load_file(tmp_path / file)
    assert torch.equal(read["b"], ITEMS["layers.0"]["b"])
    assert not read["d"].any()


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(4, dtype=torch.float16),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, 1, dtype=torch.float16),
    ],
)
def test_what_was_not_planned_so_is_not_written(wrong, tmp_path):
    placed = lay_out(tmp_path, PLANNED, max_shard_bytes=10**9)
    with pytest.raises(AssertionError, match=r"a is .* and was planned as"):
        placed.write({"a": wrong})


def test_an_item_that_is_not_whole_is_not_kept(tmp_path):
    placed = lay_out(tmp_path, PLANNED, max_shard_bytes=10**9)
    placed.write({"a": ITEMS["layers.0"]["a"]})
    with pytest.raises(AssertionError, match=r"never written: \['b'\]"):
        placed.keep("layers.0")


def test_sizes_are_of_what_is_stored():
    parts = {"codes": (torch.int32, (3, 5)), "scale": (torch.float16, (3, 1)), "flag": (torch.uint8, ())}
    assert size_bits(parts) == 8 * (60 + 6 + 1)
