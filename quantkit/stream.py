"""The pass over the checkpoint: load an item, collect what the solver asks for, solve, advance the activations.

One decoder layer is in memory at a time. Statistics come from walking all calibration windows through the layer in
step: every walk stops in front of a stage, the stage is solved, and the walks go on with the solved weights, so
that true sequential order costs one forward pass. A finished layer (after an interruption) is only walked through
with the weights read back from disk; they equal those that were solved, so what follows is the same to the bit.

Shape legend: W windows, T tokens per window, D hidden size.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.calibration.statistics import ACTIVATIONS, DEVIATION, Statistics
from quantkit.checkpoint.families import EMBEDDING, END_MODULES, HEAD, Stage
from quantkit.checkpoint.index import Checkpoint
from quantkit.checkpoint.layer import Decoder, DecoderLayer, Walk
from quantkit.errors import RefusedError
from quantkit.machine import release_freed_memory
from quantkit.progress import timed
from quantkit.qtensor import Item, LinearFacts
from quantkit.solvers.contract import Solver

HEAD_WEIGHT = f"{END_MODULES[HEAD]}.weight"


class Preparation(Protocol):
    """Rewrites a decoder layer before it is solved, without changing what the layer computes."""

    def prepare(self, layer: DecoderLayer, batches: Sequence[Tensor], rope: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Dense tensors that replace the layer's own, by checkpoint name, in the compute dtype or a wider one.

        Args:
            layer: holding the source's weights; may be altered, the stream makes itself another.
            batches: the layer's calibration inputs, each [B, T, D]; not modified.
            rope: for `DecoderLayer.walk`.
        """
        ...


