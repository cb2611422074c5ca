"""What a build will need, found out before it starts: problems, sizes, memory, disk and a time estimate."""

import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.statistics import DEVIATION
from quantkit.checkpoint.families import EMBEDDING, END_MODULES, HEAD
from quantkit.checkpoint.index import Checkpoint
from quantkit.checkpoint.spill import free_bytes
from quantkit.costs import StageWork
from quantkit.engines.env import find_engine
from quantkit.engines.runtime import require
from quantkit.errors import RefusedError
from quantkit.estimate import crowding, product_seconds, search_seconds
from quantkit.footprint import AT_WORK, FIXED_BYTES, Footprint, footprint_of, judging_bytes, together_bytes
from quantkit.formats.contract import Format, Headed, InPlace, Particular, SeveralVariants
from quantkit.launch import TOGETHER
from quantkit.methods import Method
from quantkit.ranks import owners
from quantkit.recipe import OWN_ENGINE, Recipe
from quantkit.units import duration_text, size_text
from quantkit.workload import Work, compute_dtype, held_tokens, operations, work_of

DISK_MARGIN_BYTES = 64 * 1024**2
COPIED_BYTES = 2  # of a parameter: an engine that is not given the checkpoint starts from a copy of it in 16 bits


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
        judging_bytes: peak of judging the artifact afterwards, by one process, on the same device; see `judging_bytes`.
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
    judging_bytes: int
    reserve_bytes: int
    host_free_bytes: int
    tokens: int
    operations: dict[str, float]
    source_bytes: int
    seconds: float | None
    variants: dict[str, int]
    footprint: Footprint

    @property
    def spills(self) -> bool:
        """Whether activations have to wait in the host's memory."""
        return self.memory_bytes > self.memory_free_bytes and self.fits

    @property
    def fits(self) -> bool:
        """Whether memory suffices, the host's for what can wait there."""
        if self.memory_bytes <= self.memory_free_bytes:
            return True
        # torch rounds page-locked blocks up to a power of two
        on_host = 2 * self.ranks * self.waiting_bytes
        return 0 < self.reserve_bytes <= self.memory_free_bytes and on_host <= self.host_free_bytes

    def facts(self) -> dict[str, Any]:
        """As a table for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "footprint"}


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
    shapes = list(checkpoint.linear_shapes(ends=method.solvers.ends is not None))
    untied = _untied_head(method, shapes)
    shapes += untied
    _require_possible(recipe, checkpoint, method, shapes)
    solved = [shape for shape in shapes if not shape[0].endswith(method.format.skip)]
    infos = checkpoint.tensors.tensors
    parameters = sum(info.num_elements for info in infos.values())
    quantized, added = (sum(rows * columns for _, rows, columns in found) for found in (solved, untied))
    quantized_bits = sum(method.format.stored_bits(*shape) for shape in solved)
    dense_bytes = (parameters + added - quantized) * method.format.stored_dtype.itemsize
    beside_bytes = dense_bytes + _head_bytes(method.format, checkpoint)
    variants = _variants(method.format, solved, beside_bytes)
    artifact_bytes = quantized_bits // 8 + beside_bytes * max(len(variants), 1)
    _require_whole(recipe, variants)
    tokens = recipe.calibration.tokens if reads_text(recipe, method) else 0
    work = work_of(recipe, checkpoint, method, solved, tokens)
    of_item = artifact_bytes // checkpoint.num_layers
    takes_checkpoint = engine is not None and engine.takes_checkpoint
    taken = partial(footprint_of, recipe, checkpoint, method, work, item_bytes=of_item, ranks=ranks)
    footprint = Footprint(None, 0, _upstream_memory(parameters, device) - FIXED_BYTES) if takes_checkpoint else taken()
    rank_bytes = together_bytes([footprint])
    waiting_bytes = rank_bytes - together_bytes([taken(most_batches=AT_WORK)]) if engine is None else 0
    prepared_bytes = 0 if engine is None or takes_checkpoint else COPIED_BYTES * (parameters + added)
    placed = isinstance(method.format, InPlace) and not takes_checkpoint
    counted = operations(method, work, from_float=recipe.calibration.activations == "float")
    return Plan(
        linears=len(solved),
        parameters=parameters,
        artifact_bytes=artifact_bytes,
        bits_per_weight=quantized_bits / max(quantized * max(len(variants), 1), 1),
        disk_bytes=prepared_bytes + artifact_bytes * (1 if placed else 2),
        disk_free_bytes=shutil.disk_usage(_existing(out)).free,
        ranks=ranks,
        memory_bytes=rank_bytes * (1 if has_own_memory(device) else ranks),
        rank_bytes=rank_bytes,
        memory_free_bytes=free_bytes(device),
        waiting_bytes=waiting_bytes,
        judging_bytes=judging_bytes(recipe, checkpoint, None),
        reserve_bytes=rank_bytes - waiting_bytes if waiting_bytes and has_own_memory(device) else 0,
        host_free_bytes=free_bytes(torch.device("cpu")),
        tokens=tokens,
        operations=counted,
        source_bytes=sum(info.size_bytes for info in infos.values()),
        seconds=_seconds(recipe, method, work, counted, device, ranks) if timed else None,
        variants=variants,
        footprint=footprint,
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
    _require_disk(plan, out, reserved_bytes)
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


def require_memory_to_judge(plan: Plan, device: torch.device) -> None:
    """Stop unless what was built can be judged on this machine.

    Raises:
        RefusedError: memory will not do.
    """
    if plan.judging_bytes > plan.memory_free_bytes:
        raise RefusedError(
            f"judging the artifact needs about {size_text(plan.judging_bytes)} of memory on {device.type}, "
            f"{size_text(plan.memory_free_bytes)} are free",
            where="validation and compute",
            fix="use fewer or shorter windows (validation.texts, validation.window_tokens) or a smaller "
            "compute.windows_per_batch, or build with --no-validate and run `quantkit validate` on a larger machine",
        )


def _require_disk(plan: Plan, out: Path, reserved_bytes: int) -> None:
    if not (there := _existing(out)).is_dir():
        raise RefusedError(f"{there} is a file, not a folder", where=str(out), fix="choose another folder with --out")
    if plan.disk_bytes + reserved_bytes + DISK_MARGIN_BYTES > plan.disk_free_bytes:
        beside = f", {size_text(reserved_bytes)} of them for those before it" if reserved_bytes else ""
        raise RefusedError(
            f"the build needs {size_text(plan.disk_bytes)} of disk and {size_text(DISK_MARGIN_BYTES)} to spare, "
            f"{size_text(plan.disk_free_bytes)} are free{beside}",
            where=str(out),
            fix="free some space, or choose another disk with --out",
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
        f"judging           {size_text(plan.judging_bytes)} of memory",
        f"calibration       {plan.tokens} tokens",
        f"operations        {_operations_text(plan)}",
        f"time              {_time_text(plan)}",
    ]


def _time_text(plan: Plan) -> str:
    if plan.seconds is None:
        return "not estimated: others do the work"
    return f"about {duration_text(plan.seconds)} (estimate)"


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


def _head_bytes(form: Format, checkpoint: Checkpoint) -> int:
    """What each variant has in front of its weights; most of it is the tokenizer, which a described model has not."""
    return form.head_bytes(checkpoint) if isinstance(form, Headed) and not checkpoint.described else 0


def _untied_head(method: Method, shapes: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The head that a solver makes of a tied embedding, (name, out, in), if it does and there is none."""
    if not method.solvers.unties_head or any(name == END_MODULES[HEAD] for name, _, _ in shapes):
        return []
    return [(END_MODULES[HEAD], rows, columns) for name, rows, columns in shapes if name == END_MODULES[EMBEDDING]]


