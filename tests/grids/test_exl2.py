"""EXL2's grid: float16 arithmetic of the reader, groups as the converter cuts them, sizes as the file has them."""

import numpy as np
import pytest
import torch

from quantkit.grids.exl2 import Exl2Grid, Mixture, column_scales, fit
from quantkit.grids.exl2_options import ATTENTION, HEADS, MLP, OPTIONS, PUBLISHED
from tests.oracles import oracle_exl2_scales

# shapes of Mistral-7B, and what the options take there
ATTENTION_SHAPES = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
MLP_SHAPES = {"gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}
ATTENTION_BITS = """2.138 2.199 2.283 2.677 3.169 3.171 4.044 4.047 4.082 4.138 4.171 4.190 4.274 4.330 5.256 5.330
    6.044 6.338 8.044"""
MLP_BITS = "2.245 2.323 2.596 2.912 3.283 3.366 3.619 4.137 4.198 4.266 4.348 5.249 5.331 6.071 6.303 6.869 8.035"


def test_scales_are_rounded_as_the_reader_rounds_them():
    largest = torch.tensor([0.5, 0.25, 0.1, 0.05, 0.0123, 0.00071]).half().float()
    unit = [0x1800, 0x1400, 0x0E66, 0x0A66, 0x0326, 0x002F]  # the last two are subnormal
    ones = column_scales(torch.ones(6, 1), largest).half().numpy()
    assert ones.view(np.uint16)[:, 0].tolist() == unit
    scale = float(column_scales(torch.tensor([[10]]), torch.tensor([0.5])))
    assert scale == 0.1953125
    grid = Exl2Grid(((4, 32),), torch.tensor([0.5]), torch.tensor([[10]], dtype=torch.uint8), torch.arange(32))
    assert float(grid.decode(torch.full((1, 32), 3, dtype=torch.uint8))[0, 0]) == -5 * scale


def test_a_vanished_scale_decodes_to_nothing_and_is_never_divided_by():
    weight = torch.full((32, 4), 1e-9)
    code, largest = fit(weight, torch.ones(32), 8, 12)
    assert not column_scales(code[None], largest[None]).any()
    code, largest = fit(torch.zeros(32, 4), torch.ones(32), 2, 12)
    assert torch.isfinite(largest)


def test_groups_of_the_specifications_example():
    groups = Mixture.of("8:.05/32 4:.1/128 3:.85/128").groups(14336)
    assert groups == ((8, 32),) * 23 + ((4, 128),) * 12 + ((3, 128),) * 94 + ((3, 32),)


@pytest.mark.parametrize("columns", [32, 64, 96, 160, 4096, 14336, 11008])
def test_every_mixture_cuts_every_width_into_whole_groups(columns):
    mixtures = {m for options in OPTIONS.values() for option in options for _, m in option.mixtures}
    for mixture in mixtures | set(HEADS.values()):
        groups = mixture.groups(columns)
        assert sum(size for _, size in groups) == columns
        assert all(size > 0 and size % 32 == 0 for _, size in groups)
        assert [bits for bits, _ in groups] == sorted((bits for bits, _ in groups), reverse=True)


@pytest.mark.parametrize(
    ("block", "shapes", "expected"),
    [(ATTENTION, ATTENTION_SHAPES, ATTENTION_BITS), (MLP, MLP_SHAPES, MLP_BITS)],
)
def test_options_take_what_the_converters_table_says(block, shapes, expected):
    weights = sum(rows * columns for rows, columns in shapes.values())
    found = [option.stored_bits(shapes) / weights for option in PUBLISHED[block]]
    assert found == pytest.approx([float(bits) for bits in expected.split()], abs=6e-4)


@pytest.mark.parametrize("block", [ATTENTION, MLP])
def test_options_between_the_converters_rows_need_no_further_solving(block):
    assert set(PUBLISHED[block]) < set(OPTIONS[block])
    assert len(OPTIONS[block]) == len(set(OPTIONS[block]))
    published = {named for option in PUBLISHED[block] for named in option.mixtures}
    assert {named for option in OPTIONS[block] for named in option.mixtures} == published


def test_heads_take_what_the_converters_table_says():
    found = {bits: round(head.stored_bits(32000, 4096) / (32000 * 4096), 3) for bits, head in HEADS.items()}
    assert found == {2: 2.735, 3: 3.282, 4: 4.439, 5: 5.189, 6: 6.345, 8: 8.032}


@pytest.mark.parametrize("candidates", [1, 12])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_scales_equal_the_oracles(bits, candidates):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(9, 32, generator=generator, dtype=torch.float64) * 0.02
    weight *= torch.rand(9, 1, generator=generator, dtype=torch.float64) ** 2
    importance = torch.rand(32, generator=generator, dtype=torch.float64)
    codes, largest = oracle_exl2_scales(weight, importance, bits=bits, candidates=candidates)
    code_O, scale_max = fit(weight.t().contiguous(), importance, bits, candidates)
    assert (code_O.tolist(), float(scale_max)) == (codes, largest)
