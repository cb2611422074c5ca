"""The reading side: quantkit's folders, hqq's own, and those of transformers 4."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit.checkpoint.families import family_of
from quantkit.checkpoint.index import TensorFolder, open_tensors, read_json
from quantkit.errors import RefusedError
from quantkit.formats.contract import Reading
from quantkit.formats.fit import require_fit
from quantkit.formats.hqq.linear import GRIDS, LAYOUT, decode_item
from quantkit.formats.hqq.pickled import PICKLE, open_pickle
from quantkit.formats.hqq.write import NAME, STEM, use
from quantkit.formats.parts import AGAIN, PartsArtifact, Shape

NATIVE_ENGINE = "hqq"


def open_artifact(folder: Path) -> PartsArtifact:
    """A reader of an HQQ folder: ours, hqq's `qmodel.pt`, or the safetensors that transformers 4 wrote.

    Raises:
        RefusedError: it holds no HQQ weights, misses a part of a linear, or tensors contradict the model.
    """
    config = read_json(folder / "config.json")
    opened = next((opener for name, opener in OPENERS if any(folder.glob(name))), None)
    if opened is None:
        raise RefusedError("no HQQ weights are there", where=str(folder), fix="download the artifact again")
    tensors, family = opened(folder), family_of(config, where=str(folder / "config.json"))

    def expected(name: str, rows: int, columns: int) -> dict[str, Shape]:
        """The parts fit the shape that is stored with them, see `decode_linear`; that one must be the model's."""
        stated = tensors.read([f"{name}.shape"])[f"{name}.shape"].flatten().tolist()
        if stated != [rows, columns]:
            raise RefusedError(
                f"{name}.shape says {stated}, where {[rows, columns]} belongs", where=str(folder), fix=AGAIN
            )
        for which in GRIDS:
            if not {f"{name}.{which}", f"{name}.{which}_q"} & tensors.tensors.keys():
                raise RefusedError(f"{name}.{which} is missing", where=str(folder), fix=AGAIN)
        return {}

    require_fit(LAYOUT, tensors, config, family, expected)
    settings = config.get("quantization_config") or {}
    return PartsArtifact(tensors, config, settings, family, LAYOUT, decode_item)


OPENERS: tuple[tuple[str, Callable[[Path], TensorFolder]], ...] = (
    (f"{STEM}*.safetensors", lambda folder: open_tensors(folder, stem=STEM)),
    ("model*.safetensors", open_tensors),
    (PICKLE, open_pickle),
)


def recognizes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder is HQQ; what hqq itself saves says so by its weight file only."""
    settings = config.get("quantization_config") or {}
    return settings.get("quant_method") == NAME or (not settings and (folder / PICKLE).exists())


READING = Reading(recognizes, lambda folder: {NAME: open_artifact(folder)}, NATIVE_ENGINE, (NAME,), None, use)
