"""Floating-point operations of every stage of a build, counted and not timed: none may grow unnoticed.

What torch multiplies and factorises is counted, what the compiled inner loops are asked for, and what torch rounds to
codes; other elementwise work is not. That a loop does no more than what it is asked for takes is tested in
`tests/kernels/test_reads.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import getmembers, isfunction

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from quantkit import kernels
from quantkit.calibration.statistics import Statistics
from quantkit.grids.affine import AffineRule, FloatZeroRule
from quantkit.kernels import compiled, compiled_search
from quantkit.kernels.levels import BlockSearch
from quantkit.pipeline import build
from quantkit.recipe import Recipe
from quantkit.solvers.blocks import BlockSolver
from quantkit.solvers.clipping import ClippedRounding
from quantkit.solvers.exl2 import Exl2Solver
from quantkit.solvers.gptq import GptqSolver
from quantkit.solvers.weights import WeightSolver
from tests.tiny import WORDS, make_tiny

TOKENS, WINDOW, LAYERS = 8 * 64, 64, 2
SHAPE = {"hidden_size": 128, "intermediate_size": 1280}
STAGES = ("forward", "statistics", "factorise", "substitute", "solve", "loops", "blocks", "codes", "rounded")
# millions of operations by format; smaller is welcome: then put the new figure here
COUNTED = {
    # forward, statistics, factorise, substitute, solve, loops, blocks, codes, rounded
    # two streams; scales are told apart by a sum and a factor of their own
    "awq": (2768.24, 5150.61, 2804.59, 1010.83, 3581.94, 464.98, 0, 4.34, 221.68),
    "awq rounded": (1493.17, 1191.18, 0, 0, 3938.45, 0, 0, 2.17, 83.8),
    # with the measurement
    "exl2": (19720.04, 4781.51, 2805.29, 1040.97, 3123.71, 2743.63, 0, 2.28, 0),
    "gguf": (1107.3, 2399.14, 1402.99, 109.58, 1044.38, 71.02, 439.09, 0, 0),
    # rows of 1280 alone are in blocks of Q2_K and Q3_K, and swept
    "gguf narrow": (553.65, 1207.96, 701.85, 55.57, 1233.13, 57.84, 182.85, 0, 0),
    "gguf search": (553.65, 0, 0, 0, 0, 0, 861.96, 0, 0),
    # two streams, of which one has half the windows, as MLX has them, which has the ends besides
    "compressed-tensors": (1660.94, 2768.24, 1402.3, 1010.83, 3581.94, 449.84, 0, 2.16, 0),
    "gptq": (1660.94, 2768.24, 1402.3, 1010.83, 3581.94, 449.84, 0, 4.34, 0),
    "gptq plain": (1107.3, 2382.36, 1402.3, 138.41, 3389.0, 449.84, 0, 2.18, 0),
    # refits are in the loops with all they do; as torch did them, 24 of 56 operations a weight were in the loops, 16 in
    # products and 16 nowhere
    "hqq": (0, 0, 0, 0, 0, 61.64, 0, 8.65, 5.41),
    # how long a zero moves is a matter of its last bits: a hundredth more for other processors
    "hqq half-quadratic": (0, 0, 0, 0, 0, 24.29, 0, 4.33, 2.7),
    "hqq gptq": (830.47, 1384.12, 701.15, 470.81, 1583.35, 129.22, 0, 1.08, 0),
    "mlx": (1660.94, 2793.41, 1402.99, 948.96, 3235.91, 272.99, 0, 0.39, 0.25),
    "mlx rounded": (0, 0, 0, 0, 0, 0, 0, 9.58, 0),
}
QUANTIZE = {
    "awq rounded": {"solver": "round-to-nearest", "scaling_steps": 4},
    "gptq plain": {"asymmetric": 0.0},
    "gguf": {"solver": "gptq", "types": ["Q4_K_M"]},
    "gguf narrow": {"solver": "gptq", "types": ["Q2_K"]},
    "gguf search": {"types": ["Q4_K_M", "Q5_1"]},
    "hqq gptq": {"solver": "gptq"},
    "hqq half-quadratic": {"solver": "half-quadratic"},
    "mlx rounded": {"solver": "round-to-nearest"},
}
OF_ONE_LAYER = (
    "awq rounded",
    "gguf narrow",
    "gguf search",
    "hqq gptq",
    "hqq half-quadratic",
    "mlx rounded",
)  # enough for a solver
FROM_QUANTIZED = ("awq", "compressed-tensors", "gptq", "hqq gptq", "mlx")  # their default compares two streams
SOLVERS = {
    "awq": GptqSolver,
    "awq rounded": ClippedRounding,
    "compressed-tensors": GptqSolver,
    "exl2": Exl2Solver,
    "gguf": BlockSolver,
    "gguf narrow": BlockSolver,
    "gguf search": BlockSolver,
    "gptq": GptqSolver,
    "gptq plain": GptqSolver,
    "hqq": WeightSolver,
    "hqq gptq": GptqSolver,
    "hqq half-quadratic": WeightSolver,
    "mlx": GptqSolver,
    "mlx rounded": WeightSolver,
}
# counted over planned: attention is not counted on a CPU; blocks on a symmetric sum's diagonal are whole; W R is taken
# for the recorded loss
SHARES = {"forward": (0.9, 1.0), "statistics": (1.0, 1.4), "factorise": (0.99, 1.01), "solve": (1.0, 2.1)}
# channels are scaled by a walk that leaves out its last product
LIMITS = {"awq rounded": {"forward": (0.85, 1.0)}}


def multiplied(_, left: torch.Size, right: torch.Size, **others: object) -> int:
    """Operations of a product that is added in place, which torch's own table leaves out."""
    return 2 * left[0] * left[1] * right[1]


