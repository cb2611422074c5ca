"""Which solver and which layout a recipe's format means: one row per format."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.index import read_json
from quantkit.errors import RefusedError
from quantkit.files import sha256_of
from quantkit.formats.awq import BITS as AWQ_BITS
from quantkit.formats.awq import AwqFormat
from quantkit.formats.compressed_tensors import CompressedTensorsFormat
from quantkit.formats.contract import Format
from quantkit.formats.exl2 import Exl2Format, expected_biases, sublayers
from quantkit.formats.gguf.metadata import About
from quantkit.formats.gguf.mixtures import is_sensitive
from quantkit.formats.gguf.names import Model
from quantkit.formats.gguf.write import GgufFormat
from quantkit.formats.gptq import LOWEST_ASYMMETRIC_ZERO, GptqFormat
from quantkit.formats.hqq.write import HqqFormat
from quantkit.formats.mlx import MlxFormat
from quantkit.grids.affine import AffineRule, BiasRule, FloatZeroRule
from quantkit.grids.exl2 import Mixture
from quantkit.grids.exl2_options import HEADS
from quantkit.quantize import (
    I_QUANTS,
    AwqSection,
    CompressedTensorsSection,
    Exl2Section,
    GgufSection,
    GptqSection,
    HqqSection,
    MlxSection,
)
from quantkit.solvers.awq import ChannelScaling, Feedback
from quantkit.solvers.blocks import BlockSolver
from quantkit.solvers.clipping import ClippedRounding
from quantkit.solvers.contract import Solver
from quantkit.solvers.exl2 import Exl2Solver
from quantkit.solvers.exl2_measure import OptionTrial, allocate, measured_before, measurement_file, worthwhile
from quantkit.solvers.ggml import ENGINE as GGML
from quantkit.solvers.gptq import GptqSolver
from quantkit.solvers.hqq import HalfQuadratic
from quantkit.solvers.rtn import RoundToNearest
from quantkit.solvers.weights import ByWidth, GroupFit, WeightSolver, WhereCalibrated
from quantkit.stream import Solvers
from quantkit.survey import Measuring

# where a recipe has no key for them
GPTQ_DAMPING = 0.01
GPTQ_ASYMMETRIC = 0.5
GPTQ_ASYMMETRIC_EVERY = 2


@dataclass(frozen=True)
class Survey:
    """A pass over the unquantized model that comes first, where a method has something to find out.

    Attributes:
        measuring: finds out something about every decoder layer.
        settle: the method as it is once everything was measured, given all layers' findings in order.
        earlier: findings of an earlier survey that are to be used instead, given (name, out, in) of the decoder
            layers' linears, and what is to be said of them; None where there are none.
    """

    measuring: Measuring
    settle: Callable[[list[dict[str, Any]]], "Method"]
    earlier: Callable[[list[tuple[str, int, int]]], tuple[dict[str, Any], str]] | None = None


@dataclass(frozen=True)
class Method:
    """Solvers, and the format their codes are written in.

    Attributes:
        solvers, format: what works together.
        engine: names an engine whose library the solvers call.
        survey: comes first, and changes both before the first item is solved.
        read: SHA-256 of further files that decide the bytes, by the recipe's key.
        allotments: of each variant, for the record, where a survey decided something.
    """

    solvers: Solvers
    format: Format
    engine: str | None = None
    survey: Survey | None = None
    read: Mapping[str, str] = field(default_factory=dict)
    allotments: Mapping[str, dict[str, float]] = field(default_factory=dict)


def _by_gptq(section: GptqSection | AwqSection | CompressedTensorsSection, rule: AffineRule) -> GptqSolver:
    return GptqSolver(
        rule, section.group_size, section.order, section.damping, section.asymmetric, section.refine_sweeps
    )


def gptq(section: GptqSection, config: dict[str, Any]) -> Method:
    """GPTQ codes in the GPTQ container."""
    rule = AffineRule(
        section.bits,
        symmetric=section.symmetric,
        candidates=section.scale_candidates,
        lowest_zero=0 if section.symmetric else LOWEST_ASYMMETRIC_ZERO,
    )
    return Method(
        Solvers(
            _by_gptq(section, rule),
            compared_every=section.asymmetric_every,
        ),
        GptqFormat(section.bits, section.group_size, section.symmetric, section.order, section.damping, section.skip),
    )


def hqq(section: HqqSection, config: dict[str, Any]) -> Method:
    """Codes on grids with float zeros, in the HQQ container."""
    rule = FloatZeroRule(section.bits, candidates=section.scale_candidates)
    equal_K = torch.ones(section.group_size)
    fits: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "least-squares": partial(_fit_blindly, rule, equal_K),
        "half-quadratic": HalfQuadratic(rule).fit,
    }
    solvers: dict[str, Solver] = {
        name: WeightSolver(GroupFit(fit, rule, section.group_size, section.axis).quantize) for name, fit in fits.items()
    }
    solvers["gptq"] = GptqSolver(
        rule, section.group_size, "group-aware", GPTQ_DAMPING, GPTQ_ASYMMETRIC, section.refine_sweeps
    )
    written = HqqFormat(section.bits, section.group_size, section.axis, section.skip, section.qmodel_pt)
    return Method(Solvers(solvers[section.solver], compared_every=GPTQ_ASYMMETRIC_EVERY), written)


def mlx(section: MlxSection, config: dict[str, Any]) -> Method:
    """Codes on grids of scale and bias, embedding and head included, in the MLX container."""
    stored: torch.dtype = getattr(torch, section.dtype)
    low, high = map(int, section.mixed.split("_")[1:]) if section.mixed != "none" else (section.bits, section.bits)
    raised = _raised_by_mlx(int(config["num_hidden_layers"])) if section.mixed != "none" else frozenset()

    def bits_of(name: str) -> int:
        return high if name in raised else low

    equal_K = torch.ones(section.group_size)
    solvers: dict[int, Solver] = {}
    ends: dict[int, Solver] = {}
    for bits in {low, high}:
        rule = BiasRule(bits, candidates=section.scale_candidates, stored=stored)
        fit = partial(_fit_blindly, BiasRule(bits, stored=stored), equal_K)
        quantize = GroupFit(fit, rule, section.group_size).quantize
        if section.solver == "round-to-nearest":
            quantize = RoundToNearest(bits, section.group_size, stored).quantize
        blind = WeightSolver(quantize)
        solvers[bits] = ends[bits] = blind
        if section.solver == "gptq":
            solvers[bits] = GptqSolver(
                rule, section.group_size, "group-aware", GPTQ_DAMPING, GPTQ_ASYMMETRIC, section.refine_sweeps
            )
            ends[bits] = WhereCalibrated(solvers[bits], blind)
    written = MlxFormat(low, section.group_size, bits_of, stored, section.skip)
    solver, at_ends = ByWidth(solvers, bits_of), ByWidth(ends, bits_of)
    return Method(Solvers(solver, at_ends, compared_every=GPTQ_ASYMMETRIC_EVERY), written)


def _fit_blindly(rule: FloatZeroRule, equal_K: Tensor, weight_KN: Tensor) -> tuple[Tensor, Tensor]:
    return rule.fit(weight_KN, equal_K.to(weight_KN))


def _raised_by_mlx(num_layers: int) -> frozenset[str]:
    """Modules that mlx-lm's mixtures give the high bits: those that are known to suffer most."""
    sensitive = [index for index in range(num_layers) if is_sensitive(index, num_layers)]
    return frozenset(
        {"lm_head"}
        | {f"model.layers.{index}.{linear}" for index in sensitive for linear in ("self_attn.v_proj", "mlp.down_proj")}
    )


