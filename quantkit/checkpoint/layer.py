"""The model's own code (transformers), run one item at a time on weights that come and go.

The skeleton is built on the meta device, so it costs no memory; an item's weights are put in place for as long
as it runs. Quantization never needs the whole model.

Shape legend: B windows, T tokens, D hidden size, F the input width of a linear, V vocabulary.
"""

import copy
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.families import Family, Stage
from quantkit.checkpoint.spill import STAY, Spill
from quantkit.errors import RefusedError
from quantkit.machine import needs_expanding, needs_widening

Walk = Generator[tuple[Stage, Tensor], None, Tensor]


@dataclass
class DecoderLayer:
    """One decoder layer, holding its weights.

    Attributes:
        index: which layer.
        module: transformers' decoder layer; the linears that close attention and MLP are taken out of the
            submodules' forward and applied here, so that their inputs can be seen.
        family: the architecture's row.
    """

    index: int
    module: nn.Module
    family: Family

    def __post_init__(self) -> None:
        self.linears: dict[str, nn.Linear] = {
            name: self.module.get_submodule(name)  # type: ignore[misc]
            for name in self.family.linears
        }
        self.module.self_attn.o_proj = nn.Identity()  # type: ignore[union-attr]
        self.module.mlp.down_proj = nn.Identity()  # type: ignore[union-attr]

    @property
    def size_bytes(self) -> int:
        """Of all weights as they are held."""
        held = [*self.module.parameters(), *(linear.weight for linear in self.linears.values())]
        return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in held}.values())

    def linear_name(self, linear: str) -> str:
        """Full module name of one of the family's linears in this layer."""
        return f"model.layers.{self.index}.{linear}"

    def weight(self, linear: str) -> Tensor:
        """The weight [O, I] of one of the family's linears."""
        return self.linears[linear].weight

    def walk(self, hidden_BTD: Tensor, rope: tuple[Tensor, Tensor], spill: Spill = STAY) -> Walk:
        """Go through the layer, stopping in front of every stage with the input its linears will read.

        The caller may change the stage's weights before it asks for the next stop: what follows uses them. So a
        layer is solved in true sequential order at the price of a single forward pass.

        Args:
            hidden_BTD: the layer's input [B, T, D]; not modified.
            rope: cosines and sines from `Decoder.rope`.
            spill: where the walk's own tensors wait at a stop.

        Returns:
            (as the generator's value) the layer's output [B, T, D].
        """
        qkv, o, gate_up, down = self.family.stages
        layer = self.module
        states = [hidden_BTD, layer.input_layernorm(hidden_BTD)]  # type: ignore[operator]
        del hidden_BTD
        hidden_BTD, normed = yield from _stop(qkv, states, spill)
        states = [hidden_BTD, self._attended(normed, rope)]
        del hidden_BTD, normed
        hidden_BTD, attended = yield from _stop(o, states, spill)
        hidden_BTD = hidden_BTD + self.linears["self_attn.o_proj"](attended)
        del attended
        states = [hidden_BTD, layer.post_attention_layernorm(hidden_BTD)]  # type: ignore[operator]
        del hidden_BTD
        hidden_BTD, normed = yield from _stop(gate_up, states, spill)
        states = [hidden_BTD, layer.mlp(normed)]  # type: ignore[operator]
        del hidden_BTD, normed
        hidden_BTD, gated = yield from _stop(down, states, spill)
        return hidden_BTD + self.linears["mlp.down_proj"](gated)

    def _attended(self, normed_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What o_proj reads, [B, T, F]."""
        attended: Tensor = self.module.self_attn(  # type: ignore[operator]
            hidden_states=normed_BTD, position_embeddings=rope, attention_mask=None
        )[0]
        return attended

    def normed(self, stage: Stage, hidden_BTD: Tensor) -> Tensor:
        """What the stage that opens a block, attention or MLP, reads of the hidden states before it."""
        first = stage == self.family.stages[0]
        norm = self.module.input_layernorm if first else self.module.post_attention_layernorm
        normed: Tensor = norm(hidden_BTD)  # type: ignore[operator]
        return normed

    def closing_input(self, stage: Stage, inputs_BTF: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What o_proj or down_proj reads, [B, T, F], given the input of a stage of its block."""
        qkv, _, gate_up, _ = self.family.stages
        if stage == qkv:
            return self._attended(inputs_BTF, rope)
        if stage == gate_up:
            gated: Tensor = self.module.mlp(inputs_BTF)  # type: ignore[operator]
            return gated
        return inputs_BTF

    def block_output(self, stage: Stage, inputs_BTF: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Output [B, T, D] of the block that a stage stands in, attention or MLP, given the stage's input."""
        closing = "self_attn.o_proj" if stage in self.family.stages[:2] else "mlp.down_proj"
        output: Tensor = self.linears[closing](self.closing_input(stage, inputs_BTF, rope))
        return output

    def producer(self, name: str) -> nn.Module:
        """A norm or a linear of the layer by its name inside it."""
        return self.linears[name] if name in self.linears else self.module.get_submodule(name)

    def replace(self, linear: str, module: nn.Module) -> None:
        """Put another module in a linear's place."""
        self.linears[linear] = module  # type: ignore[assignment]
        if not isinstance(self.module.get_submodule(linear), nn.Identity):
            self.module.set_submodule(linear, module)

    def forward(self, hidden_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The layer's output [B, T, D] without stops."""
        walk = self.walk(hidden_BTD, rope)
        while True:
            try:
                next(walk)
            except StopIteration as end:
                output: Tensor = end.value
                return output


def _stop(
    stage: Stage, states: list[Tensor], spill: Spill
) -> Generator[tuple[Stage, Tensor], None, tuple[Tensor, Tensor]]:
    """A stop of a walk: its two states, of which the stage reads the second, wait; the list is emptied."""
    hidden, reads = (spill.keep(state) for state in states)
    del states[0]
    yield stage, states.pop()
    return hidden.tensor(), reads.tensor()


class Decoder:
    """A causal language model's skeleton, fed with one item's weights at a time.

    It is built when something asks for it, for its code takes seconds to import: who only places weights never does.

    Args:
        config: config.json of the model.
        family: its row of the table.
        device: where weights and activations are put.
        dtype: what everything is computed in (float32 or bfloat16).
        spill: where activations wait.
    """

    def __init__(
        self, config: dict, family: Family, *, device: torch.device, dtype: torch.dtype, spill: Spill = STAY
    ) -> None:
        self.family, self.device, self.dtype, self.spill = family, device, dtype, spill
        self._described = {key: value for key, value in config.items() if key != "quantization_config"}

    @cached_property
    def _model(self) -> Any:
        """The skeleton.

        Raises:
            RefusedError: config.json describes no model of the family.
        """
        import transformers
        from huggingface_hub.errors import StrictDataclassError

        from quantkit.checkpoint.expanded import EXPANDED_ATTENTION
        from quantkit.checkpoint.widened import WIDENED_ATTENTION, widen

        widened = needs_widening(self.device, self.dtype)
        expanded = needs_expanding(self.device, self.dtype)
        attention = WIDENED_ATTENTION if widened else EXPANDED_ATTENTION if expanded else "sdpa"
        try:
            config = transformers.AutoConfig.for_model(**self._described)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(
                    config, attn_implementation=attention, dtype=self.dtype
                ).eval()
        # torch asserts that a padding token is in the vocabulary
        except (TypeError, ValueError, KeyError, AssertionError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise RefusedError(
                f"config.json does not describe a {self.family.architecture}: {reason}",
                where="config.json",
                fix="take config.json from the model's own repository",
            ) from None
        if widened:
            widen(model)
        return model

    @cached_property
    def _rotary(self) -> nn.Module:
        rotary = type(self._model.model.rotary_emb)
        found: nn.Module = rotary(config=self._model.config).to(self.device)
        return found

    @property
    def window_limit(self) -> int:
        """Most tokens a window may hold: the context, or the sliding window where the model has a smaller one."""
        config = self._model.config
        context = int(config.max_position_embeddings)
        sliding = getattr(config, "sliding_window", None)
        return min(context, int(sliding)) if sliding else context

    def reserve(self, size_bytes: int) -> None:
        """Let activations wait elsewhere where less would stay free; the most that anybody asks for counts."""
        self.spill = Spill(max(self.spill.reserve_bytes, size_bytes))

    def rope(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions 0 .. num_tokens-1, each [1, T, head_dim] in the compute dtype."""
        positions = torch.arange(num_tokens, device=self.device).unsqueeze(0)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self._rotary(like, positions)
        return cos, sin

    def embed(self, tensors: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] of int64 token ids [B, T] on the decoder's device."""
        table = tensors["model.embed_tokens.weight"]
        # looked up where the table lies: what is moved and cast is a batch's rows
        return self.place(nn.functional.embedding(tokens_BT.to(table.device), table))

    def layer(self, index: int, tensors: dict[str, Tensor]) -> DecoderLayer:
        """A decoder layer with `tensors` (by checkpoint name) as its weights, cast to the compute dtype."""
        prefix = f"model.layers.{index}."
        module = copy.deepcopy(self._model.model.layers[index])
        state = {name.removeprefix(prefix): self.place(tensor) for name, tensor in tensors.items()}
        problems = module.load_state_dict(state, strict=False, assign=True)
        if problems.missing_keys or problems.unexpected_keys:
            odd = (problems.missing_keys + problems.unexpected_keys)[0]
            raise RefusedError(
                f"layer {index} does not fit a {self.family.architecture}: {prefix}{odd}",
                where=f"layers.{index}",
                fix="the weights and config.json are of different models; download both again",
            )
        return DecoderLayer(index, module.requires_grad_(False), self.family)

    def normed(self, tensors: dict[str, Tensor], hidden_BTD: Tensor) -> Tensor:
        """Hidden states after the final norm, [B, T, D]."""
        norm = copy.deepcopy(self._model.model.norm)
        norm.load_state_dict({"weight": self.place(tensors["model.norm.weight"])}, assign=True)
        normed: Tensor = norm.requires_grad_(False)(hidden_BTD)
        return normed

    def head(self, tensors: dict[str, Tensor]) -> Tensor:
        """The output matrix [V, D]; a tied model's items carry the embedding under its own name."""
        key = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
        return self.place(tensors[key])

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor on the decoder's device, in the compute dtype."""
        # moved first: in one step torch would cast on the CPU, and move what became wide
        return tensor.to(self.device).to(self.dtype)

    def place_to_solve(self, tensor: Tensor) -> Tensor:
        """A weight on the decoder's device, in the compute dtype, or as it is where that loses nothing by widening."""
        widened = torch.promote_types(tensor.dtype, self.dtype) == self.dtype
        return tensor.to(self.device) if widened else self.place(tensor)
