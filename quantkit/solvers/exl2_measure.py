"""What each mixture of EXL2 does to a sub-layer's output, and which to take for a target of bits per weight.

Statistics and one factorization per input serve every mixture; a mixture that several options name is solved once, and
what comes out of it for the tokens that are compared is kept instead of its weights.
Figures have the shape of exllamav2's measurement.json, so that either program can read the other's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.calibration.statistics import HESSIAN, Statistics
from quantkit.checkpoint.families import Stage
from quantkit.checkpoint.layer import DecoderLayer
from quantkit.costs import FLOAT_BYTES, Cost, LayerWork, Shape, StageWork, total
from quantkit.errors import RefusedError
from quantkit.grids.exl2 import SCALE_BITS, UNIT, WIDTHS, Groups, Mixture, Part
from quantkit.grids.exl2_options import ATTENTION, LINEARS, MLP, OPTIONS, Option
from quantkit.solvers.exl2 import activation_factor, in_visiting_order, solve_groups
from quantkit.solvers.gptq import Factor, feedback_cost
from quantkit.solvers.knapsack import Choice, choose

LEAST_ACCURACY = 1e-6
UNMEASURED = ("model.norm.norm", "lm_head.linear")  # as exllamav2's measurement.json names the last modules
WINDOWS = 4
Measured = dict[str, list[dict[str, Any]]]
"""Options with their accuracy, by the sub-layer's full name."""


