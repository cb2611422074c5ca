"""What a GPU is told to do for one more group of a linear: counted, for telling takes longer than small work does."""

from collections.abc import Callable

import pytest
import torch

from quantkit.grids.affine import AffineRule, BiasRule, FloatZeroRule
from quantkit.grids.blocks import TYPES
from quantkit.grids.exl2 import Mixture
from quantkit.solvers.block_gptq import solve_blocks
from quantkit.solvers.exl2 import solve_exl2
from quantkit.solvers.gptq import factorize, solve_gptq
from quantkit.solvers.refine import Sweeps
from tests import pretended_gpu
from tests.oracles import correlated_layer

DAMPING = 0.05
FEW, MORE = 4, 12  # groups


def by_gptq(rule, sweeps):
    def solve(weight, hessian):
        factor = factorize(hessian, order="group-aware", group_size=64, damping=DAMPING)
        again = Sweeps.of(sweeps, hessian, factor.order_I, DAMPING)
        return lambda: solve_gptq(weight, factor, rule, group_size=64, sweeps=again)

    return solve


def by_exl2(weight, hessian):
    factor = factorize(hessian, order="activation", group_size=-1, damping=DAMPING)
    again = Sweeps.of(1, hessian, factor.order_I, DAMPING)
    return lambda: solve_exl2(weight, factor, Mixture.of("4:1/64"), candidates=4, sweeps=again)


def by_blocks(weight, hessian):
    kind = TYPES["Q4_0"]
    factor = factorize(hessian, order="group-aware", group_size=kind.block, damping=DAMPING)
    again = Sweeps.of(1, hessian, factor.order_I, DAMPING)
    return lambda: solve_blocks(weight, factor, kind, sweeps=again)


# operations on tensors, as the pretended GPU sees them: kernels count as what their wrappers ask of torch beside them;
# fewer are welcome: then put the new figure here
LAUNCHED = {
    "gptq": (by_gptq(AffineRule(4, candidates=10), 1), 80),
    "gptq, no sweep": (by_gptq(AffineRule(4, candidates=10), 0), 33),
    "whole zeros": (by_gptq(AffineRule(4, symmetric=False, candidates=10), 1), 90),
    "float zeros": (by_gptq(FloatZeroRule(3, candidates=5), 1), 196),
    "mlx": (by_gptq(BiasRule(4, candidates=5), 1), 184),
    "exl2": (by_exl2, 80),
    "two blocks of Q4_0": (by_blocks, 178),
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_a_group_takes(name, pretended, monkeypatch):
    prepare, expected = LAUNCHED[name]
    few, more = (launches(prepare, 64 * groups, pretended, monkeypatch) for groups in (FEW, MORE))
    assert round((more - few) / (MORE - FEW)) == expected


def launches(prepare: Callable, columns: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> int:
    """Operations that read or write a tensor's values; views and memory that is only set aside are none."""
    solve = prepare(*(part.float().to(device) for part in correlated_layer(16, columns, tokens=columns)))
    solve()  # what is made once and kept is made now
    seen, plain = [], pretended_gpu.computed

    def computed(function, args, kwargs):
        found = plain(function, args, kwargs)
        given = {each.held.untyped_storage().data_ptr() for each in pretended_gpu.tensors((args, kwargs))}
        made = [each.held.untyped_storage().data_ptr() for each in pretended_gpu.tensors([found])]
        name = function.overloadpacket.__name__
        if function._schema.is_mutable or (not set(made) <= given and not name.startswith("empty")):
            seen.append(function)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(pretended_gpu, "computed", computed)
        solve()
    return len(seen)
