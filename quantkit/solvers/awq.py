"""AWQ: input channels that carry large activations are scaled up before quantization (Lin et al., arXiv 2306.00978).

Multiplying the input channels of some linears by t and dividing by t the channels of what makes their input changes
nothing that the layer computes, but moves the grids' resolution to where activations are large. Candidates are
t = x^a (a from 0, no scaling, to 1; x the mean |activation| per channel) and t = x^a / w^(1-a) (w the mean |weight|
relative to its group's largest); the one whose rounded weights change the block's output least is kept.

The four folds of a layer do not touch each other: dividing a linear's rows moves each row's grid along with it, so
every fold is searched on the layer as it came.

With grouped-query attention several query heads read one value head, whose channels can be divided only once: the
channels of o_proj that read the same channel of v_proj share one t.

Shape legend: R candidates, B windows, T tokens, O out features, I in features, P channels of the producer, G groups,
K channels per group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.checkpoint.families import Fold, Stage
from quantkit.checkpoint.layer import DecoderLayer
from quantkit.costs import FLOAT_BYTES, Cost, LayerWork, total
from quantkit.grids.affine import AffineRule

SMALLEST = 1e-4  # of a mean: a channel that is never active must not be divided by nothing
# candidates go through the block together as long as their weights and outputs are fewer; part of the arithmetic
LARGEST_STACK = 1 << 28


@dataclass(frozen=True)
class ChannelScaling:
    """The search as the stream's preparation.

    Attributes:
        rule: how weights are rounded while candidates are compared.
        group_size: input channels per grid.
        steps: exponents between 0 and 1.
        windows: calibration windows that are looked at, evenly spaced.
        skip: name endings of linears that stay dense.
    """

    rule: AffineRule
    group_size: int
    steps: int
    windows: int
    skip: tuple[str, ...] = ()

    def prepare(self, layer: DecoderLayer, hidden_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Folded tensors by checkpoint name; see `quantkit.stream.Preparation`."""
        inputs = {}
        walk = layer.walk(hidden_BTD, rope)
        for stage, inputs_BTI in walk:
            inputs[stage] = inputs_BTI
        stages = {stage.name: stage for stage in layer.family.stages}
        scales = {}
        for fold in layer.family.folds:
            stage = stages[fold.stage]
            if not all(self._stays_dense(layer, linear) for linear in stage.linears):
                scales[fold] = self.search(layer, fold, inputs[stage], rope)
        return folded(layer, scales)

    def cost(self, layer: LayerWork) -> Cost:
        """Every fold's block for every candidate, as many together as go together."""
        tokens = min(self.windows * layer.window, layer.tokens)
        kept = tokens * sum(stage.columns for stage in layer.stages.values()) * layer.width_bytes
        walk = Cost({"prepare": layer.forward_operations(tokens)})
        searched = total(self._fold_cost(layer, name, tokens) for name in layer.stages)
        return walk + Cost(searched.operations, kept + searched.memory_bytes)

    def _fold_cost(self, layer: LayerWork, name: str, tokens: int) -> Cost:
        stage = layer.stages[name]
        if not stage.shapes:
            return Cost()
        qkv, o, _, down = layer.stages
        closing = layer.stages[o if name in (qkv, o) else down]
        own = sum(shape.size for shape in stage.shapes)
        closed = 0 if closing is stage else sum(shape.size for shape in closing.shapes)
        attention = 2 * layer.window * layer.attention_columns if name == qkv else 0
        hidden = layer.stages[qkv].columns
        candidates = 2 * self.steps + 1
        stack = own + tokens * (stage.columns + hidden)
        together = min(candidates, max(1, LARGEST_STACK // stack))
        # of one candidate: the linears that are rounded, and either the one that is being rounded, or afterwards the
        # block's input, middle and output
        rounding = 4 * FLOAT_BYTES * stage.largest
        walking = tokens * ((stage.columns + 3 * closing.columns) * layer.width_bytes + 3 * FLOAT_BYTES * hidden)
        each = own * layer.width_bytes + max(rounding, walking)
        return Cost({"prepare": (candidates + 1) * 2.0 * tokens * (own + closed + attention)}, together * each)

    def search(self, layer: DecoderLayer, fold: Fold, inputs_BTI: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The producer channels' best scales [P], in float32 or wider; all ones if nothing is better than no scaling.

        Args:
            layer: unchanged when this returns.
            fold: which of its folds.
            inputs_BTI: what the fold's stage reads.
            rope: for the attention.
        """
        stage = next(stage for stage in layer.family.stages if stage.name == fold.stage)
        weights = {name: _wide(layer.linears[name].weight) for name in stage.linears}
        channel_I = producer_channels(layer, fold)
        scale_RP = self.candidates(list(weights.values()), inputs_BTI, channel_I)
        expected_BTD = _wide(layer.block_output(stage, inputs_BTI, rope))
        num_weights = sum(weight.numel() for weight in weights.values())
        together = max(1, LARGEST_STACK // (num_weights + inputs_BTI.numel() + expected_BTD.numel()))
        losses = [
            self._losses(layer, stage, weights, tried_RP[:, channel_I], inputs_BTI, expected_BTD, rope)
            for tried_RP in scale_RP.split(together)
        ]
        # a candidate that overflows is no candidate; on a tie the first stands, which is no scaling
        return scale_RP[int(torch.cat(losses).nan_to_num(nan=torch.inf).argmin())]

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

    def rounded(self, weight_ROI: Tensor) -> Tensor:
        """Weights [R, O, I] as their nearest codes would decode."""
        groups_KN = weight_ROI.reshape(-1, self.group_size).t().contiguous()
        scale_N, zero_N = self.rule.fit(groups_KN, groups_KN.new_ones(self.group_size))
        codes_KN = self.rule.encode(groups_KN, scale_N, zero_N)
        return codes_KN.sub_(zero_N).mul_(scale_N).t().reshape(weight_ROI.shape)

    def _losses(
        self,
        layer: DecoderLayer,
        stage: Stage,
        weights: dict[str, Tensor],
        scale_RI: Tensor,
        inputs_BTI: Tensor,
        expected_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Squared change [R] of the block's output, per candidate."""
        originals = {name: layer.linears[name] for name in weights}
        for name, weight_OI in weights.items():
            scaled_ROI = weight_OI * scale_RI.unsqueeze(1)
            if not self._stays_dense(layer, name):
                scaled_ROI = self.rounded(scaled_ROI)
            layer.replace(name, _Stacked(originals[name], scaled_ROI / scale_RI.unsqueeze(1)))
        stacked = inputs_BTI.expand(len(scale_RI), *inputs_BTI.shape).flatten(0, 1)
        found_RBTD = _wide(layer.block_output(stage, stacked, rope)).unflatten(0, (len(scale_RI), -1))
        for name, original in originals.items():
            layer.replace(name, original)
        return (found_RBTD - expected_BTD).square().mean((1, 2, 3))

    def _stays_dense(self, layer: DecoderLayer, linear: str) -> bool:
        return layer.linear_name(linear).endswith(self.skip)

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


class _Stacked(nn.Module):
    """One linear with several weights: the input's windows are R times as many, candidate after candidate."""

    def __init__(self, original: nn.Linear, weight_ROI: Tensor) -> None:
        super().__init__()
        self.weight_ROI = weight_ROI.to(original.weight.dtype)
        self.bias_O = original.bias

    def forward(self, inputs_NTI: Tensor) -> Tensor:
        candidates = self.weight_ROI.shape[0]
        rows_RNI = inputs_NTI.reshape(candidates, -1, inputs_NTI.shape[-1])
        output_RNO = torch.bmm(rows_RNI, self.weight_ROI.transpose(1, 2))
        if self.bias_O is not None:
            output_RNO += self.bias_O
        return output_RNO.view(*inputs_NTI.shape[:-1], -1)


def _mean_by(channel_I: Tensor, value_I: Tensor) -> Tensor:
    """Mean [P] of the values that belong to each producer channel, to all of which equally many do.

    Summed in the order they lie in: adding each to its channel's total, a GPU would take them as they come.
    """
    num_channels = int(channel_I.max()) + 1
    return value_I[torch.argsort(channel_I, stable=True)].view(num_channels, -1).mean(1)


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it was."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
