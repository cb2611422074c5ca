"""Builds by an engine: what a recipe means to it, and how what it leaves becomes an artifact.

The engine quantizes in its own environment, on the same checkpoint and the same calibration tokens. Its weight files
are kept as they are; everything beside them comes from the source, as in quantkit's own builds.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.index import Checkpoint, read_json
from quantkit.engines.env import Engine, find_engine
from quantkit.engines.runtime import build
from quantkit.errors import RefusedError
from quantkit.formats.sidecars import quantized_config, write_sidecars
from quantkit.recipe import OWN_ENGINE, Recipe

# what an engine leaves that belongs into an artifact beside config.json; anything else is its own business
KEPT = ("*.safetensors", "*.safetensors.index.json", "qmodel.pt")
SETTINGS_KEYS = ("quantization_config", "quantization")
SETTINGS_FILE = "quantize_config.json"
PATH_KEYS = ("model_name_or_path", "model_file_base_name")


def settled(recipe: Recipe) -> Recipe:
    """The recipe as its engine will honour it: keys that it leaves out take the engine's value, not quantkit's.

    Raises:
        RefusedError: the engine does not make the format, or a key says something it cannot do; every one is named.
    """
    if recipe.engine == OWN_ENGINE:
        return recipe
    engine = find_engine(recipe.engine)
    if recipe.format not in engine.builds:
        raise RefusedError(
            f"the engine {engine.name} does not make {recipe.format}; it makes {', '.join(engine.builds) or 'nothing'}",
            where="engine",
            fix=f'choose another, or engine = "{OWN_ENGINE}"',
        )
    left_out = type(recipe.quantize).model_fields.keys() - recipe.quantize.model_fields_set
    own = {key: value for key, value in engine.own_values(recipe.format).items() if key in left_out}
    quantize = type(recipe.quantize).model_validate(recipe.quantize.model_dump() | own)
    refusals = engine.refusals(recipe.format, quantize.model_dump(mode="json"))
    changes = {f"quantize.{key}": engine.own_values(recipe.format)[key] for key in refusals}
    lines = list(refusals.values())
    if recipe.calibration.activations != "quantized":
        lines.append(f"calibration.activations = {recipe.calibration.activations!r}: {engine.name} has its own way")
        changes["calibration.activations"] = "quantized"
    if lines:
        raise RefusedError(
            f"the engine {engine.name} cannot honour the recipe:\n  " + "\n  ".join(lines),
            where="quantize",
            fix=" ".join(f"--set {key}={_word(value)}" for key, value in changes.items())
            + f', or engine = "{OWN_ENGINE}"',
        )
    return recipe.model_copy(update={"quantize": quantize})


def _word(value: Any) -> str:
    """A value as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def quantize_upstream(
    engine: Engine, checkpoint: Path, tokens_WT: Tensor, recipe: Recipe, scratch: Path, *, device: torch.device
) -> dict[str, Any]:
    """Let an engine quantize into `scratch`; returns the versions it ran with and its seconds.

    Args:
        engine: who.
        checkpoint: the source's folder.
        tokens_WT: int64 [W, T], the calibration windows.
        recipe: settled.
        scratch: a folder for its output; what an earlier run left there is removed.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    settings = recipe.quantize.model_dump(mode="json")
    # the engine works in a folder of its own
    settings |= {key: str(Path(settings[key]).resolve()) for key in recipe.quantize.files if settings[key]}
    return build(
        engine,
        recipe.format,
        checkpoint,
        tokens_WT.numpy(),
        settings,
        scratch,
        device=device.type,
        threads=recipe.compute.threads,
    )


def adopt(scratch: Path, checkpoint: Checkpoint, folder: Path) -> None:
    """Fill an artifact folder from what an engine left: its weights and settings, the source's everything else.

    Args:
        scratch: the engine's output, or a folder of it for each variant; its weight files are moved away.
        checkpoint: the source.
        folder: the artifact's; exists.
    """
    for path in (
        sorted(scratch.glob("config.json")) or sorted(scratch.glob("*/config.json")) or [scratch / "config.json"]
    ):
        target = folder / path.parent.relative_to(scratch)
        target.mkdir(exist_ok=True)
        _adopt_variant(path.parent, checkpoint, target)


def _adopt_variant(scratch: Path, checkpoint: Checkpoint, folder: Path) -> None:
    for pattern in KEPT:
        for path in sorted(scratch.glob(pattern)):
            path.rename(folder / path.name)
    left = read_json(scratch / "config.json")
    settings = {key: _without_paths(left[key]) for key in SETTINGS_KEYS if left.get(key)}
    dtype = left.get("dtype") or left.get("torch_dtype") or "float16"
    # the engine's own config.json lacks what its version of transformers does not know
    config = quantized_config(checkpoint.config, None, dtype) | settings
    extra = {SETTINGS_FILE: config["quantization_config"]} if (scratch / SETTINGS_FILE).exists() else {}
    write_sidecars(checkpoint.folder, folder, config, extra)


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in PATH_KEYS}
