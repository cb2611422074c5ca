"""Memory of a build, of several side by side, and which of them can go through a checkpoint together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.calibration.statistics import DEVIATION
from quantkit.checkpoint.families import EMBEDDING, HEAD
from quantkit.checkpoint.index import Checkpoint
from quantkit.costs import FLOAT_BYTES
from quantkit.formats.contract import InPlace
from quantkit.methods import Method
from quantkit.recipe import Recipe
from quantkit.validation.perplexity import CHUNK_COPIES, chunk_positions
from quantkit.validation.text import EvaluationText
from quantkit.workload import Work, compared_tokens, compute_dtype, held_tokens, solving, surveying

AT_WORK = 2  # batches whose activations are on the device when all others wait elsewhere
FIXED_BYTES = 660 * 1024**2  # interpreter, libraries and allocator slack
# what glibc keeps of pieces up to 32 MB while windows of many lengths come and go; larger ones are given back at once
HELD_BYTES = 200 * 1024**2


@dataclass(frozen=True)
class Footprint:
    """Memory of one build, and what of it builds can have in common; bytes.

    Attributes:
        together: builds in which this is equal can go through a checkpoint together; None for one that goes alone.
        kept: while others are at work: its own activations.
        working: more, while it is at work on an item.
        stream: what decides the unquantized stream that it takes part in; None if it takes part in none.
        stream_alone: that stream, for one build.
        stream_shared: the same for several: inputs and sums of all stages wait until the last has taken them.
    """

    together: tuple[Any, ...] | None
    kept: int
    working: int
    stream: tuple[Any, ...] | None = None
    stream_alone: int = 0
    stream_shared: int = 0


def together_bytes(builds: Sequence[Footprint]) -> int:
    """Peak memory of builds side by side: each keeps its activations, one is at work, streams are shared."""
    streams: dict[tuple[Any, ...], list[Footprint]] = {}
    for build in builds:
        if build.stream is not None:
            streams.setdefault(build.stream, []).append(build)
    shared = sum(
        users[0].stream_alone if len(users) == 1 else max(user.stream_shared for user in users)
        for users in streams.values()
    )
    return FIXED_BYTES + sum(build.kept for build in builds) + max(build.working for build in builds) + shared


def in_passes(builds: Sequence[Footprint], free: int) -> list[list[int]]:
    """Places of builds that go together: each joins the first of its kind where memory suffices for one more."""
    passes: list[list[int]] = []
    for place, build in enumerate(builds):
        for taking in passes:
            alike = build.together is not None and builds[taking[0]].together == build.together
            if alike and together_bytes([*(builds[other] for other in taking), build]) <= free:
                taking.append(place)
                break
        else:
            passes.append([place])
    return passes


def judging_bytes(recipe: Recipe, checkpoint: Checkpoint, text: EvaluationText | None) -> int:
    """Peak of judging a variant: all windows on their way through it, or its logits beside the source's.

    Layers that are held for the answer to the prompt take what is free, and are not counted; nor are engines, which are
    processes of their own.

    Args:
        recipe, checkpoint: of the build.
        text: to judge on; of one that is not at hand no state is counted.
    """
    width = compute_dtype(recipe).itemsize
    windows, together = (() if text is None else text.windows), recipe.compute.windows_per_batch
    lengths = [len(window.inputs) for window in windows]
    batches = [lengths[first : first + together] for first in range(0, len(lengths), together)]
    padded = [len(batch) * max(batch) for batch in batches]
    state = int(checkpoint.config["hidden_size"]) * width
    predicted = state * sum(len(window.targets) for window in windows)
    vocabulary = int(checkpoint.config["vocab_size"])
    head = vocabulary * int(checkpoint.config["hidden_size"])
    infos = checkpoint.tensors.tensors
    layer = [infos[name].num_elements for name in checkpoint.names("layers.0")]
    columns = max(columns for _, _, columns in checkpoint.linear_shapes())
    # decoded to float32, and then cast where that is another dtype
    wide = FLOAT_BYTES + (width if width != FLOAT_BYTES else 0)
    through = wide * sum(layer) + FLOAT_BYTES * max(layer) + 3 * max(padded, default=0) * columns * width
    walking = state * sum(padded) + predicted + max(through, wide * head)
    logits = CHUNK_COPIES * FLOAT_BYTES * chunk_positions(vocabulary) * vocabulary
    # and no more than all that comes and goes
    held = min(HELD_BYTES, sum(padded) * (state + FLOAT_BYTES * vocabulary))
    return FIXED_BYTES + held + max(walking, 2 * predicted + 2 * wide * head + logits)


def footprint_of(
    recipe: Recipe,
    checkpoint: Checkpoint,
    method: Method,
    work: Work,
    *,
    item_bytes: int,
    ranks: int,
    most_batches: int | None = None,
) -> Footprint:
    """Peak of the pass: activations, one layer, and the largest of what is done to it; or one of the ends.

    Of several ranks each holds the activations of its own windows alone, and everything else as one process would: the
    layer, whole sums, and one of them the largest linear's solution.

    Args:
        recipe, checkpoint, method, work: of the build.
        item_bytes: of a solved item in the artifact.
        ranks: how many processes make it; the footprint is that of the first, which has most.
        most_batches: whose activations are on the device; None is all of its own.
    """
    width = compute_dtype(recipe).itemsize
    infos = checkpoint.tensors.tensors
    names = checkpoint.names("layers.0")
    layer, source = (sum(getattr(infos[name], part) for name in names) for part in ("num_elements", "size_bytes"))
    ends = max(sum(infos[name].size_bytes for name in checkpoint.names(item)) for item in (EMBEDDING, HEAD))
    solvers = method.solvers
    compares = DEVIATION in solvers.needs
    tokens = work.layers[0].tokens
    own, travelling = held_tokens(recipe, tokens, ranks)
    if most_batches is not None:
        own = min(own, most_batches * recipe.compute.windows_per_batch * recipe.calibration.window_tokens)
    from_float = recipe.calibration.activations == "float"
    batch = min(own, recipe.compute.windows_per_batch * recipe.calibration.window_tokens)
    own_compared, batch_compared = (compared_tokens(recipe, method, held) for held in (own, batch))
    unquantized = own if from_float else own_compared
    hidden, unquantized_hidden, handed = (
        held * int(checkpoint.config["hidden_size"]) * width for held in (own, unquantized, travelling)
    )
    *_, last = work.layers[0].stages
    # what an unquantized stream of its own reads at the last stage, where its walks end, is there for a batch at a time
    beside = {name: batch_compared if name == last else own_compared for name in work.layers[0].stages}
    peaks = [
        (own + beside[name]) * stage.columns * width
        # on its way through the MLP a batch is there three times, of which once it stays; what was handed comes after
        + max(
            solving(solvers.layers, stage).memory_bytes + travelling * stage.columns * width,
            2 * batch * stage.columns * width,
        )
        for name, stage in work.layers[0].stages.items()
    ]
    if solvers.preparation is not None:
        peaks.append(handed + solvers.preparation.cost(work.layers[0]).memory_bytes)
    if method.survey is not None:
        peaks.append(max(handed, surveying(method.survey, work.layers[0]).memory_bytes))
    # what has its places is written linear by linear, and the solver counts those; else a solved item is there, and one
    # more that is being written
    at_once = isinstance(method.format, InPlace) and (from_float or not tokens) and ranks == 1
    solved, waiting = (0, 0) if at_once else (layer, item_bytes)
    # without text nothing goes through the layer: of its weights those of a stage are placed, and nothing is rewritten
    stages = work.layers[0].stages.values()
    largest = max(sum(shape.size for shape in stage.shapes) for stage in stages)
    placed = width * (1 + compares) * layer if tokens else source * largest // layer
    in_layer = placed + solved + (3 if tokens else 2) * source + max(peaks)
    at_ends = max((solving(solvers.ends, stage).memory_bytes for stage in work.ends if solvers.ends), default=0)
    working = ends + max(in_layer, at_ends)
    together = (recipe.model, recipe.compute.threads)
    if not tokens or not (from_float or compares):
        return Footprint(together, hidden + waiting, working)
    section = recipe.calibration
    compute = (recipe.compute.windows_per_batch, recipe.compute.dtype)
    every = 1 if from_float else solvers.compared_every
    inputs = [stage.columns for stage in work.layers[0].stages.values()]
    sums = 2 * FLOAT_BYTES * sum(columns**2 for columns in inputs)
    return Footprint(
        together,
        waiting + (0 if from_float else hidden),
        working,
        stream=(tuple(sorted(section.texts.items())), section.window_tokens, section.seed, *compute, every),
        stream_alone=unquantized_hidden,
        stream_shared=2 * unquantized_hidden + unquantized * sum(inputs) * width + width * layer + sums,
    )
