"""Joining item files: the same bytes whatever order tensors came in, aligned, and readable by the library."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file

from quantkit.formats import shards
from quantkit.formats.shards import extents, merge, write_item

ITEMS = {
    "embedding": {"e": torch.arange(15, dtype=torch.float16).reshape(3, 5)},
    "layers.0": {"b": torch.arange(7, dtype=torch.int32), "a": torch.ones(3, dtype=torch.float16)},
    "layers.1": {"d": torch.arange(4, dtype=torch.int32), "c": torch.zeros(0, 2, dtype=torch.float16)},
}
ALL = {name: tensor for tensors in ITEMS.values() for name, tensor in tensors.items()}


@pytest.fixture
def items(tmp_path):
    paths = []
    for name, tensors in ITEMS.items():
        paths.append(tmp_path / f"{name}.safetensors")
        write_item(paths[-1], tensors)
    return paths


@pytest.mark.parametrize("piece_bytes", [shards.PIECE_BYTES, 7, 16])
def test_one_file_holds_every_tensor(piece_bytes, items, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PIECE_BYTES", piece_bytes)
    (path,) = merge(items, tmp_path, max_shard_bytes=10**9)
    assert path.name == "model.safetensors"
    read = load_file(path)
    assert read.keys() == ALL.keys()
    for name, tensor in ALL.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_tensors_are_aligned_and_in_a_fixed_order(items, tmp_path):
    (path,) = merge(items, tmp_path, max_shard_bytes=10**9)
    first = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", first[:8])
    header = json.loads(first[8 : 8 + header_bytes])
    assert header_bytes % 8 == 0
    assert header["__metadata__"] == {"format": "pt"}
    assert [name for name in header if name != "__metadata__"] == ["b", "d", "a", "c", "e"]
    for extent in extents(path):
        assert extent.start % ALL[extent.name].element_size() == 0
    merge(items[::-1], tmp_path, max_shard_bytes=10**9)
    assert path.read_bytes() == first


def test_shards_with_an_index(items, tmp_path):
    written = merge(items, tmp_path, max_shard_bytes=60)
    assert [path.name for path in written] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads(written[-1].read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ALL.values())
    assert index["weight_map"].keys() == ALL.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], ALL[name])
