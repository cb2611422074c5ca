"""Every format that can be read, by the name its own config gives it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.index import read_json
from quantkit.errors import RefusedError
from quantkit.formats import gptq
from quantkit.formats.contract import Artifact


@dataclass(frozen=True)
class Reading:
    """How a format is read.

    Attributes:
        open: the folder as dense weights by item.
        native_engine: the engine whose reader is the format's own.
    """

    open: Callable[[Path], Artifact]
    native_engine: str


READERS = {gptq.NAME: Reading(gptq.open_artifact, gptq.NATIVE_ENGINE)}


def detect(folder: Path) -> str:
    """The format of an artifact folder.

    Raises:
        RefusedError: it is none that quantkit reads.
    """
    if not folder.is_dir():
        raise RefusedError(f"no such folder: {folder}", fix="give the folder of an artifact")
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config") or {}
    if not settings and (folder / "quantize_config.json").exists():
        return gptq.NAME
    method = settings.get("quant_method")
    if method not in READERS:
        found = f"quant_method is {method!r}" if settings else "config.json has no quantization_config"
        raise RefusedError(
            f"not an artifact of a known format: {found}",
            where=str(folder),
            fix="known: " + ", ".join(sorted(READERS)),
        )
    return str(method)
