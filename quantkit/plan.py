"""What a build will need, found out before it starts: problems, sizes, memory, disk and a time estimate."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.statistics import DEVIATION, narrow
from quantkit.calibration.statistics import cost as statistics_cost
from quantkit.checkpoint.families import EMBEDDING, END_MODULES, HEAD
from quantkit.checkpoint.index import Checkpoint
from quantkit.checkpoint.spill import free_bytes
from quantkit.costs import FLOAT_BYTES, Cost, LayerWork, Shape, StageWork, total
from quantkit.engines.env import find_engine
from quantkit.engines.runtime import require
from quantkit.errors import RefusedError
from quantkit.estimate import crowding, product_seconds, search_seconds
from quantkit.formats.contract import Format, Headed, InPlace, Particular, SeveralVariants
from quantkit.launch import TOGETHER
from quantkit.methods import Method, Survey
from quantkit.ranks import owners
from quantkit.recipe import OWN_ENGINE, Recipe
from quantkit.solvers.contract import Solver
from quantkit.units import size_text

DISK_MARGIN_BYTES = 64 * 1024**2
AT_WORK = 2  # batches whose activations are on the device when all others wait elsewhere
FIXED_BYTES = 660 * 1024**2  # interpreter, libraries and allocator slack


@dataclass(frozen=True)
class Plan:
    """Estimates for one build; bytes and seconds.

    Attributes:
        linears: how many linears are quantized.
        parameters: of the whole model.
        artifact_bytes: weights on disk.
        bits_per_weight: over the quantized linears; the mean of the variants.
        disk_bytes: most that is on disk at once (finished items beside the artifact).
        disk_free_bytes: on the output's disk.
        ranks: processes that make it together.
        memory_bytes: peak on the device that solves: of all processes on a CPU, which they share; of one on its GPU.
        rank_bytes: of it, the one process that needs most.
        memory_free_bytes: available there.
        waiting_bytes: of a rank's memory, activations that can wait in the host's where the device has its own.
        reserve_bytes: of such a device, what is to be free for what is at work; 0 on a CPU.
        host_free_bytes: available there.
        tokens: of calibration.
        operations: least floating-point operations of each stage, see `operations`.
        source_bytes: weights to be read.
        seconds: a rough estimate from short trials; None where others do the work, or where nobody asked.
        variants: bytes of each variant's weights, where the format writes several.
        footprint: what of the memory several builds can have in common.
    """

    linears: int
    parameters: int
    artifact_bytes: int
    bits_per_weight: float
    disk_bytes: int
    disk_free_bytes: int
    ranks: int
    memory_bytes: int
    rank_bytes: int
    memory_free_bytes: int
    waiting_bytes: int
    reserve_bytes: int
    host_free_bytes: int
    tokens: int
    operations: dict[str, float]
    source_bytes: int
    seconds: float | None
    variants: dict[str, int]
    footprint: "Footprint"

    @property
    def spills(self) -> bool:
        """Whether activations have to wait in the host's memory."""
        return self.memory_bytes > self.memory_free_bytes and self.fits

    @property
    def fits(self) -> bool:
        """Whether memory suffices, the host's for what can wait there."""
        if self.memory_bytes <= self.memory_free_bytes:
            return True
        on_host = self.ranks * self.waiting_bytes
        return 0 < self.reserve_bytes <= self.memory_free_bytes and on_host <= self.host_free_bytes

    def facts(self) -> dict[str, Any]:
        """As a table for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "footprint"}


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


def make_plan(
    recipe: Recipe,
    checkpoint: Checkpoint,
    method: Method,
    *,
    out: Path,
    device: torch.device,
    ranks: int = 1,
    timed: bool = False,
) -> Plan:
    """The plan of a build.

    Args:
        recipe, checkpoint, method: what is built.
        out: the artifact's folder.
        device: where is computed.
        ranks: how many processes make it together.
        timed: try how long it will take, which takes a moment itself.

    Raises:
        RefusedError: the format cannot hold a linear; every problem is named.
    """
    engine = recipe.upstream
    if engine is not None:
        engine.require_model(checkpoint.family.model_type)
    several = isinstance(method.format, SeveralVariants) and len(method.format.variants) > 1
    if several and engine is None and method.solvers.needs and recipe.calibration.activations != "float":
        raise RefusedError(
            "several variants cannot share statistics of a quantized stream, which is different for each",
            where="calibration.activations",
            fix='set it to "float", or let the recipe name a single variant',
        )
    if DEVIATION in method.solvers.needs and recipe.calibration.activations == "float":
        raise RefusedError(
            "the correction towards the unquantized stream (asymmetric) has nothing to correct in that stream itself",
            where="calibration.activations",
            fix='set it to "quantized", or asymmetric to 0 where the format has that key',
        )
    shapes = list(checkpoint.linear_shapes(ends=method.solvers.ends is not None))
    untied = method.solvers.unties_head and all(name != END_MODULES[HEAD] for name, _, _ in shapes)
    if untied:
        shapes += [
            (END_MODULES[HEAD], rows, columns) for name, rows, columns in shapes if name == END_MODULES[EMBEDDING]
        ]
    solved = [shape for shape in shapes if not shape[0].endswith(method.format.skip)]
    problems = method.format.problems(shapes)
    if isinstance(method.format, Particular):
        problems += method.format.tensor_problems(checkpoint.tensors.tensors)
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise RefusedError(
            f"{len(problems)} linear(s) do not fit the format:\n  " + "\n  ".join(shown),
            where=str(checkpoint.folder),
            fix="change the recipe as said, or choose another group_size",
        )
    infos = checkpoint.tensors.tensors
    parameters = sum(info.num_elements for info in infos.values())
    quantized = sum(rows * columns for _, rows, columns in solved)
    parameters_held = parameters + (shapes[-1][1] * shapes[-1][2] if untied else 0)
    quantized_bits = sum(method.format.stored_bits(*shape) for shape in solved)
    dense_bytes = (parameters_held - quantized) * method.format.stored_dtype.itemsize
    beside_bytes = dense_bytes + (method.format.head_bytes(checkpoint) if isinstance(method.format, Headed) else 0)
    variants = _variants(method.format, solved, beside_bytes)
    artifact_bytes = quantized_bits // 8 + beside_bytes * max(len(variants), 1)
    if engine is not None and not engine.takes_checkpoint:
        _require_whole(recipe, variants)
    tokens = 0
    if reads_text(recipe, method):
        tokens = sum(recipe.calibration.texts.values()) * recipe.calibration.window_tokens
    work = work_of(recipe, checkpoint, method, solved, tokens)
    item_bytes = artifact_bytes // checkpoint.num_layers
    taken = (
        Footprint(None, 0, _upstream_memory(parameters, device) - FIXED_BYTES)
        if engine is not None and engine.takes_checkpoint
        else _footprint(recipe, checkpoint, method, work, item_bytes=item_bytes, ranks=ranks)
    )
    rank_bytes = together_bytes([taken])
    waiting_bytes = 0
    if engine is None:
        least = _footprint(recipe, checkpoint, method, work, item_bytes=item_bytes, ranks=ranks, most_batches=AT_WORK)
        waiting_bytes = rank_bytes - together_bytes([least])
    # what is not given the checkpoint starts from a copy of it in 16 bits
    prepared_bytes = 0 if engine is None or engine.takes_checkpoint else 2 * parameters_held
    counted = operations(method, work, from_float=recipe.calibration.activations == "float")
    return Plan(
        linears=len(solved),
        parameters=parameters,
        artifact_bytes=artifact_bytes,
        bits_per_weight=quantized_bits / max(quantized * max(len(variants), 1), 1),
        disk_bytes=prepared_bytes + artifact_bytes * (1 if isinstance(method.format, InPlace) else 2),
        disk_free_bytes=shutil.disk_usage(_existing(out)).free,
        ranks=ranks,
        memory_bytes=rank_bytes * (1 if has_own_memory(device) else ranks),
        rank_bytes=rank_bytes,
        memory_free_bytes=free_bytes(device),
        waiting_bytes=waiting_bytes,
        reserve_bytes=rank_bytes - waiting_bytes if waiting_bytes and has_own_memory(device) else 0,
        host_free_bytes=free_bytes(torch.device("cpu")),
        tokens=tokens,
        operations=counted,
        source_bytes=sum(info.size_bytes for info in infos.values()),
        seconds=_seconds(recipe, method, work, counted, device, ranks) if timed else None,
        variants=variants,
        footprint=taken,
    )


def require_here(
    plan: Plan, recipe: Recipe, method: Method, *, out: Path, device: torch.device, reserved_bytes: int = 0
) -> None:
    """Stop unless this machine can run the build.

    Args:
        plan: what it needs.
        recipe, method: what it calls.
        out: the artifact's folder.
        device: where to compute.
        reserved_bytes: of the disk, for other builds.

    Raises:
        RefusedError: disk or memory will not do.
        UnavailableError: an engine that the build calls cannot run here.
    """
    if recipe.upstream is not None:
        require(recipe.upstream, device.type)
    if method.engine:
        require(find_engine(method.engine), "cpu")
    if device.type == "cuda" and plan.ranks > torch.cuda.device_count():
        raise RefusedError(
            f"{plan.ranks} ranks want a GPU each: {torch.cuda.device_count()} are there",
            where=TOGETHER,
            fix="use as many ranks as there are GPUs",
        )
    if plan.disk_bytes + reserved_bytes + DISK_MARGIN_BYTES > plan.disk_free_bytes:
        beside = f", {size_text(reserved_bytes)} of them for those before it" if reserved_bytes else ""
        raise RefusedError(
            f"the build needs {size_text(plan.disk_bytes)} of disk, {size_text(plan.disk_free_bytes)} are free{beside}",
            where=str(out),
            fix="free some space, or choose another disk with --out",
        )
    if not plan.fits:
        shared = plan.memory_bytes > plan.rank_bytes
        together = f", {size_text(plan.rank_bytes)} for each of {plan.ranks} ranks" if shared else ""
        fewer = "fewer ranks (--ranks), " if shared else ""
        more = "more GPUs (--ranks), " if device.type == "cuda" and recipe.upstream is None and plan.tokens else ""
        least = (
            f"; with {size_text(plan.waiting_bytes)} of activations in the host's memory, of which "
            f"{size_text(plan.host_free_bytes)} are free, still {size_text(plan.reserve_bytes)}"
            if plan.reserve_bytes
            else ""
        )
        raise RefusedError(
            f"the build needs about {size_text(plan.memory_bytes)} of memory on {device.type}{together}, "
            f"{size_text(plan.memory_free_bytes)} are free{least}",
            where="calibration and compute",
            fix=f"use {fewer}{more}fewer or shorter windows (calibration.texts, calibration.window_tokens), or a "
            "larger machine",
        )


def plan_lines(plan: Plan) -> list[str]:
    """The plan for people."""
    return [
        f"linears           {plan.linears}, {plan.bits_per_weight:.3f} bits per weight",
        f"parameters        {plan.parameters / 1e6:.1f} M",
        f"artifact          {size_text(plan.artifact_bytes)}",
        *(f"  {name:<16}{size_text(size)}" for name, size in plan.variants.items()),
        f"disk              {size_text(plan.disk_bytes)} while building, {size_text(plan.disk_free_bytes)} free",
        f"memory            {_memory_text(plan)}, {size_text(plan.memory_free_bytes)} free",
        f"calibration       {plan.tokens} tokens",
        f"operations        {_operations_text(plan)}",
        f"time              {_time_text(plan)}",
    ]


def _time_text(plan: Plan) -> str:
    return "not estimated: others do the work" if plan.seconds is None else f"about {plan.seconds:.0f} s (estimate)"


def _operations_text(plan: Plan) -> str:
    if not plan.operations:
        return "no products: codes are found on the weights alone"
    by_stage = ", ".join(f"{stage} {count / 1e12:.2f}" for stage, count in plan.operations.items())
    return f"{sum(plan.operations.values()) / 1e12:.2f} T at least: {by_stage}"


def _memory_text(plan: Plan) -> str:
    """What is held against the free memory; of several ranks on one CPU also what each takes."""
    if plan.spills:
        return f"{size_text(plan.reserve_bytes)}, {size_text(plan.waiting_bytes)} of activations wait in the host's"
    if plan.memory_bytes > plan.rank_bytes:
        return f"{size_text(plan.memory_bytes)} of {plan.ranks} ranks, {size_text(plan.rank_bytes)} each"
    return f"{size_text(plan.memory_bytes)}{' of each rank' if plan.ranks > 1 else ''}"


def together_lines(names: list[list[str]], memory_bytes: int, disk_bytes: int) -> list[str]:
    """For people: what goes together, and what that takes.

    Args:
        names: of each pass.
        memory_bytes: of the largest pass.
        disk_bytes: of all.
    """
    return [
        *(f"pass {number:<13}{', '.join(taking)}" for number, taking in enumerate(names, 1)),
        f"memory            {size_text(memory_bytes)} together",
        f"disk              {size_text(disk_bytes)} together",
    ]


def _variants(form: Format, solved: list[tuple[str, int, int]], beside_bytes: int) -> dict[str, int]:
    """Bytes of each variant; empty for a format that writes one."""
    if not isinstance(form, SeveralVariants):
        return {}
    bits: dict[str, int] = {}
    for shape in solved:
        for name, stored in form.variant_bits(*shape).items():
            bits[name] = bits.get(name, 0) + stored
    return {name: stored // 8 + beside_bytes for name, stored in bits.items()}


def _require_whole(recipe: Recipe, variants: dict[str, int]) -> None:
    """Stop where a file would have to be split that an engine writes whole."""
    large = [name for name, size_bytes in variants.items() if size_bytes > recipe.quantize.shard_gb * 1e9]
    if large:
        raise RefusedError(
            f"the engine {recipe.engine} does not split files, and {', '.join(large)} would be larger than "
            f"{recipe.quantize.shard_gb:g} GB",
            where="quantize.shard_gb",
            fix=f'choose a larger one, other types, or engine = "{OWN_ENGINE}"',
        )


def reads_text(recipe: Recipe, method: Method) -> bool:
    """Whether a build uses calibration text: an engine that is given it always, for nobody knows what for."""
    return bool(method.solvers.needs) or (recipe.upstream is not None and recipe.upstream.takes_checkpoint)


def _upstream_memory(parameters: int, device: torch.device) -> int:
    """Engines hold the whole model, in float16 on a GPU and float32 elsewhere, and half as much again at work."""
    return parameters * (2 if device.type == "cuda" else 4) * 3 // 2 + 1024**3


@dataclass(frozen=True)
class Work:
    """Everything that a pass goes through.

    Attributes:
        layers: the decoder layers with the linears that are quantized.
        ends: embedding and head, where they are quantized.
    """

    layers: tuple[LayerWork, ...]
    ends: tuple[StageWork, ...]


def work_of(
    recipe: Recipe, checkpoint: Checkpoint, method: Method, solved: list[tuple[str, int, int]], tokens: int
) -> Work:
    """What a build goes through.

    Args:
        recipe, checkpoint, method: of the build.
        solved: (name, out, in) of the linears that are quantized.
        tokens: of calibration.
    """
    compared = _compared_tokens(recipe, method, tokens)
    shapes = {name: Shape(name, rows, columns) for name, rows, columns in solved}
    every = {name: Shape(name, rows, columns) for name, rows, columns in checkpoint.linear_shapes()}
    layers = []
    for index in range(checkpoint.num_layers):
        prefix = f"model.layers.{index}."
        stages = {}
        for stage in checkpoint.family.stages:
            names = [prefix + linear for linear in stage.linears]
            taken = tuple(shapes[name] for name in names if name in shapes)
            is_narrow = narrow([(shape.rows, shape.columns) for shape in taken])
            stages[stage.name] = StageWork(taken, every[names[0]].columns, tokens, compared, is_narrow)
        forward = sum(every[prefix + linear].size for linear in checkpoint.family.linears)
        attention = stages[checkpoint.family.stages[1].name].columns
        layers.append(
            LayerWork(
                stages, forward, attention, tokens, compared, recipe.calibration.window_tokens, _width(recipe).itemsize
            )
        )
    ends = tuple(
        StageWork((shapes[module],), shapes[module].columns, *((tokens, compared) if item == HEAD else (0, 0)))
        for item, module in END_MODULES.items()
        if module in shapes
    )
    return Work(tuple(layers), ends)


def _seconds(
    recipe: Recipe, method: Method, work: Work, counted: dict[str, float], device: torch.device, ranks: int
) -> float | None:
    """A rough estimate for the rank with most to do: products at the device's rate, searches as they are tried."""
    if recipe.upstream is not None or method.engine is not None:
        return None
    dtype, solvers = _width(recipe), method.solvers
    # layers are alike
    tried = [search_seconds(solvers.layers, stage, dtype, device) for stage in work.layers[0].stages.values()]
    searched = len(work.layers) * sum(tried)
    if solvers.ends is not None:
        searched += sum(search_seconds(solvers.ends, stage, dtype, device) for stage in work.ends)
    shares = _dealt(work, recipe, ranks)
    products = product_seconds({name: count * shares.get(name, 1) for name, count in counted.items()}, dtype, device)
    crowded = 1.0 if has_own_memory(device) else crowding(ranks, recipe.compute.threads)
    return (products + searched * shares["solve"]) * crowded


