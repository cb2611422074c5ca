"""Whole solvers on the GPU's kernels against the same on the CPU's: in float64, where it can be, the same codes.

The kernels are interpreted here, and compiled where there is a GPU (`make test-gpu`); see `tests.kernels.test_kernels`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from quantkit import kernels
from quantkit.calibration.statistics import Statistics
from quantkit.grids.affine import AffineRule, BiasRule, FloatZeroRule
from quantkit.grids.blocks import TYPES, quantize
from quantkit.grids.exl2 import Mixture
from quantkit.solvers.block_gptq import solve_blocks
from quantkit.solvers.exl2 import solve_exl2
from quantkit.solvers.gptq import factorize, solve_gptq
from quantkit.solvers.hqq import HalfQuadratic
from quantkit.solvers.refine import Sweeps
from quantkit.solvers.weights import GroupFit, WeightSolver
from tests.kernels.test_kernels import TRITON, on
from tests.oracles import correlated_layer

DAMPING = 0.01
FLOAT_ZEROS = FloatZeroRule(3, candidates=4)


@pytest.fixture
def launched(monkeypatch):
    """A function that puts a device on an implementation, and gives the names of the kernels that run from then on."""

    def put(module: str, device: str) -> set[str]:
        ran = set()

        def noted(name):
            real = import_module(f"quantkit.kernels.{name}")

            def noting(function, *arguments, **named):
                ran.add(function)
                return getattr(real, function)(*arguments, **named)

            return SimpleNamespace(**{each: partial(noting, each) for each in vars(real) if hasattr(kernels, each)})

        for chooser, name in (("_implementation", module), ("_searching", f"{module}_search")):
            own, plain = noted(name), getattr(kernels, chooser)
            monkeypatch.setattr(
                kernels, chooser, lambda kind, own=own, plain=plain: own if kind == device else plain(kind)
            )
        return ran

    return put


def factor_of(hessian, order, group_size):
    return factorize(hessian, order=order, group_size=group_size, damping=DAMPING)


def by_gptq(weight, hessian, rule, order="group-aware", group_size=32):
    found = solve_gptq(weight, factor_of(hessian, order, group_size), rule, group_size=group_size)
    return found.codes_OI, found.grid, found.loss


def by_sweeps(weight, hessian, rule):
    factor = factor_of(hessian, "group-aware", 32)
    sweeps = Sweeps.of(1, hessian, factor.order_I, DAMPING)
    found = solve_gptq(weight, factor, rule, group_size=32, sweeps=sweeps)
    return found.codes_OI, found.grid, found.loss


def by_exl2(weight, hessian, mixture):
    factor = factor_of(hessian, "activation", -1)
    sweeps = Sweeps.of(1, hessian, factor.order_I, DAMPING)
    found, lost = solve_exl2(weight * 0.02, factor, Mixture.of(mixture), candidates=4, sweeps=sweeps)
    return found.codes_OI, found.grid, lost


def by_blocks(weight, hessian, kind):
    factor = factor_of(hessian, "group-aware", kind.block)
    return solve_blocks(weight, factor, kind, sweeps=Sweeps.of(1, hessian, factor.order_I, DAMPING))


def by_search(weight, hessian, kind):
    weight, importance = weight.float(), hessian.diagonal().float()
    codes, grid = quantize(weight, kind, importance)
    return codes, grid, float(((grid.decode(codes) - weight).square() * importance).sum())


def by_weights(weight, _, fit, axis=1):
    solver = WeightSolver(GroupFit(fit, FLOAT_ZEROS, 32, axis).quantize)
    ((_, found, facts),) = solver.solve({"a linear": weight.float()}, Statistics(frozenset()))
    return found.codes_OI, found.grid, facts.loss


def least_squares(weight_KN):
    return FLOAT_ZEROS.fit(weight_KN, torch.ones_like(weight_KN[:, 0]))


@dataclass(frozen=True)
class Case:
    """A solver with what it is given, the linear's shape, and the kernels that it stands on.

    `exact` where it works in the weights' own dtype, float64. Searches in float32 take sums in another order: where two
    scales are as good either may come out, as `test_the_whole_search_finds_what_its_steps_find` has it.
    """

    solve: Callable
    given: dict
    shape: tuple[int, int]
    kernels: set[str]
    exact: bool = True


CHOSEN = {"solve_panel", "best_scales"}
ROUNDED = {"solve_panel", "rounding_errors"}
FITTED = ROUNDED | {"code_moments"}
CASES = {
    # more channels than a panel has
    "gptq": Case(by_gptq, {"rule": AffineRule(4), "order": "activation", "group_size": -1}, (3, 136), {"solve_panel"}),
    # more rows than a program of the kernel has; the last group is a short one
    "sweep, symmetric": Case(by_sweeps, {"rule": AffineRule(3, candidates=4)}, (20, 40), CHOSEN),
    "sweep, whole zeros": Case(by_sweeps, {"rule": AffineRule(2, symmetric=False, candidates=4)}, (6, 40), ROUNDED),
    "sweep, float zeros": Case(by_sweeps, {"rule": FLOAT_ZEROS}, (6, 40), FITTED),
    "sweep, mlx": Case(by_sweeps, {"rule": BiasRule(4, candidates=4, stored=torch.bfloat16)}, (6, 40), FITTED),
    "exl2": Case(by_exl2, {"mixture": "8:.05/32 4:.1/32 3:.85/64"}, (6, 128), CHOSEN),
    "gptq on Q4_0": Case(by_blocks, {"kind": TYPES["Q4_0"]}, (3, 64), {"solve_panel", "fit_offset"}, exact=False),
    "gptq on Q5_1": Case(by_blocks, {"kind": TYPES["Q5_1"]}, (3, 64), {"solve_panel", "fit_ranges"}, exact=False),
    "gptq on Q2_K": Case(
        by_blocks, {"kind": replace(TYPES["Q2_K"], block=64)}, (3, 128), {"solve_panel", "search_blocks"}, exact=False
    ),
    "search for Q4_K": Case(by_search, {"kind": TYPES["Q4_K"]}, (3, 256), {"search_blocks"}, exact=False),
    "search for Q6_K": Case(by_search, {"kind": TYPES["Q6_K"]}, (3, 256), {"search_blocks"}, exact=False),
    "half-quadratic": Case(
        by_weights,
        {"fit": HalfQuadratic(FLOAT_ZEROS, iterations=3).fit},
        (5, 96),
        {"rounding_errors", "squared_errors"},
        exact=False,
    ),
    "least squares over rows": Case(
        by_weights,
        {"fit": least_squares, "axis": 0},
        (64, 5),
        FITTED - {"solve_panel"} | {"squared_errors"},
        exact=False,
    ),
}


@pytest.mark.parametrize(("module", "device"), [TRITON])
@pytest.mark.parametrize("name", CASES)
def test_a_solver_finds_on_the_gpus_kernels_what_it_finds_on_the_cpus(name, module, device, launched):
    case = CASES[name]
    weight, hessian = correlated_layer(*case.shape, seed=11)
    codes, grid, lost = case.solve(weight, hessian, **case.given)
    ran = launched(module, device)
    found, found_grid, found_lost = case.solve(*on(device, weight, hessian), **case.given)
    assert ran >= case.kernels
    same = (found.cpu() == codes).float().mean()
    assert same == 1 if case.exact else same > 0.9
    assert found_lost == pytest.approx(lost, rel=1e-9 if case.exact else 5e-4)
    if case.exact:
        assert torch.equal(found_grid.decode(found).cpu(), grid.decode(codes))
