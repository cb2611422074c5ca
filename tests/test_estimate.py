"""How long a build is said to take."""

from types import SimpleNamespace

import pytest
import torch

from quantkit import estimate, machine
from quantkit.calibration.statistics import HESSIAN, SQUARES
from quantkit.costs import Shape, StageWork
from quantkit.pipeline import plan
from quantkit.plan import plan_lines
from quantkit.progress import Progress
from quantkit.units import duration_text
from tests.test_plan import planned, recipe_of
from tests.tiny import make_tiny

CPU = torch.device("cpu")
STAGE = StageWork((Shape("gate", 3000, 64), Shape("up", 100, 64)), columns=64, tokens=512)


class Clocked:
    """Takes a thousandth of a second for each weight, and a minute more the first time."""

    def __init__(self, needs: frozenset[str]) -> None:
        self.needs = needs
        self.now = 0.0
        self.seen: list[tuple[list[tuple[int, ...]], int]] = []

    def solve(self, weights, statistics):
        self.now += 60.0 * (not self.seen)
        self.seen.append(([tuple(weight.shape) for weight in weights.values()], statistics.num_tokens))
        for name, weight in weights.items():
            self.now += weight.numel() / 1000
            yield name, None, None


@pytest.mark.parametrize("needs", [frozenset(), frozenset({SQUARES})], ids=["weights", "squares"])
def test_a_search_is_tried_on_some_rows_and_counted_on_all(needs, monkeypatch):
    solver = Clocked(needs)
    monkeypatch.setattr("quantkit.progress.time", SimpleNamespace(perf_counter=lambda: solver.now))
    monkeypatch.setattr(estimate, "pieces_at_a_time", lambda: 3)
    assert estimate.search_seconds(solver, STAGE, torch.float32, CPU) == pytest.approx(3100 * 64 / 1000)
    shapes, tokens = solver.seen[-1]
    assert shapes == [(3 * 128, 64), (100, 64)]
    assert tokens > 0


def test_where_products_decide_nothing_is_tried():
    solver = Clocked(frozenset({HESSIAN}))
    assert estimate.search_seconds(solver, STAGE, torch.float32, CPU) == 0.0
    assert not solver.seen


@pytest.mark.parametrize(("name", "solver"), [("hqq-3bit", "least-squares"), ("mlx", "round-to-nearest")])
def test_what_has_no_products_takes_its_time_too(name, solver):
    found = planned("mistral-7b", name, quantize__solver=solver)
    assert found.seconds > 1
    assert f"about {duration_text(found.seconds)} (estimate)" in plan_lines(found)[-1]
    assert "no products" in plan_lines(found)[-2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (150, "2.5 min"), (7199, "120.0 min"), (9000, "2.5 h"), (551302, "6.4 days")],
)
def test_a_duration_is_told_in_few_digits(seconds, text):
    assert duration_text(seconds) == text


def test_a_search_that_weighs_by_squares_counts_beside_the_products(tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.plan.product_seconds", lambda counted, dtype, device: 1000.0)
    model = make_tiny(tmp_path / "model", "mistral", hidden_size=256, intermediate_size=512)
    recipe = recipe_of(model, "gguf", quantize={"types": ["Q4_K_M"]})
    found = plan(recipe, out=tmp_path / "out", device=CPU, progress=Progress())
    assert found.operations
    assert found.seconds > 1000


def test_the_rate_is_that_of_what_is_computed_in(monkeypatch):
    """A CPU without instructions for bfloat16 computes in float32."""
    asked = []
    monkeypatch.setattr(estimate, "_rate", lambda dtype, device: asked.append(dtype) or 1e12)
    for widens in (True, False):
        monkeypatch.setattr(machine, "needs_widening", lambda device, dtype, widens=widens: widens)
        assert estimate.product_seconds({"forward": 7e12, "solve": 7e12}, torch.bfloat16, CPU) == pytest.approx(40)
    assert asked == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(("flops", "last"), [(1e7, 32), (1e11, 128)])
def test_a_fast_device_is_given_products_that_outlast_their_launch(flops, last, monkeypatch):
    now, sides = [0.0], []

    class Device(torch.overrides.TorchFunctionMode):
        """Takes 10 microseconds a product to be told, beside the work."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.matmul:
                sides.append(len(args[0]))
                now[0] += 1e-5 + 2 * sides[-1] ** 3 / flops
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr("quantkit.progress.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(estimate, "PROBE_SIDES", (32, 64, 128))
    monkeypatch.setattr(estimate, "AT_WORK_SECONDS", 1e-4)
    with Device():
        assert estimate._rate(torch.float32, CPU) == pytest.approx(flops, rel=0.3)
    assert sides[-1] == last


def test_how_long_an_engine_takes_is_not_told():
    found = planned("mistral-7b", "gptq", engine="gptqmodel")
    assert found.seconds is None
    assert plan_lines(found)[-1].split() == ["time", *["not", "estimated:", "others", "do", "the", "work"]]
