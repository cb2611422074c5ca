"""The pass over the checkpoint: load an item, collect what the solver asks for, solve, advance the activations.

One decoder layer is in memory at a time, and all calibration windows walk through it in step, see
`quantkit.activations`. A finished layer (after an interruption) is only walked through with the weights read back from
disk; they equal those that were solved, so what follows is the same to the bit.

Streams of several recipes may go through a checkpoint in step, an item each in turn, and share what is the same for
them: see `quantkit.source_pass`.

Shape legend: W windows, T tokens per window, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.activations import Activations, WeightOf
from quantkit.calibration.statistics import ACTIVATIONS, DEVIATION, Statistics
from quantkit.checkpoint.families import EMBEDDING, END_MODULES, HEAD, Stage
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.spill import Kept
from quantkit.errors import RefusedError
from quantkit.machine import release_freed_memory
from quantkit.progress import timed, timed_steps
from quantkit.qtensor import Item, LinearFacts, QuantizedLinear
from quantkit.solvers.contract import Preparation, Prepared, Solver
from quantkit.source_pass import Calibration, SourcePass, Taken

HEAD_WEIGHT = f"{END_MODULES[HEAD]}.weight"


@dataclass(frozen=True)
class Solvers:
    """Who decides what the pass does to the weights.

    Attributes:
        layers: solves the linears of the decoder layers.
        ends: solves the embedding and the head, where a format quantizes them too; of what it needs the head's input
            is collected, and an embedding has no input to collect.
        preparation: rewrites each layer first.
        unties_head: a tied model gets a head of its own, solved from the embedding.
        compared_every: of each batch, one window in so many goes through the unquantized model too, the first among
            them, for solvers that ask how far the quantized stream has moved.
    """

    layers: Solver
    ends: Solver | None = None
    preparation: Preparation | None = None
    unties_head: bool = False
    compared_every: int = 1

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that any of them asks for; if empty, no text is read and no forward pass is run."""
        asked = self.layers.needs | (self.ends.needs if self.ends else frozenset())
        return asked | ({ACTIVATIONS} if self.preparation else frozenset())


@dataclass(frozen=True)
class Sinks:
    """Who wants to hear of the pass while it runs.

    Attributes:
        item: told the name of an item that begins.
        linear: told of a linear as soon as it is solved.
        taken: given every solved linear at once, with the item and its full name, so that the item need not hold them
            all; for streams that do not go on with quantized weights (`goes_on_quantized`).
    """

    item: Callable[[str], None] = lambda name: None
    linear: Callable[[LinearFacts], None] = lambda facts: None
    taken: Callable[[Item, str, QuantizedLinear], None] | None = None


def goes_on_quantized(calibration: Calibration | None) -> bool:
    """Whether what follows a linear in the stream is computed with what it became."""
    return calibration is not None and not calibration.from_float


