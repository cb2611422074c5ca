"""Every format that can be read, by the name recipes give it."""

from pathlib import Path

from quantkit.checkpoint.index import read_json
from quantkit.errors import RefusedError
from quantkit.formats import gptq, hqq, mlx
from quantkit.formats.contract import Reading

READERS: dict[str, Reading] = {module.NAME: module.READING for module in (gptq, hqq, mlx)}


def detect(folder: Path) -> str:
    """The format of an artifact folder.

    Raises:
        RefusedError: it is none that quantkit reads.
    """
    if not folder.is_dir():
        raise RefusedError(f"no such folder: {folder}", fix="give the folder of an artifact")
    config = read_json(folder / "config.json")
    for name, reading in READERS.items():
        if reading.recognizes(folder, config):
            return name
    settings = config.get("quantization_config") or {}
    found = (
        f"quant_method is {settings.get('quant_method')!r}" if settings else "config.json has no quantization_config"
    )
    raise RefusedError(
        f"not an artifact of a known format: {found}",
        where=str(folder),
        fix="known: " + ", ".join(sorted(READERS)),
    )
