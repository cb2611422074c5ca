"""Everything in an artifact folder that is not weights: config.json, tokenizer, chat template, licence."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.numbers import DEFAULT_THETA
from quantkit.formats.shards import copy_file

# copied as they are when the source has them
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
# keys that tell of the machine the source was saved on
PRIVATE_KEYS = ("_name_or_path", "transformers_version")


def quantized_config(
    source: dict[str, Any], settings: dict[str, Any] | None, dtype: torch.dtype | str
) -> dict[str, Any]:
    """config.json of the artifact: the source's, readable by old and new readers, with the quantization's settings.

    transformers 5 keeps rope_theta inside `rope_parameters` and calls the dtype `dtype`; older readers look for
    `rope_theta`, `rope_scaling` and `torch_dtype`. Both spellings are written. Of a rope's `type` and `rope_type`, two
    names of one thing, only the newer is: exllamav2 refuses both together.

    Args:
        source: the source's config.json; not modified.
        settings: quantization_config; None where the format keeps its settings elsewhere.
        dtype: of the dense tensors, or what config.json calls it.
    """
    config = {key: value for key, value in copy.deepcopy(source).items() if key not in PRIVATE_KEYS}
    for key in ("rope_parameters", "rope_scaling"):
        if "rope_type" in (config.get(key) or {}):
            config[key].pop("type", None)
    rope = config.get("rope_parameters")
    if rope is not None:
        config.setdefault("rope_theta", rope.get("rope_theta") or DEFAULT_THETA)
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    elif "rope_theta" in config:
        scaling = config.get("rope_scaling") or {"rope_type": "default"}
        config["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"]}
    config |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    return config if settings is None else config | {"quantization_config": settings}


def write_sidecars(source: Path, target: Path, config: dict[str, Any], extra: dict[str, dict[str, Any]]) -> None:
    """Fill an artifact folder with everything but weights, card and record.

    Args:
        source: the checkpoint's folder.
        target: the artifact's folder; exists.
        config: config.json.
        extra: further JSON files by name.
    """
    for name in COPIED:
        if (source / name).is_file():
            copy_file(source / name, target / name)
    for name, content in {"config.json": config, **extra}.items():
        (target / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
