"""One artifact held against its reference: the results that the record, the card and the gate are made of."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.source import WeightSource
from quantkit.checkpoint.tokenizer import Tokenizer
from quantkit.engines.env import REFERENCE_RUNTIME
from quantkit.validation.gate import judge
from quantkit.validation.perplexity import Comparison, compare, compare_logits, losses, perplexities, room_for
from quantkit.validation.reference import Judged, Settings, run
from quantkit.validation.text import EvaluationText


def reference_figures(reference: Judged, text: EvaluationText) -> dict[str, Any]:
    """The `reference` of `validate --json`: the reference model's own perplexities and answer."""
    figures: dict[str, Any] = dict(perplexities(losses(reference.states_ND, reference.head_VD, text.targets), text))
    return figures | {"answer": asdict(reference.answer) if reference.answer else None}


def reference_result(
    source: WeightSource,
    reference: Judged,
    text: EvaluationText,
    decoder: Decoder,
    tokenizer: Tokenizer,
    settings: Settings,
) -> dict[str, Any]:
    """One entry of `results` of `validate --json`: an artifact decoded and run by quantkit itself.

    Args:
        source: the artifact's dense weights.
        reference: what the reference model made of the same text.
    """
    started = time.perf_counter()
    judged = run(source, text, decoder, tokenizer, settings)
    found = compare((reference.states_ND, reference.head_VD), (judged.states_ND, judged.head_VD), text.targets)
    answer = asdict(judged.answer) if judged.answer else None
    return _result(REFERENCE_RUNTIME, found, text, started) | {"answer": answer}


def logits_result(
    runtime: str, logits: Iterable[np.ndarray], reference: Judged, text: EvaluationText
) -> dict[str, Any]:
    """One entry of `results` of `validate --json`: an artifact run by somebody else's reader.

    Args:
        runtime: whose.
        logits: float32 [targets, V] of every window, in window order; one window at a time is held.
        reference: what the reference model made of the same text.
    """
    started = time.perf_counter()
    targets = [list(window.targets) for window in text.windows]
    rows = reference.states_ND.split([len(wanted) for wanted in targets])
    head_VD = reference.head_VD.float()
    room = room_for(head_VD, copies=3)
    parts = [
        compare_logits((states, head_VD), torch.from_numpy(found), wanted, room)
        for states, found, wanted in zip(rows, logits, targets, strict=True)
    ]
    joined = Comparison(
        torch.cat([part.reference_loss for part in parts]),
        torch.cat([part.loss for part in parts]),
        torch.cat([part.divergence for part in parts]),
        torch.cat([part.agrees for part in parts]),
    )
    return _result(runtime, joined, text, started)


def _result(runtime: str, found: Comparison, text: EvaluationText, started: float) -> dict[str, Any]:
    expected = perplexities(found.reference_loss, text)
    measured = perplexities(found.loss, text)
    figures = {
        **measured,
        "ratio": measured["ppl_per_token"] / expected["ppl_per_token"],
        "mean_kld": float(found.divergence.mean()),
        "p99_kld": float(torch.quantile(found.divergence, 0.99)),
        "top1_agreement": float(found.agrees.double().mean()),
    }
    if odd := no_numbers(figures):
        return failed(runtime, f"its {odd[0]} is {figures[odd[0]]}: logits are not finite")
    return {
        "runtime": runtime,
        "status": "ok",
        "reason": "",
        **figures,
        "seconds": round(time.perf_counter() - started, 3),
    }


def no_numbers(figures: Mapping[str, Any]) -> list[str]:
    """Which of the figures are NaN or infinite."""
    return [key for key, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]


def not_run(runtime: str, reason: str) -> dict[str, Any]:
    """The result of a runtime that could not judge the artifact."""
    return {"runtime": runtime, "status": "not run", "reason": reason}


def failed(runtime: str, reason: str) -> dict[str, Any]:
    """The result of a runtime that broke while it judged the artifact."""
    return {"runtime": runtime, "status": "failed", "reason": reason}


def gated(
    variant: Mapping[str, Any],
    reference: Mapping[str, Any],
    gates: Mapping[str, float | None],
    require: Sequence[str],
) -> dict[str, Any]:
    """A variant with its verdict: {"passed", "failures"}."""
    failures = judge(variant["results"], gates, require, reference)
    return {**variant, "gate": {"passed": not failures, "failures": failures}}
