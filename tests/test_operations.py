"""Floating-point operations of every stage of a build, counted and not timed: none may grow unnoticed.

What torch multiplies is counted; the compiled inner loops and elementwise work are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quantkit.calibration.statistics import Statistics
from quantkit.pipeline import build
from quantkit.recipe import Recipe
from tests.tiny import WORDS, make_tiny

TOKENS, WINDOW, LAYERS = 8 * 64, 64, 2
SHAPE = {"hidden_size": 128, "intermediate_size": 1280, "layers": LAYERS}
# millions of operations by format; smaller is welcome: then put the new figure here
COUNTED = {
    "awq": {"forward": 65330.48, "statistics": 2382.36, "solve": 1031.8},  # most of it tries scales out
    "compressed-tensors": {"forward": 1107.3, "statistics": 2382.36, "solve": 1031.8},
    "exl2": {"forward": 24283.45, "statistics": 4781.51, "solve": 1164.71},  # with the measurement
    "gguf": {"forward": 1107.3, "statistics": 2399.14, "solve": 1044.38},
    "gptq": {"forward": 1107.3, "statistics": 2382.36, "solve": 1031.8},
    "hqq": {"forward": 0, "statistics": 0, "solve": 17.3},
    "mlx": {"forward": 2215.38, "statistics": 5872.03, "solve": 2106.85},  # two streams, and the ends
}
QUANTIZE = {"gptq": {"asymmetric": 0.0}, "gguf": {"solver": "gptq", "types": ["Q4_K_M"]}}
SOLVERS = {
    "awq": "quantkit.solvers.gptq.GptqSolver",
    "compressed-tensors": "quantkit.solvers.gptq.GptqSolver",
    "exl2": "quantkit.solvers.exl2.Exl2Solver",
    "gguf": "quantkit.solvers.blocks.BlockSolver",
    "gptq": "quantkit.solvers.gptq.GptqSolver",
    "hqq": "quantkit.solvers.weights.WeightSolver",
    "mlx": "quantkit.solvers.gptq.GptqSolver",
}


def multiplied(_, left: torch.Size, right: torch.Size, **others: object) -> int:
    """Operations of a product that is added in place, which torch's own table leaves out."""
    return 2 * left[0] * left[1] * right[1]


@contextmanager
def counted_into(totals: dict[str, int], stage: str) -> Iterator[None]:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: multiplied}) as counter:
        yield
    totals[stage] += counter.get_total_flops()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("operations")
    (folder / "text.txt").write_text(WORDS * 100, encoding="utf-8")
    return make_tiny(folder / "model", "mistral", **SHAPE), folder / "text.txt"


def counts(name: str, source, tmp_path, monkeypatch) -> dict[str, float]:
    """Millions of operations of each stage of a build."""
    model, text = source
    totals = {"all": 0, "statistics": 0, "solve": 0}
    module, _, cls = SOLVERS[name].rpartition(".")
    solver = getattr(__import__(module, fromlist=[cls]), cls)
    plain_solve, plain_add = solver.solve, Statistics.add

    def solve(self, *arguments):
        with counted_into(totals, "solve"):
            found = list(plain_solve(self, *arguments))
        return iter(found)

    def add(self, *arguments):
        with counted_into(totals, "statistics"):
            plain_add(self, *arguments)

    monkeypatch.setattr("quantkit.plan._rate", lambda recipe, device: 1e9)  # the plan's probe is no part of the work
    monkeypatch.setattr(solver, "solve", solve)
    monkeypatch.setattr(Statistics, "add", add)
    recipe = Recipe.of(
        {
            "format": name,
            "model": {"id": str(model)},
            "quantize": QUANTIZE.get(name, {}),
            "calibration": {
                "texts": {str(text): TOKENS // WINDOW},
                "window_tokens": WINDOW,
                "activations": "quantized" if name == "mlx" else "float",
            },
        }
    )
    with counted_into(totals, "all"):
        build(recipe, out=tmp_path / "out", device=torch.device("cpu"), validated=False)
    forward = totals["all"] - totals["solve"] - totals["statistics"]
    return {key: round(value / 1e6, 2) for key, value in ({"forward": forward} | totals).items() if key != "all"}


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_no_stage_takes_more_operations_than_before(name, source, tmp_path, monkeypatch):
    found = counts(name, source, tmp_path, monkeypatch)
    print(f'"{name}": {found},')
    assert all(found[stage] <= COUNTED[name][stage] for stage in found), f"{found} against {COUNTED[name]}"
    assert all(found[stage] >= 0.98 * COUNTED[name][stage] for stage in found), f"fewer: {found}; lower the table"
