"""Which solver and which layout a recipe's format means: one row per format."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantkit.formats.contract import Format
from quantkit.formats.gptq import LOWEST_ASYMMETRIC_ZERO, GptqFormat
from quantkit.grids.affine import AffineRule
from quantkit.quantize import GptqSection
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


METHODS: dict[str, Callable[[Any], Method]] = {"gptq": gptq}
