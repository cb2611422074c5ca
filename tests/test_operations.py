"""Floating-point operations of every stage of a build, counted and not timed: none may grow unnoticed.

What torch multiplies and factorises is counted, and what the compiled inner loops do; elementwise work in torch is not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from quantkit.calibration.statistics import Statistics
from quantkit.kernels import compiled
from quantkit.pipeline import build
from quantkit.recipe import Recipe
from tests.tiny import WORDS, make_tiny

TOKENS, WINDOW, LAYERS = 8 * 64, 64, 2
SHAPE = {"hidden_size": 128, "intermediate_size": 1280, "layers": LAYERS}
STAGES = ("forward", "statistics", "factorise", "substitute", "solve", "loops")
# millions of operations by format; smaller is welcome: then put the new figure here
COUNTED = {
    # two streams; scales are told apart by a sum and a factor of their own
    "awq": dict(zip(STAGES, (6224.35, 2768.24, 2804.59, 1010.83, 3581.94, 464.98), strict=True)),
    # with the measurement
    "exl2": dict(zip(STAGES, (19720.04, 4781.51, 2805.29, 1040.97, 1164.71, 2606.81), strict=True)),
    "gguf": dict(zip(STAGES, (1107.3, 2399.14, 1402.99, 109.58, 1044.38, 71.02), strict=True)),
    # two streams, of which one has half the windows, as MLX has them, which has the ends besides
    "compressed-tensors": dict(zip(STAGES, (1660.94, 2768.24, 1402.3, 1010.83, 3581.94, 464.98), strict=True)),
    "gptq": dict(zip(STAGES, (1660.94, 2768.24, 1402.3, 1010.83, 3581.94, 464.98), strict=True)),
    "gptq plain": dict(zip(STAGES, (1107.3, 2382.36, 1402.3, 138.41, 3389.0, 464.98), strict=True)),
    # refits are in the loops with all they do; as torch did them, 24 of 56 operations a weight were in the loops, 16 in
    # products and 16 nowhere
    "hqq": dict(zip(STAGES, (0, 0, 0, 0, 0, 61.64), strict=True)),
    "mlx": dict(zip(STAGES, (1660.94, 2793.41, 1402.99, 948.96, 3235.91, 272.99), strict=True)),
}
QUANTIZE = {"gptq plain": {"asymmetric": 0.0}, "gguf": {"solver": "gptq", "types": ["Q4_K_M"]}}
FROM_QUANTIZED = ("awq", "compressed-tensors", "gptq", "mlx")  # their default compares two streams
SOLVERS = {
    "awq": "quantkit.solvers.gptq.GptqSolver",
    "compressed-tensors": "quantkit.solvers.gptq.GptqSolver",
    "exl2": "quantkit.solvers.exl2.Exl2Solver",
    "gguf": "quantkit.solvers.blocks.BlockSolver",
    "gptq": "quantkit.solvers.gptq.GptqSolver",
    "hqq": "quantkit.solvers.weights.WeightSolver",
    "mlx": "quantkit.solvers.gptq.GptqSolver",
}
# counted over planned: attention is not counted on a CPU; blocks on a symmetric sum's diagonal are whole; W R is taken
# for the recorded loss
SHARES = {"forward": (0.9, 1.0), "statistics": (1.0, 1.4), "factorise": (0.99, 1.01), "solve": (1.0, 2.1)}


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


def moments(weight_IO: Tensor, *others: object) -> int:
    """Operations of one grid's moments: multiply, round, two comparisons, two differences, five sums, three of squares
    or products.
    """
    return 19 * weight_IO.numel()


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
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("operations")
    (folder / "text.txt").write_text(WORDS * 100, encoding="utf-8")
    return make_tiny(folder / "model", "mistral", **SHAPE), folder / "text.txt"


def counts(name: str, source, tmp_path, monkeypatch) -> tuple[dict[str, float], dict[str, float]]:
    """Millions of operations of each stage of a build, and what its plan said they would be at least."""
    model, text = source
    totals = dict.fromkeys(("all", *STAGES[1:]), 0)
    form, *_ = name.split()
    module, _, cls = SOLVERS[form].rpartition(".")
    solver = getattr(__import__(module, fromlist=[cls]), cls)
    plain_solve, plain_add = solver.solve, Statistics.add

    def solve(self, *arguments):
        with counted_into(totals, "solve"):
            found = list(plain_solve(self, *arguments))
        return iter(found)

    def add(self, *arguments):
        with counted_into(totals, "statistics"):
            plain_add(self, *arguments)

    def counted(plain, operations):
        def run(*arguments):
            totals["loops"] += operations(*arguments)
            return plain(*arguments)

        return run

    monkeypatch.setattr(compiled, "solve_panel", counted(compiled.solve_panel, panel))
    for search, operations in (("rounding_errors", rounding), ("best_scales", rounding), ("code_moments", moments)):
        monkeypatch.setattr(compiled, search, counted(getattr(compiled, search), operations))
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
    return millions(totals), millions(made.record["build"]["operations"])


def millions(operations: dict[str, float]) -> dict[str, float]:
    return {stage: round(count / 1e6, 2) for stage, count in operations.items()}


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_no_stage_takes_more_operations_than_before(name, source, tmp_path, monkeypatch):
    found, planned = counts(name, source, tmp_path, monkeypatch)
    print(f'"{name}": {found}, planned {planned}')
    assert all(found[stage] <= COUNTED[name][stage] for stage in found), f"{found} against {COUNTED[name]}"
    assert all(found[stage] >= 0.98 * COUNTED[name][stage] for stage in found), f"fewer: {found}; lower the table"
    if name != "hqq":
        # scaling channels is walking; a survey does a bit of everything
        further = planned.get("prepare", 0.0) + planned.get("survey", 0.0)
        # what tells scales apart is factorised as what is solved
        again = planned["factorise"] if name == "awq" else 0.0
        expected = planned | {
            "forward": planned["forward"] + further - again,
            "factorise": planned["factorise"] + again,
        }
        # where two streams are compared, most of what is substituted is the correction, planned as a part of solving
        corrected = found["substitute"] if name in FROM_QUANTIZED else 0.0
        taken = found | {"solve": found["solve"] + corrected}
        shares = {stage: taken[stage] / expected[stage] for stage in SHARES}
        limits = SHARES if "survey" not in planned else {"forward": (0.8, 1.0)}
        assert all(low <= shares[stage] <= high for stage, (low, high) in limits.items()), f"{shares} of {planned}"