def _require_possible(
    recipe: Recipe, checkpoint: Checkpoint, method: Method, shapes: list[tuple[str, int, int]]
) -> None:
    """Stop at what the engine, the method or the format cannot do with the model, whatever the machine."""
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
    if method.solvers.needs and not recipe.calibration.tokens:
        raise RefusedError(
            "no calibration windows are asked for",
            where="calibration.texts",
            fix='set texts = { "polish-core" = 64 }',
        )
    _require_names(recipe, method, [name for name, _, _ in shapes])
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


def _require_names(recipe: Recipe, method: Method, linears: list[str]) -> None:
    """Stop at names in the recipe that mean nothing: a linear to be skipped, a variant with gates of its own."""
    skip = getattr(recipe.quantize, "skip", ())
    if strange := [ending for ending in skip if not any(name.endswith(ending) for name in linears)]:
        raise RefusedError(
            f"no linear's name ends in {strange[0]!r}",
            where="quantize.skip",
            fix=f"take the end of a name such as {linears[0]}",
        )
    if all(name.endswith(method.format.skip) for name in linears):
        raise RefusedError(
            "nothing is left to be quantized", where="quantize.skip", fix="name fewer linears, or longer endings"
        )
    form = method.format
    variants = form.variants if isinstance(form, SeveralVariants) else (form.name,)
    others = recipe.validation.variant_gates.keys() - {*variants}
    # a recipe that extends another, or that --set changes, need not make all that the other has gates for
    if strange := sorted(name for name in others if not (isinstance(form, SeveralVariants) and form.could_make(name))):
        raise RefusedError(
            f"the recipe makes no variant {strange[0]!r}",
            where="validation.variant_gates",
            fix=f"there is {', '.join(variants)}",
        )


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
    if recipe.upstream is None or recipe.upstream.takes_checkpoint:
        return
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


def _seconds(
    recipe: Recipe, method: Method, work: Work, counted: dict[str, float], device: torch.device, ranks: int
) -> float | None:
    """A rough estimate for the rank with most to do: products at the device's rate, searches as they are tried."""
    if recipe.upstream is not None or method.engine is not None:
        return None
    dtype, solvers = compute_dtype(recipe), method.solvers
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
        "forward": held_tokens(recipe, tokens, ranks)[0] / max(tokens, 1),
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


def has_own_memory(device: torch.device) -> bool:
    """Whether a device's memory is not the host's."""
    return device.type != "cpu"


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