def factorised(matrix: torch.Size, *others: object, **named: object) -> int:
    """Operations of a Cholesky factorization, which torch's own table leaves out, as what solves with it."""
    return matrix[-1] ** 3 // 3


def substituted(triangle: torch.Size, right: torch.Size, *others: object, **named: object) -> int:
    """Operations of one substitution, from either side."""
    return triangle[-1] * right.numel()


UNCOUNTED = {
    torch.ops.aten.addmm_: multiplied,
    torch.ops.aten.linalg_cholesky_ex: factorised,
    torch.ops.aten.linalg_solve_triangular: substituted,
}

# stages that run inside others, by what they consist of
INSIDE = {
    "factorise": (torch.ops.aten.linalg_cholesky_ex,),
    "substitute": (torch.ops.aten.linalg_solve_triangular,),
}


def panel(weight_PO: Tensor, *others: object) -> int:
    """Operations of a panel: each channel's error into those behind it, and into the loss."""
    channels, rows = weight_PO.shape
    return rows * channels * (channels - 1) + 4 * rows * channels


def rounding(weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, *others: object) -> int:
    """Operations of a scale search: multiply, round, two comparisons, difference, square, weigh, add."""
    return 8 * len(scale_CO) * weight_IO.numel()


def choosing(weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, top: int, worth_turning: float) -> int:
    """The same, and all but the first two once more for the negatives."""
    return (14 if worth_turning else 8) * len(scale_CO) * weight_IO.numel()


def moments(weight_IO: Tensor, *others: object) -> int:
    """Operations of one grid's moments: multiply, round, two comparisons, two differences, five sums, three of squares
    or products.
    """
    return 19 * weight_IO.numel()


def block_search(x_NSL: Tensor, w_NSL: Tensor, search: BlockSearch) -> int:
    """Operations of a K-quant's search: starts, of which all but the first are fitted first; the grid they give; for
    each refinement the neighbours, another fit and what it gives; the codes.
    """
    starts, neighbours = len(search.starts), 8 if search.min_top else 2
    tried = starts if search.offset else 2 * starts - 1
    return 11 * x_NSL.numel() * (tried + 1 + search.refinements * (neighbours + 2) + 1)


def range_search(
    x_LM: Tensor, w_LM: Tensor, step_CM: Tensor, less_CM: Tensor, top: int, *, signed: bool, refits: int
) -> int:
    """Operations of the older block types with a min: candidates, of which all but the first are fitted, and fits."""
    return 11 * x_LM.numel() * (2 * (len(step_CM) + refits) - 1)


def offset_search(x_LM: Tensor, w_LM: Tensor, largest_M: Tensor, code_C: Tensor, *others: object) -> int:
    """Operations of those without: multiply, round, two comparisons, two products and a sum for each of two sums."""
    return 10 * x_LM.numel() * len(code_C)


def each_once(operations: int, values: Tensor, *others: object, **named: object) -> int:
    """Operations of what goes through all values once."""
    return operations * values.numel()


# the inner loops, with the stage they count for
LOOPS: dict[str, tuple[str, Callable[..., int]]] = {
    "solve_panel": ("loops", panel),
    "rounding_errors": ("loops", rounding),
    "best_scales": ("loops", choosing),
    "code_moments": ("loops", moments),
    "search_blocks": ("blocks", block_search),
    "fit_ranges": ("blocks", range_search),
    "fit_offset": ("blocks", offset_search),
    # two comparisons for the ends, difference, quotient, round, two comparisons
    "round_groups": ("codes", partial(each_once, 7)),
    # two differences and a product for what a code stands for, another difference, two squares and their sums
    "squared_errors": ("codes", partial(each_once, 8)),
    # shift, or, and of a code the shift and mask
    "pack": ("codes", partial(each_once, 2)),
    "unpack": ("codes", partial(each_once, 2)),
    "dequantize": ("codes", partial(each_once, 2)),
}


# of codes that torch takes: quotient, sum, round, two comparisons
ROUNDED, ROUNDERS = partial(each_once, 5), (AffineRule, FloatZeroRule)