def _dealt(work: Work, recipe: Recipe, ranks: int) -> dict[str, float]:
    """The share of each stage that the rank with most to do has; what is not here, each does in full."""
    stages = [*(stage for layer in work.layers for stage in layer.stages.values()), *work.ends]
    tokens = work.layers[0].tokens
    return {
        "forward": _held_tokens(recipe, tokens, ranks)[0] / max(tokens, 1),
        "statistics": 1 / ranks,
        "solve": sum(_most(stage, ranks) * stage.columns for stage in stages)
        / max(sum(shape.size * stage.columns for stage in stages for shape in stage.shapes), 1),
    }


def _most(stage: StageWork, ranks: int) -> int:
    """Weights that the rank with most of a stage has to solve."""
    sizes = [shape.size for shape in stage.shapes]
    load = [0] * ranks
    for size, owner in zip(sizes, owners(sizes, ranks), strict=True):
        load[owner] += size
    return max(load)


def operations(method: Method, work: Work, *, from_float: bool) -> dict[str, float]:
    """Least floating-point operations of each stage, one multiply-add being two; a floor, not what a solver takes.

    * forward: all tokens through the decoder layers, attention without its mask, and those that are compared once more;
    * statistics: half of the symmetric sum of x x^T, once for linears that read the same;
    * factorise, solve, prepare: as solvers and preparation state them (`cost`);
    * survey: the whole of a pass that comes first.

    Args:
        method: solvers, and the survey if there is one.
        work: what they go through.
        from_float: activations come from the unquantized model.
    """
    solvers = method.solvers
    found = Cost()
    if solvers.needs:
        # a layer whose channels were scaled is walked, and then the checkpoint's own
        passes = 1 + (solvers.preparation is not None and from_float)
        found += total(
            Cost({"forward": layer.forward_operations(passes * layer.tokens + layer.compared)}) for layer in work.layers
        )
    found += total(_solving(solvers.layers, stage) for layer in work.layers for stage in layer.stages.values())
    if solvers.ends is not None:
        found += total(_solving(solvers.ends, stage) for stage in work.ends)
    if solvers.preparation is not None:
        found += total(solvers.preparation.cost(layer) for layer in work.layers)
    if method.survey is not None:
        found += total(_surveying(method.survey, layer) for layer in work.layers)
    return found.operations


