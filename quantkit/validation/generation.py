"""A short greedy answer to a chat prompt: it catches what perplexity misses, numbers that are not finite and loops."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.checkpoint.families import EMBEDDING
from quantkit.checkpoint.layer import Decoder, DecoderLayer
from quantkit.checkpoint.source import WeightSource, head_tensors
from quantkit.checkpoint.spill import free_bytes
from quantkit.checkpoint.tokenizer import Tokenizer

LONGEST_PERIOD = 8
ENDLESS_REPEATS = 4
ENDLESS_TOKENS = 16  # digits are tokens of their own: a large round number is no loop


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer, special tokens left out.
        num_tokens: how many tokens it has.
        finite: all logits were finite.
        repeats: it ends in the same few tokens again and again.
    """

    text: str
    num_tokens: int
    finite: bool
    repeats: bool


def repeats_endlessly(ids: list[int]) -> bool:
    """Whether the last tokens, 16 at least, are one period of at most 8 tokens, four times over or more often."""
    for period in range(1, LONGEST_PERIOD + 1):
        length = max(period * ENDLESS_REPEATS, ENDLESS_TOKENS)
        last = ids[-length:]
        if len(last) == length and last[period:] == last[:-period]:
            return True
    return False


def greedy_answer(
    source: WeightSource, decoder: Decoder, tokenizer: Tokenizer, *, prompt: str, num_tokens: int
) -> Answer:
    """The most likely answer to a user's message.

    The layers are held in memory if they take no more than half of what is free, else read again for every token.

    Args:
        source: the checkpoint, or an artifact's reader.
        prompt: what the user says.
        num_tokens: most tokens to generate.
    """
    context = [tokenizer.start, *tokenizer.encode(tokenizer.render([("user", prompt)], answer=True))]
    generated: list[int] = []
    next_logits = _logits(source, decoder)
    finite = True
    while len(generated) < num_tokens:
        logits_V = next_logits([*context, *generated])
        if not torch.isfinite(logits_V).all():
            finite = False
            break
        token = int(logits_V.argmax())
        if token == tokenizer.eos:
            break
        generated.append(token)
    return Answer(tokenizer.decode(generated), len(generated), finite, repeats_endlessly(generated))


def _logits(source: WeightSource, decoder: Decoder) -> Callable[[list[int]], Tensor]:
    embedding = source.read(EMBEDDING)
    head = head_tensors(source)
    matrix = decoder.head(head)
    layers = _layers(source, decoder)

    def last_logits(ids: list[int]) -> Tensor:
        hidden = decoder.embed(embedding, torch.tensor([ids]))
        rope = decoder.rope(len(ids))
        for index in range(source.num_layers):
            hidden = layers(index).forward(hidden, rope)
        return (decoder.normed(head, hidden[:, -1:])[0, 0] @ matrix.t()).float()

    return last_logits


def _layers(source: WeightSource, decoder: Decoder) -> Callable[[int], DecoderLayer]:
    """A way to get at decoder layers: all resident, or each read anew."""

    def read(index: int) -> DecoderLayer:
        return decoder.layer(index, source.read(f"layers.{index}"))

    first = read(0)
    if first.size_bytes * source.num_layers > free_bytes(decoder.device) / 2:
        return read
    resident = [first, *(read(index) for index in range(1, source.num_layers))]
    return resident.__getitem__
