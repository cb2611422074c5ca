"""The mathematics of judging: hidden states layer by layer, then logits chunk by chunk, never two full tensors of them.

Shape legend: N predicted tokens, D hidden size, V vocabulary, B windows, T tokens.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.checkpoint.families import EMBEDDING
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.source import WeightSource, head_tensors
from quantkit.validation.text import EvaluationText, Window

CHUNK_POSITIONS = 256  # whose logits are there at once, while the vocabulary is no larger than 32,768
CHUNK_LOGITS = 1 << 23
CHUNK_COPIES = 4  # logits and log-probabilities of both, and what is made of them


@dataclass(frozen=True)
class Comparison:
    """Per predicted token, in window order; all float64 [N] but `agrees`, bool [N].

    Attributes:
        reference_loss: negative log-likelihood under the reference, in nats.
        loss: the same under the artifact.
        divergence: KL(reference || artifact) over the whole vocabulary, in nats.
        agrees: both prefer the same token.
    """

    reference_loss: Tensor
    loss: Tensor
    divergence: Tensor
    agrees: Tensor


def perplexities(losses: Tensor, text: EvaluationText) -> dict[str, float]:
    """Perplexity per token and per word, and bits per byte, from the nats of every predicted token.

    Per word follows lm-evaluation-harness: exp(nats / words). `ppl_per_token` compares models of one tokenizer only.
    """
    nats = float(losses.double().sum())
    return {
        "ppl_per_token": _exp(nats / losses.numel()),
        "ppl_per_word": _exp(nats / text.words),
        "bits_per_byte": nats / math.log(2) / text.bytes,
    }


def final_states(source: WeightSource, text: EvaluationText, decoder: Decoder, *, windows_per_batch: int) -> Tensor:
    """Hidden states [N, D] after the final norm at every position that predicts, on the CPU in the compute dtype.

    Windows go through one layer together, then the next layer is read. Short windows are padded on the right, which
    causal attention cannot see.

    Args:
        source: the checkpoint, or an artifact's reader.
        text: what to read.
        decoder: the model's code, with device and dtype.
        windows_per_batch: windows per forward pass.
    """
    batches = [
        text.windows[first : first + windows_per_batch] for first in range(0, len(text.windows), windows_per_batch)
    ]
    embedding = source.read(EMBEDDING)
    hidden = [decoder.embed(embedding, _padded(batch)) for batch in batches]
    del embedding
    longest = max(states.shape[1] for states in hidden)
    cos, sin = decoder.rope(longest)
    for index in range(source.num_layers):
        layer = decoder.layer(index, source.read(f"layers.{index}"))
        for position, states in enumerate(hidden):
            length = states.shape[1]
            hidden[position] = layer.forward(states, (cos[:, :length], sin[:, :length]))
    head = head_tensors(source)
    rows = []
    for batch in batches:
        normed = decoder.normed(head, hidden.pop(0))
        for window, row in zip(batch, normed, strict=True):
            rows.append(row[len(window.inputs) - len(window.targets) : len(window.inputs)].cpu())
    return torch.cat(rows)


def losses(states_ND: Tensor, head_VD: Tensor, targets: list[int]) -> Tensor:
    """Negative log-likelihood float64 [N] of each target, in nats; logits and softmax in float32, over all of V."""
    wide_VD = head_VD.float()
    logits, found = room_for(wide_VD, copies=2)
    chunks = _chunks(states_ND, targets, wide_VD)
    return torch.cat([_loss(_log_softmax(states, wide_VD, logits, found), wanted) for states, wanted in chunks])


def compare(reference: tuple[Tensor, Tensor], artifact: tuple[Tensor, Tensor], targets: list[int]) -> Comparison:
    """Losses of both, divergence and agreement, chunk by chunk.

    Args:
        reference: final states [N, D] and head [V, D] of the reference.
        artifact: the same of the artifact.
        targets: the N tokens to be predicted.
    """
    device = artifact[1].device
    expected_VD = reference[1].float()
    # most formats leave the head as it is
    same = reference[1].device == device and torch.equal(reference[1], artifact[1])
    found_VD = expected_VD if same else artifact[1].float()
    pairs = zip(_chunks(reference[0], targets, found_VD), _chunks(artifact[0], targets, found_VD), strict=True)
    logits, kept, other, work = room_for(found_VD, copies=CHUNK_COPIES)
    return _joined(
        (
            (_log_softmax(expected, expected_VD, logits, kept), _log_softmax(found, found_VD, logits, other), wanted)
            for (expected, wanted), (found, _) in pairs
        ),
        (logits, work),
    )


def compare_logits(
    reference: tuple[Tensor, Tensor], logits_NV: Tensor, targets: list[int], room: tuple[Tensor, ...]
) -> Comparison:
    """The same for an artifact of which only logits are known, of a window's N predicted tokens.

    Args:
        reference: final states [N, D] and head [V, D] of the reference, the head in float32.
        logits_NV: float32, the artifact's; columns beyond the reference's vocabulary are padding.
        targets: the N tokens to be predicted.
        room: three of `room_for`, for one window after another.
    """
    head_VD = reference[1]
    parts = logits_NV.split(chunk_positions(head_VD.shape[0]))
    pairs = zip(_chunks(reference[0], targets, head_VD), parts, strict=True)
    logits, kept, work = room
    return _joined(
        (
            (
                _log_softmax(expected, head_VD, logits, kept),
                torch.log_softmax(found[:, : head_VD.shape[0]].to(head_VD.device), dim=-1),
                wanted,
            )
            for (expected, wanted), found in pairs
        ),
        (logits, work),
    )


def room_for(head_VD: Tensor, *, copies: int) -> tuple[Tensor, ...]:
    """Float32 [positions, V] for the logits of a chunk, so many times, to be used for one chunk after another.

    Made anew for each, glibc finds no room where the last were, for something small has been put there since: it held
    three times as much.
    """
    vocabulary = head_VD.shape[0]
    return tuple(torch.empty(chunk_positions(vocabulary), vocabulary, device=head_VD.device) for _ in range(copies))


def _joined(chunks: Iterable[tuple[Tensor, Tensor, Tensor]], room: tuple[Tensor, Tensor]) -> Comparison:
    """What chunks of log-probabilities [N, V] of both and the tokens wanted [N] come to, one after another."""
    parts = [
        (_loss(expected, wanted), _loss(found, wanted), *divergence(expected, found, room))
        for expected, found, wanted in chunks
    ]
    return Comparison(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def divergence(expected_NV: Tensor, found_NV: Tensor, room: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """KL(expected || found) in nats, float64 [N], and whether the most likely tokens are the same, bool [N].

    Args:
        expected_NV: float32 log-probabilities of the reference; `found_NV` those of the artifact.
        room: float32 [at least N, V], twice, to be written over.
    """
    share_NV, apart_NV = (each[: len(expected_NV)] for each in room)
    torch.exp(expected_NV, out=share_NV)
    torch.sub(expected_NV, found_NV, out=apart_NV)
    kld_N = share_NV.mul_(apart_NV).sum(-1)
    return kld_N.double().cpu(), (expected_NV.argmax(-1) == found_NV.argmax(-1)).cpu()


def chunk_positions(vocabulary: int) -> int:
    """Positions whose logits are there at once."""
    return max(1, min(CHUNK_POSITIONS, CHUNK_LOGITS // vocabulary))


def _chunks(states_ND: Tensor, targets: list[int], head_VD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    wanted_N, positions = torch.tensor(targets), chunk_positions(head_VD.shape[0])
    for first in range(0, states_ND.shape[0], positions):
        chunk = slice(first, first + positions)
        yield states_ND[chunk].to(head_VD.device), wanted_N[chunk].to(head_VD.device)


def _log_softmax(states_ND: Tensor, head_VD: Tensor, logits: Tensor, out: Tensor) -> Tensor:
    """Log-probabilities float32 [N, V] by a head in float32: a product in bf16 would round what is to be compared.

    Args:
        states_ND, head_VD: what is multiplied.
        logits, out: float32 [at least N, V], to be written over; the result lies in the latter.
    """
    rows = len(states_ND)
    torch.matmul(states_ND.float(), head_VD.t(), out=logits[:rows])
    return torch.log_softmax(logits[:rows], dim=-1, out=out[:rows])


def _loss(log_probabilities_NV: Tensor, wanted_N: Tensor) -> Tensor:
    return -log_probabilities_NV.gather(1, wanted_N.unsqueeze(1)).squeeze(1).double().cpu()


def _padded(windows: tuple[Window, ...]) -> Tensor:
    longest = max(len(window.inputs) for window in windows)
    return torch.tensor([[*window.inputs, *[0] * (longest - len(window.inputs))] for window in windows])


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
