"""Where an artifact's bytes come from: what decides them, and the record that tells."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.tokenizer import Tokenizer
from quantkit.engines.env import find_engine
from quantkit.errors import RefusedError
from quantkit.judgement import stated_texts
from quantkit.machine import deciding_versions, device_model, environment
from quantkit.recipe import OWN_ENGINE, Recipe, fingerprint, public_name
from quantkit.report.record import CARD, SCHEMA, read_record, require_replaceable, require_unchanged
from quantkit.source_pass import Calibration
from quantkit.sources import Source
from quantkit.texts import TextSet
from quantkit.workdir import discard_work, is_being_replaced, refuse_other


def identity_of(
    recipe: Recipe,
    source: Source,
    texts: dict[str, TextSet],
    device: torch.device,
    engine: str,
    read: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that decides the artifact's bytes; the same identity gives the same files."""
    deciding = recipe.deciding()
    # what it was resolved to: a recipe that is pinned to it afterwards means the same build
    deciding["model"] = deciding["model"] | {"revision": source.revision}
    identity = {
        "recipe": deciding,
        "source": source.sha256,
        "texts": {public_name(name): text_set.sha256 for name, text_set in texts.items()},
        "versions": deciding_versions(),
        "device": device_model(device),
    }
    if engine != OWN_ENGINE:
        identity["engine"] = find_engine(engine).pins
    return identity | ({"read": dict(read)} if read else {})


def refuse_other_licence(recipe: Recipe, source: Source) -> None:
    """Stop where the recipe announces another licence than the source's own repository.

    Raises:
        RefusedError: naming both.
    """
    sections = {"release": recipe.release, "quantize": recipe.quantize}
    stated = {f"{name}.license": getattr(section, "license", None) for name, section in sections.items()}
    own = source.license.get("license")
    for key, licence in stated.items():
        if None not in (licence, own) and licence != own:
            raise RefusedError(
                f"the recipe says {licence}, the model's own card {own}",
                where=key,
                fix="leave the key out, or state the source's licence: a quantized model keeps it",
            )


def finished_record(out: Path, identity: Callable[[], dict[str, Any]], *, fresh: bool) -> dict[str, Any] | None:
    """The record of an artifact that is there already and is this one; None if it is to be made.

    Args:
        out: its folder.
        identity: gives what `identity_of` gave; asked if there is something to compare it with.
        fresh: replace what is there; so does a run that goes on after one with `fresh`.

    Raises:
        RefusedError: the folder holds something else (`fresh` allows another build of quantkit, nothing more), or
            beside such a build what quantkit did not make.
        RunFailedError: it is this one, but its files were changed.
    """
    if (record := record_at(out)) is None:
        return None
    if fresh or is_being_replaced(out, identity):
        require_replaceable(out, record)
        return None
    refuse_other(record["identity"], identity(), where=out)
    # a kill may have come between card and record; publishing looks at both
    require_unchanged(out, record, but=(CARD,))
    discard_work(out)
    return record


def refuse_other_recipe(out: Path, recipe: Recipe) -> None:
    """Stop where an artifact is by another recipe: what `finished_record` refuses, as far as no hash is needed.

    Raises:
        RefusedError: naming every key that differs; see also `record_at`.
    """
    if (record := record_at(out)) is None:
        return
    earlier, deciding = record["identity"]["recipe"], recipe.deciding()
    if recipe.model.revision is None:
        # which one it would be resolved to is not known yet
        deciding["model"] = deciding["model"] | {"revision": earlier["model"]["revision"]}
    refuse_other({"recipe": earlier}, {"recipe": deciding}, where=out)


def record_at(out: Path) -> dict[str, Any] | None:
    """The record of an artifact that is where one is to be made; None where nothing is.

    Raises:
        RefusedError: there is something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    record = read_record(out) if out.is_dir() else None
    if record is None:
        raise RefusedError(
            f"{out} exists and is no artifact of quantkit", where=str(out), fix="choose another folder with --out"
        )
    return record


def new_record(
    recipe: Recipe,
    source: Source,
    texts: dict[str, TextSet],
    identity: dict[str, Any],
    device: torch.device,
    calibration: Calibration | None,
) -> dict[str, Any]:
    """A record as far as it is known before there is an artifact; see docs/record.schema.json.

    Args:
        recipe: of the build.
        source: what is quantized.
        texts: calibration texts by the names that the recipe gives them.
        identity: what `identity_of` gave.
        device: that computes.
        calibration: the windows; None if none were asked for.
    """
    facts = None
    if calibration is not None:
        section = recipe.calibration
        facts = {
            "texts": [
                {
                    "name": public_name(name),
                    "sha256": text_set.sha256,
                    "revision": text_set.revision,
                    "windows": section.texts[name],
                }
                for name, text_set in texts.items()
            ],
            "window_tokens": section.window_tokens,
            "seed": section.seed,
            "tokens_sha256": fingerprint(calibration.tokens_WT.tolist()),
        }
    return {
        "schema": SCHEMA,
        "format": recipe.format,
        "engine": recipe.engine,
        "recipe": recipe.resolved(),
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "source": source.facts(),
        "calibration": facts,
        "environment": environment(device),
        "validation_texts": stated_texts(recipe.validation.texts),
        "validation": None,
        "chat": _chat_example(source.tokenizer, recipe.validation.prompt),
    }


def _chat_example(tokenizer: Tokenizer, prompt: str) -> str | None:
    """A question as the model reads it; None for a model without a chat template."""
    return tokenizer.render([("user", prompt)], answer=True) if tokenizer.has_template else None
