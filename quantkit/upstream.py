"""Builds by an engine: what a recipe means to it, and how what it leaves becomes an artifact.

The engine quantizes in its own environment, on the same checkpoint and the same calibration tokens, or on what quantkit
prepares of both: a 16-bit file and statistics. Its weight files are kept as they are; everything beside them comes from
the source, as in quantkit's own builds.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.checkpoint.index import Checkpoint, read_json
from quantkit.checkpoint.layer import Decoder
from quantkit.engines.env import Engine
from quantkit.engines.runtime import build
from quantkit.errors import RefusedError
from quantkit.formats.contract import Format, InPlace, KeepsImportance
from quantkit.formats.shards import write_item
from quantkit.formats.sidecars import quantized_config, write_sidecars
from quantkit.methods import METHODS
from quantkit.qtensor import Item
from quantkit.recipe import OWN_ENGINE, Recipe
from quantkit.source_pass import Calibration, SourcePass
from quantkit.stream import Sinks, stream

# what an engine leaves that belongs into an artifact beside config.json; anything else is its own business
KEPT = ("*.safetensors", "*.safetensors.index.json", "qmodel.pt")
SETTINGS_KEYS = ("quantization_config", "quantization")
SETTINGS_FILE = "quantize_config.json"
PATH_KEYS = ("model_name_or_path", "model_file_base_name")
# what an engine is given that does not take the checkpoint itself
WHOLE_GB = 1e9  # of a file that is never split
IMPORTANCE_FILE = "importance.npz"


def settled(recipe: Recipe) -> Recipe:
    """The recipe as its engine will honour it: keys that it leaves out take the engine's value, not quantkit's.

    Raises:
        RefusedError: the engine does not make the format, or a key says something it cannot do; every one is named.
    """
    engine = recipe.upstream
    if engine is None:
        return recipe
    if recipe.format not in engine.builds:
        raise RefusedError(
            f"the engine {engine.name} does not make {recipe.format}; it makes {', '.join(engine.builds) or 'nothing'}",
            where="engine",
            fix=f'choose another, or engine = "{OWN_ENGINE}"',
        )
    left_out = type(recipe.quantize).model_fields.keys() - recipe.quantize.model_fields_set
    own = {key: value for key, value in engine.own_values(recipe.format).items() if key in left_out}
    refusals = engine.refusals(recipe.format, recipe.quantize.model_dump(mode="json") | own)
    changes = {f"quantize.{key}": engine.own_values(recipe.format)[key] for key in refusals}
    lines = list(refusals.values())
    calibration = recipe.calibration
    if "activations" not in calibration.model_fields_set:
        calibration = calibration.model_copy(update={"activations": engine.activations})
    if calibration.activations != engine.activations:
        lines.append(f"calibration.activations = {calibration.activations!r}: {engine.name} has its own way")
        changes["calibration.activations"] = engine.activations
    if lines:
        raise RefusedError(
            f"the engine {engine.name} cannot honour the recipe:\n  " + "\n  ".join(lines),
            where="quantize",
            fix=" ".join(f"--set {key}={_word(value)}" for key, value in changes.items())
            + f', or engine = "{OWN_ENGINE}"',
        )
    quantize = type(recipe.quantize).model_validate(recipe.quantize.model_dump() | own)
    return recipe.model_copy(update={"quantize": quantize, "calibration": calibration})


def _word(value: Any) -> str:
    """A value as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def prepare(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None,
    folder: Path,
    *,
    decoder: Decoder,
    sinks: Sinks,
    shared: SourcePass,
) -> Iterator[None]:
    """Write what an engine starts from that is not given the checkpoint, an item of the source at a time.

    It is a GGUF file of 16 bits, F16 for a source of float16 and BF16 for any other, as llama.cpp's own converter
    chooses; the files of `prepared_items`; and, if the recipe wants it, the importance of every column by the tensors'
    names in the file, float32 [I], as `importance.npz`.

    Args:
        checkpoint: the source.
        recipe: settled.
        calibration: the text; None if nothing is to be collected.
        folder: to be filled; what an earlier run left there is removed.
        decoder, sinks, shared: as for `quantkit.stream.stream`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first = next(iter(checkpoint.tensors.tensors.values()))
    changes = {"types": ("F16" if first.dtype == "F16" else "BF16",), "shard_gb": WHOLE_GB}
    method = METHODS[recipe.format](recipe.quantize.model_copy(update=changes), checkpoint.config)
    form = method.format
    assert isinstance(form, InPlace), "a file of 16 bits is one whose tensors have their places"
    places = form.lay_out(checkpoint, folder)
    solved = stream(
        shared,
        method.solvers,
        calibration,
        decoder=decoder,
        stored_dtype=form.stored_dtype,
        sinks=sinks,
    )
    paths = prepared_items(checkpoint, folder)

    def keep(item: Item | None, path: Path) -> None:
        assert item is not None, "nothing is kept of an earlier run"
        write_item(path, places.write(form.encode_item(item)))

    def go_through() -> Iterator[None]:
        # mapped, for a loop would hold on to an item while others take their turns
        yield from map(keep, solved, paths)
        if calibration is not None:
            assert isinstance(form, KeepsImportance), "what was collected is for the engine"
            importance: dict[str, Any] = form.importance(paths)
            np.savez(folder / IMPORTANCE_FILE, **importance)

    return go_through()


def prepared_items(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """What of each item has no place in the 16-bit file, as work files in stream order; see `prepare`."""
    return [folder / f"{item}.safetensors" for item in checkpoint.items]


def quantize_upstream(
    engine: Engine, given: Path, tokens_WT: Tensor, recipe: Recipe, scratch: Path, *, device: torch.device
) -> dict[str, Any]:
    """Let an engine quantize into `scratch`; returns the versions it ran with and its seconds.

    Args:
        engine: who.
        given: the source's folder, or what `prepare` made of it.
        tokens_WT: int64 [W, T], the calibration windows; none where they were used before.
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
        given,
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


def adopt_files(scratch: Path, form: Format, checkpoint: Checkpoint, items: list[Path], folder: Path) -> None:
    """Fill an artifact folder from the files that an engine left, and with what the format puts beside them.

    Args:
        scratch: the engine's output; its files are moved away.
        form: as for a build of quantkit's own.
        checkpoint: the source.
        items: see `prepared_items`.
        folder: the artifact's; exists.
    """
    for path in sorted(scratch.iterdir()):
        path.rename(folder / path.name)
    form.assemble(checkpoint, items, folder)


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
