"""A record with round figures for every format, as a build would leave it: what cards and pages are drawn from."""

from typing import Any

from quantkit.quantize import QUANTIZE
from quantkit.recipe import Recipe

HASH = "0123456789abcdef" * 4
# where an artifact holds several, a variant goes by a name of its own
ONE_OF_SEVERAL = {"exl2": "4.0bpw", "gguf": "Q4_K_M"}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ANSWER = {"text": "Wiosnę, lato, jesień i zimę.", "num_tokens": 9, "finite": True, "repeats": False}


def result(ratio: float, **changes: Any) -> dict[str, Any]:
    """One entry of `results`."""
    figures = {
        "ppl_per_token": 10.0 * ratio,
        "ppl_per_word": 200.0 * ratio,
        "bits_per_byte": 0.8,
        "ratio": ratio,
        "mean_kld": (ratio - 1) / 2,
        "p99_kld": ratio - 1,
        "top1_agreement": 0.95,
        "seconds": 3.5,
        "answer": ANSWER,
    }
    return {"runtime": "reference", "status": "ok", "reason": "", **figures, **changes}


def variant(name: str, bits: float, ratio: float, failures: tuple[str, ...] = ()) -> dict[str, Any]:
    """A judged variant."""
    return {
        "name": name,
        "files": [f"{name}.safetensors"],
        "bits_per_weight": bits,
        "size_bytes": int(bits * 1e9),
        "results": [result(ratio)],
        "gate": {"passed": not failures, "failures": list(failures)},
    }


def record_of(name: str, *variants: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A record of format `name`, not sealed.

    Args:
        variants: judged; one that passed if none is given.
        changes: of top-level keys.
    """
    content = {
        "format": name,
        "model": {"id": "an-org/Żuraw-7B", "revision": "a" * 40},
        "quantize": QUANTIZE[name].model_dump(mode="json"),
        "release": {"repo": f"an-org/Zuraw-7B-{name.upper()}", "quantized_by": "an-org"},
        "validation": {"gates": {"perplexity_ratio": 1.05}},
    }
    recipe = Recipe.of(content).resolved()
    identity = {"recipe": recipe, "source": {"model.safetensors": HASH}}
    judged = list(variants) or [variant(ONE_OF_SEVERAL.get(name, name), 4.25, 1.01)]
    failures = [failure for one in judged for failure in one["gate"]["failures"]]
    items = {
        f"layers.{index}": {
            "linears": [
                {
                    "name": f"model.layers.{index}.{linear}",
                    "loss": 1e-3 * (index + 1),
                    "damping": 0.01,
                    "elapsed_s": 1.0,
                }
                for linear in LINEARS
            ],
            "seconds": {"solve": 4.0},
        }
        for index in range(3)
    }
    return {
        "schema": 2,
        "format": name,
        "engine": "quantkit",
        "recipe": recipe,
        # not the real one, which every new key of a recipe would change
        "fingerprint": HASH,
        "identity": identity,
        "source": {
            "id": "an-org/Żuraw-7B",
            "revision": "a" * 40,
            "on_hub": True,
            "license": "cc-by-nc-4.0",
            "license_name": None,
            "license_link": None,
            "sha256": {"model.safetensors": HASH},
        },
        "chat": "[INST] Jakie mamy pory roku w Polsce? [/INST]",
        "calibration": {
            "texts": [{"name": "polish-core", "sha256": HASH, "revision": None, "windows": 64}],
            "window_tokens": 512,
            "seed": 0,
            "tokens_sha256": HASH,
        },
        "environment": {
            "versions": {"quantkit": "0.1.0", "torch": "2.13.0"},
            "commit": "b" * 40,
            "python": "3.11.7",
            "system": "Linux x86_64",
            "device": "cpu",
            "device_model": "A processor",
            "threads": 2,
            "cuda": None,
            "driver": None,
        },
        "validation_texts": [{"name": "polish-core", "sha256": HASH}],
        "validation": {
            "artifact": f"Zuraw-7B-{name.upper()}",
            "format": name,
            "engine": "quantkit",
            "text": {
                "name": "polish-core",
                "sha256": HASH,
                "documents": 31,
                "tokens": 18294,
                "words": 5596,
                "bytes": 1,
            },
            "reference": {"ppl_per_token": 10.0, "ppl_per_word": 200.0, "bits_per_byte": 0.79, "answer": ANSWER},
            "variants": judged,
            "gate": {"passed": not failures, "failures": failures},
        },
        "engine_facts": None,
        "reproducible": True,
        "variants": {one["name"]: one["files"] for one in judged},
        "outputs": [{"name": f"{judged[0]['name']}.safetensors", "size_bytes": 9, "sha256": HASH}],
        "build": {
            "items": items,
            "seconds": {"prepare": 1.0, "quantize": 12.0},
            "wall_seconds": 13.0,
            "peak_memory_bytes": {"host": 1_000_000_000},
        },
        "card_sha256": HASH,
    } | changes
