"""AWQ: input channels that carry large activations are scaled up before quantization (Lin et al., arXiv 2306.00978).

Multiplying the input channels of some linears by t and dividing by t the channels of what makes their input changes
nothing that the layer computes, but moves the grids' resolution to where activations are large. Candidates are
t = x^a (a from 0, no scaling, to 1; x the mean |activation| per channel) and t = x^a / w^(1-a) (w the mean |weight|
relative to its group's largest); the one whose rounding costs the linears' outputs least is kept.

What a channel's rounding error e_i costs depends on who chooses the codes. Where they are rounded it is e_i^2 H_ii, the
channel's mean square, for errors of other channels are as often of one sign as of the other. GPTQ lets the channels
that are still to come make up for it, and what is left is e_i^2 R_ii^2, with the pivots of H = R R^T
(`quantkit.solvers.gptq`). A channel's scale divides both by its square.

The four folds of a layer do not touch each other: dividing a linear's rows moves each row's grid along with it, so
every fold is searched on the layer as it came.

With grouped-query attention several query heads read one value head, whose channels can be divided only once: the
channels of o_proj that read the same channel of v_proj share one t.

Shape legend: R candidates, B windows, T tokens, N of all windows, O out features, I in features, P channels of the
producer, K channels per group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor, nn

from quantkit.calibration.statistics import HESSIAN, SQUARES, Statistics
from quantkit.checkpoint.families import Fold, Stage
from quantkit.checkpoint.layer import DecoderLayer
from quantkit.costs import FLOAT_BYTES, Cost, LayerWork, StageWork, total
from quantkit.grids.affine import AffineRule
from quantkit.machine import rows_together, side_by_side
from quantkit.solvers.contract import Prepared
from quantkit.solvers.gptq import factorize

SMALLEST = 1e-4  # of a mean: a channel that is never active must not be divided by nothing
COPIES = 4  # of a stage's weights, while candidates are made of them and tried


@dataclass(frozen=True)
class Feedback:
    """How GPTQ will solve what is scaled; see `quantkit.solvers.gptq.factorize`."""

    order: str
    damping: float


@dataclass(frozen=True)
class ChannelScaling:
    """The search as the stream's preparation.

    Attributes:
        rule: how weights are rounded while candidates are compared.
        group_size: input channels per grid.
        steps: exponents between 0 and 1.
        windows: calibration windows that are looked at, evenly spaced.
        feedback: of errors, where GPTQ chooses the codes; None where they are rounded.
        skip: name endings of linears that stay dense.
    """

    rule: AffineRule
    group_size: int
    steps: int
    windows: int
    feedback: Feedback | None
    skip: tuple[str, ...] = ()

    def prepare(self, layer: DecoderLayer, hidden_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Prepared:
        """The folded layer; see `quantkit.solvers.contract.Preparation`."""
        folds = {fold.stage: fold for fold in layer.family.folds}
        scales = {}
        for stage, inputs_BTI in layer.walk(hidden_BTD, rope):
            if stage.name in folds and any(self._solved(layer, stage)):
                scales[folds[stage.name]] = self.search(layer, folds[stage.name], inputs_BTI)
        divided = {fold.stage: scale_P[producer_channels(layer, fold)] for fold, scale_P in scales.items()}
        return Prepared(folded(layer, scales), divided)

    def cost(self, layer: LayerWork) -> Cost:
        """A walk, and for every fold what its input's channels cost; trying candidates is no product."""
        tokens = min(self.windows * layer.window, layer.tokens)
        walk = Cost({"prepare": layer.forward_operations(tokens)})
        searched = total(self._fold_cost(stage, tokens) for stage in layer.stages.values() if stage.shapes)
        # what a stage reads, and what goes by it
        kept = 2 * tokens * max(stage.columns for stage in layer.stages.values()) * layer.width_bytes
        return walk + Cost(searched.operations, kept + searched.memory_bytes)

    def _fold_cost(self, stage: StageWork, tokens: int) -> Cost:
        side = stage.columns
        wide = tokens * side * FLOAT_BYTES
        weights = COPIES * sum(shape.size for shape in stage.shapes) * FLOAT_BYTES
        if self.feedback is None:
            return Cost({}, wide + weights)
        # half of the symmetric sum and its factor, which needs a copy in another order
        return Cost({"prepare": tokens * side**2 + side**3 / 3}, max(wide, 3 * side**2 * FLOAT_BYTES) + weights)

    def search(self, layer: DecoderLayer, fold: Fold, inputs_BTI: Tensor) -> Tensor:
        """The producer channels' best scales [P], in float32 or wider; all ones if nothing is better than no scaling.

        Args:
            layer: not modified.
            fold: which of its folds.
            inputs_BTI: what the fold's stage reads.
        """
        stage = next(stage for stage in layer.family.stages if stage.name == fold.stage)
        weights = [_wide(layer.linears[linear].weight) for linear in stage.linears]
        channel_I = producer_channels(layer, fold)
        scale_RP = self.candidates(weights, inputs_BTI, channel_I)
        importance_I = self.importance(inputs_BTI, where=layer.linear_name(stage.linears[0]))
        scale_RI = scale_RP[:, channel_I]
        solved = compress(weights, self._solved(layer, stage))
        losses_R = torch.stack([self.losses(weight_OI, importance_I, scale_RI) for weight_OI in solved]).sum(0)
        # a candidate that overflows is no candidate; on a tie the first stands, which is no scaling
        return scale_RP[int(losses_R.nan_to_num(nan=torch.inf).argmin())]

    def importance(self, inputs_BTI: Tensor, *, where: str) -> Tensor:
        """What a channel's squared weight errors cost the outputs, [I], for each token."""
        seen = Statistics(frozenset({SQUARES if self.feedback is None else HESSIAN}))
        seen.add(inputs_BTI)
        seen.complete()
        if self.feedback is None:
            return seen.mean_square()
        factor = factorize(
            seen.hessian() / seen.num_tokens,
            order=self.feedback.order,
            group_size=self.group_size,
            damping=self.feedback.damping,
            where=where,
        )
        pivot_I = factor.upper_II.diagonal()
        return torch.empty_like(pivot_I).index_copy_(0, factor.order_I, pivot_I.square())

    def losses(self, weight_OI: Tensor, importance_I: Tensor, scale_RI: Tensor) -> Tensor:
        """What rounding a linear's scaled weights costs its output, by candidate, [R].

        Args:
            weight_OI: [O, I], before it is scaled.
            importance_I: of its errors, before it is scaled.
            scale_RI: of the input channels.
        """
        pieces = ((part_OI, importance_I, scale_RI) for part_OI in weight_OI.split(rows_together(weight_OI)))
        return torch.stack(side_by_side(self._losses_of_rows, pieces, weight_OI.device)).sum(0)

    def _losses_of_rows(self, weight_OI: Tensor, importance_I: Tensor, scale_RI: Tensor) -> Tensor:
        return torch.stack([self._loss_of_rows(weight_OI, importance_I, scale_I) for scale_I in scale_RI])

    def _loss_of_rows(self, weight_OI: Tensor, importance_I: Tensor, scale_I: Tensor) -> Tensor:
        scaled_OGK = (weight_OI * scale_I).unflatten(1, (-1, self.group_size))
        low_OG1, high_OG1 = scaled_OGK.amin(2, keepdim=True), scaled_OGK.amax(2, keepdim=True)
        scale_OG1, zero_OG1 = self.rule.within(low_OG1.clamp_(max=0), high_OG1.clamp_(min=0))
        error_OGK = self.rule.encode(scaled_OGK, scale_OG1, zero_OG1).sub_(zero_OG1).mul_(scale_OG1).sub_(scaled_OGK)
        return error_OGK.flatten(1).square_().sum(0) @ (importance_I / scale_I.square())

    def candidates(self, weights: Sequence[Tensor], inputs_BTI: Tensor, channel_I: Tensor) -> Tensor:
        """Scales [R, P] to be tried, the first all ones; each has sqrt(max * min) = 1.

        Args:
            weights: [O, I] of the linears that read the input.
            inputs_BTI: the input.
            channel_I: int64 [I], the producer's channel behind each of the input's.
        """
        active_P = _mean_by(channel_I, _wide(inputs_BTI).abs().flatten(0, -2).mean(0)).clamp(min=SMALLEST)
        relative_OI = torch.cat([self._relative(weight_OI) for weight_OI in weights])
        weight_P = _mean_by(channel_I, relative_OI.mean(0)).clamp(min=SMALLEST)
        exponent_R1 = torch.linspace(0, 1, self.steps + 1, dtype=active_P.dtype, device=active_P.device).unsqueeze(1)
        powered_RP = active_P**exponent_R1
        # at exponent 1 both forms are the same
        scale_RP = torch.cat([powered_RP, (powered_RP / weight_P ** (1 - exponent_R1))[:-1]])
        return scale_RP / (scale_RP.amax(1, keepdim=True) * scale_RP.amin(1, keepdim=True)).sqrt()

    def _solved(self, layer: DecoderLayer, stage: Stage) -> list[bool]:
        """Whether each of the stage's linears is."""
        return [not layer.linear_name(linear).endswith(self.skip) for linear in stage.linears]

    def _relative(self, weight_OI: Tensor) -> Tensor:
        """|weights| over the largest of their group, [O, I]."""
        groups = weight_OI.abs().unflatten(1, (-1, self.group_size))
        return (groups / groups.amax(2, keepdim=True).clamp(min=SMALLEST)).flatten(1)


