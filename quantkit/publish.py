"""An artifact on the Hub: only variants that passed their gates, only the bytes that passed, one commit per branch.

What goes up is compared with the record before, while and after it is uploaded. A second run finds nothing to do;
a run that broke off is finished by the same command. Every branch is an artifact by itself: its record and card name
the repository, and tell of the variants that are there and of no others, but for a note on what was left out.

Variants whose files lie in folders of their own names go to branches of these names, the rest to main; the variants of
any other artifact are files of one branch.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.branches import MAIN, Revision, change, put
from quantkit.errors import GateError, RefusedError
from quantkit.files import sha256_of, write_text
from quantkit.formats import READERS
from quantkit.hub import collect
from quantkit.lock import alone
from quantkit.recipe import REPO_RULES, is_repository
from quantkit.report.card import PICTURES, keep
from quantkit.report.page import DATA
from quantkit.report.record import CARD, built_record, require_unchanged, require_weights_here
from quantkit.report.verdict import judged_on_own_texts, own_failures, told
from quantkit.signature import SIGNATURE, SIGNATURES, problem, public_part, sign
from quantkit.units import size_text
from quantkit.workdir import RECORD

BRANCH = re.compile(r"(?!.*\.\.)\w[\w./-]*")


@alone(writes=False)
def publish(
    folder: Path,
    *,
    repo: str | None,
    revision: str,
    private: bool,
    dry_run: bool,
    key: Path | None = None,
    report: Path | None = None,
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
        report: folder of a report on this artifact and others; the card shows its plots.
        say: told what is going on.

    Returns:
        {"repo", "private", "dry_run", "signed", "variants", "left_out", "collection", "branches": [{"revision",
        "upload": [{"name", "size_bytes", "sha256"}], "remove", "unchanged", "others", "commit"}]}; `remove` are files
        that an earlier publication put there and this one does not have, `others` those of somebody else, left alone.

    Raises:
        GateError: not validated by the recipe's own texts, or no variant passed.
        RefusedError: no record, no repository named, an unpinned source, no permission, a bad key, a report on other
            artifacts.
        RunFailedError: the bytes are not those that passed, or the Hub holds others after the upload.
        UnavailableError: the Hub cannot be reached, or signing needs what is not installed.
    """
    record = built_record(folder)
    require_weights_here(folder, record)
    release = record["recipe"]["release"]
    repo = repo or release["repo"]
    if repo is None or not is_repository(repo):
        raise RefusedError(
            "the recipe names no repository to publish to" if repo is None else f"{repo!r} is no repository",
            where=str(folder),
            fix=f"give --repo ORG/NAME: {REPO_RULES}",
        )
    if not BRANCH.fullmatch(revision):
        raise RefusedError(f"{revision!r} is no branch", where="--revision", fix="give a name, such as main or 4bit")
    passed, left_out = passing_variants(record, folder)
    _require_pinned(record, folder)
    pictures = {} if report is None else pictures_of(report, record)
    say("checking the artifact's hashes")
    require_unchanged(folder, record)
    found = {
        "repo": repo,
        "private": private,
        "dry_run": dry_run,
        "signed": key is not None,
        "variants": passed,
        "left_out": [*left_out],
        "collection": release["collection"],
    }
    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch:
        revisions = stage(folder, record, Target(repo, revision, passed, left_out, pictures), Path(scratch))
        if key is not None:
            say("signing")
            revisions = [_signed(staged, key, _kept(folder, repo, staged), dry_run=dry_run) for staged in revisions]
        message = f"{record['format']} {', '.join(passed)}: {record['fingerprint'][:12]}"
        # whatever is refused is refused before the first upload
        changes = [change(staged, repo, say) for staged in revisions]
        branches = [put(wanted, repo, private=private, dry_run=dry_run, message=message, say=say) for wanted in changes]
    if release["collection"] is not None and not dry_run:
        say(f"adding it to the collection {release['collection']}")
        collect(repo, release["collection"], private=private)
    return found | {"branches": branches}


