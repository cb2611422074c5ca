"""An artifact on the Hub: only variants that passed their gates, only the bytes that passed, one commit per branch.

What goes up is compared with the record before, while and after it is uploaded. A second run finds nothing to do;
a run that broke off is finished by the same command.

Variants whose files lie in folders of their own names go to branches of these names, the rest to main; the variants of
any other artifact are files of one branch.
"""

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import GateError, RefusedError, RunFailedError
from quantkit.hub import Branch, collect, read_branch, upload
from quantkit.report.record import CARD, read_record, require_unchanged, write_record
from quantkit.report.table import size_text
from quantkit.signature import SIGNATURE, problem, public_part, sign
from quantkit.workdir import RECORD, sha256_of

REPO = re.compile(r"[\w.-]+/[\w.-]+")
MAIN = "main"
SIGNATURES = ".signatures"  # of branches; the signature of a folder that is one branch lies in it


@dataclass(frozen=True)
class Revision:
    """What one branch is to hold.

    Attributes:
        branch: its name.
        folder: links to the files, under their names on the branch, and nothing else.
        sha256: of each, by name.
    """

    branch: str
    folder: Path
    sha256: dict[str, str]

    @property
    def files(self) -> dict[str, tuple[Path, str]]:
        """Path and SHA-256 by name."""
        return {name: (self.folder / name, sha256) for name, sha256 in self.sha256.items()}


def publish(
    folder: Path,
    *,
    repo: str | None,
    revision: str,
    private: bool,
    dry_run: bool,
    key: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Upload an artifact; see the module.

    Args:
        folder: the artifact.
        repo: `org/name`; None takes the recipe's.
        revision: branch, made if it is not there.
        private: of a repository that is made now; an existing one stays as it is.
        dry_run: only say what would be done; the Hub is asked what it has.
        key: sign what goes up with this private key.
        say: told what is going on.

    Returns:
        {"repo", "private", "dry_run", "signed", "variants", "left_out", "collection", "branches": [{"revision",
        "upload": [{"name", "size_bytes", "sha256"}], "unchanged", "others", "commit"}]}; `others` are files on the
        branch that the artifact does not have, left alone.

    Raises:
        GateError: not validated, or no variant passed.
        RefusedError: no record, no repository named, an unpinned source, no permission, a bad key.
        RunFailedError: the bytes are not those that passed, or the Hub holds others after the upload.
        UnavailableError: the Hub cannot be reached, or signing needs what is not installed.
    """
    record = read_record(folder)
    if record is None:
        raise RefusedError(
            "the folder has no record of how it was made and judged",
            where=str(folder),
            fix="publish the folder of an artifact that `quantkit build` made",
        )
    release = record["recipe"]["release"]
    repo = repo or release["repo"]
    if repo is None or not REPO.fullmatch(repo):
        raise RefusedError(f"no repository to publish to: {repo}", where=str(folder), fix="give --repo ORG/NAME")
    passed, left_out = passing_variants(record, folder)
    _require_pinned(record, folder)
    say("checking the artifact's hashes")
    require_unchanged(folder, record)
    found = {
        "repo": repo,
        "private": private,
        "dry_run": dry_run,
        "signed": key is not None,
        "variants": passed,
        "left_out": left_out,
        "collection": release["collection"],
    }
    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch:
        revisions = stage(folder, record, passed, revision, Path(scratch))
        if key is not None:
            say("signing")
            alone = len(revisions) == 1
            revisions = [
                _signed(staged, folder, key, folder / SIGNATURE if alone else _kept(folder, staged), dry_run=dry_run)
                for staged in revisions
            ]
        message = f"{record['format']} {', '.join(passed)}: {record['fingerprint'][:12]}"
        branches = [
            _put(staged, repo, private=private, dry_run=dry_run, message=message, say=say) for staged in revisions
        ]
    if release["collection"] is not None and not dry_run:
        say(f"adding it to the collection {release['collection']}")
        collect(repo, release["collection"], private=private)
    return found | {"branches": branches}


def _put(
    staged: Revision, repo: str, *, private: bool, dry_run: bool, message: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Bring one branch to what was staged for it."""
    say(f"asking the Hub what {repo} has on {staged.branch}")
    branch = read_branch(repo, staged.branch)
    changed = _changed(staged.files, branch)
    if changed and SIGNATURE in branch.files and SIGNATURE not in staged.sha256:
        raise RefusedError(
            f"{repo} is signed, and its signature would not hold for the new files",
            where=staged.branch,
            fix="give the key with --sign, or remove the signature there first",
        )
    found = {
        "revision": staged.branch,
        "upload": [
            {"name": name, "size_bytes": path.stat().st_size, "sha256": sha256}
            for name, (path, sha256) in changed.items()
        ],
        "unchanged": [name for name in staged.sha256 if name not in changed],
        "others": sorted(name for name in branch.files if name not in staged.sha256 and not name.startswith(".")),
        "commit": branch.commit,
    }
    if dry_run or not changed:
        return found
    say(f"uploading {len(changed)} files")
    found["commit"] = upload(repo, staged.branch, changed, private=private, message=message)
    say("checking what the Hub holds now")
    wrong = _changed(staged.files, read_branch(repo, staged.branch))
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


def stage(folder: Path, record: dict[str, Any], passed: list[str], revision: str, scratch: Path) -> list[Revision]:
    """What each branch is to hold, main last; nothing that only variants left out use.

    Args:
        folder: the artifact.
        record: its record.
        passed: variants to publish.
        revision: branch of an artifact that is one.
        scratch: an empty folder for the links.

    Raises:
        RefusedError: another branch is named for an artifact that has several.
    """
    outputs = {entry["name"]: entry["sha256"] for entry in record["outputs"]}
    left_out = [name for name in record["variants"] if name not in passed]
    if not _has_branches(record):
        kept = {file for name in passed for file in record["variants"][name]}
        dropped = {file for name in left_out for file in record["variants"][name]} - kept
        files = {name: (folder / name, sha256) for name, sha256 in outputs.items() if name not in dropped}
        files |= {name: (folder / name, sha256_of(folder / name)) for name in (CARD, RECORD)}
        return [_linked(revision, files, scratch)]
    if revision != MAIN:
        raise RefusedError(
            "every variant of this artifact has a branch of its own", where="--revision", fix="leave it out"
        )
    staged = []
    for variant in [*passed, None]:
        inside = {
            name if variant is None else name.removeprefix(f"{variant}/"): (folder / name, sha256)
            for name, sha256 in outputs.items()
            if (name.partition("/")[0] not in record["variants"] if variant is None else name.startswith(f"{variant}/"))
        }
        branch = MAIN if variant is None else variant
        view = scratch / f"{branch}.record"
        view.mkdir()
        write_record(view, _view(record, variant, inside))
        inside |= {CARD: (folder / CARD, record["card_sha256"]), RECORD: (view / RECORD, sha256_of(view / RECORD))}
        staged.append(_linked(branch, inside, scratch))
    return staged


def _has_branches(record: dict[str, Any]) -> bool:
    """Whether every variant's files lie in a folder of the variant's name."""
    variants = record["variants"].items()
    return bool(variants) and all(file.startswith(f"{name}/") for name, files in variants for file in files)


def _view(record: dict[str, Any], variant: str | None, files: dict[str, tuple[Path, str]]) -> dict[str, Any]:
    """The record as it stands on a branch: its files by their names there, everything else as it is."""
    own = (
        {} if variant is None else {variant: [file.removeprefix(f"{variant}/") for file in record["variants"][variant]]}
    )
    entries = [
        {"name": name, "size_bytes": path.stat().st_size, "sha256": sha256} for name, (path, sha256) in files.items()
    ]
    return record | {"variants": own, "outputs": sorted(entries, key=lambda entry: str(entry["name"]))}


def _linked(branch: str, files: dict[str, tuple[Path, str]], scratch: Path) -> Revision:
    folder = scratch / branch
    for name, (path, _) in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path.resolve())
    return Revision(branch, folder, {name: sha256 for name, (_, sha256) in files.items()})


