"""The record of an artifact, `quantkit.json`: where every byte came from and how good the result is.

The record is the source; the card, the table and the page are views of it. It holds no local path, user or host.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantkit.errors import RefusedError, RunFailedError
from quantkit.files import finite, hash_files, write_json
from quantkit.recipe import Recipe, fingerprint
from quantkit.report.schema import Record
from quantkit.signature import SIGNATURE, SIGNATURES
from quantkit.workdir import RECORD

SCHEMA = 2
CARD = "README.md"
# the record cannot hold its own hash; the card is drawn from it, and the signature is of both
UNHASHED = (RECORD, CARD, SIGNATURE)
# what the Hub, its client and git put into a folder, and the signatures of branches
GIT = ".git"
BESIDE = (".gitattributes", ".cache", GIT, SIGNATURES)
UNRECORDED = "not in the record"

OWN_WORDS = f"; `quantkit validate` draws {CARD} anew, words of your own for it are [release] notes in the recipe"


def artifact_files(folder: Path) -> list[str]:
    """Names of every file of an artifact, below its folder, sorted; hidden ones too, but for those of BESIDE."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if path.parts[0] not in BESIDE)


def output_entries(folder: Path) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of every file whose bytes the recipe decides."""
    names = [name for name in artifact_files(folder) if name not in UNHASHED]
    hashes = hash_files(folder, names)
    return [{"name": name, "size_bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in names]


def read_record(folder: Path) -> dict[str, Any] | None:
    """An artifact's record, or None where there is none (somebody else made the folder).

    Raises:
        RefusedError: it is not a record this version reads.
        RunFailedError: it was edited after it was written.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    # a build reads the record first, so that it would stop at the same error, even with --fresh
    anew = f"remove the folder {folder}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RefusedError(
            f"the record is not JSON: {error}", where=str(path), fix=f"{anew} and build the artifact again"
        ) from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise RefusedError(
            "the record is of another version of quantkit",
            where=str(path),
            fix=f"{anew} and build the artifact again",
        )
    if record.get("seal") != _seal(record):
        raise RunFailedError(
            f"{RECORD} was edited after it was written",
            where=str(path),
            fix=f"restore it, or {anew} and build the artifact again; what the card is to say stands in the recipe",
        )
    try:
        Record.model_validate(record)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise RefusedError(
            f"{len(problems)} problem(s) in the record:\n  " + "\n  ".join(problems),
            where=str(path),
            fix=f"{anew} and build the artifact again",
        ) from None
    return record


def branches_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The judged variants that are on branches of their own, for the branch that has a card and no weights."""
    return record["validation"]["variants"] if record.get("published") and not record["variants"] else []


def require_weights_here(folder: Path, record: dict[str, Any]) -> None:
    """Stop where a folder is the branch of a repository whose variants are on other branches.

    Raises:
        RefusedError: naming these branches.
    """
    if branches := [variant["name"] for variant in branches_of(record)]:
        repo = record["published"]["repo"]
        raise RefusedError(
            f"no weights here: {repo} has them on branches, {', '.join(branches)}",
            where=str(folder),
            fix=f"hf download {repo} --revision {branches[0]} --local-dir DIR, and give DIR",
        )


def recorded_recipe(record: dict[str, Any]) -> Recipe:
    """The recipe that an artifact was made by.

    Raises:
        RefusedError: it has keys that recipes of this version have not, or not like that.
    """
    try:
        return Recipe.of(record["recipe"])
    except ValidationError as error:
        keys = ", ".join(dict.fromkeys(".".join(map(str, detail["loc"])) for detail in error.errors()))
        raise RefusedError(
            f"the artifact's recipe is of another version of quantkit: {keys}",
            where=RECORD,
            fix="judge it by a recipe of today: `quantkit build` with the same --out",
        ) from None


def built_record(folder: Path) -> dict[str, Any]:
    """The record of an artifact that `quantkit build` made.

    Raises:
        RefusedError: the folder is not there, or somebody else made it.
    """
    if not folder.is_dir():
        raise RefusedError(f"no such folder: {folder}", fix="give the folder of an artifact")
    record = read_record(folder)
    if record is None:
        raise RefusedError(
            "the folder has no record of how it was made and judged",
            where=str(folder),
            fix="give the folder of an artifact that `quantkit build` made",
        )
    return record


def write_record(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Put the record in place, whole or not at all; returns it with the hash that tells of a later edit."""
    record = finite(record)  # as it will be read again
    record = record | {"seal": _seal(record)}
    write_json(folder / RECORD, record)
    return record


def _seal(record: dict[str, Any]) -> str:
    return fingerprint({key: value for key, value in record.items() if key != "seal"})


def changed_files(folder: Path, record: dict[str, Any]) -> list[str]:
    """Which files differ from what the record says: "name: missing", "name: changed" or "name: not in the record"."""
    recorded = {entry["name"]: entry["sha256"] for entry in record["outputs"]} | {CARD: record["card_sha256"]}
    present = [name for name in artifact_files(folder) if name not in (RECORD, SIGNATURE)]
    hashes = hash_files(folder, [name for name in present if name in recorded])
    lines = [f"{name}: missing" for name in recorded if name not in present]
    lines += [f"{name}: changed" for name, sha256 in hashes.items() if sha256 != recorded[name]]
    lines += [f"{name}: {UNRECORDED}" for name in present if name not in recorded]
    return sorted(lines)


def require_replaceable(folder: Path, record: dict[str, Any]) -> None:
    """Stop where replacing an artifact would delete what quantkit did not make; its own files may have been changed.

    Raises:
        RefusedError: naming every file that is not in the record.
    """
    known = {entry["name"] for entry in record["outputs"]} | {*UNHASHED}
    strange = [name for name in artifact_files(folder) if name not in known]
    # somebody's history, which belongs beside an artifact and cannot be made again
    strange += [GIT] if (folder / GIT).exists() else []
    if strange:
        raise RefusedError(
            f"--fresh would delete what is {UNRECORDED}:\n  " + "\n  ".join(strange),
            where=str(folder),
            fix="move it elsewhere, or choose another folder with --out",
        )


def require_unchanged(folder: Path, record: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    """Stop if an artifact's bytes are not those that were built.

    Args:
        but: files that may differ.

    Raises:
        RunFailedError: naming every file that differs.
    """
    refuse_changed(folder, [line for line in changed_files(folder, record) if line.partition(":")[0] not in but])


def refuse_changed(folder: Path, changed: list[str]) -> None:
    """Stop at files that `changed_files` names.

    Raises:
        RunFailedError: naming every one.
    """
    if changed:
        strange = [line for line in changed if line.endswith(f": {UNRECORDED}")]
        fixes = [f"move what is {UNRECORDED} elsewhere"] if strange else []
        fixes += ["build it again with --fresh, or restore the files"] if len(strange) < len(changed) else []
        raise RunFailedError(
            "the artifact is not what was built:\n  " + "\n  ".join(changed),
            where=str(folder),
            fix="; ".join(fixes) + (OWN_WORDS if f"{CARD}: changed" in changed else ""),
        )
