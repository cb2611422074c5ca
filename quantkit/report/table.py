"""The table of results, for the terminal and the card."""

from typing import Any

from quantkit.units import size_text

COLUMNS = (
    "format",
    "bits per weight",
    "size",
    "ppl_per_token",
    "ppl_per_word",
    "bits_per_byte",
    "ratio",
    "KLD",
    "top-1",
    "seconds",
    "gate",
)


def rows(name: str, validation: dict[str, Any], *, seconds: float | None = None) -> list[list[str]]:
    """One row per variant and runtime, after one for the reference.

    Args:
        name: what to call the artifact.
        validation: as in `validate --json`.
        seconds: of the build; each result's own if None.
    """
    reference = validation["reference"]
    found = [["reference", "16", "", *_perplexities(reference), "1.0000", "", "", "", ""]]
    for variant in validation["variants"]:
        gate = "passed" if variant["gate"]["passed"] else "FAILED"
        label = name if len(validation["variants"]) == 1 else f"{name} {variant['name']}"
        start = [f"{variant['bits_per_weight']:.3f}", size_text(variant["size_bytes"])]
        for result in variant["results"]:
            shown = label if result["runtime"] == "reference" else f"{label} ({result['runtime']})"
            if result["status"] != "ok":
                found.append([shown, *start, f"{result['status']}: {result['reason']}", *[""] * 6, gate])
                continue
            spent = result["seconds"] if seconds is None else seconds
            found.append(
                [
                    shown,
                    *start,
                    *_perplexities(result),
                    f"{result['ratio']:.4f}",
                    f"{result['mean_kld']:.4f}",
                    f"{result['top1_agreement']:.3f}",
                    f"{spent:.1f}",
                    gate,
                ]
            )
    return found


def rows_of_several(artifacts: dict[str, tuple[dict[str, Any], float | None]]) -> list[list[str]]:
    """One table over artifacts of the same model and text; the reference comes once.

    Args:
        artifacts: validation and seconds, as `rows` takes them, by name.
    """
    table: list[list[str]] = []
    for name, (validation, seconds) in artifacts.items():
        found = rows(name, validation, seconds=seconds)
        table += found if not table else found[1:]
    return table


def _perplexities(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['ppl_per_token']:.3f}",
        f"{result['ppl_per_word']:.1f}",
        f"{result['bits_per_byte']:.4f}",
    ]