@contextmanager
def counted_into(totals: dict[str, int], stage: str) -> Iterator[None]:
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        yield
    operations = counter.get_flop_counts().get("Global", {})
    inside = {name: sum(operations.get(each, 0) for each in kinds) for name, kinds in INSIDE.items()}
    totals[stage] += counter.get_total_flops() - sum(inside.values())
    for name, count in inside.items():
        # what runs inside is in here once more
        totals[name] = max(totals[name], count)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Checkpoints by the number of their layers, and a text."""
    folder = tmp_path_factory.mktemp("operations")
    (folder / "text.txt").write_text(WORDS * 100, encoding="utf-8")
    models = {layers: make_tiny(folder / str(layers), "mistral", layers=layers, **SHAPE) for layers in (1, LAYERS)}
    return models, folder / "text.txt"


def counts(name: str, sources, tmp_path, monkeypatch) -> tuple[dict[str, float], dict[str, float]]:
    """Millions of operations of each stage of a build, and what its plan said they would be at least."""
    models, text = sources
    model = models[1 if name in OF_ONE_LAYER else LAYERS]
    totals = dict.fromkeys(("all", *STAGES[1:]), 0)
    form, *_ = name.split()
    solver, looped = SOLVERS[name], []
    plain_solve, plain_add = solver.solve, Statistics.add

    def solve(self, *arguments):
        with counted_into(totals, "solve"):
            found = list(plain_solve(self, *arguments))
        return iter(found)

    def add(self, *arguments):
        with counted_into(totals, "statistics"):
            plain_add(self, *arguments)

    def counted(plain, stage, operations):
        def run(*arguments, **named):
            # threads may run several at a time
            looped.append((stage, operations(*arguments, **named)))
            return plain(*arguments, **named)

        return run

    for loop, (stage, operations) in LOOPS.items():
        module = compiled_search if loop == "search_blocks" else compiled
        monkeypatch.setattr(module, loop, counted(getattr(module, loop), stage, operations))
    for rule in ROUNDERS:
        monkeypatch.setattr(rule, "encode", counted(rule.encode, "rounded", lambda _, *given: ROUNDED(*given)))
    # counted is what this thread asks for: no other is to take rows for itself
    monkeypatch.setattr("quantkit.machine.FEWEST_ROWS", 1 << 30)
    monkeypatch.setattr(solver, "solve", solve)
    monkeypatch.setattr(Statistics, "add", add)
    recipe = Recipe.of(
        {
            "format": form,
            "model": {"id": str(model)},
            "quantize": QUANTIZE.get(name, {}),
            "calibration": {
                "texts": {str(text): TOKENS // WINDOW},
                "window_tokens": WINDOW,
                "activations": "quantized" if name in FROM_QUANTIZED else "float",
            },
        }
    )
    with counted_into(totals, "all"):
        made = build(recipe, out=tmp_path / "out", device=torch.device("cpu"), validated=False)
    totals["forward"] = totals.pop("all") - totals["solve"] - totals["statistics"]
    for stage, operations in looped:
        totals[stage] += operations
    return millions(totals), millions(made.record["build"]["operations"])


def millions(operations: dict[str, float]) -> dict[str, float]:
    return {stage: round(count / 1e6, 2) for stage, count in operations.items()}


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_no_stage_takes_more_operations_than_before(name, sources, tmp_path, monkeypatch):
    found, planned = counts(name, sources, tmp_path, monkeypatch)
    print(f'"{name}": {found}, planned {planned}')
    before = dict(zip(STAGES, COUNTED[name], strict=True))
    assert all(found[stage] <= before[stage] for stage in STAGES), f"{found} against {before}"
    assert all(found[stage] >= 0.98 * before[stage] for stage in STAGES), f"fewer: {found}; lower the table"
    # searches are not planned, products all are
    assert all(planned.get(stage) or not found[stage] for stage in SHARES), f"{found} of {planned}"
    # scaling channels is walking; a survey does a bit of everything
    further = planned.get("prepare", 0.0) + planned.get("survey", 0.0)
    again = {"forward": further}
    if name == "awq":
        # its preparation walks once where the build does one and a half times, then sums, and factorises as for solving
        again = {"forward": planned["forward"] / 1.5, "factorise": planned["factorise"]}
        again["statistics"] = further - sum(again.values())
    expected = {stage: planned[stage] + again.get(stage, 0.0) for stage in SHARES if stage in planned}
    # where two streams are compared, most of what is substituted is the correction, planned as a part of solving
    corrected = found["substitute"] if name in FROM_QUANTIZED else 0.0
    taken = found | {"solve": found["solve"] + corrected}
    shares = {stage: taken[stage] / least for stage, least in expected.items()}
    limits = SHARES | LIMITS.get(name, {}) if "survey" not in planned else {"forward": (0.8, 1.0)}
    bounds = {stage: limits[stage] for stage in shares if stage in limits}
    assert all(low <= shares[stage] <= high for stage, (low, high) in bounds.items()), f"{shares} of {planned}"


def test_every_loop_that_is_compiled_is_counted():
    loops = {name for name, loop in getmembers(kernels, isfunction) if loop.__module__ == kernels.__name__}
    assert {name for name in loops if not name.startswith("_")} == set(LOOPS)