def gguf(section: GgufSection, config: dict[str, Any]) -> Method:
    """Searched block codes in GGUF files, embedding and head included, every type from one pass."""
    about = About(section.name, section.license, section.languages, section.base_model, section.quantized_by)
    written = GgufFormat(
        section.types,
        Model.of(config),
        about,
        weighted=section.imatrix,
        shard_bytes=int(section.shard_gb * 1e9),
        ollama=section.ollama,
        system=section.system,
        imatrix_dat=section.imatrix_dat,
    )
    damping = section.damping if section.solver == "gptq" else None
    with_ggml = section.encoder == "ggml"
    solver = BlockSolver(written.types, section.imatrix, damping, section.refine_sweeps, with_ggml)
    needs_ggml = with_ggml or any(name.startswith(I_QUANTS) for name in section.types)
    return Method(Solvers(solver, ends=solver), written, GGML if needs_ggml else None)


def awq(section: AwqSection, config: dict[str, Any]) -> Method:
    """Codes of weights whose channels were scaled by their activations, by GPTQ or rounded, in the AWQ container."""
    rule = AffineRule(AWQ_BITS, symmetric=False, candidates=section.scale_candidates)
    solvers: dict[str, tuple[Solver, Feedback | None]] = {
        "gptq": (
            _by_gptq(section, rule),
            Feedback(section.order, section.damping),
        ),
        "round-to-nearest": (ClippedRounding(rule, section.group_size), None),
    }
    solver, feedback = solvers[section.solver]
    scaling = ChannelScaling(
        replace(rule, candidates=0),
        section.group_size,
        section.scaling_steps,
        section.scaling_windows,
        feedback,
        section.skip,
    )
    return Method(
        Solvers(
            solver,
            preparation=scaling if section.scaling_steps else None,
            compared_every=section.asymmetric_every,
        ),
        AwqFormat(section.group_size, section.skip),
    )


