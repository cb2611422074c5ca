"""Every format that can be read, by the name recipes give it."""

from pathlib import Path

from quantkit.checkpoint.index import Checkpoint, read_json
from quantkit.errors import RefusedError
from quantkit.formats import awq, compressed_tensors, exl2, gguf, gptq, hqq, mlx
from quantkit.formats.contract import Artifact, Reading
from quantkit.formats.fit import require_weights

READERS: dict[str, Reading] = {
    module.NAME: module.READING for module in (gptq, awq, compressed_tensors, hqq, mlx, gguf, exl2)
}


def detect(folder: Path) -> str:
    """The format of an artifact folder, or of one file of a format whose variants are files.

    Raises:
        RefusedError: it is none that quantkit reads.
    """
    if not folder.exists():
        raise RefusedError(f"no such folder: {folder}", fix="give the folder of an artifact")
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    for key in ("quantization_config", "quantization"):
        if not isinstance(config.get(key) or {}, dict):
            raise RefusedError(f"{key} is no table", where=str(path), fix="download it again")
    for name, reading in READERS.items():
        if reading.recognizes(folder, config):
            return name
    if folder.is_file():
        raise RefusedError(
            f"{folder.name} is no artifact by itself", where=str(folder.parent), fix="give its folder, or a .gguf file"
        )
    config = read_json(path)
    settings = config.get("quantization_config") or {}
    found = (
        f"quant_method is {settings.get('quant_method')!r}" if settings else "config.json has no quantization_config"
    )
    raise RefusedError(
        f"not an artifact of a known format: {found}",
        where=str(folder),
        fix="known: " + ", ".join(sorted(READERS)),
    )


def open_variants(name: str, folder: Path) -> dict[str, Artifact]:
    """What an artifact folder of the format `name` holds, by variant; one under the format's name for most formats.

    Raises:
        RefusedError: a tensor that the model needs is missing, or whatever the format's own reader refuses.
    """
    found = dict(READERS[name].variants(folder))
    for artifact in found.values():
        where = str(artifact.tensors.folder / artifact.tensors.files[0])
        require_weights(artifact.weights, artifact.config, artifact.family, where=where)
    return found


def require_same_model(name: str, artifact: Artifact, checkpoint: Checkpoint) -> None:
    """Stop where an artifact of the format `name` contradicts the checkpoint whose config it would be run by.

    Raises:
        RefusedError: naming the differences.
    """
    differences = READERS[name].differences
    found = differences(artifact, checkpoint) if differences else []
    if found:
        raise RefusedError(
            f"the artifact is not of the reference model: {'; '.join(found[:4])}"
            + (f"; and {len(found) - 4} more" if len(found) > 4 else ""),
            where=str(artifact.tensors.folder / artifact.tensors.files[0]),
            fix="give the model that it was made from with --model, or make the artifact anew",
        )
