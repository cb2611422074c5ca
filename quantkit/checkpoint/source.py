"""What a forward pass needs of a model, whether its weights are dense on disk or decoded from an artifact."""

from typing import Protocol

from torch import Tensor

from quantkit.checkpoint.families import EMBEDDING, HEAD, Family


class WeightSource(Protocol):
    """Dense weights by item: a checkpoint, or the reader of any format."""

    @property
    def config(self) -> dict:
        """config.json of the model."""
        ...

    @property
    def family(self) -> Family:
        """The architecture's row of the table."""
        ...

    @property
    def num_layers(self) -> int: ...

    def read(self, item: str) -> dict[str, Tensor]:
        """Dense tensors of "embedding", "layers.<i>" or "head", by checkpoint name, on the CPU."""
        ...


def head_tensors(source: WeightSource) -> dict[str, Tensor]:
    """The tensors that turn final hidden states into logits; a tied model's head is its embedding."""
    tensors = source.read(HEAD)
    return tensors if "lm_head.weight" in tensors else tensors | source.read(EMBEDDING)
