"""What an artifact folder is, from its files and its record."""

from pathlib import Path
from statistics import fmean
from typing import Any

from quantkit.errors import RefusedError
from quantkit.formats import detect, open_variants
from quantkit.formats.contract import Artifact
from quantkit.report.record import CARD, branches_of, changed_files, read_record, refuse_changed
from quantkit.signature import SIGNATURE, problem, require_key
from quantkit.units import size_text
from quantkit.workdir import RECORD

GOOD, BROKEN, UNCHECKED, NO_SIGNATURE = "good", "broken", "not checked", "none"


def inspect_artifact(folder: Path, *, verify: bool, public_key: Path | None = None) -> dict[str, Any]:
    """Format, sizes, tensors and record of an artifact.

    Args:
        folder: the artifact, or one file of a format whose variants are files.
        verify: also hash every file; `changed` then lists what differs from the record.
        public_key: also check the signature; one that is missing is broken then.

    Returns:
        {"artifact", "format", "bits_per_weight" (the variants' mean, None without any), "size_bytes",
        "variants": [{"name", "files", "bits_per_weight", "size_bytes"}],
        "branches": [{"name", "bits_per_weight", "size_bytes"}] of the repository that hold the variants, where the
        folder is its branch without weights,
        "tensors": [{"name", "dtype", "shape", "file"}], "record", "verified", "changed",
        "signature": "good", "broken", "not checked" or "none", "signature_problem"}.
    """
    if public_key is not None and not verify:
        raise RefusedError("a signature is checked with --verify only", where="--public-key", fix="add --verify")
    if public_key is not None:
        require_key(public_key, "--public-key")
    record = read_record(folder)
    branches = [] if record is None else branches_of(record)
    changed = []
    if verify:
        changed = [f"{RECORD}: missing"] if record is None else changed_files(folder, record)
    try:
        name = record["format"] if record is not None and branches else detect(folder)
        opened = {} if branches else open_variants(name, folder)
    except RefusedError:
        # what cannot be opened because it is not what was built
        if record is not None:
            refuse_changed(folder, changed)
        raise
    variants = [_variant(name, artifact) for name, artifact in opened.items()]
    signature, why = _signature(folder, public_key)
    return {
        "artifact": folder.resolve().name,
        "format": name,
        "bits_per_weight": fmean(variant["bits_per_weight"] for variant in variants) if variants else None,
        "size_bytes": sum(variant["size_bytes"] for variant in variants),
        "variants": [{key: value for key, value in variant.items() if key != "tensors"} for variant in variants],
        "branches": [{key: branch[key] for key in ("name", "bits_per_weight", "size_bytes")} for branch in branches],
        "tensors": [tensor for variant in variants for tensor in variant["tensors"]],
        "record": record,
        "verified": verify,
        "changed": changed,
        "signature": signature,
        "signature_problem": why,
    }


def _variant(name: str, artifact: Artifact) -> dict[str, Any]:
    tensors = artifact.tensors
    return {
        "name": name,
        "files": tensors.files,
        "bits_per_weight": artifact.bits_per_weight,
        "size_bytes": sum((tensors.folder / file).stat().st_size for file in tensors.files),
        "tensors": [
            {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "file": info.file}
            for info in tensors.tensors.values()
        ],
    }


def _signature(folder: Path, public_key: Path | None) -> tuple[str, str | None]:
    """How the signature stands, and what is wrong with it."""
    path = folder / SIGNATURE
    if public_key is None:
        return (UNCHECKED if path.is_file() else NO_SIGNATURE), None
    if not path.is_file():
        return BROKEN, f"{SIGNATURE} is missing"
    why = problem(folder, path, public_key, covers=(RECORD, CARD))
    return (GOOD if why is None else BROKEN), why


def inspection_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    record, several = found["record"], len(found["variants"]) > 1
    lines = [f"artifact          {found['artifact']}", f"format            {found['format']}"]
    if found["branches"]:
        repo = record["published"]["repo"]
        lines += [f"weights           none here: `hf download {repo} --revision BRANCH` fetches them, BRANCH one of"]
    else:
        lines += [
            f"bits per weight   {found['bits_per_weight']:.3f}" + (", mean of the variants" if several else ""),
            f"size              {size_text(found['size_bytes'])} in weights, {len(found['tensors'])} tensors",
        ]
    lines += [
        f"  {variant['name']:<16}{size_text(variant['size_bytes'])}, {variant['bits_per_weight']:.3f} bits a weight"
        for variant in found["branches"] or found["variants"]
        if several or found["branches"]
    ]
    if record is None:
        lines += ["record            none: not made by quantkit"]
        return lines + [f"verify            {change}" for change in found["changed"]]
    if found["signature"] != NO_SIGNATURE:
        lines += [f"signature         {found['signature_problem'] or found['signature']}"]
    validation = record["validation"]
    verdict = "not validated"
    if validation is not None:
        verdict = "passed" if validation["gate"]["passed"] else "FAILED: " + "; ".join(validation["gate"]["failures"])
    lines += [
        f"source            {record['source']['id']} {record['source']['revision'] or ''}".rstrip(),
        f"fingerprint       {record['fingerprint']}",
        f"made by           quantkit {record['environment']['versions']['quantkit']}, engine {_engine(record)}",
        f"gate              {verdict}",
    ]
    if found["verified"]:
        lines += [f"verify            {change}" for change in found["changed"]] or [
            f"verify            all {len(record['outputs']) + 1} files are as recorded"
        ]
    return lines


def _engine(record: dict[str, Any]) -> str:
    facts = record["engine_facts"]
    return f"{facts['package']} {facts['version']} (bytes not reproducible)" if facts else str(record["engine"])
