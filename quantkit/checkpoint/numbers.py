"""Numbers of config.json that decide what a model computes.

A reader computes with whatever stands there: of a number that makes no model every artifact is as bad as its source,
and looks like a bad quantization.
"""

import math
from typing import Any

from quantkit.errors import RefusedError

DEFAULT_THETA = 10000.0  # what transformers takes where config.json names none
# of rotary settings: what has to be above 0 where it is given, and what a kind of scaling cannot do without
ABOVE_ZERO = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
)
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings in one place: "rope_type", "rope_theta" and what the type needs."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    return rope


def require_computable(config: dict[str, Any], *, where: str) -> None:
    """Stop at a number that makes no model.

    Args:
        config: config.json.
        where: its path.

    Raises:
        RefusedError: naming each.
    """
    if problems := _problems(config):
        raise RefusedError(
            f"config.json says {'; '.join(problems)}",
            where=where,
            fix="take config.json from the model's own repository",
        )


def _problems(config: dict[str, Any]) -> list[str]:
    found = []
    norm, window = config.get("rms_norm_eps"), config.get("sliding_window")
    if norm is not None and not (_is_above_zero(norm) and norm < 1):
        found.append(f"rms_norm_eps = {norm!r}, which is not between 0 and 1")
    slides = window is not None and config.get("use_sliding_window") is not False
    if slides and not (type(window) is int and window > 0):
        found.append(f"sliding_window = {window!r}; it is a number of tokens above 0, or null")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, dict):
            return [*found, f"{key} = {config[key]!r}, which is no table"]
    return found + _rope_problems(rope_of(config), config.get("rope_theta"))


def _rope_problems(rope: dict[str, Any], beside: Any) -> list[str]:
    """What is wrong with rotary settings, given the rope_theta that stands beside them."""
    given = {key: rope[key] for key in ABOVE_ZERO if rope.get(key) is not None}
    found = [
        f"{key} = {value!r}, which is no number above 0" for key, value in given.items() if not _is_above_zero(value)
    ]
    kind = rope["rope_type"]
    if not isinstance(kind, str):
        return [*found, f"rope_type = {kind!r}, which is no name"]
    found += [f"rope_type = {kind!r}, but no {key}" for key in NEEDED.get(kind, ()) if key not in given]
    if beside is not None and beside != given.get("rope_theta", beside):
        found.append(
            f"rope_theta = {beside!r} and, within rope_parameters, {rope['rope_theta']!r}: readers take either"
        )
    if not found and kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        found.append(f"low_freq_factor = {given['low_freq_factor']!r}, which is not below high_freq_factor")
    return found


def _is_above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)