@dataclass(frozen=True)
class OptionTrial:
    """How mixtures are tried out, see `quantkit.survey.Measuring`.

    Attributes:
        damping, candidates: of the solver, see `quantkit.solvers.exl2`.
        tokens: that outputs are compared on, the beginnings of a few windows; statistics come from all.
    """

    damping: float
    candidates: int
    tokens: int

    @property
    def windows(self) -> int:
        """How many of them."""
        return WINDOWS

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN})

    def measure(
        self,
        layer: DecoderLayer,
        statistics: Mapping[str, Statistics],
        hidden_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> dict[str, Any]:
        """{"weights": of the layer's linears, "measured": accuracy of every option} of attention and MLP.

        Accuracy is 1 - mean over windows of ||error|| / ||hidden states after the block||. Outputs are compared in
        float32: what 8-bit codes change is less than what bfloat16 rounds away.
        """
        _in_float32(layer)
        weights = sum(linear.weight.numel() for linear in layer.linears.values())
        length = min(-(-self.tokens // len(hidden_BTD)), hidden_BTD.shape[1])
        hidden_BTD = hidden_BTD[:, :length].float()
        rope = (rope[0][:, :length].float(), rope[1][:, :length].float())
        found: Measured = {}
        for block, stages in ((ATTENTION, layer.family.stages[:2]), (MLP, layer.family.stages[2:])):
            inputs_BTD = layer.normed(stages[0], hidden_BTD)
            exact_BTD = layer.block_output(stages[0], inputs_BTD, rope)
            hidden_BTD += exact_BTD
            norm_B = _norms(hidden_BTD)
            linears = {linear: layer.linears[f"{block}.{linear}"] for linear in LINEARS[block]}
            shapes = {linear: (module.out_features, module.in_features) for linear, module in linears.items()}
            cut = {option: _cut(option, shapes) for option in OPTIONS[block]}
            biases = {linear: module.bias for linear, module in linears.items()}
            factor = self._factor(layer, stages[0], statistics)
            ordered_BTD = inputs_BTD[..., factor.order_I]
            outputs = {
                (linear, groups): functional.linear(ordered_BTD, decoded_IO.t(), biases[linear])
                for linear, groups, decoded_IO in self._solved(layer, stages[0], factor)
            }
            del ordered_BTD
            closing_inputs: dict[tuple[Groups, ...], Tensor] = {}
            for *opened, _ in cut.values():
                if tuple(opened) not in closing_inputs:
                    for linear, groups in zip(LINEARS[block], opened, strict=False):
                        layer.replace(f"{block}.{linear}", _Given(outputs[linear, groups]))
                    closing_inputs[tuple(opened)] = layer.closing_input(stages[0], inputs_BTD, rope)
            del outputs
            factor = self._factor(layer, stages[1], statistics)
            for before, closing_BTF in closing_inputs.items():
                closing_inputs[before] = closing_BTF[..., factor.order_I]
            accuracy: dict[tuple[Groups, ...], float] = {}
            wanted = set(cut.values())
            for closing, groups, decoded_IO in self._solved(layer, stages[1], factor):
                for before, closing_BTF in closing_inputs.items():
                    if (*before, groups) in wanted:
                        error_BTD = functional.linear(closing_BTF, decoded_IO.t(), biases[closing]) - exact_BTD
                        share = float((_norms(error_BTD) / norm_B).mean())
                        accuracy[(*before, groups)] = max(LEAST_ACCURACY, 1 - share)
            del closing_inputs
            found[layer.linear_name(block)] = [
                option_row(accuracy[cut[option]], option.stored_bits(shapes), dict(option.mixtures))
                for option in OPTIONS[block]
            ]
        return {"weights": weights, "measured": found}

    def cost(self, layer: LayerWork) -> Cost:
        """Every linear solved with each of its mixtures, and each option's walk through its block."""
        solved = total(feedback_cost(replace(stage, shapes=_tried(stage))) for stage in layer.stages.values())
        qkv, o, gate_up, down = layer.stages.values()
        attention = 2 * layer.window * layer.attention_columns
        tokens = min(self.tokens, self.windows * layer.window)
        walked, held = 0.0, 0
        for opening, closing, beside in ((qkv, o, attention), (gate_up, down, 0)):
            tried = _tried(opening)
            combinations, options = _steps(opening, closing)
            walked += 2.0 * tokens * (sum(shape.size for shape in tried) + combinations * beside)
            walked += 2.0 * tokens * options * closing.largest
            held = max(held, tokens * (sum(shape.rows for shape in tried) + combinations * closing.columns))
        memory_bytes = solved.memory_bytes + FLOAT_BYTES * (held + layer.forward_weights)
        return Cost(solved.operations | {"forward": walked}, memory_bytes)

    def _factor(self, layer: DecoderLayer, stage: Stage, statistics: Mapping[str, Statistics]) -> Factor:
        return activation_factor(statistics[stage.name], self.damping, where=layer.linear_name(stage.linears[0]))

    def _solved(self, layer: DecoderLayer, stage: Stage, factor: Factor) -> Iterator[tuple[str, Groups, Tensor]]:
        """(linear, groups, what its codes stand for) for every way in which an option cuts a stage's linears.

        The last [I, O] has its channels in the factor's order; its float32 numbers differ in their last bit from those
        that a reader decodes.
        """
        for full in stage.linears:
            block, linear = full.rsplit(".", 1)
            weight_OI = layer.linears[full].weight.to(factor.upper_II.dtype)
            weight_IO = in_visiting_order(weight_OI, factor.order_I, where=layer.linear_name(full))
            mixtures = (dict(option.mixtures)[linear] for option in OPTIONS[block])
            for groups in dict.fromkeys(mixture.groups(len(weight_IO)) for mixture in mixtures):
                error_IO = solve_groups(weight_IO, factor, groups, candidates=self.candidates).error_IO
                yield linear, groups, torch.sub(weight_IO, error_IO, out=error_IO)


class _Given(nn.Module):
    """Stands for a linear whose output is known."""

    def __init__(self, output_BTO: Tensor) -> None:
        super().__init__()
        self.output_BTO = output_BTO

    def forward(self, inputs_BTD: Tensor) -> Tensor:
        return self.output_BTO


def _cut(option: Option, shapes: Mapping[str, tuple[int, int]]) -> tuple[Groups, ...]:
    """The groups of each of a block's linears."""
    return tuple(mixture.groups(shapes[linear][1]) for linear, mixture in option.mixtures)


def _steps(opening: StageWork, closing: StageWork) -> tuple[int, int]:
    """How many different combinations of its opening linears the options of a block have, and of all its linears."""
    shapes = {shape.name.rsplit(".", 1)[1]: (shape.rows, shape.columns) for shape in opening.shapes + closing.shapes}
    *_, block, _ = closing.shapes[0].name.split(".")
    cuts = {_cut(option, shapes) for option in OPTIONS[block]}
    return len({cut[:-1] for cut in cuts}), len(cuts)


def _tried(stage: StageWork) -> tuple[Shape, ...]:
    """Each linear as often as its mixtures cut its channels into other groups."""
    found = []
    for shape in stage.shapes:
        *_, block, linear = shape.name.split(".")
        mixtures = {dict(option.mixtures)[linear] for option in OPTIONS[block]}
        found += [shape] * len({mixture.groups(shape.columns) for mixture in mixtures})
    return tuple(found)


def _in_float32(layer: DecoderLayer) -> None:
    layer.module.float()
    for linear in layer.linears.values():
        linear.float()


def _norms(states_BTD: Tensor) -> Tensor:
    return states_BTD.flatten(1).double().norm(dim=1)


def described(mixture: Mixture) -> dict[str, Any]:
    """A mixture as measurement.json has it."""
    return {
        "group_size": {str(part.bits): part.group_size for part in mixture.parts},
        "bits": [part.bits for part in mixture.parts],
        "bits_prop": [part.share for part in mixture.parts],
        "scale_bits": SCALE_BITS,
    }


def mixture_of(entry: Mapping[str, Any]) -> Mixture:
    """A mixture from its description; the inverse of `described`.

    Raises:
        ValueError: it is none that EXL2 holds, or not described so.
    """
    try:
        sizes, widths, shares = entry["group_size"], entry["bits"], entry["bits_prop"]
        scale_bits = entry["scale_bits"]
        parts = tuple(
            Part(int(bits), float(share), int(sizes[str(bits)])) for bits, share in zip(widths, shares, strict=True)
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a mixture: {error}") from None
    if scale_bits != SCALE_BITS:
        raise ValueError(f"scales of {scale_bits} bits")
    if not parts or sorted(widths, reverse=True) != widths or not set(widths) <= set(WIDTHS):
        raise ValueError(f"widths of {widths}")
    if any(part.group_size <= 0 or part.group_size % UNIT or not 0 < part.share <= 1 for part in parts):
        raise ValueError(f"shares of {shares} in groups of {sizes}")
    return Mixture(parts)


def measured_before(
    content: Mapping[str, Any], linears: Mapping[str, Mapping[str, tuple[int, int]]], *, where: str
) -> tuple[dict[str, Any], str]:
    """What `OptionTrial` would find out of all layers, taken from a measurement.json, and a word on it.

    Options of another table are taken, too, where the format can hold them; the bits that they take are counted anew.

    Args:
        content: of the file, quantkit's or exllamav2's.
        linears: (out, in) of each sub-layer's linears, by the sub-layer's full name.
        where: the file, for errors.

    Raises:
        RefusedError: it is none, or a sub-layer was not measured.
    """
    rows_by_key = content.get("measurement")
    found: Measured = {}
    ignored = 0
    for key, shapes in linears.items():
        rows = rows_by_key.get(key) if isinstance(rows_by_key, Mapping) else None
        usable = [row for row in map(partial(_usable, shapes), rows if isinstance(rows, list) else []) if row]
        if not usable:
            raise RefusedError(
                f"no option of {key} was measured",
                where=where,
                fix="give the measurement.json of this model, or leave quantize.measurement out",
            )
        ignored += len(rows) - len(usable)  # type: ignore[arg-type]
        found[key] = usable
    word = f"using the measurement of {sum(map(len, found.values()))} options"
    weights = sum(rows * columns for shapes in linears.values() for rows, columns in shapes.values())
    return {"weights": weights, "measured": found}, word + (
        f"; {ignored} that do not fit are ignored" if ignored else ""
    )


def _usable(shapes: Mapping[str, tuple[int, int]], row: Any) -> dict[str, Any] | None:
    """An option of a measurement.json for linears of these shapes; None if it is none."""
    try:
        accuracy = float(row["accuracy"])
        mixtures = {linear: mixture_of(row[linear]) for linear in shapes}
    except (KeyError, TypeError, ValueError):
        return None
    if not 0 < accuracy <= 1:
        return None
    bits = sum(mixture.stored_bits(*shapes[linear]) for linear, mixture in mixtures.items())
    return option_row(accuracy, bits, mixtures)


def option_row(accuracy: float, bits: int, mixtures: Mapping[str, Mixture]) -> dict[str, Any]:
    """An option as measurement.json has it."""
    described_by = {linear: described(mixture) for linear, mixture in mixtures.items()}
    return {"accuracy": accuracy, "total_bits": bits, **described_by}


def worthwhile(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Options by rising bits, without those that another is no larger than and as accurate as.

    exllamav2 steps through an option's followers while bits are left, so each must be the better one.
    """
    kept: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["total_bits"], -row["accuracy"])):
        if not kept or row["accuracy"] > kept[-1]["accuracy"]:
            kept.append(row)
    return kept


@dataclass(frozen=True)
class Allocation:
    """Mixtures for one target.

    Attributes:
        mixtures: by the linear's full name.
        choice: what the knapsack found.
        bits_per_weight: over the linears of the decoder layers.
    """

    mixtures: dict[str, Mixture]
    choice: Choice
    bits_per_weight: float

    @property
    def facts(self) -> dict[str, float]:
        """For the record, see `quantkit.report.schema.Allotment`."""
        return {"bits_per_weight": self.bits_per_weight, "noise": self.choice.cost, "bound": self.choice.bound}


def allocate(measured: Measured, weights: int, target: float, *, norm: float = 2.0) -> Allocation:
    """The options of least total noise, the sum of (1 - accuracy)^norm, whose bits stay within the target.

    Noise that a sub-layer adds to the residual stream is measured relative to the stream; independent noises add by
    their squares.

    Args:
        measured: options of every sub-layer.
        weights: number of weights of the decoder layers' linears.
        target: bits per weight, everything that the file stores for them included.
        norm: how much more the larger errors count.

    Raises:
        RefusedError: the target is below what the options allow.
    """
    slots = [[(int(row["total_bits"]), (1 - row["accuracy"]) ** norm) for row in rows] for rows in measured.values()]
    try:
        choice = choose(slots, int(target * weights))
    except ValueError:
        least = sum(min(size for size, _ in slot) for slot in slots) / weights
        raise RefusedError(
            f"{target} bits per weight are below {least:.3f}, the least that the mixtures allow",
            where="quantize.bits",
            fix="ask for more bits",
        ) from None
    mixtures = {
        f"{key}.{linear}": mixture_of(rows[taken][linear])
        for (key, rows), taken in zip(measured.items(), choice.options, strict=True)
        for linear in LINEARS[key.rsplit(".", 1)[1]]
    }
    return Allocation(mixtures, choice, choice.size / weights)


def measurement_file(measured: Measured, found: Mapping[str, Allocation]) -> dict[str, Any]:
    """measurement.json: exllamav2's keys, and what was chosen for each variant and how well that is proven.

    exllamav2 counts its modules: the embedding, two of each layer, the norm and the head, of which it measures neither.

    Args:
        measured: options of every sub-layer, by rising bits.
        found: by variant.
    """
    return {
        "measurement": {**measured, **dict.fromkeys(UNMEASURED)},
        "last_module_idx": len(measured) + len(UNMEASURED),
        "allocations": {
            variant: each.facts | {"options": dict(zip(measured, each.choice.options, strict=True))}
            for variant, each in found.items()
        },
    }
