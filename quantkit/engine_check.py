"""An engine put to the test on bielik-nano: it builds and reads its own; if it only reads, an artifact of ours."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.layer import Decoder
from quantkit.engines.env import Engine, environment_of, installed_facts
from quantkit.engines.runtime import check, evaluate, require
from quantkit.errors import RunFailedError
from quantkit.formats import open_variants
from quantkit.machine import fix_arithmetic
from quantkit.nano import NAME
from quantkit.pipeline import build
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from quantkit.recipe_files import find_recipe, list_recipes, load_recipe
from quantkit.sources import open_source
from quantkit.texts import load_text_set
from quantkit.validation.compare import logits_result, reference_result
from quantkit.validation.reference import Settings, run
from quantkit.validation.text import evaluation_text

TEXT = "polish-core"
WINDOW_TOKENS = 128
WINDOWS = 2
# perplexities of two readers of the same weights, one of them in half precision
LARGEST_DISTANCE = 0.05


def check_engine(engine: Engine, model: str, progress: Progress) -> dict[str, Any]:
    """What an engine can do here, as facts for people.

    Args:
        engine: installed.
        model: a small checkpoint, as a recipe names it.
        progress: told what is going on.

    Raises:
        UnavailableError: it cannot run here.
        RunFailedError: it does not work, or reads something else than what was written.
    """
    device = "cpu" if "cpu" in engine.hardware else engine.hardware[0]
    require(engine, device)
    if engine.builds and engine.takes_checkpoint:
        return check(engine, open_source(model, None, progress).checkpoint.folder, device=device)
    return read_check(engine, model, progress, device=device)


def _shipped(made: str, model: str, engine: Engine) -> Recipe:
    """bielik-nano's first recipe of a format, for another folder of it, on few windows, by the engine if it can."""
    paths = (find_recipe(name) for name in list_recipes() if name.startswith(f"{NAME}/"))
    path = next(path for path in paths if load_recipe(path).format == made)
    changes: tuple[str, ...] = (f'calibration.texts={{"{TEXT}"=8}}', f"calibration.window_tokens={WINDOW_TOKENS}")
    if made in engine.builds:
        own = {f"quantize.{key}": value for key, value in engine.own_values(made).items()}
        changes += (f"engine={engine.name}", *(f"{key}={json.dumps(value)}" for key, value in own.items()))
    return load_recipe(path, changes, model=model)


def read_check(engine: Engine, model: str, progress: Progress, *, device: str) -> dict[str, Any]:
    """Let an engine read an artifact in the first of its formats, and hold it against our own decode.

    The artifact is one of ours, or one that it builds from what we prepare.

    Returns:
        {"package", "version", "read", "ratio", "ratio_of_reference", "evaluate_seconds"}
    """
    recipe = _shipped(engine.reads[0], model, engine)
    fix_arithmetic(recipe.compute.threads)
    with tempfile.TemporaryDirectory(prefix="quantkit-check-") as folder:
        done = build(recipe, out=Path(folder) / "artifact", device=torch.device("cpu"), validated=False)
        name, artifact = next(iter(open_variants(engine.reads[0], done.out).items()))
        source = open_source(model, None, progress)
        tokenizer = source.tokenizer
        decoder = Decoder(
            source.checkpoint.config, source.checkpoint.family, device=torch.device("cpu"), dtype=torch.float32
        )
        settings = Settings(WINDOWS, "", 0)
        text = evaluation_text([(load_text_set(TEXT, "validation"), WINDOWS)], tokenizer, window_tokens=WINDOW_TOKENS)
        reference = run(source.checkpoint, text, decoder, tokenizer, settings)
        ours = reference_result(artifact, reference, text, decoder, tokenizer, settings)
        started = time.monotonic()
        tensors = artifact.tensors
        logits = evaluate(engine, tensors.folder, text.windows, files=tensors.files, device=device)
        theirs = logits_result(engine.name, logits, reference, text)
    whose = "of its own" if recipe.upstream else "of ours"
    # a comparison with NaN is false
    if not abs(theirs["ratio"] / ours["ratio"] - 1) <= LARGEST_DISTANCE:
        raise RunFailedError(
            f"the engine {engine.name} reads {name} {whose} as something else: its perplexity is {theirs['ratio']:.3f} "
            f"times the source's, where {ours['ratio']:.3f} is right",
            where=str(environment_of(engine)),
            fix=f"remove that folder and run `{engine.install_command}`",
        )
    facts = installed_facts(engine)
    return {
        "package": facts["package"],
        "version": facts["version"],
        "read": name,
        "ratio": round(theirs["ratio"], 5),
        "ratio_of_reference": round(ours["ratio"], 5),
        "evaluate_seconds": round(time.monotonic() - started, 3),
    }