def compressed_tensors(section: CompressedTensorsSection, config: dict[str, Any]) -> Method:
    """GPTQ codes in the container of compressed-tensors."""
    stored: torch.dtype = getattr(torch, section.dtype)
    rule = AffineRule(section.bits, symmetric=section.symmetric, candidates=section.scale_candidates, stored=stored)
    return Method(
        Solvers(
            _by_gptq(section, rule),
            compared_every=section.asymmetric_every,
        ),
        CompressedTensorsFormat(section.bits, section.group_size, section.symmetric, stored, section.skip),
    )


def exl2(section: Exl2Section, config: dict[str, Any]) -> Method:
    """GPTQ codes of mixed widths that a measurement allots, in EXL2 folders, one for each target."""
    head = HEADS[section.head_bits]
    written = Exl2Format(section.bits, head, section.head_bits, int(config["vocab_size"]), expected_biases(config))
    trial = OptionTrial(section.damping, section.scale_candidates, section.measure_tokens)

    def solvers(mixtures: Callable[[str], tuple[Mixture, ...]]) -> Solvers:
        solver = Exl2Solver(mixtures, section.damping, section.scale_candidates, section.refine_sweeps)
        return Solvers(solver, ends=solver, unties_head=True)

    def settle(layers: list[dict[str, Any]]) -> Method:
        measured = {key: worthwhile(rows) for layer in layers for key, rows in layer["measured"].items()}
        weights = sum(layer["weights"] for layer in layers)
        targets = zip(written.variants, section.bits, strict=True)
        found = {variant: allocate(measured, weights, bits) for variant, bits in targets}
        several = [allocation.mixtures for allocation in found.values()]
        chosen = {name: tuple(each[name] for each in several) for name in several[0]}
        settled = replace(written, measurement=measurement_file(measured, found))
        allotments = {variant: allocation.facts for variant, allocation in found.items()}
        solver = solvers(lambda name: chosen.get(name, (head,) * len(found)))
        return Method(solver, settled, read=read, allotments=allotments)

    def earlier(shapes: list[tuple[str, int, int]]) -> tuple[dict[str, Any], str]:
        linears = sublayers({name: (rows, columns) for name, rows, columns in shapes})
        return measured_before(content, linears, where=str(section.measurement))

    read, content = {}, {}
    if section.measurement is not None:
        path = Path(section.measurement)
        if not path.is_file():
            raise RefusedError(
                f"no such file: {path}",
                where="quantize.measurement",
                fix="give the measurement.json of an artifact, or of exllamav2",
            )
        content = read_json(path)
        read = {"quantize.measurement": sha256_of(path)}
    unsettled = solvers(lambda name: (head,) * len(section.bits))
    survey = Survey(trial, settle, None if section.measurement is None else earlier)
    return Method(unsettled, written, survey=survey, read=read)


METHODS: dict[str, Callable[[Any, dict[str, Any]], Method]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "hqq": hqq,
    "mlx": mlx,
    "gguf": gguf,
    "exl2": exl2,
}
