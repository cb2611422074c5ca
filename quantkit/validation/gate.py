"""What an artifact must keep to be published."""

from collections.abc import Mapping, Sequence
from typing import Any

# gate key -> (key of a result, whether larger is worse)
LIMITS = {
    "perplexity_ratio": ("ratio", True),
    "mean_kld": ("mean_kld", True),
    "top1_agreement": ("top1_agreement", False),
}


def judge(
    results: Sequence[Mapping[str, Any]],
    gates: Mapping[str, float | None],
    require: Sequence[str],
    reference: Mapping[str, Any],
) -> list[str]:
    """Why a variant may not be published, one line each; empty if it may.

    Args:
        results: one per runtime, as in `validate --json`.
        gates: limit by key of `LIMITS`; None is no limit.
        require: runtimes that must have run.
        reference: the reference model's figures, with its answer where the generation check was made.
    """
    failures = []
    by_runtime = {result["runtime"]: result for result in results}
    for runtime in require:
        found = by_runtime.get(runtime)
        if found is None or found["status"] != "ok":
            why = found["reason"] if found else "it was not asked for"
            failures.append(f"{runtime}: required, but {why}")
    for result in results:
        if result["status"] == "failed" and result["runtime"] not in require:
            failures.append(f"{result['runtime']}: {result['reason']}")
        if result["status"] != "ok":
            continue
        for gate, limit in gates.items():
            key, larger_is_worse = LIMITS[gate]
            if limit is None:
                continue
            value = result[key]
            # a comparison with NaN is false, so the test is written for what passes
            passed = value <= limit if larger_is_worse else value >= limit
            if not passed:
                sign = ">" if larger_is_worse else "<"
                failures.append(f"{result['runtime']}: {gate} {value:.4f} {sign} {limit:g}")
        failures += _spoken(result, reference)
    return failures


def _spoken(result: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """What is wrong with the greedy answer; a loop counts only if the reference does not fall into one too."""
    answer = result.get("answer")
    if answer is None:
        return []
    if not answer["finite"]:
        return [f"{result['runtime']}: the answer to the prompt has logits that are not finite"]
    if answer["repeats"] and not (reference.get("answer") or {}).get("repeats", False):
        return [f"{result['runtime']}: the answer to the prompt repeats itself without end"]
    return []