def pictures_of(report: Path, record: dict[str, Any]) -> dict[str, Path]:
    """The plots of a report by their names in a published folder.

    Args:
        report: a folder that `quantkit report` wrote.
        record: of an artifact that it must show as it is now.

    Raises:
        RefusedError: it is no report, or shows the artifact as it was before, or not at all.
    """
    path = report / DATA
    try:
        shown = {artifact["record"]["seal"] for artifact in json.loads(path.read_text(encoding="utf-8"))["artifacts"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise RefusedError(
            "the folder holds no report", where=str(path), fix="give one that `quantkit report --out` wrote"
        ) from None
    if record["seal"] not in shown:
        raise RefusedError(
            "the report does not show the artifact as it is now",
            where=str(path),
            fix="draw it again: `quantkit report ARTIFACT... --out DIR`",
        )
    return {name: report / Path(name).name for name in PICTURES if (report / Path(name).name).is_file()}


def passing_variants(record: dict[str, Any], folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the variants that passed their gates, and of those that did not, with the reasons.

    The gates are held against the recorded figures once more, and count only on the texts that the recipe names.

    Raises:
        GateError: none passed, or it was judged on other texts.
    """
    validation = record["validation"]
    if validation is None:
        raise GateError(
            "the artifact was never validated", where=str(folder), fix=f"quantkit validate {folder}, then publish"
        )
    if not judged_on_own_texts(record):
        raise GateError(
            f"the recorded verdict is not on the texts of the recipe, but on {validation['text']['name']}",
            where=str(folder),
            fix="run `quantkit build` with the recipe again: it judges anew and keeps the weights",
        )
    failures = {variant["name"]: own_failures(variant, record) for variant in validation["variants"]}
    passed = [name for name in failures if not failures[name]]
    left_out = {name: failures.get(name, ["not validated"]) for name in record["variants"] if name not in passed}
    if not passed:
        raise GateError(
            "no variant passed its gates:\n  " + "\n  ".join(told(left_out)),
            where=str(folder),
            fix="more bits, a smaller group, more calibration text, or other gates in the recipe",
        )
    return passed, left_out


@dataclass(frozen=True)
class Target:
    """What goes where.

    Attributes:
        repo: `org/name`.
        revision: branch of an artifact that is one.
        passed: variants to publish.
        left_out: the others, with the reasons.
        pictures: plots for the card, by their names in the repository.
    """

    repo: str
    revision: str
    passed: list[str]
    left_out: dict[str, list[str]]
    pictures: dict[str, Path]


def stage(folder: Path, record: dict[str, Any], target: Target, scratch: Path) -> list[Revision]:
    """What each branch is to hold, main last: whole by itself, with a record and a card of what is there.

    Args:
        folder: the artifact.
        record: its record.
        target: where what goes.
        scratch: an empty folder for links and for what is written anew.

    Raises:
        RefusedError: another branch is named for an artifact that has several.
    """
    outputs = {entry["name"]: (folder / entry["name"], entry["sha256"]) for entry in record["outputs"]}
    if not _has_branches(record):
        own = {name: record["variants"][name] for name in target.passed}
        files = outputs | _retold(folder, record, target, scratch / ".retold")
        dropped = {file for name in target.left_out for file in record["variants"][name]} - set().union(*own.values())
        inside = {name: file for name, file in files.items() if name not in dropped and file[0].exists()}
        return [_staged(target.revision, inside, own, target.passed, record, target, scratch)]
    if target.revision != MAIN:
        raise RefusedError(
            "every variant of this artifact has a branch of its own", where="--revision", fix="leave it out"
        )
    staged = []
    for variant in target.passed:
        start = f"{variant}/"
        inside = {name.removeprefix(start): file for name, file in outputs.items() if name.startswith(start)}
        own = {variant: [file.removeprefix(start) for file in record["variants"][variant]]}
        staged.append(_staged(variant, inside, own, [variant], record, target, scratch))
    beside = {name: file for name, file in outputs.items() if name.partition("/")[0] not in record["variants"]}
    return [*staged, _staged(MAIN, beside, {}, target.passed, record, target, scratch)]


def _has_branches(record: dict[str, Any]) -> bool:
    """Whether every variant's files lie in a folder of the variant's name."""
    variants = record["variants"].items()
    return bool(variants) and all(file.startswith(f"{name}/") for name, files in variants for file in files)


def _retold(folder: Path, record: dict[str, Any], target: Target, scratch: Path) -> dict[str, tuple[Path, str]]:
    """Files that name weights, as they are without the variants left out; one with nothing to name is not there."""
    retell = READERS[record["format"]].retell
    if retell is None or not target.left_out:
        return {}
    scratch.mkdir()
    texts = retell(folder, {name: record["variants"][name] for name in target.passed})
    for name, text in texts.items():
        if text is not None:
            write_text(scratch / name, text)
    return {name: (scratch / name, "" if text is None else sha256_of(scratch / name)) for name, text in texts.items()}


def _staged(
    branch: str,
    files: dict[str, tuple[Path, str]],
    variants: dict[str, list[str]],
    judged: list[str],
    record: dict[str, Any],
    target: Target,
    scratch: Path,
) -> Revision:
    """A folder of links to files, with the record and the card as they stand on a branch.

    Args:
        branch: its name.
        files: path and SHA-256 by the name there.
        variants: whose weights are there.
        judged: variants whose figures the card shows.
        record: of the whole artifact.
        target: where it goes.
        scratch: for the folder.
    """
    files = files | {name: (path, sha256_of(path)) for name, path in target.pictures.items()}
    folder = scratch / branch
    folder.mkdir(parents=True)
    for name, (path, _) in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path.resolve())
    validation, facts = record["validation"], record["build"]
    if "allotments" in facts:
        facts = facts | {
            "allotments": {name: facts["allotments"][name] for name in facts["allotments"] if name in judged}
        }
    keep(
        folder,
        record
        | {
            "variants": variants,
            "build": facts,
            "outputs": [
                {"name": name, "size_bytes": path.stat().st_size, "sha256": sha256}
                for name, (path, sha256) in sorted(files.items())
            ],
            "validation": validation
            | {
                "variants": [variant for variant in validation["variants"] if variant["name"] in judged],
                "gate": {"passed": True, "failures": []},
            },
            "published": {
                "repo": target.repo,
                "revision": branch,
                "left_out": target.left_out,
                "pictures": [*target.pictures],
            },
        },
    )
    sha256 = {name: sha256 for name, (_, sha256) in files.items()}
    return Revision(branch, folder, sha256 | {name: sha256_of(folder / name) for name in (CARD, RECORD)})


def _signed(staged: Revision, key: Path, kept: Path, *, dry_run: bool) -> Revision:
    """What was staged, with its signature: the one made before where it still holds, so that nothing changes."""
    scratch = staged.folder.with_name(f"{staged.branch}.signature")
    scratch.mkdir(parents=True)
    fresh = scratch / SIGNATURE
    sign(staged.folder, key, fresh)
    public = public_part(key, scratch / "public.pem")
    if kept.is_file() and problem(staged.folder, kept, public, covers=tuple(staged.sha256)) is None:
        fresh = kept
    elif not dry_run:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fresh, kept)
    (staged.folder / SIGNATURE).symlink_to(fresh.resolve())
    return Revision(staged.branch, staged.folder, staged.sha256 | {SIGNATURE: sha256_of(fresh)})


def _kept(folder: Path, repo: str, staged: Revision) -> Path:
    """Where the signature of a repository's branch stays, so that the next run finds it."""
    return folder / SIGNATURES / repo / f"{staged.branch}.sig"


def _require_pinned(record: dict[str, Any], folder: Path) -> None:
    if record["source"]["on_hub"] and record["recipe"]["model"]["revision"] is None:
        raise RefusedError(
            f"the recipe does not say which revision of {record['source']['id']} it means",
            where=str(folder),
            fix="write it with `quantkit recipes pin FILE` and build with that recipe",
        )


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
        lines += [f"  {'removed':>13}  {name}" for name in branch["remove"]]
        lines += [f"on the Hub only   {name}" for name in branch["others"]]
        if not branch["upload"]:
            lines += ["nothing to upload: the Hub has these bytes"]
            continue
        done = "would be uploaded" if found["dry_run"] else f"uploaded, commit {branch['commit']}"
        lines += [f"{len(branch['upload'])} files, {size_text(size)}, {done}"]
    return lines
