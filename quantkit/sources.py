"""The model a recipe names, as an opened checkpoint with the hashes of its files."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from quantkit.checkpoint.index import (
    Checkpoint,
    TensorInfo,
    describe_model,
    holds_weights,
    open_checkpoint,
    read_header,
    require_one_head,
)
from quantkit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from quantkit.errors import RefusedError, RunFailedError
from quantkit.files import hash_beside
from quantkit.formats.sidecars import COPIED
from quantkit.hub import fetch_checkpoint, fetch_header
from quantkit.nano import NAME as NANO
from quantkit.nano import ensure_nano
from quantkit.progress import Progress
from quantkit.recipe import is_on_hub, is_path, public_name

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
FRONT_MATTER = re.compile(r"\ufeff?---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
# what an artifact is made of beside weights: whatever is read or copied
HASHED_SIDECARS = ("config.json", *COPIED)


@dataclass(frozen=True)
class Source:
    """A dense checkpoint and where it is from.

    Attributes:
        checkpoint: the opened folder.
        id: Hub id, `bielik-nano`, or a local folder's name.
        revision: commit on the Hub, if it is from there.
        license: as its own model card states it: `license`, and `license_name` and `license_link` where it has them.
        hashes: waits for `sha256`.
        stamps: size and time of the last change of each of these files, from before it was hashed.
    """

    checkpoint: Checkpoint
    id: str
    revision: str | None
    license: dict[str, str]
    hashes: Callable[[], dict[str, str]]
    stamps: dict[str, tuple[int, int]]

    def require_unchanged(self) -> None:
        """Asked after files were read, before what came of them is kept under the hashes of what they were.

        Raises:
            RunFailedError: a file was written since it was hashed.
        """
        folder = self.checkpoint.folder
        changed = [name for name, stamp in self.stamps.items() if _stamp(folder / name) != stamp]
        if changed:
            raise RunFailedError(
                f"the source changed while it was read: {', '.join(changed)}",
                where=str(folder),
                fix="see that nothing writes there (a download, an export), and run the same command again; what was "
                "finished before is kept",
            )

    @cached_property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of every file that goes into an artifact, by name: weights, config, tokenizer, licence.

        They are hashed beside whatever is done from when the source was opened; who asks waits.
        """
        return self.hashes()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, checked against its embedding."""
        return tokenizer_of(self.checkpoint)

    def facts(self) -> dict[str, Any]:
        """What the record says of the source."""
        return {
            "id": self.id,
            "revision": self.revision,
            "on_hub": self.revision is not None,
            **{key: self.license.get(key) for key in LICENCE_KEYS},
            "sha256": self.sha256,
        }


def open_source(model_id: str, revision: str | None, progress: Progress) -> Source:
    """The checkpoint that a recipe's model means: bielik-nano, a folder, or a Hub id.

    Raises:
        RefusedError, UnavailableError: see `open_checkpoint`, `require_one_head` and `fetch_checkpoint`.
    """
    folder, commit = _folder_of(model_id, revision, progress, weights=True)
    checkpoint = open_checkpoint(folder)
    require_one_head(checkpoint)
    progress.stage("hashing the source")
    sidecars = [name for name in HASHED_SIDECARS if (folder / name).is_file()]
    # a quarter of the cores, for what is done meanwhile takes them all; two, for there may be nothing meanwhile
    threads = max(2, (os.cpu_count() or 1) // 4)
    names = [*checkpoint.tensors.files, *sidecars]
    stamps = {name: _stamp(folder / name) for name in names}
    hashes = hash_beside(folder, names, threads=threads)
    return Source(checkpoint, public_name(model_id), commit, stated_licence(folder), hashes, stamps)


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change; of a file that is gone none that a file has."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def describe_checkpoint(model_id: str, revision: str | None, progress: Progress) -> Checkpoint:
    """The same checkpoint, for whoever reads no weights: of a Hub model only the headers of its shards are fetched.

    A folder that holds a config.json and no weights will do, too: then they are those that it describes.

    Raises:
        RefusedError, UnavailableError: as `open_source`, as far as can be told without weights.
    """
    folder, commit = _folder_of(model_id, revision, progress, weights=False)
    if commit is None:
        bare = (folder / "config.json").is_file() and not holds_weights(folder)
        if bare:
            return describe_model(folder)
        checkpoint = open_checkpoint(folder)
        require_one_head(checkpoint)
        return checkpoint

    def header(file: str) -> dict[str, TensorInfo] | None:
        if (held := read_header(folder, file)) is not None:
            return held
        fetched = fetch_header(model_id, commit, file)
        if fetched is None:
            return None
        return {name: TensorInfo(name, *described, file) for name, described in fetched.items()}

    return open_checkpoint(folder, header=header)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """A checkpoint's tokenizer, checked against its embedding."""
    return load_tokenizer(checkpoint.folder, vocab_size=int(checkpoint.config["vocab_size"]))


def _folder_of(model_id: str, revision: str | None, progress: Progress, *, weights: bool) -> tuple[Path, str | None]:
    """Where the files of a recipe's model are, and the commit they are of if they are from the Hub.

    Raises:
        RefusedError: a path at which there is nothing, a revision of what is not on the Hub; see `fetch_checkpoint`
            for the others.
    """
    if revision is not None and not is_on_hub(model_id):
        raise RefusedError(
            f"{model_id} is not on the Hub, so it has no revision {revision}",
            where="model.revision",
            fix="leave it out for a folder and for bielik-nano; of a Hub model, run where no folder has its name",
        )
    if model_id == NANO:
        return ensure_nano(progress.steps), None
    if os.path.exists(model_id):
        return Path(model_id), None
    if is_path(model_id):
        raise RefusedError(
            f"no such folder: {model_id}",
            where="model.id",
            fix="give a folder with config.json and *.safetensors, a Hub id (org/name), or bielik-nano",
        )
    progress.stage(f"fetching {model_id}" + ("" if weights else ", all but its weights"))
    return fetch_checkpoint(model_id, revision, weights=weights)


def stated_licence(folder: Path) -> dict[str, str]:
    """The licence in the front matter of a model's card, under its keys there; empty where it states none.

    Raises:
        RefusedError: the front matter is not YAML.
    """
    path = folder / CARD
    if not path.is_file():
        return {}
    found = FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace"))
    try:
        stated = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise RefusedError(
            f"the front matter of the model's card is not YAML: {str(error).splitlines()[0]}",
            where=str(path),
            fix="mend it, or take the card from the model's repository",
        ) from None
    if not isinstance(stated, dict) or not stated.get("license"):
        return {}
    return {key: str(stated[key]) for key in LICENCE_KEYS if stated.get(key)}
