"""What a branch of a repository has, held against what is staged for it, and the commit that makes them one."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import RefusedError, RunFailedError
from quantkit.hub import Branch, read_branch, read_text, upload
from quantkit.report.record import CARD
from quantkit.signature import SIGNATURE
from quantkit.workdir import RECORD

MAIN = "main"


@dataclass(frozen=True)
class Revision:
    """What one branch is to hold.

    Attributes:
        branch: its name.
        folder: record, card and links to the other files, under their names on the branch, and nothing else.
        sha256: of each, by name.
    """

    branch: str
    folder: Path
    sha256: dict[str, str]

    @property
    def files(self) -> dict[str, tuple[Path, str]]:
        """Path and SHA-256 by name."""
        return {name: (self.folder / name, sha256) for name, sha256 in self.sha256.items()}


@dataclass(frozen=True)
class Change:
    """What it takes to bring a branch to what is staged for it.

    Attributes:
        staged: what it is to hold.
        commit: of the branch as it is; None where it is not there.
        upload: files that it lacks.
        removed: files of an earlier publication that are not staged.
        others: files of anybody else, left alone.
    """

    staged: Revision
    commit: str | None
    upload: dict[str, tuple[Path, str]]
    removed: list[str]
    others: list[str]


def change(staged: Revision, repo: str, say: Callable[[str], None]) -> Change:
    """What a branch has, held against what is staged for it.

    Raises:
        RefusedError: it holds something else, or a signature that would not hold any more.
    """
    say(f"asking the Hub what {repo} has on {staged.branch}")
    branch = read_branch(repo, staged.branch)
    # a branch that is made begins as main is
    begun = read_branch(repo, MAIN) if branch.commit is None and staged.branch != MAIN else branch
    changed = begun.lacks(staged.files)
    if branch.commit is not None and changed and SIGNATURE in branch.files and SIGNATURE not in staged.sha256:
        raise RefusedError(
            f"{repo} is signed, and its signature would not hold for the new files",
            where=staged.branch,
            fix="give the key with --sign, or remove the signature there first",
        )
    earlier = _earlier_record(repo, begun, staged.branch) if changed else None
    if branch.commit is not None and changed:
        _require_same_kind(repo, branch, earlier, staged, changed)
    removed = _left_behind(begun, earlier, staged)
    kept = [name for name in begun.files if name not in staged.sha256 and name not in removed]
    return Change(staged, branch.commit, changed, removed, sorted(name for name in kept if not name.startswith(".")))


def put(
    wanted: Change, repo: str, *, private: bool, dry_run: bool, message: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Bring one branch to what was staged for it."""
    staged, changed = wanted.staged, wanted.upload
    found = {
        "revision": staged.branch,
        "upload": [
            {"name": name, "size_bytes": path.stat().st_size, "sha256": sha256}
            for name, (path, sha256) in changed.items()
        ],
        "remove": wanted.removed,
        "unchanged": [name for name in staged.sha256 if name not in changed],
        "others": wanted.others,
        "commit": wanted.commit,
    }
    if dry_run or not changed:
        return found
    say(f"uploading {len(changed)} files")
    found["commit"] = upload(
        repo, staged.branch, changed, removed=wanted.removed, private=private, message=message, say=say
    )
    say("checking what the Hub holds now")
    now = read_branch(repo, staged.branch)
    wrong = [*now.lacks(staged.files), *(name for name in wanted.removed if name in now.files)]
    if wrong:
        raise RunFailedError(
            "the Hub holds other bytes than were uploaded: " + ", ".join(wrong),
            where=repo,
            fix="run the same command again",
        )
    return found


@dataclass(frozen=True)
class Earlier:
    """What an earlier publication says of itself, by the record that lies with it."""

    format: str
    source: str
    source_sha256: dict[str, str]
    files: frozenset[str]


def _earlier_record(repo: str, branch: Branch, name: str) -> Earlier | None:
    """Of what lies on a branch; None where quantkit has put nothing there."""
    if branch.commit is None or RECORD not in branch.files:
        return None
    try:
        return _told(json.loads(read_text(repo, RECORD, branch.commit)))
    except (ValueError, KeyError, TypeError):
        raise RefusedError(
            f"{RECORD} in {repo} is not a record, so what lies beside it may be of anybody",
            where=name,
            fix="remove it there, with the weights that belong to it, and publish again",
        ) from None


def _told(record: dict[str, Any]) -> Earlier:
    source = record["source"]
    files = frozenset(str(entry["name"]) for entry in record["outputs"]) | {SIGNATURE}
    return Earlier(str(record["format"]), str(source["id"]), dict(source["sha256"]), files)


def _require_same_kind(
    repo: str, branch: Branch, earlier: Earlier | None, staged: Revision, changed: dict[str, tuple[Path, str]]
) -> None:
    """Stop where a branch is no earlier state of what is staged: another model or format would give way to it."""
    ours = _told(json.loads((staged.folder / RECORD).read_text(encoding="utf-8")))
    taken = sorted(name for name in changed if name in branch.files and name != CARD)
    if earlier is None and taken:
        what = f"{repo} has files that quantkit did not put there and this would replace: {', '.join(taken)}"
    elif earlier is not None and earlier.format != ours.format:
        what = f"{repo} holds {earlier.format}, and this is {ours.format}"
    elif earlier is not None and ours.source != earlier.source and ours.source_sha256 != earlier.source_sha256:
        what = f"{repo} holds an artifact of {earlier.source}, and this is one of {ours.source}"
    else:
        return
    raise RefusedError(
        what, where=staged.branch, fix="name another --repo or --revision, or remove what is there first"
    )


def _left_behind(branch: Branch, earlier: Earlier | None, staged: Revision) -> list[str]:
    """Files of an earlier publication that what is staged does not have."""
    ours = earlier.files if earlier else frozenset()
    return sorted(name for name in ours if name in branch.files and name not in staged.sha256)
