"""Which solver and which layout a recipe's format means: one row per format."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from quantkit.formats.awq import BITS as AWQ_BITS
from quantkit.formats.awq import AwqFormat
from quantkit.formats.contract import Format
from quantkit.formats.gptq import LOWEST_ASYMMETRIC_ZERO, GptqFormat
from quantkit.grids.affine import AffineRule
from quantkit.quantize import AwqSection, GptqSection
from quantkit.solvers.awq import ChannelScaling
from quantkit.solvers.gptq import GptqSolver
from quantkit.stream import Solvers


@dataclass(frozen=True)
class Method:
    """Solvers, and the format their codes are written in."""

    solvers: Solvers
    format: Format


def gptq(section: GptqSection) -> Method:
    """GPTQ codes in the GPTQ container."""
    rule = AffineRule(
        section.bits,
        symmetric=section.symmetric,
        candidates=section.scale_candidates,
        lowest_zero=0 if section.symmetric else LOWEST_ASYMMETRIC_ZERO,
    )
    return Method(
        Solvers(GptqSolver(rule, section.group_size, section.order, section.damping, section.asymmetric)),
        GptqFormat(section.bits, section.group_size, section.symmetric, section.order, section.damping, section.skip),
    )


def awq(section: AwqSection) -> Method:
    """GPTQ codes of weights whose channels were scaled by their activations, in the AWQ container."""
    rule = AffineRule(AWQ_BITS, symmetric=False, candidates=section.scale_candidates)
    scaling = ChannelScaling(
        replace(rule, candidates=0), section.group_size, section.scaling_steps, section.scaling_windows, section.skip
    )
    return Method(
        Solvers(
            GptqSolver(rule, section.group_size, section.order, section.damping),
            preparation=scaling if section.scaling_steps else None,
        ),
        AwqFormat(section.group_size, section.skip),
    )


METHODS: dict[str, Callable[[Any], Method]] = {"gptq": gptq, "awq": awq}
