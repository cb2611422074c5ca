"""What the pipeline asks of a format, see docs/add-a-format.md."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from quantkit.checkpoint.index import Checkpoint, TensorFolder
from quantkit.checkpoint.source import WeightSource
from quantkit.qtensor import Item

MAX_SHARD_BYTES = 5 * 1000**3


def transformers_snippet(packages: str) -> str:
    """How a card says that transformers loads a folder, with {repo} for the repository's name.

    Args:
        packages: what pip is to install.
    """
    return f"""```python
# pip install {packages}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{repo}}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{{repo}}")
messages = [{{{{"role": "user", "content": "Jakie mamy pory roku w Polsce?"}}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs.to(model.device), max_new_tokens=200)[0]))
```
"""


class Format(Protocol):
    """How solved items are laid out on disk; made from a recipe's settings."""

    @property
    def name(self) -> str:
        """As in `format = "..."` of a recipe."""
        ...

    @property
    def stored_dtype(self) -> torch.dtype:
        """What dense tensors are kept in."""
        ...

    @property
    def skip(self) -> tuple[str, ...]:
        """Name endings of linears that stay dense."""
        ...

    def problems(self, shapes: list[tuple[str, int, int]]) -> list[str]:
        """Why linears of these (name, out, in) shapes cannot be stored, one line each."""
        ...

    def stored_bits(self, name: str, rows: int, columns: int) -> int:
        """Bits that a quantized linear takes in the file."""
        ...

    def encode_item(self, item: Item) -> dict[str, Tensor]:
        """An item's tensors as they stand in its work file."""
        ...

    def decode_item(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors by checkpoint name, as every reader of the artifact will see them."""
        ...

    def assemble(self, checkpoint: Checkpoint, items: list[Path], folder: Path) -> dict[str, list[str]]:
        """Write the artifact but card, record and what was laid out (`InPlace`) into an existing folder.

        Args:
            checkpoint: the source.
            items: work files in stream order.
            folder: to be filled.

        Returns:
            names of the weight files of each variant.
        """
        ...


@runtime_checkable
class SeveralVariants(Protocol):
    """A format that writes several variants of the model into one folder; its `stored_bits` counts them all."""

    @property
    def variants(self) -> tuple[str, ...]:
        """Their names."""
        ...

    def could_make(self, variant: str) -> bool:
        """Whether a recipe of the format can ask for a variant of that name."""
        ...

    def variant_bits(self, name: str, rows: int, columns: int) -> dict[str, int]:
        """Bits that a quantized linear takes in each variant, by the variant's name."""
        ...


@runtime_checkable
class Headed(Protocol):
    """A format whose files begin with more than the names and places of tensors."""

    def head_bytes(self, checkpoint: Checkpoint) -> int:
        """Bytes that each variant takes beside its weights.

        Raises:
            RefusedError: what is to be written there cannot be.
        """
        ...


@runtime_checkable
class Particular(Protocol):
    """A format that cannot hold whatever tensors stand beside the weights of the linears."""

    def tensor_problems(self, names: Collection[str]) -> list[str]:
        """Why a checkpoint of tensors with these names cannot be stored, one line each; empty if it can."""
        ...


@runtime_checkable
class TellsCalibration(Protocol):
    """A format whose files say what they were calibrated on."""

    def calibrated(self, texts: Sequence[str], windows: int, window_tokens: int) -> Self:
        """The format as it writes this down.

        Args:
            texts: names of the text sets.
            windows: how many there were in all.
            window_tokens: tokens of each.
        """
        ...


class LaidOut(Protocol):
    """Files of an artifact in which every tensor has its place before it is solved."""

    @property
    def fresh(self) -> bool:
        """Whether they hold nothing of an earlier run."""
        ...

    @property
    def files(self) -> frozenset[str]:
        """Their names below the artifact's folder."""
        ...

    def write(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put encoded tensors into their places; returns those that have none, for the work file."""
        ...

    def keep(self, item: str) -> None:
        """Make durable what was written; of an item that is complete now."""
        ...

    def read(self, item: str) -> dict[str, Tensor]:
        """What `decode_item` needs of an item that was written, but for what had no place."""
        ...


@runtime_checkable
class InPlace(Protocol):
    """A format whose solved items go straight into the artifact's files, so that they are written once."""

    def lay_out(self, checkpoint: Checkpoint, folder: Path) -> LaidOut:
        """Make the files in the folder, or open those of an earlier run."""
        ...


@runtime_checkable
class KeepsImportance(Protocol):
    """A format that keeps what was collected of the inputs, so that others can start from it."""

    def importance(self, items: Sequence[Path]) -> dict[str, np.ndarray]:
        """The mean square of every input channel, float32 [I], by the tensor's name in the files.

        Args:
            items: work files.
        """
        ...


@dataclass(frozen=True)
class Reading:
    """How a format is told, read and presented.

    Attributes:
        recognizes: whether a folder with this config.json is of the format.
        variants: what the folder holds as dense weights by item, by variant; one under the format's name for most.
        native_engine: the engine whose reader is the format's own.
        tags: for the model card.
        library: `library_name` of the model card; None where no library of the Hub's list loads it.
        use: how the card says it is loaded, given the repository's name, the recipe's [quantize], and the variants
            that are to be had there, one at least.
        differences: what an artifact says otherwise than the checkpoint it is held against, one line each; None where
            it says nothing that config.json does not.
        retell: where files beside the weights name some of them: given the artifact's folder and the weight files of
            the variants that stay, the new text of each such file, or None for one that has nothing left to name.
    """

    recognizes: Callable[[Path, dict[str, Any]], bool]
    variants: Callable[[Path], "Mapping[str, Artifact]"]
    native_engine: str
    tags: tuple[str, ...]
    library: str | None
    use: Callable[[str, dict[str, Any], Sequence[str]], str]
    differences: "Callable[[Any, Checkpoint], list[str]] | None" = None
    retell: Callable[[Path, dict[str, list[str]]], dict[str, str | None]] | None = None

    @staticmethod
    def of_one(
        name: str,
        recognizes: Callable[[Path, dict[str, Any]], bool],
        open_artifact: "Callable[[Path], Artifact]",
        native_engine: str,
        library: str,
        snippet: str,
    ) -> "Reading":
        """Of a format whose folders are one variant each, under the format's name.

        Args:
            name: of the format, which is its tag as well.
            recognizes, native_engine, library: see the class.
            open_artifact: the folder as dense weights by item.
            snippet: how it is loaded, with {repo} for the repository's name.
        """
        return Reading(
            recognizes,
            lambda folder: {name: open_artifact(folder)},
            native_engine,
            (name,),
            library,
            lambda repo, *_: snippet.format(repo=repo),
        )


class Artifact(WeightSource, Protocol):
    """A folder of a known format, ours or anybody's, opened for reading."""

    @property
    def tensors(self) -> TensorFolder: ...

    @property
    def settings(self) -> dict[str, Any]:
        """The format's own settings as the folder states them."""
        ...

    @property
    def weights(self) -> frozenset[str]:
        """Checkpoint names of what `read` gives."""
        ...

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized linears, scales and all, over their number of weights."""
        ...
