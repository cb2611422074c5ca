"""Hidden states of the calibration windows on their way through the layers, and what solvers ask to know of them.

Every walk stops in front of a stage, the stage is solved, and the walks go on with the solved weights, so that true
sequential order costs one forward pass.

Shape legend: T tokens per window, D hidden size, O out features, I in features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat

from torch import Tensor

from quantkit.calibration.statistics import Statistics
from quantkit.checkpoint.families import EMBEDDING, HEAD, Stage
from quantkit.checkpoint.layer import Decoder, DecoderLayer, Walk
from quantkit.checkpoint.spill import Kept
from quantkit.machine import release_freed_memory
from quantkit.progress import timed
from quantkit.qtensor import Item
from quantkit.source_pass import Calibration, FloatStream, Taken, embedded, finish, start

WeightOf = Callable[[str], Tensor]
"""A layer's weight [O, I] by the name of its linear in the family's table."""
SolveStage = Callable[[Stage, WeightOf, Statistics], None]


class Activations:
    """Hidden states of all calibration windows in front of the current item.

    Args:
        decoder: the model's code.
        calibration: token windows and how they are batched.
        exact: the unquantized stream, for those that compare with it or live on it.
        wanted: what is taken of it.
    """

    def __init__(self, decoder: Decoder, calibration: Calibration, exact: FloatStream | None, wanted: Taken) -> None:
        self.decoder = decoder
        self.calibration = calibration
        self.from_float = calibration.from_float
        self.rope = exact.rope if exact else decoder.rope(calibration.tokens_WT.shape[1])
        self._batches: list[Kept] = []
        self._exact = exact
        self._wanted = wanted
        if exact is not None:
            exact.join(self, wanted)

    def taking_part(self) -> AbstractContextManager[None]:
        """Where the stream runs: behind it nothing is kept for it any more."""
        return nullcontext() if self._exact is None else self._exact.taking_part(self)

    @property
    def shares_sums(self) -> bool:
        """Whether layers are solved from sums of the unquantized stream, the same for all who live on it."""
        return bool(self._wanted.needs)

    def at(self, name: str, source: dict[str, Tensor], seconds: dict[str, float]) -> None:
        """Come to an item, with the checkpoint's weights of it; the time of what had to be computed goes to seconds."""
        if self._exact is not None:
            self._exact.at(name, source, seconds)

    def hidden(self) -> list[Kept]:
        """The batches [B, T, D] in front of the item, once for each; the tensors are not to be modified."""
        return self._float().hidden() if self.from_float else self._batches

    def advance(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Go through an item that needs no solving: the embedding, the head, or a layer finished earlier.

        Args:
            name: the item.
            tensors: dense weights as the artifact holds them.
        """
        if name == HEAD or self.from_float:
            return
        if name == EMBEDDING:
            self._batches = embedded(self.decoder, tensors, self.calibration)
            return
        layer = self.decoder.layer(int(name.removeprefix("layers.")), tensors)
        self._batches = finish(start(layer, self._batches, self.rope, self.decoder.spill), self.decoder.spill)

    def head_statistics(
        self, tensors: dict[str, Tensor], source: dict[str, Tensor], needs: frozenset[str]
    ) -> Statistics:
        """Statistics of what the head reads.

        Args:
            tensors: the final norm as the artifact holds it.
            source: the checkpoint's own.
            needs: which.
        """
        exact = self._float().hidden() if self._wanted.inputs else None

        def inputs() -> Iterator[tuple[Tensor, ...]]:
            for position, batch in enumerate(self.hidden()):
                normed = self.decoder.normed(tensors, batch.tensor())
                if exact is None:
                    yield (normed,)
                else:
                    yield normed, self.decoder.normed(source, exact[position].tensor())

        return self._summed(inputs(), self._statistics(needs, ()), {})

    def solve_shared(self, item: Item, solve_stage: SolveStage) -> None:
        """Solve a layer stage by stage from the unquantized stream's own sums."""
        exact = self._float()
        for stage in self.decoder.family.stages:
            statistics = exact.statistics(stage, item.seconds)
            solve_stage(stage, exact.layer().weight, statistics)

    def solve_layer(
        self,
        layer: DecoderLayer,
        hidden: list[Kept],
        item: Item,
        solved: frozenset[str],
        needs: frozenset[str],
        divided: Mapping[str, Tensor],
        solve_stage: SolveStage,
    ) -> None:
        """Solve a layer stage by stage and leave the activations behind it.

        Args:
            layer: holding the source's linears; replaced by decoded ones as they are solved.
            hidden: what `hidden` gave; emptied.
            item: gathers the solved linears and the seconds spent.
            solved: the linears that are, by their names in the family's table.
            needs: statistics the solver asks for.
            divided: what the channels of a stage's input are divided by in the layer, and not in the source's; by the
                stage's name.
            solve_stage: solves the linears of one stage into `item`.
        """
        walks = start(layer, hidden, self.rope, self.decoder.spill)
        for stage in layer.family.stages:
            exact = self._float().inputs(stage, item.seconds) if self._wanted.inputs else None
            if exact is not None and stage.name in divided:
                exact = _divided(exact, divided[stage.name])
            weights = [layer.weight(linear) for linear in stage.linears if linear in solved]
            # nothing is summed for a stage whose linears all stay dense
            sums = self._statistics(needs if weights else frozenset(), weights)
            statistics = self._summed(_stops(walks, exact, item.seconds), sums, item.seconds)
            del exact
            solve_stage(stage, layer.weight, statistics)
            if not self.from_float:
                _replace_weights(layer, stage, item)
        if not self.from_float:
            with timed(item.seconds, "advance"):
                self._batches = finish(walks, self.decoder.spill)

    def _statistics(self, needs: frozenset[str], weights: Sequence[Tensor]) -> Statistics:
        every = 1 if self._exact is None else self._exact.calibration.every
        return Statistics(needs, self.calibration.ranks, weights, every)

    def _summed(
        self, inputs: Iterator[tuple[Tensor, ...]], statistics: Statistics, seconds: dict[str, float]
    ) -> Statistics:
        """Sums over all batches, given what is read of one's own, and what the unquantized stream has there."""
        for batch in self.calibration.in_order(inputs):
            with timed(seconds, "statistics"):
                statistics.add(*batch)
            del batch
            # in pieces between what stays, the next batch would find no room in it
            if self.decoder.device.type == "cpu":
                release_freed_memory()
        statistics.complete()
        return statistics

    def _float(self) -> FloatStream:
        assert self._exact is not None, "it has nothing to do with the unquantized stream"
        return self._exact


def _divided(exact: Iterator[tuple[Tensor]], by_I: Tensor) -> Iterator[tuple[Tensor]]:
    """What the unquantized stream would have with the channels divided, in the divisors' dtype."""
    for (inputs,) in exact:
        yield (inputs / by_I,)


def _stops(
    walks: Sequence[Walk], exact: Iterator[tuple[Tensor]] | None, seconds: dict[str, float]
) -> Iterator[tuple[Tensor, ...]]:
    """What walks read at their next stop, with what the unquantized stream has there, and none of it while asked on."""
    next_walk = iter(walks)
    # its own end it must come to; what zip gave, zip would hold
    for other in exact if exact is not None else repeat((), len(walks)):
        with timed(seconds, "forward"):
            _, inputs = next(next(next_walk))
        both = (inputs, *other)
        del inputs, other
        yield both
        del both


def _replace_weights(layer: DecoderLayer, stage: Stage, item: Item) -> None:
    for linear in stage.linears:
        if quantized := item.linears.get(layer.linear_name(linear)):
            weight = layer.linears[linear].weight
            weight.data = quantized.dequantize().to(device=weight.device, dtype=weight.dtype)
