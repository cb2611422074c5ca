"""ggml's block types: bytes that gguf-py decodes to what was solved, and a search that earns its name."""

import gguf
import numpy as np
import pytest
import torch

from quantkit.errors import RefusedError
from quantkit.grids.block_bytes import LAYOUTS, encode, pack
from quantkit.grids.blocks import TYPES, BlockGrid, error_weights, quantize


def theirs(packed: torch.Tensor, kind: str) -> np.ndarray:
    return gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind])


def weights(rows: int = 6, columns: int = 512, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator) * 0.1
    weight[0, :256] = 0
    weight[1, :256] = weight[1, :256].abs() + 0.5  # no weight near zero, all of one sign
    weight[2] = -weight[1]
    weight[3, 17] = 3.0  # an outlier
    return weight


def importance(columns: int = 512) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 3 * 4


def test_every_type_has_a_layout():
    assert TYPES.keys() == LAYOUTS.keys()
    assert len(TYPES) == 10


@pytest.mark.parametrize("name", TYPES)
def test_random_codes_and_scales_are_what_gguf_py_reads(name):
    """Every field over its whole range, so that a bit in the wrong place shows."""
    kind = TYPES[name]
    generator = torch.Generator().manual_seed(2)

    def whole(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    rows, blocks, subs = 5, 3, kind.block // kind.sub
    d, dmin = (torch.randn(rows, blocks, generator=generator).half().float() for _ in range(2))
    low, high = kind.scale_range
    mins = whole(0, kind.min_top, rows, blocks, subs) if kind.has_sub_scales else torch.ones(rows, blocks, subs)
    if kind.min_top == 0:
        dmin, mins = torch.zeros_like(d), torch.zeros(rows, blocks, subs)
    grid = BlockGrid(kind, d, dmin, whole(low, high, rows, blocks, subs).short(), mins.short())
    codes = whole(0, kind.top, rows, blocks * kind.block).to(torch.uint8)
    packed = pack(codes, grid)
    assert packed.shape == (rows, blocks * kind.size_bytes)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.block, kind.size_bytes)
    np.testing.assert_array_equal(theirs(packed, name), grid.decode(codes).numpy())


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_solved_weights_decode_exactly_and_the_error_falls_with_the_bits(name, weighted):
    kind, weight = TYPES[name], weights()
    codes, grid = quantize(weight, kind, importance() if weighted else None)
    decoded = theirs(pack(codes, grid), name)
    np.testing.assert_array_equal(decoded, grid.decode(codes).numpy())
    assert (decoded[0, :256] == 0).all()
    error = float((grid.decode(codes)[4:] - weight[4:]).norm() / weight[4:].norm())
    assert error < {2: 0.36, 3: 0.19, 4: 0.11, 5: 0.055, 6: 0.03, 8: 0.008}[kind.bits]


# total squared error of a plain normal sample against ggml's C encoder (docs/formats/gguf.md): plain, and weighted by
# an importance that both were given
@pytest.mark.parametrize(
    ("name", "most"), [("Q2_K", 0.0876), ("Q3_K", 0.0238), ("Q4_K", 0.0057), ("Q5_K", 0.00139), ("Q6_K", 0.00035)]
)
def test_the_error_on_normal_noise_is_what_ggml_reaches(name, most):
    weight = torch.randn(32, 1024, generator=torch.Generator().manual_seed(3))
    codes, grid = quantize(weight, TYPES[name])
    assert float((grid.decode(codes) - weight).square().mean()) < most


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.has_sub_scales])
def test_the_search_beats_rounding_in_its_own_weighting(name):
    kind, weight = TYPES[name], weights()[3:]
    codes, grid = quantize(weight, kind, importance())
    w = error_weights(weight, kind, importance())
    found = (w * (grid.decode(codes) - weight).square()).sum()
    unweighted, plain = quantize(weight, kind)
    assert found < 0.97 * (w * (plain.decode(unweighted) - weight).square()).sum()


@pytest.mark.parametrize("name", TYPES)
def test_chunks_do_not_change_the_bytes(name, monkeypatch):
    weight = weights(rows=9)
    whole = pack(*quantize(weight, TYPES[name], importance()))
    monkeypatch.setattr("quantkit.machine.TOGETHER", 1024)
    assert torch.equal(whole, pack(*quantize(weight, TYPES[name], importance())))
    encoded, grid = encode(weight, TYPES[name], importance())
    assert torch.equal(whole, encoded)
    np.testing.assert_array_equal(grid.decode(encoded).numpy(), theirs(whole, name))


def test_the_worked_example_of_the_specification():
    """Values i mod 16 as Q4_K: one scale per sub-block at its top, no mins, codes that count up."""
    weight = (torch.arange(256) % 16).float().unsqueeze(0)
    packed = pack(*quantize(weight, TYPES["Q4_K"]))[0]
    assert packed[:4].tolist() == [16, 36, 0, 0]
    assert packed[4:16].tolist() == [255] * 4 + [0] * 4 + [15] * 4
    assert packed[16:20].tolist() == [0, 17, 34, 51]


@pytest.mark.parametrize("name", TYPES)
def test_weights_beyond_half_precision_are_refused(name):
    """Also where a block beside them is small."""
    weight = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    weight[1, 256:] *= 1e9
    with pytest.raises(RefusedError, match=f"too large for {name}"):
        quantize(weight, TYPES[name], where="p")


@pytest.mark.parametrize("name", [name for name in TYPES if name.endswith("_K")])
def test_large_weights_that_the_scales_hold_are_kept(name):
    weight = torch.randn(2, 512, generator=torch.Generator().manual_seed(0)) * 3e4
    weight[1, :256] = 0
    codes_OI, grid = quantize(weight, TYPES[name])
    assert (grid.decode(codes_OI) - weight).norm() < 0.4 * weight.norm()