@dataclass(frozen=True)
class Solvers:
    """Who decides what the pass does to the weights.

    Attributes:
        layers: solves the linears of the decoder layers.
        ends: solves the embedding and the head, where a format quantizes them too; of what it needs the head's input
            is collected, and an embedding has no input to collect.
        preparation: rewrites each layer first.
        unties_head: a tied model gets a head of its own, solved from the embedding.
    """

    layers: Solver
    ends: Solver | None = None
    preparation: Preparation | None = None
    unties_head: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that any of them asks for; if empty, no text is read and no forward pass is run."""
        asked = self.layers.needs | (self.ends.needs if self.ends else frozenset())
        return asked | ({ACTIVATIONS} if self.preparation else frozenset())


@dataclass(frozen=True)
class Calibration:
    """How statistics are collected.

    Attributes:
        tokens_WT: int64 [W, T] token ids.
        windows_per_batch: windows that go through a layer together; part of the arithmetic.
        from_float: statistics and activations come from the unquantized model instead of the stream so far.
    """

    tokens_WT: Tensor
    windows_per_batch: int
    from_float: bool = False


@dataclass(frozen=True)
class Sinks:
    """Who wants to hear of the pass while it runs; a linear is reported as soon as it is solved."""

    linear: Callable[[LinearFacts], None] = lambda facts: None
    item: Callable[[str], None] = lambda name: None


def stream(
    checkpoint: Checkpoint,
    solvers: Solvers,
    calibration: Calibration | None,
    *,
    decoder: Decoder,
    stored_dtype: torch.dtype,
    skip: tuple[str, ...] = (),
    finished: Callable[[str], dict[str, Tensor] | None] = lambda item: None,
    sinks: Sinks | None = None,
) -> Iterator[Item]:
    """Yield every item of the checkpoint, solved, in order; items that are finished already are not yielded again.

    Args:
        checkpoint: the source.
        solvers: choose the codes.
        calibration: None if and only if the solvers need no statistics.
        decoder: the model's code.
        stored_dtype: dtype the format keeps dense tensors in; the stream computes with what the file will hold.
        skip: suffixes of linears that stay dense, embedding and head included.
        finished: dense weights of a finished item as read back from disk, or None if it is still to be done.
        sinks: told of progress.

    Raises:
        RefusedError: a weight that is not finite or does not fit the stored dtype.
        RunFailedError: from the solver, with the linear's name.
    """
    assert (calibration is None) == (not solvers.needs), "calibration is given exactly when a solver needs it"
    sinks = sinks or Sinks()
    activations = Activations(decoder, calibration, both=DEVIATION in solvers.needs) if calibration else None
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        names = checkpoint.items
        pending = reader.submit(checkpoint.read, names[0])
        for position, name in enumerate(names):
            started = time.perf_counter()
            source = pending.result()
            waited = time.perf_counter() - started
            if position + 1 < len(names):
                pending = reader.submit(checkpoint.read, names[position + 1])
            sinks.item(name)
            if name == HEAD and solvers.unties_head and HEAD_WEIGHT not in source:
                source |= {HEAD_WEIGHT: checkpoint.read(EMBEDDING)[f"{END_MODULES[EMBEDDING]}.weight"]}
            replay = finished(name)
            if replay is not None:
                if activations:
                    activations.advance(name, replay, source)
                continue
            item = _solve_item(checkpoint, name, source, solvers, activations, stored_dtype, skip, sinks, decoder)
            item.seconds["read"] = waited
            yield item


class Measuring(Protocol):
    """Finds something out about the decoder layers of the unquantized model before the first of them is solved."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of every stage's inputs."""
        ...

    @property
    def windows(self) -> int:
        """Most calibration windows whose hidden states `measure` is given."""
        ...

    def measure(
        self,
        layer: DecoderLayer,
        statistics: Mapping[str, Statistics],
        hidden_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> dict[str, Any]:
        """What is found out, for JSON.

        Args:
            layer: holding the source's weights; may be altered.
            statistics: over all windows, by the stage's name.
            hidden_BTD: the layer's input [B, T, D] for some windows, evenly spaced; may be altered.
            rope: for `DecoderLayer.walk`.
        """
        ...


def survey(
    checkpoint: Checkpoint,
    calibration: Calibration,
    measuring: Measuring,
    *,
    decoder: Decoder,
    known: Callable[[str], bool] = lambda item: False,
    sinks: Sinks | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what is found out about every decoder layer, by its name, but those that are known already."""
    sinks = sinks or Sinks()
    activations = Activations(decoder, replace(calibration, from_float=True), both=False)
    for name in checkpoint.items[:-1]:
        sinks.item(name)
        source = checkpoint.read(name)
        if name == EMBEDDING or known(name):
            activations.advance(name, source, source)
            continue
        layer = decoder.layer(int(name.removeprefix("layers.")), source)
        hidden_BTD = activations.sample(measuring.windows)
        statistics = activations.observe(layer, measuring.needs)
        release_freed_memory()
        yield name, measuring.measure(layer, statistics, hidden_BTD, activations.rope)


def _solve_item(
    checkpoint: Checkpoint,
    name: str,
    source: dict[str, Tensor],
    solvers: Solvers,
    activations: "Activations | None",
    stored_dtype: torch.dtype,
    skip: tuple[str, ...],
    sinks: Sinks,
    decoder: Decoder,
) -> Item:
    if name in (EMBEDDING, HEAD):
        ends = None if END_MODULES[name].endswith(skip) else solvers.ends
        return _solve_end(name, source, ends, activations, stored_dtype, sinks, decoder)
    index = int(name.removeprefix("layers."))
    rewritten = source
    if solvers.preparation is not None:
        assert activations is not None, "a preparation needs activations"
        started = time.perf_counter()
        layer = decoder.layer(index, source)
        rewritten = source | solvers.preparation.prepare(layer, activations.batches, activations.rope)
        del layer
        prepared = time.perf_counter() - started
    stored = {key: _as_stored(key, tensor, stored_dtype) for key, tensor in rewritten.items()}
    linears = {f"model.layers.{index}.{linear}" for linear in checkpoint.family.linears if not linear.endswith(skip)}
    # linears to be solved start from the source's own values; what stays dense is used as the file will hold it
    working = {key: rewritten[key] if key.removesuffix(".weight") in linears else stored[key] for key in rewritten}
    from_float = activations is not None and activations.calibration.from_float
    if from_float:
        working = rewritten
    item = Item(name, {}, {key: stored[key] for key in stored if key.rsplit(".", 1)[0] not in linears})
    biases = {key.removesuffix(".bias"): stored[key] for key in stored if key.endswith(".bias")}

    def solve_stage(stage: Stage, layer: DecoderLayer, statistics: Statistics) -> None:
        weights = {
            full: layer.linears[linear].weight
            for linear in stage.linears
            if (full := layer.linear_name(linear)) in linears
        }
        with timed(item.seconds, "solve"):
            # what the walks freed must not stand beside what the solver takes, nor the other way round
            release_freed_memory()
            for full, quantized, facts in solvers.layers.solve(weights, statistics):
                item.linears[full] = replace(quantized, bias_O=biases.get(full, quantized.bias_O))
                item.facts.append(facts)
                sinks.linear(facts)
            release_freed_memory()

    if solvers.preparation is not None:
        item.seconds["prepare"] = prepared
    with timed(item.seconds, "load"):
        layer = decoder.layer(index, working)
    if activations is None:
        for stage in checkpoint.family.stages:
            solve_stage(stage, layer, Statistics(frozenset()))
    else:
        before = list(activations.batches) if from_float and rewritten is not source else None
        activations.solve_layer(layer, source, item, solvers.layers.needs, solve_stage)
        if before is not None:
            # go on as a resumed build would: with the checkpoint's own layer, not the rewritten one
            activations.batches = before
            with timed(item.seconds, "forward"):
                activations.advance(name, stored, source)
    return item


def _solve_end(
    name: str,
    source: dict[str, Tensor],
    solver: Solver | None,
    activations: "Activations | None",
    stored_dtype: torch.dtype,
    sinks: Sinks,
    decoder: Decoder,
) -> Item:
    """The embedding, or final norm and head; quantized if there is a solver for them."""
    stored = {key: _as_stored(key, tensor, stored_dtype) for key, tensor in source.items()}
    key = f"{END_MODULES[name]}.weight"
    item = Item(name, {}, stored)
    if solver is not None and key in source:
        statistics = Statistics(solver.needs if name == HEAD else frozenset())
        if name == HEAD and activations and solver.needs:
            with timed(item.seconds, "statistics"):
                activations.collect_head(stored, source, statistics)
        with timed(item.seconds, "solve"):
            weights = {END_MODULES[name]: source[key].to(device=decoder.device, dtype=decoder.dtype)}
            for full, quantized, facts in solver.solve(weights, statistics):
                item.linears[full] = quantized
                item.facts.append(facts)
                sinks.linear(facts)
        del item.tensors[key]
        stored = item.tensors | {f"{full}.weight": linear.dequantize() for full, linear in item.linears.items()}
    if activations:
        with timed(item.seconds, "forward"):
            activations.advance(name, stored, source)
    return item


class Activations:
    """Hidden states of all calibration windows in front of the next item.

    Args:
        decoder: the model's code.
        calibration: token windows and how they are batched.
        both: also carry the unquantized stream, for solvers that compare the two.
    """

    def __init__(self, decoder: Decoder, calibration: Calibration, *, both: bool) -> None:
        self.decoder = decoder
        self.calibration = calibration
        self.rope = decoder.rope(calibration.tokens_WT.shape[1])
        self.batches: list[Tensor] = []
        self.exact: list[Tensor] | None = [] if both and not calibration.from_float else None

    def advance(self, name: str, tensors: dict[str, Tensor], source: dict[str, Tensor]) -> None:
        """Go through an item that needs no solving: the embedding, the head, or a layer finished earlier.

        Args:
            name: the item.
            tensors: dense weights as the artifact holds them.
            source: dense weights of the checkpoint.
        """
        if name == HEAD:
            return
        used = source if self.calibration.from_float else tensors
        self.batches = self._through(name, used, self.batches)
        if self.exact is not None:
            self.exact = self._through(name, source, self.exact)

    def sample(self, most: int) -> Tensor:
        """A copy of at most so many windows [W, T, D], evenly spaced."""
        windows = [window for batch in self.batches for window in batch.unbind()]
        count = min(most, len(windows))
        return torch.stack([windows[place * len(windows) // count] for place in range(count)])

    def observe(self, layer: DecoderLayer, needs: frozenset[str]) -> dict[str, Statistics]:
        """Go through a layer that is not solved, and collect what each of its stages reads, by the stage's name."""
        statistics = {stage.name: Statistics(needs) for stage in layer.family.stages}
        for place, batch in enumerate(self.batches):
            walk = layer.walk(batch, self.rope)
            for stage in layer.family.stages:
                statistics[stage.name].add(next(walk)[1])
            self.batches[place] = _finish([walk])[0]
        return statistics

    def _through(self, name: str, tensors: dict[str, Tensor], batches: list[Tensor]) -> list[Tensor]:
        if name == EMBEDDING:
            split = self.calibration.tokens_WT.split(self.calibration.windows_per_batch)
            return [self.decoder.embed(tensors, tokens) for tokens in split]
        layer = self.decoder.layer(int(name.removeprefix("layers.")), tensors)
        return _finish([layer.walk(batches.pop(0), self.rope) for _ in range(len(batches))])

    def collect_head(self, tensors: dict[str, Tensor], source: dict[str, Tensor], statistics: Statistics) -> None:
        """Statistics of what the head reads.

        Args:
            tensors: the final norm as the artifact holds it.
            source: the checkpoint's own.
            statistics: to be filled.
        """
        for position, batch in enumerate(self.batches):
            exact = self.decoder.normed(source, self.exact[position]) if self.exact is not None else None
            statistics.add(self.decoder.normed(tensors, batch), exact)

    def solve_layer(
        self,
        layer: DecoderLayer,
        source: dict[str, Tensor],
        item: Item,
        needs: frozenset[str],
        solve_stage: Callable[[Stage, DecoderLayer, Statistics], None],
    ) -> None:
        """Solve a layer stage by stage and leave the activations behind it.

        Args:
            layer: holding the source's linears; replaced by decoded ones as they are solved.
            source: dense weights of the checkpoint.
            item: gathers the solved linears and the seconds spent.
            needs: statistics the solver asks for.
            solve_stage: solves the linears of one stage into `item`.
        """
        walks = _start(layer, self.batches, self.rope)
        exact = None
        if self.exact is not None:
            exact = _start(self.decoder.layer(layer.index, source), self.exact, self.rope)
        for stage in layer.family.stages:
            statistics = Statistics(needs)
            for position, walk in enumerate(walks):
                with timed(item.seconds, "forward"):
                    _, inputs = next(walk)
                    exact_inputs = next(exact[position])[1] if exact else None
                with timed(item.seconds, "statistics"):
                    statistics.add(inputs, exact_inputs)
            solve_stage(stage, layer, statistics)
            if not self.calibration.from_float:
                _replace_weights(layer, stage, item)
        with timed(item.seconds, "forward"):
            self.batches = _finish(walks)
            if exact is not None:
                self.exact = _finish(exact)


def _start(layer: DecoderLayer, batches: list[Tensor], rope: tuple[Tensor, Tensor]) -> list[Walk]:
    """Walks over the batches; the list is emptied, so that a batch lives only as long as its walk needs it."""
    return [layer.walk(batches.pop(0), rope) for _ in range(len(batches))]


def _finish(walks: list[Walk]) -> list[Tensor]:
    """The outputs of walks, wherever they stand."""
    outputs = []
    while walks:
        walk = walks.pop(0)
        while True:
            try:
                next(walk)
            except StopIteration as end:
                outputs.append(end.value)
                break
    return outputs


def _replace_weights(layer: DecoderLayer, stage: Stage, item: Item) -> None:
    for linear in stage.linears:
        if quantized := item.linears.get(layer.linear_name(linear)):
            weight = layer.linears[linear].weight
            weight.data = quantized.dequantize().to(device=weight.device, dtype=weight.dtype)


def _as_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor.to(dtype)
    if not torch.isfinite(stored).all():
        raise RefusedError(
            f"{name} holds values beyond {str(dtype).removeprefix('torch.')} (largest: {tensor.abs().max():g})",
            where=name,
            fix="this model cannot be stored in the format's 16-bit floats",
        )
    return stored
