"""What a build goes through: the linears of every layer, the tokens, and the operations that takes at least."""

from dataclasses import dataclass

import torch

from quantkit.calibration.statistics import DEVIATION, narrow
from quantkit.calibration.statistics import cost as statistics_cost
from quantkit.checkpoint.families import END_MODULES, HEAD
from quantkit.checkpoint.index import Checkpoint
from quantkit.costs import Cost, LayerWork, Shape, StageWork, total
from quantkit.methods import Method, Survey
from quantkit.recipe import Recipe
from quantkit.solvers.contract import Solver


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
    compared = compared_tokens(recipe, method, tokens)
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
                stages,
                forward,
                attention,
                tokens,
                compared,
                recipe.calibration.window_tokens,
                compute_dtype(recipe).itemsize,
            )
        )
    ends = tuple(
        StageWork((shapes[module],), shapes[module].columns, *((tokens, compared) if item == HEAD else (0, 0)))
        for item, module in END_MODULES.items()
        if module in shapes
    )
    return Work(tuple(layers), ends)


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
    found += total(solving(solvers.layers, stage) for layer in work.layers for stage in layer.stages.values())
    if solvers.ends is not None:
        found += total(solving(solvers.ends, stage) for stage in work.ends)
    if solvers.preparation is not None:
        found += total(solvers.preparation.cost(layer) for layer in work.layers)
    if method.survey is not None:
        found += total(surveying(method.survey, layer) for layer in work.layers)
    return found.operations


def held_tokens(recipe: Recipe, tokens: int, ranks: int) -> tuple[int, int]:
    """Tokens of the batches that the first rank is dealt, and of the batch that it is handed of another's."""
    if ranks == 1 or not tokens:
        return tokens, 0
    batch = recipe.compute.windows_per_batch * recipe.calibration.window_tokens
    batches = -(-tokens // batch)
    return min(tokens, -(-batches // ranks) * batch), min(tokens, batch)


def compared_tokens(recipe: Recipe, method: Method, tokens: int) -> int:
    """Of so many tokens, those that go through the unquantized model too, beside the quantized stream."""
    if DEVIATION not in method.solvers.needs:
        return 0
    every, window = method.solvers.compared_every, recipe.calibration.window_tokens
    whole, rest = divmod(tokens // window, recipe.compute.windows_per_batch)
    return (whole * -(-recipe.compute.windows_per_batch // every) + -(-rest // every)) * window


def solving(solver: Solver, stage: StageWork) -> Cost:
    """Statistics and solution, both in memory together."""
    collected, solved = statistics_cost(solver.needs, stage), solver.cost(stage)
    return Cost((collected + solved).operations, collected.memory_bytes + solved.memory_bytes)


def surveying(survey: Survey, layer: LayerWork) -> Cost:
    """A survey keeps the statistics of all stages, each over every linear that reads the same."""
    measuring = survey.measuring
    collected = [statistics_cost(measuring.needs, stage) for stage in layer.stages.values()]
    walked = Cost({"forward": layer.forward_operations(layer.tokens)})
    found = total([walked, *collected, measuring.cost(layer)])
    return Cost(found.operations, found.memory_bytes + sum(each.memory_bytes for each in collected)).under("survey")


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """What activations are computed in."""
    dtype: torch.dtype = getattr(torch, recipe.compute.dtype)
    return dtype