def _signed(staged: Revision, artifact: Path, key: Path, kept: Path, *, dry_run: bool) -> Revision:
    """What was staged, with its signature: the one made before where it still holds, so that nothing changes."""
    scratch = staged.folder.with_name(f"{staged.branch}.signature")
    scratch.mkdir(parents=True)
    fresh = scratch / SIGNATURE
    sign(staged.folder, key, fresh)
    public = public_part(key, scratch / "public.pem")
    if kept.is_file() and problem(staged.folder, kept, public, covers=tuple(staged.sha256)) is None:
        fresh = kept
    elif not dry_run:
        kept.parent.mkdir(exist_ok=True)
        shutil.copyfile(fresh, kept)
    (staged.folder / SIGNATURE).symlink_to(fresh.resolve())
    return Revision(staged.branch, staged.folder, staged.sha256 | {SIGNATURE: sha256_of(fresh)})


def _kept(folder: Path, staged: Revision) -> Path:
    """Where the signature of a branch stays, so that the next run finds it."""
    return folder / SIGNATURES / f"{staged.branch}.sig"


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
    lines = [f"repository        {found['repo']}"]
    lines += [f"variants          {', '.join(found['variants'])}"]
    lines += [f"left out          {', '.join(found['left_out'])}: did not pass"] if found["left_out"] else []
    lines += [f"collection        {found['collection']}"] if found["collection"] else []
    for branch in found["branches"]:
        size = sum(file["size_bytes"] for file in branch["upload"])
        lines += [f"branch            {branch['revision']}"]
        lines += [f"  {size_text(file['size_bytes']):>13}  {file['name']}" for file in branch["upload"]]
        lines += [f"on the Hub only   {name}" for name in branch["others"]]
        if not branch["upload"]:
            lines += ["nothing to upload: the Hub has these bytes"]
            continue
        done = "would be uploaded" if found["dry_run"] else f"uploaded, commit {branch['commit']}"
        lines += [f"{len(branch['upload'])} files, {size_text(size)}, {done}"]
    return lines
