"""Whether a record's verdict is one that counts: on the texts that its recipe names, and by the recipe's own gates."""

from collections.abc import Mapping
from typing import Any

from quantkit.recipe import ValidationSection
from quantkit.texts import joined_sha256
from quantkit.validation.gate import judge


def judged_on_own_texts(record: dict[str, Any]) -> bool:
    """Whether a record's verdict is on the texts of its recipe, by their names and content."""
    texts, validation = record.get("validation_texts"), record["validation"]
    if (
        not texts
        or validation is None
        or [text["name"] for text in texts] != list(record["recipe"]["validation"]["texts"])
    ):
        return False
    hashes = [text["sha256"] for text in texts]
    return None not in hashes and joined_sha256(hashes) == validation["text"]["sha256"]


def own_failures(variant: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Why a judged variant may not be published: what was recorded, and what the recipe's gates say of its figures."""
    # the keys that decide it, so that a record of another version is judged too
    stated = {key: record["recipe"]["validation"][key] for key in ("gates", "variant_gates", "require")}
    section = ValidationSection.model_validate(stated)
    recorded = [] if variant["gate"]["passed"] else variant["gate"]["failures"]
    reference = record["validation"]["reference"]
    found = judge(variant["results"], gates_of(section, variant["name"]), section.require, reference)
    return list(dict.fromkeys([*recorded, *found]))


def gates_of(section: ValidationSection, variant: str) -> dict[str, float | None]:
    """Limits that a variant must keep, by the keys of the recipe's gates."""
    own = section.variant_gates.get(variant)
    given = {} if own is None else {key: value for key, value in own.model_dump().items() if value is not None}
    return section.gates.model_dump() | given


def told(failures: Mapping[str, list[str]]) -> list[str]:
    """Failures by variant, one after another; the variant is named where there are several."""
    several = len(failures) > 1
    return [f"{name}: {failure}" if several else failure for name, found in failures.items() for failure in found]
