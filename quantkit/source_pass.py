"""One pass over a checkpoint for all who go through it in step: items are read once, the unquantized model run once.

Whoever takes part goes through the items in order, and nobody comes to an item before all have left the one before it.
What an item gave is kept until the last has taken it, or all have gone on: so memory holds what one item gives, however
many take part.

Shape legend: W windows, B windows of a batch, T tokens per window, D hidden size, I in features.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

import torch
from torch import Tensor

from quantkit.calibration.statistics import Statistics
from quantkit.checkpoint.families import EMBEDDING, HEAD, Stage
from quantkit.checkpoint.index import Checkpoint
from quantkit.checkpoint.layer import Decoder, DecoderLayer, Walk
from quantkit.checkpoint.spill import Kept, Spill
from quantkit.progress import timed
from quantkit.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Calibration:
    """How statistics are collected.

    Attributes:
        tokens_WT: int64 [W, T] token ids.
        windows_per_batch: windows that go through a layer together; part of the arithmetic.
        from_float: statistics and activations come from the unquantized model instead of the stream so far.
        ranks: who take the batches in turn.
        every: of each batch, one window in so many goes through, the first among them.
    """

    tokens_WT: Tensor
    windows_per_batch: int
    from_float: bool = False
    ranks: Ranks = ALONE
    every: int = 1

    @cached_property
    def batching(self) -> tuple[str, int, int]:
        """What two calibrations must have in common to see the same batches."""
        return hashlib.sha256(self.tokens_WT.numpy().tobytes()).hexdigest(), self.windows_per_batch, self.every

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """Token ids int64 [B, T] that go through the model together; one's own of them."""
        return tuple(each[:: self.every] for each in self.ranks.dealt(self.tokens_WT.split(self.windows_per_batch)))

    def in_order(self, own: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        """What was made of every rank's batches, in the recipe's order, given one's own."""
        return self.ranks.in_order(own, -(-len(self.tokens_WT) // self.windows_per_batch))

    def sampled(self, own: Iterator[Tensor], most: int) -> Tensor:
        """A copy of at most so many of all windows [B, ...], evenly spaced, given what was made of one's own."""
        assert self.every == 1, "of what is left out nothing can be sampled"
        windows = len(self.tokens_WT)
        count = min(most, windows)
        wanted = [place * windows // count for place in range(count)]
        found: list[Tensor] = []
        first = 0
        for (batch,) in self.in_order((each,) for each in own):
            found += [batch[at - first].clone() for at in wanted if first <= at < first + len(batch)]
            first += len(batch)
        return torch.stack(found)


class SourcePass:
    """What the participants of one pass share. A context: leaving it ends the reading ahead.

    Args:
        checkpoint: the source.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._reads: dict[str, Future[dict[str, Tensor]]] = {}
        self._streams: dict[tuple[tuple[str, int, int], torch.dtype], FloatStream] = {}

    def __enter__(self) -> "SourcePass":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    def read(self, item: str, following: str | None = None) -> dict[str, Tensor]:
        """An item's dense tensors as `Checkpoint.read` gives them, the same to all; not to be modified.

        Args:
            item: not before one that was read already.
            following: is read meanwhile.
        """
        for name in (item, following):
            if name is not None and name not in self._reads:
                self._reads[name] = self._reader.submit(self.checkpoint.read, name)
        order = self.checkpoint.items
        here = order.index(item)
        self._reads = {name: read for name, read in self._reads.items() if order.index(name) >= here}
        return self._reads[item].result()

    def float_stream(self, decoder: Decoder, calibration: Calibration) -> "FloatStream":
        """The unquantized stream of these windows in the decoder's dtype: one for all who ask for the same."""
        key = (calibration.batching, decoder.dtype)
        if key not in self._streams:
            self._streams[key] = FloatStream(decoder, calibration)
        return self._streams[key]


class FloatStream:
    """Hidden states of all calibration windows in the unquantized model, in front of the current item.

    Every participant joins before the first layer, saying what it will take of each, and comes to every item with `at`.

    Args:
        decoder: the model's code.
        calibration: token windows and how they are batched.
    """

    def __init__(self, decoder: Decoder, calibration: Calibration) -> None:
        self.decoder = decoder
        self.calibration = calibration
        self.rope = decoder.rope(calibration.tokens_WT.shape[1])
        self._wanted: dict[object, Taken] = {}
        self._name: str | None = None
        self._source: dict[str, Tensor] = {}
        self._batches: list[Kept] = []
        self._visit: _Visit | None = None
        self._hidden_left = 0

    def join(self, who: object, wanted: "Taken") -> None:
        """Take part from now on; whoever joins goes on inside `taking_part`.

        Args:
            who: hashed by identity.
            wanted: what it takes of every layer.
        """
        assert who not in self._wanted, "it takes part already"
        self._wanted[who] = wanted

    @contextmanager
    def taking_part(self, who: object) -> Iterator[None]:
        """Behind it nothing is kept for `who` any more, from the next item on."""
        try:
            yield
        finally:
            del self._wanted[who]

    def at(self, name: str, source: dict[str, Tensor], seconds: dict[str, float]) -> None:
        """Come to an item; the first to come takes the stream through the item before it, as far as it is not yet.

        Args:
            name: the item.
            source: its dense weights.
            seconds: the time of what had to be computed goes there.
        """
        if name == self._name:
            return
        if self._name == EMBEDDING:
            with timed(seconds, "embed"):
                self._batches = embedded(self.decoder, self._source, self.calibration)
        elif self._name is not None:
            visit = self._layer(seconds)
            with timed(seconds, "advance"):
                self._batches = visit.outputs()
        self._name, self._source, self._visit = name, source, None
        self._hidden_left = sum(wanted.hidden for wanted in self._wanted.values())

    def hidden(self) -> list[Kept]:
        """The batches [B, T, D] in front of the item, in a list of one's own; the tensors are not to be modified."""
        found = list(self._batches)
        self._hidden_left -= 1
        if self._hidden_left == 0 and self._visit is not None:
            self._batches = []
        return found

    def layer(self) -> DecoderLayer:
        """The current layer with the source's weights, not to be altered."""
        return self._layer({}).layer

    def inputs(self, stage: Stage, seconds: dict[str, float]) -> Iterator[tuple[Tensor]]:
        """What a stage of the current layer reads, ([B, T, I],) per batch; once for each who said they would take them.

        To be gone through to the end before anything else is asked for. Made one by one, and kept by nobody, where
        none but the caller wants to know of the stage.

        Args:
            stage: after those that were taken.
            seconds: the time of what had to be computed goes there.
        """
        return self._layer(seconds).inputs(stage, seconds)

    def statistics(self, stage: Stage, seconds: dict[str, float]) -> Statistics:
        """Sums over what a stage reads, at least those that the participant asked for; otherwise as `inputs`."""
        return self._layer(seconds).statistics(stage, seconds)

    def _layer(self, seconds: dict[str, float]) -> "_Visit":
        assert self._name not in (None, EMBEDDING, HEAD), f"{self._name} is no layer"
        if self._visit is None:
            with timed(seconds, "load"):
                layer = self.decoder.layer(int(str(self._name).removeprefix("layers.")), self._source)
            batches = list(self._batches) if self._hidden_left > 0 else self._batches
            wanted = tuple(self._wanted.values())
            self._visit = _Visit(layer, batches, self.rope, self.decoder.spill, self.calibration, wanted)
        return self._visit


@dataclass(frozen=True)
class Taken:
    """What a participant takes of every layer of the unquantized stream.

    Attributes:
        needs: names of sums over the stages' inputs; if empty, it takes none.
        inputs: the stages' inputs themselves.
        hidden: the layer's input.
    """

    needs: frozenset[str] = frozenset()
    inputs: bool = False
    hidden: bool = False


class _Visit:
    """All batches on their way through one layer; the list of batches is emptied when they set out."""

    def __init__(
        self,
        layer: DecoderLayer,
        batches: list[Kept],
        rope: tuple[Tensor, Tensor],
        spill: Spill,
        calibration: Calibration,
        wanted: Sequence[Taken],
    ) -> None:
        self.layer = layer
        self._spill = spill
        self._calibration = calibration
        self._walks = start(layer, batches, rope, spill)
        self._needs = frozenset().union(*(each.needs for each in wanted))
        self._takers = {"inputs": sum(each.inputs for each in wanted), "sums": sum(bool(each.needs) for each in wanted)}
        self._reached: set[Stage] = set()
        self._inputs: dict[Stage, tuple[int, list[Kept]]] = {}
        self._sums: dict[Stage, tuple[int, Statistics]] = {}
        self._outputs: list[Kept] = []

    def inputs(self, stage: Stage, seconds: dict[str, float]) -> Iterator[tuple[Tensor]]:
        if self._takers == {"inputs": 1, "sums": 0}:
            self._reached.add(stage)
            return self._reaching(stage, seconds)
        self._reach(stage, seconds)
        left, found = self._inputs.pop(stage)
        if left > 1:
            self._inputs[stage] = (left - 1, found)
        return ((each.tensor(),) for each in found)

    def statistics(self, stage: Stage, seconds: dict[str, float]) -> Statistics:
        self._reach(stage, seconds)
        left, found = self._sums.pop(stage)
        if left > 1:
            self._sums[stage] = (left - 1, found)
        return found

    def outputs(self) -> list[Kept]:
        """The batches behind the layer."""
        self._outputs += finish(self._walks, self._spill)
        return self._outputs

    def _reach(self, stage: Stage, seconds: dict[str, float]) -> None:
        """Bring all batches to a stage, if they are not there or beyond it already."""
        if stage in self._reached:
            return
        self._reached.add(stage)
        kept: list[Kept] = []
        reached = self._reaching(stage, seconds, kept if self._takers["inputs"] else None)
        if self._takers["sums"]:
            statistics = Statistics(self._needs, self._calibration.ranks)
            for inputs in self._calibration.in_order(reached):
                with timed(seconds, "statistics"):
                    statistics.add(*inputs)
                del inputs
            statistics.complete()
            self._sums[stage] = (self._takers["sums"], statistics)
        for _ in reached:
            pass
        if self._takers["inputs"]:
            self._inputs[stage] = (self._takers["inputs"], kept)

    def _reaching(
        self, stage: Stage, seconds: dict[str, float], kept: list[Kept] | None = None
    ) -> Iterator[tuple[Tensor]]:
        """What the stage reads, batch by batch, kept if there is a list; a batch goes on once the next is asked for."""
        last = stage == self.layer.family.stages[-1]
        for position in range(len(self._walks)):
            with timed(seconds, "forward"):
                _, inputs = next(self._walks[0 if last else position])
            if kept is not None:
                kept.append(self._spill.keep(inputs))
            yield (inputs,)
            del inputs
            if last:
                # nothing but the output is left of a batch, unless somebody takes what the stage read
                with timed(seconds, "advance"):
                    self._outputs += finish([self._walks.pop(0)], self._spill)


def embedded(decoder: Decoder, tensors: dict[str, Tensor], calibration: Calibration) -> list[Kept]:
    """One's batches of hidden states [B, T, D] in front of the first layer."""
    return [decoder.spill.keep(decoder.embed(tensors, tokens)) for tokens in calibration.batches]


def start(layer: DecoderLayer, batches: list[Kept], rope: tuple[Tensor, Tensor], spill: Spill) -> list[Walk]:
    """Walks over the batches; the list is emptied, so that a batch lives only as long as its walk needs it."""
    return [_walked(layer, [batches.pop(0)], rope, spill) for _ in range(len(batches))]


def _walked(layer: DecoderLayer, batch: list[Kept], rope: tuple[Tensor, Tensor], spill: Spill) -> Walk:
    """A walk whose batch waits until it sets out; the list with it is emptied then."""
    return (yield from layer.walk(batch.pop().tensor(), rope, spill))


def finish(walks: list[Walk], spill: Spill) -> list[Kept]:
    """The outputs of walks, wherever they stand; the list is emptied."""
    outputs = []
    while walks:
        walk = walks.pop(0)
        while True:
            try:
                next(walk)
            except StopIteration as end:
                outputs.append(spill.keep(end.value))
                break
    return outputs