def _footprint(
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
    width = _width(recipe).itemsize
    infos = checkpoint.tensors.tensors
    names = checkpoint.names("layers.0")
    layer, source = (sum(getattr(infos[name], part) for name in names) for part in ("num_elements", "size_bytes"))
    ends = max(sum(infos[name].size_bytes for name in checkpoint.names(item)) for item in (EMBEDDING, HEAD))
    solvers = method.solvers
    compares = DEVIATION in solvers.needs
    tokens = work.layers[0].tokens
    own, travelling = _held_tokens(recipe, tokens, ranks)
    if most_batches is not None:
        own = min(own, most_batches * recipe.compute.windows_per_batch * recipe.calibration.window_tokens)
    from_float = recipe.calibration.activations == "float"
    batch = min(own, recipe.compute.windows_per_batch * recipe.calibration.window_tokens)
    own_compared, batch_compared = (_compared_tokens(recipe, method, held) for held in (own, batch))
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
            _solving(solvers.layers, stage).memory_bytes + travelling * stage.columns * width,
            2 * batch * stage.columns * width,
        )
        for name, stage in work.layers[0].stages.items()
    ]
    if solvers.preparation is not None:
        peaks.append(handed + solvers.preparation.cost(work.layers[0]).memory_bytes)
    if method.survey is not None:
        peaks.append(max(handed, _surveying(method.survey, work.layers[0]).memory_bytes))
    # what has its places is written linear by linear, and the solver counts those; else a solved item is there, and one
    # more that is being written
    at_once = isinstance(method.format, InPlace) and (from_float or not tokens) and ranks == 1
    solved, waiting = (0, 0) if at_once else (layer, item_bytes)
    # without text nothing goes through the layer: of its weights those of a stage are placed, and nothing is rewritten
    stages = work.layers[0].stages.values()
    largest = max(sum(shape.size for shape in stage.shapes) for stage in stages)
    placed = width * (1 + compares) * layer if tokens else source * largest // layer
    in_layer = placed + solved + (3 if tokens else 2) * source + max(peaks)
    at_ends = max((_solving(solvers.ends, stage).memory_bytes for stage in work.ends if solvers.ends), default=0)
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


