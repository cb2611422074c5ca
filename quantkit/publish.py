"""An artifact on the Hub: only variants that passed their gates, only the bytes that passed, in one commit.

What goes up is compared with the record before, while and after it is uploaded. A second run finds nothing to do;
a run that broke off is finished by the same command.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit.errors import GateError, RefusedError, RunFailedError
from quantkit.hub import Branch, read_branch, upload
from quantkit.report.record import CARD, read_record, require_unchanged
from quantkit.workdir import RECORD, sha256_of

REPO = re.compile(r"[\w.-]+/[\w.-]+")


def publish(
    folder: Path,
    *,
    repo: str | None,
    revision: str,
    private: bool,
    dry_run: bool,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Upload an artifact; see the module.

    Args:
        folder: the artifact.
        repo: `org/name`; None takes the recipe's.
        revision: branch, made if it is not there.
        private: of a repository that is made now; an existing one stays as it is.
        dry_run: only say what would be done; the Hub is asked what it has.
        say: told what is going on.

    Returns:
        {"repo", "revision", "private", "dry_run", "variants", "left_out", "upload": [{"name", "size_bytes", "sha256"}],
        "unchanged", "others", "commit"}; `others` are files on the branch that the artifact does not have, left alone.

    Raises:
        GateError: not validated, or no variant passed.
        RefusedError: no record, no repository named, an unpinned source, no permission.
        RunFailedError: the bytes are not those that passed, or the Hub holds others after the upload.
        UnavailableError: the Hub cannot be reached.
    """
    record = read_record(folder)
    if record is None:
        raise RefusedError(
            "the folder has no record of how it was made and judged",
            where=str(folder),
            fix="publish the folder of an artifact that `quantkit build` made",
        )
    repo = repo or record["recipe"]["release"]["repo"]
    if repo is None or not REPO.fullmatch(repo):
        raise RefusedError(f"no repository to publish to: {repo}", where=str(folder), fix="give --repo ORG/NAME")
    passed, left_out = passing_variants(record, folder)
    _require_pinned(record, folder)
    say("checking the artifact's hashes")
    require_unchanged(folder, record)
    files = published_files(folder, record, left_out)

    say(f"asking the Hub what {repo} has")
    branch = read_branch(repo, revision)
    changed = _changed(files, branch)
    found = {
        "repo": repo,
        "revision": revision,
        "private": private,
        "dry_run": dry_run,
        "variants": passed,
        "left_out": left_out,
        "upload": [
            {"name": name, "size_bytes": path.stat().st_size, "sha256": sha256}
            for name, (path, sha256) in changed.items()
        ],
        "unchanged": [name for name in files if name not in changed],
        "others": sorted(name for name in branch.files if name not in files and not name.startswith(".")),
        "commit": branch.commit,
    }
    if dry_run or not changed:
        return found
    say(f"uploading {len(changed)} files")
    message = f"{record['format']} {', '.join(passed)}: {record['fingerprint'][:12]}"
    found["commit"] = upload(repo, revision, changed, private=private, message=message)
    say("checking what the Hub holds now")
    wrong = _changed(files, read_branch(repo, revision))
    if wrong:
        raise RunFailedError(
            "the Hub holds other bytes than were uploaded: " + ", ".join(wrong),
            where=repo,
            fix="run the same command again",
        )
    return found


def passing_variants(record: dict[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """Names of the variants that passed their gates, and of those that did not.

    Raises:
        GateError: none passed.
    """
    validation = record["validation"]
    if validation is None:
        raise GateError(
            "the artifact was never validated", where=str(folder), fix=f"quantkit validate {folder}, then publish"
        )
    verdicts = {variant["name"]: variant["gate"]["passed"] for variant in validation["variants"]}
    passed = [name for name, good in verdicts.items() if good]
    left_out = [name for name in record["variants"] if name not in passed]
    if not passed:
        raise GateError(
            "no variant passed its gates:\n  " + "\n  ".join(validation["gate"]["failures"]),
            where=str(folder),
            fix="more bits, a smaller group, more calibration text, or other gates in the recipe",
        )
    return passed, left_out


def published_files(folder: Path, record: dict[str, Any], left_out: list[str]) -> dict[str, tuple[Path, str]]:
    """Path and SHA-256 of each file to publish: everything but the files that only variants left out use."""
    kept = {file for name, files in record["variants"].items() if name not in left_out for file in files}
    dropped = {file for name in left_out for file in record["variants"][name]} - kept
    files = {
        entry["name"]: (folder / entry["name"], entry["sha256"])
        for entry in record["outputs"]
        if entry["name"] not in dropped
    }
    files[CARD] = (folder / CARD, record["card_sha256"])
    files[RECORD] = (folder / RECORD, sha256_of(folder / RECORD))
    return files


def _require_pinned(record: dict[str, Any], folder: Path) -> None:
    if record["source"]["on_hub"] and record["recipe"]["model"]["revision"] is None:
        raise RefusedError(
            f"the recipe does not say which revision of {record['source']['id']} it means",
            where=str(folder),
            fix="write it with `quantkit recipes pin FILE` and build with that recipe",
        )


def _changed(files: dict[str, tuple[Path, str]], branch: Branch) -> dict[str, tuple[Path, str]]:
    """The files that a branch does not hold as they are."""
    return {
        name: (path, sha256)
        for name, (path, sha256) in files.items()
        if name not in branch.files or not branch.files[name].holds(path, sha256)
    }


def publication_lines(found: dict[str, Any]) -> list[str]:
    """What `publish` did or would do, for people."""
    size = sum(file["size_bytes"] for file in found["upload"])
    lines = [f"repository        {found['repo']}, branch {found['revision']}"]
    lines += [f"variants          {', '.join(found['variants'])}"]
    lines += [f"left out          {', '.join(found['left_out'])}: did not pass"] if found["left_out"] else []
    lines += [f"  {file['size_bytes'] / 1e6:>10.2f} MB  {file['name']}" for file in found["upload"]]
    lines += [f"on the Hub only   {name}" for name in found["others"]]
    if not found["upload"]:
        return [*lines, "nothing to upload: the Hub has these bytes"]
    done = "would be uploaded" if found["dry_run"] else f"uploaded, commit {found['commit']}"
    return [*lines, f"{len(found['upload'])} files, {size / 1e6:.2f} MB, {done}"]