def stream(
    shared: SourcePass,
    solvers: Solvers,
    calibration: Calibration | None,
    *,
    decoder: Decoder,
    stored_dtype: torch.dtype,
    skip: tuple[str, ...] = (),
    finished: Callable[[str], dict[str, Tensor] | None] = lambda item: None,
    sinks: Sinks | None = None,
) -> Iterator[Item | None]:
    """Every item of the checkpoint in order, solved; None for one that is finished already.

    Args:
        shared: the pass over the checkpoint, in which others may take part.
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
    assert sinks is None or sinks.taken is None or not goes_on_quantized(calibration), "the stream needs the linears"
    activations = _activations(shared, decoder, calibration, solvers) if calibration else None
    return _Stream(shared, solvers, activations, decoder, stored_dtype, skip, sinks or Sinks()).items(finished)


@dataclass(frozen=True)
class _Stream:
    """One recipe on its way through a checkpoint; attributes as of `stream`."""

    shared: SourcePass
    solvers: Solvers
    activations: Activations | None
    decoder: Decoder
    stored_dtype: torch.dtype
    skip: tuple[str, ...]
    sinks: Sinks

    def items(self, finished: Callable[[str], dict[str, Tensor] | None]) -> Iterator[Item | None]:
        """See `stream`."""
        names = self.shared.checkpoint.items
        with self.activations.taking_part() if self.activations else nullcontext():
            for name, following in zip(names, [*names[1:], None], strict=True):
                spent: dict[str, float] = {}
                with timed(spent, "read"):
                    source = self.shared.read(name, following)
                self.sinks.item(name)
                if name == HEAD and self.solvers.unties_head and HEAD_WEIGHT not in source:
                    embedding = self.shared.checkpoint.read(EMBEDDING)
                    source = source | {HEAD_WEIGHT: embedding[f"{END_MODULES[EMBEDDING]}.weight"]}
                if self.activations:
                    self.activations.at(name, source, spent)
                replay = finished(name)
                if replay is not None:
                    if self.activations:
                        self.activations.advance(name, replay)
                    yield None
                    continue
                # no variable: it would hold on to an item while others take their turns
                yield _timed_item(
                    self._end(name, source) if name in (EMBEDDING, HEAD) else self._layer(name, source), spent
                )

    def _layer(self, name: str, source: dict[str, Tensor]) -> Item:
        """A decoder layer: rewritten where the recipe prepares it, and its linears solved stage by stage."""
        index, family, activations = int(name.removeprefix("layers.")), self.decoder.family, self.activations
        hidden = activations.hidden() if activations is not None and not activations.shares_sums else []
        seconds: dict[str, float] = {}
        prepared = self._prepared(index, source, hidden, seconds)
        rewritten = source | prepared.tensors
        full_names = (f"model.layers.{index}.{linear}" for linear in family.linears)
        linears = {full for full in full_names if not full.endswith(self.skip)}
        solved = {f"{linear}.weight": rewritten[f"{linear}.weight"] for linear in linears}
        for key, tensor in solved.items():
            _require_storable(key, tensor, self.stored_dtype)
        dense = {key: tensor for key, tensor in rewritten.items() if key not in solved}
        stored = {key: _as_stored(key, tensor, self.stored_dtype) for key, tensor in dense.items()}
        # linears to be solved start from the source's own values; what stays dense is used as the file will hold it
        working = rewritten if activations is not None and activations.from_float else stored | solved
        item = Item(name, {}, {key: tensor for key, tensor in stored.items() if key.rsplit(".", 1)[0] not in linears})
        item.seconds.update(seconds)
        biases = {key.removesuffix(".bias"): stored[key] for key in stored if key.endswith(".bias")}

        def solve_stage(stage: Stage, weight_of: WeightOf, statistics: Statistics) -> None:
            named = {f"model.layers.{index}.{linear}": linear for linear in stage.linears}
            with timed(item.seconds, "load"):
                weights = {full: weight_of(linear) for full, linear in named.items() if full in linears}
            # what walks freed must not stand beside what the solver takes, nor the other way round; without walks it is
            # the next matrix that wants it, and a page that comes anew costs more than the numbers on it
            walked = activations is not None
            if walked:
                release_freed_memory()
            self._solve(item, self.solvers.layers, weights, statistics, biases)
            if walked:
                release_freed_memory()

        if activations is None:
            # nothing goes through the layer: its linears are enough, a stage's at a time
            for stage in family.stages:
                solve_stage(
                    stage,
                    lambda linear: self.decoder.place_to_solve(working[f"model.layers.{index}.{linear}.weight"]),
                    Statistics(frozenset()),
                )
            return item
        if activations.shares_sums:
            activations.solve_shared(item, solve_stage)
            return item
        with timed(item.seconds, "load"):
            layer = self.decoder.layer(index, working)
        here = frozenset(linear for linear in family.linears if layer.linear_name(linear) in linears)
        activations.solve_layer(layer, hidden, item, here, self.solvers.layers.needs, prepared.divided, solve_stage)
        return item

    def _prepared(
        self, index: int, source: dict[str, Tensor], hidden: Sequence[Kept], seconds: dict[str, float]
    ) -> Prepared:
        """What a preparation makes of a layer; nothing where the recipe has none."""
        preparation, activations = self.solvers.preparation, self.activations
        if preparation is None:
            return Prepared({}, {})
        assert activations is not None, "a preparation needs activations"
        with timed(seconds, "prepare"):
            layer = self.decoder.layer(index, source)
            sample_BTD = activations.calibration.sampled((each.tensor() for each in hidden), preparation.windows)
            return preparation.prepare(layer, sample_BTD, activations.rope)

    def _end(self, name: str, source: dict[str, Tensor]) -> Item:
        """The embedding, or final norm and head; quantized if there is a solver for them."""
        key, activations = f"{END_MODULES[name]}.weight", self.activations
        solver = None if END_MODULES[name].endswith(self.skip) or key not in source else self.solvers.ends
        if solver is not None:
            _require_storable(key, source[key], self.stored_dtype)
        kept = {other: tensor for other, tensor in source.items() if solver is None or other != key}
        item = Item(name, {}, {other: _as_stored(other, tensor, self.stored_dtype) for other, tensor in kept.items()})
        if solver is not None:
            statistics = Statistics(frozenset())
            if name == HEAD and activations and solver.needs:
                with timed(item.seconds, "statistics"):
                    statistics = activations.head_statistics(item.tensors, source, solver.needs)
            self._solve(item, solver, {END_MODULES[name]: self.decoder.place_to_solve(source[key])}, statistics, {})
        if activations and not activations.from_float and name == EMBEDDING:
            decoded = {f"{full}.weight": linear.dequantize() for full, linear in item.linears.items()}
            with timed(item.seconds, "embed"):
                activations.advance(name, item.tensors | decoded)
        return item

    def _solve(
        self,
        item: Item,
        solver: Solver,
        weights: dict[str, Tensor],
        statistics: Statistics,
        biases: Mapping[str, Tensor],
    ) -> None:
        """Solve linears into an item; what they share counts as a stage of its own."""
        factorised = 0.0
        for full, quantized, facts in timed_steps(item.seconds, "solve", solver.solve(weights, statistics)):
            linear = replace(quantized, bias_O=biases.get(full, quantized.bias_O))
            if self.sinks.taken is None:
                item.linears[full] = linear
            else:
                self.sinks.taken(item, full, linear)
            # else it would be there until the next is solved
            del quantized, linear
            item.facts.append(facts)
            self.sinks.linear(facts)
            factorised += facts.factorise_s
        if factorised:
            item.seconds["factorise"] = item.seconds.get("factorise", 0.0) + factorised
            item.seconds["solve"] -= factorised


def _timed_item(item: Item, spent: Mapping[str, float]) -> Item:
    """The item with what was spent on coming to it counted too."""
    for stage, seconds in spent.items():
        item.seconds[stage] = item.seconds.get(stage, 0.0) + seconds
    return item


def _activations(shared: SourcePass, decoder: Decoder, calibration: Calibration, solvers: Solvers) -> Activations:
    """One stream's activations, with a place in the unquantized stream if it has to do with it."""
    rewrites = solvers.preparation is not None
    if calibration.from_float:
        wanted = Taken(hidden=True) if rewrites else Taken(solvers.layers.needs)
        return Activations(decoder, calibration, shared.float_stream(decoder, calibration), wanted)
    if DEVIATION not in solvers.needs:
        return Activations(decoder, calibration, None, Taken())
    exact = shared.float_stream(decoder, replace(calibration, every=solvers.compared_every))
    return Activations(decoder, calibration, exact, Taken(inputs=True))


def _as_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    _require_storable(name, tensor, dtype)
    return tensor.to(dtype)


def _require_storable(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuse what does not fit: what a checkpoint holds is finite, what a preparation makes is wider than stored."""
    if tensor.dtype == dtype:
        return
    # rounding keeps the order of values, so the extremes tell of all
    if not torch.isfinite(torch.stack(tensor.aminmax()).to(dtype)).all():
        raise RefusedError(
            f"{name} holds values beyond {str(dtype).removeprefix('torch.')} (largest: {tensor.abs().max():g})",
            where=name,
            fix="this model cannot be stored in the format's 16-bit floats",
        )
