"""The reading side: quantkit's folders, hqq's own, and those of transformers 4."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.checkpoint.families import Family, family_of, item_of
from quantkit.checkpoint.index import TensorFolder, open_tensors, read_json
from quantkit.errors import RefusedError
from quantkit.formats.contract import Reading
from quantkit.formats.hqq.linear import GRIDS, LAYOUT, decode_item
from quantkit.formats.hqq.pickled import PICKLE, open_pickle
from quantkit.formats.hqq.write import NAME, STEM, use
from quantkit.formats.parts import AGAIN, Shape, require_fit

NATIVE_ENGINE = "hqq"
# what a linear's weights take, but for a few numbers
WEIGHING = (
    "W_q",
    *(f"{which}{end}" for which in GRIDS for end in ("", "_q")),
    *(f"meta_{which}:{key}" for which in GRIDS for key in GRIDS),
)


@dataclass(frozen=True)
class HqqArtifact:
    """An HQQ folder as dense weights by item, ours or anybody's.

    Attributes:
        tensors: the stored tensors.
        config: config.json.
        settings: its quantization_config, if any.
        family: the architecture's row.
    """

    tensors: TensorFolder
    config: dict
    settings: dict[str, Any]
    family: Family

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized linears, scales and zeros included, over their number of weights."""
        infos = self.tensors.tensors
        modules = LAYOUT.modules(infos)
        names = (f"{module}.{part}" for module in modules for part in WEIGHING)
        stored = sum(infos[name].size_bytes for name in names if name in infos)
        shapes = self.tensors.read([f"{module}.shape" for module in modules]).values()
        return 8 * stored / sum(int(shape.prod()) for shape in shapes)

    @property
    def weights(self) -> frozenset[str]:
        """Checkpoint names of what `read` gives."""
        return LAYOUT.weights(self.tensors.tensors)

    def read(self, item: str) -> dict[str, Tensor]:
        """Dense tensors of an item by checkpoint name, on the CPU."""
        return decode_item(self.tensors.read([name for name in self.tensors.tensors if item_of(name) == item]))


def open_artifact(folder: Path) -> HqqArtifact:
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
    return HqqArtifact(tensors, config, config.get("quantization_config") or {}, family)


OPENERS: tuple[tuple[str, Callable[[Path], TensorFolder]], ...] = (
    (f"{STEM}*.safetensors", lambda folder: open_tensors(folder, stem=STEM)),
    ("model*.safetensors", open_tensors),
    (PICKLE, open_pickle),
)


def recognizes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder is HQQ; what hqq itself saves says so by its weight file only."""
    settings = config.get("quantization_config") or {}
    return settings.get("quant_method") == NAME or (not settings and (folder / PICKLE).exists())


READING = Reading(recognizes, open_artifact, NATIVE_ENGINE, (NAME,), None, use)