def folded(layer: DecoderLayer, scales: dict[Fold, Tensor]) -> dict[str, Tensor]:
    """The layer's tensors that folding changes, by checkpoint name, in float32 or wider.

    Args:
        layer: not modified.
        scales: [P] by fold, what the consumers are multiplied and the producer is divided by.
    """
    stages = {stage.name: stage for stage in layer.family.stages}
    tensors: dict[str, Tensor] = {}

    def change(module: str, part: str, factor: Tensor) -> None:
        key = f"{layer.linear_name(module)}.{part}"
        if key not in tensors:
            tensors[key] = _wide(getattr(layer.producer(module), part))
        tensors[key] = tensors[key] * factor

    for fold, scale_P in scales.items():
        if bool((scale_P == 1).all()):
            continue
        for linear in stages[fold.stage].linears:
            change(linear, "weight", scale_P[producer_channels(layer, fold)])
        producer = layer.producer(fold.producer)
        inverse_P = 1 / scale_P
        change(fold.producer, "weight", inverse_P.unsqueeze(1) if isinstance(producer, nn.Linear) else inverse_P)
        if getattr(producer, "bias", None) is not None:
            change(fold.producer, "bias", inverse_P)
    return tensors


def producer_channels(layer: DecoderLayer, fold: Fold) -> Tensor:
    """int64 [I]: which of the producer's channels each input channel of the fold's stage carries."""
    stage = next(stage for stage in layer.family.stages if stage.name == fold.stage)
    weight_OI = layer.linears[stage.linears[0]].weight
    channels = torch.arange(weight_OI.shape[1], device=weight_OI.device)
    num_made = layer.producer(fold.producer).weight.shape[0]  # type: ignore[index]
    if num_made == len(channels):
        return channels
    # grouped-query attention: consecutive query heads read one value head
    head_dim = int(layer.module.self_attn.head_dim)  # type: ignore[union-attr,arg-type]
    heads_per_value = len(channels) // num_made
    return channels // (head_dim * heads_per_value) * head_dim + channels % head_dim


def _mean_by(channel_I: Tensor, value_I: Tensor) -> Tensor:
    """Mean [P] of the values that belong to each producer channel, to all of which equally many do.

    Summed in the order they lie in: adding each to its channel's total, a GPU would take them as they come.
    """
    num_channels = int(channel_I.max()) + 1
    return value_I[torch.argsort(channel_I, stable=True)].view(num_channels, -1).mean(1)


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it was."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
