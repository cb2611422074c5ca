"""The compiled inner loops against plain torch, at shapes that fill no block, and against other numbers of threads."""

import pytest
import torch

from quantkit.kernels import compiled, reference
from quantkit.kernels.levels import Levels

ROWS = (1, 7, 128, 129, 300)
# the decoded value is a difference of products, so its last bits depend on the order of operations
CLOSE = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def panel(channels: int, rows: int, dtype: torch.dtype):
    upper = torch.triu(random(channels, channels, dtype=dtype, seed=3) * 0.1) + torch.eye(channels, dtype=dtype)
    return random(channels, rows, dtype=dtype), random(channels, rows, dtype=dtype, seed=1) * 0.1, upper


def levels_of(kind: str, channels: int, rows: int, dtype: torch.dtype) -> Levels:
    if kind == "zero per row":
        scale = random(rows, dtype=dtype, seed=4).abs() * 0.2 + 0.01
        return Levels.of_zeros(scale, random(rows, dtype=dtype, seed=5) + 7, 15)
    if kind == "products of float16":
        scale = (
            (random(rows, dtype=dtype, seed=4).abs() * 10.0 ** (-6 * torch.rand(rows, dtype=dtype))).half().to(dtype)
        )
        return Levels(*(part.unsqueeze(0) for part in (scale, scale * 0 + 128, scale * 0)), 255, half=True)
    step = random(channels, rows, dtype=dtype, seed=4) * 0.2  # ggml's may be negative, and 0
    step[0, 0] = 0
    less = random(channels, rows, dtype=dtype, seed=5).abs()
    return Levels(step, torch.full((1, rows), 4.0, dtype=dtype), less, 7)


def solved(kernels, weight, feedback, upper, levels):
    codes = torch.full(weight.shape, 255, dtype=torch.uint8)
    error = torch.full_like(weight, torch.nan)
    return codes, error, kernels.solve_panel(weight, feedback, upper, levels, codes, error)


@pytest.mark.parametrize("kind", ["zero per row", "step and minimum per channel", "products of float16"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("channels", [1, 5, 32, 128])
def test_a_panel_is_solved_as_in_plain_torch(channels, rows, kind):
    arguments = panel(channels, rows, torch.float64)
    levels = levels_of(kind, channels, rows, torch.float64)
    codes, error, lost = solved(compiled, *arguments, levels)
    expected_codes, expected_error, expected_lost = solved(reference, *arguments, levels)
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(error, expected_error, **CLOSE[torch.float64])
    torch.testing.assert_close(lost, expected_lost, **CLOSE[torch.float64])


def test_errors_are_of_what_a_reader_decodes():
    """In float32, bit for bit: what the solver fed forward is what the file stands for."""
    weight, feedback, upper = panel(64, 200, torch.float32)
    levels = levels_of("zero per row", 64, 200, torch.float32)
    codes, error, _ = solved(compiled, weight, feedback, upper, levels)
    decoded = (codes.float() - levels.shift_PO) * levels.step_PO
    assert torch.equal(error, weight - decoded)


def test_products_are_rounded_as_float16_rounds_them():
    """Every step of 8 bits times every positive float16 that does not carry it beyond the largest; subnormals too."""
    steps = torch.arange(-128, 128, dtype=torch.float32)
    scales = torch.arange(1, 0x5C00, dtype=torch.int16).view(torch.float16).float()
    products = torch.outer(scales, steps).flatten().contiguous()
    rounded = products.clone().numpy()
    compiled._round_to_half(rounded, rounded.view("int32"))
    assert torch.equal(torch.from_numpy(rounded), products.half().float())


def test_lost_is_the_image_of_the_errors_and_the_feedback():
    weight, feedback, upper = panel(48, 20, torch.float64)
    _, error, lost = solved(compiled, weight, feedback, upper, levels_of("zero per row", 48, 20, torch.float64))
    torch.testing.assert_close(lost, (feedback + upper.T @ error).square().sum(0))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", CLOSE)
def test_rounding_errors_are_those_of_plain_torch(dtype, rows):
    weight, importance = random(40, rows, dtype=dtype), random(40, dtype=dtype, seed=1).abs()
    scale = random(3, rows, dtype=dtype, seed=2).abs() + 0.1
    zero = random(3, rows, dtype=dtype, seed=3) + 3
    found = compiled.rounding_errors(weight, importance, scale, zero, 7)
    torch.testing.assert_close(found, reference.rounding_errors(weight, importance, scale, zero, 7), **CLOSE[dtype])
    # weights that lie apart in memory are the same weights
    assert torch.equal(found, compiled.rounding_errors(weight.t().contiguous().t(), importance, scale, zero, 7))


def test_threads_change_no_bit():
    weight, feedback, upper = panel(128, 1000, torch.float32)
    levels = levels_of("zero per row", 128, 1000, torch.float32)
    scale, zero = levels.step_PO.expand(3, -1), levels.shift_PO.expand(3, -1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(
                (
                    *solved(compiled, weight, feedback, upper, levels),
                    compiled.rounding_errors(weight, upper[0].abs(), scale, zero, 15),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