def _held_tokens(recipe: Recipe, tokens: int, ranks: int) -> tuple[int, int]:
    """Tokens of the batches that the first rank is dealt, and of the batch that it is handed of another's."""
    if ranks == 1 or not tokens:
        return tokens, 0
    batch = recipe.compute.windows_per_batch * recipe.calibration.window_tokens
    batches = -(-tokens // batch)
    return min(tokens, -(-batches // ranks) * batch), min(tokens, batch)


def _compared_tokens(recipe: Recipe, method: Method, tokens: int) -> int:
    """Of so many tokens, those that go through the unquantized model too, beside the quantized stream."""
    if DEVIATION not in method.solvers.needs:
        return 0
    every, window = method.solvers.compared_every, recipe.calibration.window_tokens
    whole, rest = divmod(tokens // window, recipe.compute.windows_per_batch)
    return (whole * -(-recipe.compute.windows_per_batch // every) + -(-rest // every)) * window


def _solving(solver: Solver, stage: StageWork) -> Cost:
    """Statistics and solution, both in memory together."""
    collected, solved = statistics_cost(solver.needs, stage), solver.cost(stage)
    return Cost((collected + solved).operations, collected.memory_bytes + solved.memory_bytes)


def _surveying(survey: Survey, layer: LayerWork) -> Cost:
    """A survey keeps the statistics of all stages, each over every linear that reads the same."""
    measuring = survey.measuring
    collected = [statistics_cost(measuring.needs, stage) for stage in layer.stages.values()]
    walked = Cost({"forward": layer.forward_operations(layer.tokens)})
    found = total([walked, *collected, measuring.cost(layer)])
    return Cost(found.operations, found.memory_bytes + sum(each.memory_bytes for each in collected)).under("survey")


def has_own_memory(device: torch.device) -> bool:
    """Whether a device's memory is not the host's."""
    return device.type != "cpu"


def _width(recipe: Recipe) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, recipe.compute.dtype)
    return dtype


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
