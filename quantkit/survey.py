"""The pass that comes first where a method is settled by what the layers of the unquantized model are like.

Shape legend: T tokens per window, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from quantkit.calibration.statistics import Statistics
from quantkit.checkpoint.families import EMBEDDING
from quantkit.checkpoint.layer import Decoder, DecoderLayer
from quantkit.costs import Cost, LayerWork
from quantkit.machine import release_freed_memory
from quantkit.source_pass import Calibration, SourcePass, Taken


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

    def cost(self, layer: LayerWork) -> Cost:
        """What measuring such a layer takes, beside the walk of all windows through it and the statistics."""
        ...


def survey(
    shared: SourcePass,
    calibration: Calibration,
    measuring: Measuring,
    *,
    decoder: Decoder,
    known: Callable[[str], bool] = lambda item: False,
    told: Callable[[str], None] = lambda item: None,
) -> Iterator[tuple[str, dict[str, Any]] | None]:
    """What is found out about every decoder layer, by its name; None for an item of which nothing is, or known already.

    Args:
        shared: the pass over the checkpoint, in which others may take part.
        calibration: the windows; what they are in the unquantized model is looked at.
        measuring: looks.
        decoder: the model's code.
        known: whether a layer was measured before.
        told: of every item that is come to.
    """
    exact = shared.float_stream(decoder, calibration)
    # two recipes may measure in the same way: each takes part for itself
    place = object()
    exact.join(place, Taken(measuring.needs, hidden=True))

    def measured() -> Iterator[tuple[str, dict[str, Any]] | None]:
        names = shared.checkpoint.items[:-1]
        with exact.taking_part(place):
            for name, following in zip(names, [*names[1:], None], strict=True):
                source = shared.read(name, following)
                told(name)
                exact.at(name, source, {})
                if name == EMBEDDING or known(name):
                    yield None
                    continue
                hidden_BTD = calibration.sampled((each.tensor() for each in exact.hidden()), measuring.windows)
                spent: dict[str, float] = {}
                statistics = {stage.name: exact.statistics(stage, spent) for stage in decoder.family.stages}
                release_freed_memory()
                layer = exact.decoder.layer(int(name.removeprefix("layers.")), source)
                yield name, measuring.measure(layer, statistics, hidden_BTD, exact.rope)
                del statistics, layer, hidden_BTD

    return measured()
