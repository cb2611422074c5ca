"""Every implementation of the inner loops against plain torch, at shapes that fill no block, and on other threads.

`numba` is what a CPU runs; `triton` what a GPU runs: interpreted here, compiled where there is one (`make test-gpu`).
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from quantkit.grids.blocks import TYPES, fit, search, steps_of
from quantkit.kernels import compiled, reference
from quantkit.kernels.levels import Levels

CUDA = torch.cuda.is_available()
TRITON = pytest.param(
    "gpu",
    "cuda" if CUDA else "cpu",
    marks=[pytest.mark.gpu] if CUDA else [pytest.mark.skipif(find_spec("triton") is None, reason="no triton here")],
    id="triton" if CUDA else "triton, interpreted",
)
each_implementation = pytest.mark.parametrize(
    ("module", "device"), [pytest.param("compiled", "cpu", id="numba"), TRITON]
)
SHAPES = ((1, 1), (8, 63), (5, 20), (33, 40), (128, 3))  # an interpreter takes a second for a hundred channels
LARGE = ((64, 500), (128, 300), (100, 129))  # for numba, which has blocks of rows
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
    codes = torch.full(weight.shape, 255, dtype=torch.uint8, device=weight.device)
    error = torch.full_like(weight, torch.nan)
    return codes, error, kernels.solve_panel(weight, feedback, upper, levels, codes, error)


def on(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def levels_on(device: str, levels: Levels) -> Levels:
    return Levels(*on(device, levels.step_PO, levels.shift_PO, levels.less_PO), levels.top, levels.half)


@each_implementation
@pytest.mark.parametrize("kind", ["zero per row", "step and minimum per channel", "products of float16"])
@pytest.mark.parametrize(("channels", "rows"), SHAPES)
def test_a_panel_is_solved_as_in_plain_torch(channels, rows, kind, module, device):
    arguments = panel(channels, rows, torch.float64)
    levels = levels_of(kind, channels, rows, torch.float64)
    found = solved(import_module(f"quantkit.kernels.{module}"), *on(device, *arguments), levels_on(device, levels))
    codes, error, lost = on("cpu", *found)
    expected_codes, expected_error, expected_lost = solved(reference, *arguments, levels)
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(error, expected_error, **CLOSE[torch.float64])
    torch.testing.assert_close(lost, expected_lost, **CLOSE[torch.float64])


@pytest.mark.parametrize("kind", ["zero per row", "step and minimum per channel", "products of float16"])
@pytest.mark.parametrize(("channels", "rows"), LARGE)
def test_a_large_panel_is_solved_as_in_plain_torch(channels, rows, kind):
    test_a_panel_is_solved_as_in_plain_torch(channels, rows, kind, "compiled", "cpu")


@each_implementation
def test_a_panel_may_lie_inside_a_larger_matrix(module, device):
    """As the solvers hand it on: rows of what is larger, filled where they lie and nowhere else."""
    kernels = import_module(f"quantkit.kernels.{module}")
    weight, feedback, upper = on(device, *panel(40, 70, torch.float32))
    levels = levels_on(device, levels_of("zero per row", 40, 70, torch.float32))
    here = slice(8, 24)
    codes = torch.full((40, 70), 255, dtype=torch.uint8, device=device)
    error = torch.full((40, 70), 7.0, device=device)
    lost = kernels.solve_panel(weight[here], feedback[here], upper[here, here], levels, codes[here], error[here])
    alone = solved(kernels, *(part[here].clone() for part in (weight, feedback)), upper[here, here].clone(), levels)
    assert all(torch.equal(one, two) for one, two in zip((codes[here], error[here], lost), alone, strict=True))
    assert bool((codes[:8] == 255).all() and (error[24:] == 7).all())


@each_implementation
def test_errors_are_of_what_a_reader_decodes(module, device):
    """In float32, bit for bit: what the solver fed forward is what the file stands for."""
    weight, feedback, upper = on(device, *panel(16, 40, torch.float32))
    levels = levels_on(device, levels_of("zero per row", 16, 40, torch.float32))
    codes, error, _ = solved(import_module(f"quantkit.kernels.{module}"), weight, feedback, upper, levels)
    decoded = (codes.float() - levels.shift_PO) * levels.step_PO
    assert torch.equal(error, weight - decoded)


def test_products_are_rounded_as_float16_rounds_them():
    """Every step of 8 bits times every positive float16 that does not carry it beyond the largest; subnormals too."""
    steps = torch.arange(-128, 128, dtype=torch.float32)
    scales = torch.arange(1, 0x5C00, dtype=torch.int16).view(torch.float16).float()
    products = torch.outer(scales, steps).flatten().contiguous()
    rounded = products.clone().numpy()
    compiled.round_to_half(rounded, rounded.view("int32"))
    assert torch.equal(torch.from_numpy(rounded), products.half().float())


def test_lost_is_the_image_of_the_errors_and_the_feedback():
    weight, feedback, upper = panel(48, 20, torch.float64)
    _, error, lost = solved(compiled, weight, feedback, upper, levels_of("zero per row", 48, 20, torch.float64))
    torch.testing.assert_close(lost, (feedback + upper.T @ error).square().sum(0))


@each_implementation
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", CLOSE)
def test_rounding_errors_are_those_of_plain_torch(dtype, rows, module, device):
    kernels = import_module(f"quantkit.kernels.{module}")
    weight, importance = random(41, rows, dtype=dtype), random(41, dtype=dtype, seed=1).abs()
    scale = random(3, rows, dtype=dtype, seed=2).abs() + 0.1
    zero = random(3, rows, dtype=dtype, seed=3) + 3
    there = on(device, weight, importance, scale, zero)
    found = kernels.rounding_errors(*there, 7)
    expected = reference.rounding_errors(weight, importance, scale, zero, 7)
    torch.testing.assert_close(found.cpu(), expected, **CLOSE[dtype])
    # weights that lie apart in memory are the same weights
    assert torch.equal(found, kernels.rounding_errors(there[0].t().contiguous().t(), *there[1:], 7))


@each_implementation
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", CLOSE)
def test_moments_are_those_of_the_nearest_codes(dtype, rows, module, device):
    """Of a regression written out: weights and codes, weighted, in float64."""
    kernels = import_module(f"quantkit.kernels.{module}")
    weight, importance = random(41, rows, dtype=dtype), random(41, dtype=dtype, seed=1).abs()
    weight[:, -1] = 0.9
    scale, zero = random(rows, dtype=dtype, seed=2).abs() + 0.1, random(rows, dtype=dtype, seed=3) + 3
    there = on(device, weight, importance, scale, zero)
    found = kernels.code_moments(*there, 7)
    ratio = (weight / scale + zero).double()
    code = ratio.round().clamp(0, 7)
    share = (importance / importance.sum()).double()
    mean, miss, apart = share @ code, share @ (ratio - code), code - share @ code
    lost = importance.double() @ (scale * (ratio - code)).square()
    expected = torch.stack([lost, mean, miss, share @ apart.square(), share @ (apart * (ratio - code))])
    torch.testing.assert_close(found.cpu(), expected.to(dtype), **CLOSE[dtype])
    assert float(found[3, -1]) == 0, "codes that are all the same"
    torch.testing.assert_close(found.cpu(), reference.code_moments(weight, importance, scale, zero, 7), **CLOSE[dtype])
    assert torch.equal(found, kernels.code_moments(there[0].t().contiguous().t(), *there[1:], 7))


@each_implementation
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("worth_turning", [0.0, 0.75, 1.0])
def test_the_best_scale_is_the_first_of_least_rounding_error(worth_turning, dtype, rows, module, device):
    kernels = import_module(f"quantkit.kernels.{module}")
    # more channels than a program takes at a time
    weight, importance = random(70, rows, dtype=dtype), random(70, dtype=dtype, seed=1).abs()
    scale = random(5, rows, dtype=dtype, seed=2).abs() * 0.5 + 0.1
    scale[3] = scale[1]
    scale[0, 0] = 0  # beside others that are none
    scale[:, -1], weight[:, -1] = 0, 0
    there = on(device, weight, importance, scale)
    found = kernels.best_scales(*there, 7, worth_turning).cpu()
    usable = torch.where(scale == 0, 1.0, scale)
    errors = [
        reference.rounding_errors(weight, importance, either, torch.full_like(scale, 4.0), 7)
        for either in (usable, -usable)
    ]
    least, turned_least = (error.amin(0) for error in errors)
    turns = turned_least < least * worth_turning
    clear = ~torch.isclose(turned_least, least * worth_turning, **CLOSE[dtype])
    assert torch.equal((found >= 5)[clear], turns[clear])
    wanted = torch.where(found >= 5, turned_least, least)
    torch.testing.assert_close(torch.cat(errors).gather(0, found[None])[0], wanted, **CLOSE[dtype])
    assert not bool((found % 5 == 3).any()), "the later of two alike"
    assert int(found[-1]) == 0, "zeros are as well off with the first as it is"
    assert len(set(found.tolist())) > 1 or rows == 1
    assert bool((found >= 5).any()) == (worth_turning > 0) or rows < 128
    apart = there[0].t().contiguous().t()
    assert torch.equal(found, kernels.best_scales(apart, *there[1:], 7, worth_turning).cpu())


def groups_of(rows: int, columns: int) -> torch.Tensor:
    """Weights whose first rows are zeros of either sign, of one value, of one sign, far from 0, and very small."""
    weight = random(rows, columns, dtype=torch.float32)
    weight[0] = torch.tensor([0.0, -0.0]).repeat(columns // 2)
    weight[1], weight[2] = 3, -2
    weight[3:5] = torch.stack([weight[3].abs(), -weight[4].abs()])
    weight[5] = 100 + weight[5] / 10
    weight[6] *= 1e-8
    weight[7] = torch.tensor([1.0, -1.0]).repeat(columns // 2)
    return weight.bfloat16().float()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("length", [32, 64, 128])
def test_groups_are_rounded_to_the_bits_of_plain_torch(length, bits):
    weight = groups_of(11, 3 * length)
    found, expected = (
        (*kernels.round_groups(weight, length, 2**bits - 1, codes), codes)
        for kernels, codes in ((compiled, torch.full(weight.shape, 255).byte()), (reference, weight.byte()))
    )
    assert all(torch.equal(*two) for two in zip(found, expected, strict=True))
    step, low, codes = found
    assert not torch.signbit(low[0]).any(), "no -0 in a file"
    decoded = codes.unflatten(1, (-1, length)) * step[..., None] + low[..., None]
    off = (decoded.flatten(1) - weight).abs().unflatten(1, (-1, length))
    # steps are stretched or squeezed so that 0 is on the grid: by half a step in all at most, and more for far ones
    near = torch.arange(11) != 5
    assert bool((off[near] <= 1.01 * step[near].abs()[..., None]).all())


@pytest.mark.parametrize("length", [1, 64])
def test_squared_errors_are_of_what_codes_stand_for(length):
    """Against sums in float64; a group of one is what grids over rows have."""
    weight, groups = random(9, 192, dtype=torch.float32), 192 // length
    codes = torch.randint(0, 16, weight.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    step, shift, less = (random(9, groups, dtype=torch.float32, seed=seed) for seed in (2, 3, 4))
    size, zero, minus = (part.double().repeat_interleave(length, 1) for part in (step, shift, less))
    off = (codes.double() - zero) * size - minus - weight.double()
    expected = torch.stack([off.square().sum(), weight.double().square().sum()])
    for kernels in (compiled, reference):
        found = torch.stack(kernels.squared_errors(weight, codes, step, shift, less))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@each_implementation
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("runs", "width"), [(1, 1), (3, 63), (2, 1030)])
def test_packing_is_that_of_plain_torch_and_is_undone(runs, width, bits, module, device):
    kernels = import_module(f"quantkit.kernels.{module}")
    codes = torch.randint(
        0, 2**bits, (32 * runs, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    codes[0], codes[-1] = 2**bits - 1, 2**bits - 1  # the sign bit of the words, too
    words = kernels.pack(codes.to(device), bits)
    assert torch.equal(words.cpu(), reference.pack(codes, bits))
    assert torch.equal(kernels.unpack(words, bits).cpu(), codes)
    # as AWQ and GPTQ pack along rows
    assert torch.equal(kernels.pack(codes.t().contiguous().t().to(device), bits), words)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 1, 1), (8, 63, 4), (3, 1500, 12)])
def test_decoding_is_that_of_plain_torch(rows, columns, groups, dtype, module, device):
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scale = random(rows, groups, dtype=torch.float32, seed=2).abs() * 0.01
    zero = random(rows, groups, dtype=torch.float32, seed=3) * 8
    group = torch.randint(0, groups, (columns,), dtype=torch.int32, generator=torch.Generator().manual_seed(4))
    found = import_module(f"quantkit.kernels.{module}").dequantize(*on(device, codes, scale, zero, group), dtype)
    assert found.dtype == dtype
    # the interpreter cuts bfloat16 off where a GPU rounds
    cut = 2.0**-7 if (dtype, module, device) == (torch.bfloat16, "gpu", "cpu") else 0.0
    expected = reference.dequantize(codes, scale, zero, group, dtype)
    torch.testing.assert_close(found.cpu(), expected, rtol=cut, atol=0.0)


@pytest.mark.parametrize("order", ["runs", "shuffled", "last run short", "one group"])
def test_a_weight_is_decoded_with_its_channels_group(order):
    groups = {
        "runs": torch.arange(96) // 32,
        "shuffled": torch.randperm(96, generator=torch.Generator().manual_seed(5)) // 32,
        "last run short": torch.arange(80) // 32,
        "one group": torch.zeros(96, dtype=torch.int64),
    }
    group = groups[order].to(torch.int32)
    columns, count = len(group), int(group.max()) + 1
    codes = torch.randint(0, 16, (4, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scale = random(4, count, dtype=torch.float32, seed=2).abs()
    zero = random(4, count, dtype=torch.float32, seed=3) * 8
    for laid_out in (codes, codes.t().contiguous().t()):
        found = reference.dequantize(laid_out, scale, zero, group)
        for row in range(4):
            for column in range(columns):
                place = row, int(group[column])
                assert found[row, column] == (codes[row, column].float() - zero[place]) * scale[place]


# of ggml's types those whose sub-blocks differ in length, codes or what is searched
BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q5_0", "Q5_1", "Q8_0")


def small_blocks(kind, count: int) -> list[torch.Tensor]:
    """Weights, and how their errors weigh; one block all zero, one all alike, one with a far outlier."""
    weight = random(kind.sub, count, dtype=torch.float32) * 0.05
    weight[:, :1] = 0
    weight[:, 1:2] = 0.25
    weight[3, 2:3] = 40.0
    return [weight, random(kind.sub, count, dtype=torch.float32, seed=1).abs() + 0.01]


@each_implementation
@pytest.mark.parametrize("count", [1, 63, 300])
@pytest.mark.parametrize("name", BLOCKS)
def test_fitted_blocks_are_as_good_as_those_of_plain_torch(name, count, module, device):
    """A step may come out another where two are as good; its error may not."""
    kind = TYPES[name]
    kernels = import_module(f"quantkit.kernels.{module}")
    weight, importance = small_blocks(kind, count)
    if kind.offset:
        largest = weight.gather(0, weight.abs().argmax(0, keepdim=True))[0]
        arguments = (weight, importance, largest, torch.tensor([-kind.offset - 0.4, -kind.offset, kind.offset - 1.3]))
        step = kernels.fit_offset(*on(device, *arguments), kind.offset, kind.top).cpu()
        expected_step = reference.fit_offset(*arguments, kind.offset, kind.top)
        less = expected_less = torch.zeros_like(step)
    else:
        span, low = weight.amax(0) - weight.amin(0), weight.amin(0).clamp(max=0)
        steps = torch.stack([span / (kind.top + extra) for extra in (0.0, -0.5, 0.4, 1.0)])
        arguments = (weight, importance, steps, -low.expand_as(steps))
        wanted = {"top": kind.top, "signed": kind.min_top == 1, "refits": 2}
        step, less = on("cpu", *kernels.fit_ranges(*on(device, *arguments), **wanted))
        expected_step, expected_less = reference.fit_ranges(*arguments, **wanted)
    both = torch.stack([step, expected_step]), torch.stack([less, expected_less])
    error, expected = reference.block_errors(weight, importance, *both, kind.offset, kind.top)
    assert torch.isfinite(step).all()
    assert bool((error <= 1.001 * expected + 1e-6).all()), f"{(error - expected).max()} above"
    assert ((step - expected_step).abs() <= 1e-4 * expected_step.abs()).float().mean() > 0.97


@pytest.mark.parametrize("blocks", [1, 5, 40])
@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.has_sub_scales])
@each_implementation
def test_the_whole_search_finds_what_its_steps_find(module, device, name, blocks, monkeypatch):
    kind, whole = TYPES[name], import_module(f"quantkit.kernels.{module}_search")
    monkeypatch.setattr("quantkit.kernels._searching", lambda _: whole)
    shape = (blocks, kind.block // kind.sub, kind.sub)
    weight = random(*shape, dtype=torch.float32) * 0.05
    weight[0, 0], weight[-1, 1], weight[0, 2, 3] = 0, 0.25, 4.0
    weight[-1, 3:6] = weight[-1, 3:6].abs() + 0.1  # would be on a line that begins above 0, which no min can say
    if kind.offset:
        # weights all alike are exact with any code, and what that does to the rest of the block is chance
        weight[-1, 1, 0] = 0.05
    importance = random(*shape, dtype=torch.float32, seed=1).abs() + 0.01
    importance[0, 3] = 0
    if blocks == 40:
        importance = importance[:1].expand(shape)  # as GPTQ has them: what errors weigh is the same for all rows
    found, codes = search(*on(device, weight, importance), kind)
    found, codes = on("cpu", *found), codes.cpu()
    expected = fit(weight, importance, kind)
    error, expected_error = (
        block_errors_of(weight, importance, *(part.flatten() for part in steps_of(each)), kind)
        for each in (found, expected)
    )
    assert bool((error <= 1.0005 * expected_error + 1e-9).all()), f"{(error / expected_error).max()} of the error"
    # sums are taken in another order, so a scale may come out another where two are as good
    assert all((a == b).float().mean() > 0.9 for a, b in zip(found, expected, strict=True))
    step, less = (part.unsqueeze(2) for part in steps_of(found))
    away = (step * (codes.float() - kind.offset) - less - weight).square()
    torch.testing.assert_close((importance * away).sum((1, 2)), error, rtol=1e-4, atol=1e-8)


def block_errors_of(weight, importance, step, less, kind) -> torch.Tensor:
    """The error of every block on a grid."""
    flat = (part.flatten(0, 1).t().contiguous() for part in (weight, importance))
    return reference.block_errors(*flat, step[None], less[None], kind.offset, kind.top).view(len(weight), -1).sum(1)


def test_threads_change_no_bit():
    weight, feedback, upper = panel(128, 1000, torch.float32)
    levels = levels_of("zero per row", 128, 1000, torch.float32)
    scale, zero = levels.step_PO.expand(3, -1), levels.shift_PO.expand(3, -1)
    tried = scale * torch.tensor([[1.0], [0.8], [0.6]])
    blocks, q2_k = random(90, 16, 16, dtype=torch.float32), TYPES["Q2_K"]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            grid, codes = search(blocks, blocks.abs(), q2_k)
            found.append(
                (
                    *grid,
                    codes,
                    *solved(compiled, weight, feedback, upper, levels),
                    compiled.rounding_errors(weight, upper[0].abs(), scale, zero, 15),
                    compiled.best_scales(weight, upper[0].abs(), tried, 15, 0.0),
                    compiled.best_scales(weight, upper[0].abs(), tried, 15, 1.0),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton here")
@pytest.mark.parametrize(("which", "number"), [("few", 17), pytest.param("all", 52, marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_gpus_fuses_nothing_and_keeps_to_registers(which, number, tmp_path):
    """To machine code, where there is no GPU too: what is interpreted above are the same functions."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_gpus", which],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == number
    wanted = {"fused": 0, "spilled": 0}
    assert all(each["bytes"] > 1000 and wanted.items() <= each.items() for each in found.values()), found
