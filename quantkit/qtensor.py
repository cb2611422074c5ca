"""The waist between solvers and formats: what was decided about one linear and one item of the stream.

A solver does not know which format its codes go to; a format does not know how they were found.
"""

from dataclasses import dataclass, field

from torch import Tensor

from quantkit.grids.affine import Grid


@dataclass(frozen=True)
class Importance:
    """How strongly each input channel of a linear is driven: float32 [I], the mean of x^2 over so many tokens."""

    mean_square_I: Tensor
    num_tokens: int


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer, or an embedding table, as codes on a grid.

    Attributes:
        codes_OI: uint8 [O, I], in the checkpoint's channel order.
        grid: what the codes mean; an affine grid's `group_I` carries an activation order, if any.
        bias_O: [O] in the source's dtype, or None.
        others: the same linear on further grids, where one pass serves several variants of an artifact; a stream that
            goes on with quantized weights goes on with this one.
        importance: what the codes were weighted by, where the format publishes it.
    """

    codes_OI: Tensor
    grid: Grid
    bias_O: Tensor | None = None
    others: tuple["QuantizedLinear", ...] = ()
    importance: Importance | None = None

    def dequantize(self) -> Tensor:
        """float32 [O, I]: the weights every reader of the artifact must see."""
        return self.grid.decode(self.codes_OI)


@dataclass(frozen=True)
class LinearFacts:
    """What the record keeps about one solved linear.

    Attributes:
        name: full module name.
        loss: sum over rows of e H e^T for the weight error e, divided by the same for the weights themselves;
            unitless, 0 is exact. None when the solver uses no statistics.
        damping: fraction of mean(diag H) that made H positive definite.
        elapsed_s: seconds spent solving this linear.
        factorise_s: of these, seconds for the factor that it shares with the linears after it.
    """

    name: str
    loss: float | None
    damping: float | None
    elapsed_s: float
    factorise_s: float = 0.0


@dataclass(frozen=True)
class Item:
    """One step of the stream: the embedding, a decoder layer, or the final norm with the head.

    Attributes:
        name: "embedding", "layers.<i>" or "head".
        linears: quantized linears by full module name ("model.layers.0.self_attn.q_proj"); where a format quantizes
            them too, also "model.embed_tokens" and "lm_head".
        tensors: every other tensor of the item by checkpoint name, dense; a solver may have changed them.
        facts: one entry per quantized linear.
        seconds: wall seconds by stage; `quantkit.report.schema.ItemFacts` names them.
    """

    name: str
    linears: dict[str, QuantizedLinear]
    tensors: dict[str, Tensor]
    facts: list[LinearFacts] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
