"""All network access but engine installation: pinned downloads from the Hugging Face Hub, and uploads to it."""

import errno
import fnmatch
import hashlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quantkit.errors import QuantkitError, RefusedError, RunFailedError, UnavailableError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")

WEIGHT_FILES = "*.safetensors"
CHECKPOINT_FILES = (
    *(WEIGHT_FILES, "*.json", "tokenizer.model", "merges.txt", "*.jinja", "LICENSE*", "NOTICE", "README.md"),
)
# the Hub's client lets errors of its HTTP library through, which is not the same one in every version
HTTP_LIBRARIES = ("httpx", "httpx2", "requests")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ONLINE = "connect, or set HF_HOME to a cache that holds it and HF_HUB_OFFLINE=1"
SHIPPED_TEXT = (
    "connect, or use the text that ships with quantkit: "
    """--set 'calibration.texts={"polish-core"=24}' --set 'validation.texts=["polish-core"]'"""
)
MODEL_ABSENT = "give a Hub id (org/name), an existing folder, or bielik-nano; private models need `hf auth login`"
REVISION_ABSENT = "give a commit that the model has, or leave it out; `quantkit recipes pin` writes the newest"
TEXT_ABSENT = "mend the commit behind @, or leave it out; a private or withdrawn set needs another text set"


@dataclass(frozen=True)
class HubText:
    """A text set on the Hub.

    Attributes:
        dataset: its id.
        files: patterns of the files that each split, "calibration" or "validation", is read from, in order.
        licence: as its card states it.
        revision: commit that it is read at where a recipe names none; None for the main branch's.
    """

    dataset: str
    files: Mapping[str, tuple[str, ...]]
    licence: str
    revision: str | None = None


@dataclass(frozen=True)
class FetchedFile:
    """A downloaded file and the commit it is from."""

    path: Path
    revision: str


def fetch_checkpoint(model_id: str, revision: str | None, *, weights: bool = True) -> tuple[Path, str]:
    """The folder of a Hub model's files, and the commit hash it is.

    Args:
        model_id: `org/name`.
        revision: branch or commit; None means main.
        weights: False leaves out what is large; see `fetch_header`.

    Raises:
        RefusedError: there is no such model or revision.
        UnavailableError: the Hub cannot be reached and the cache does not hold it.
    """
    from huggingface_hub import snapshot_download

    left_out = None if weights else [WEIGHT_FILES]
    with _reaching_model(model_id, revision):
        folder = Path(
            snapshot_download(
                model_id, revision=revision, allow_patterns=list(CHECKPOINT_FILES), ignore_patterns=left_out
            )
        )
    # a snapshot's folder is named by its commit
    return folder, folder.name


def fetch_header(model_id: str, revision: str, file: str) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """(dtype, shape) of every tensor of a Hub model's safetensors file, without the file; None if there is none.

    Raises:
        RefusedError: it is no safetensors file.
        UnavailableError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

    with _reaching_model(model_id, revision):
        try:
            found = HfApi().parse_safetensors_file_metadata(model_id, file, revision=revision)
        except EntryNotFoundError:
            return None
        except SafetensorsParsingError as error:
            raise RefusedError(
                f"{file} of {model_id} is no safetensors file: {_first_line(error)}",
                where="model.id",
                fix="choose another revision, or ask the model's authors",
            ) from None
    return {name: (info.dtype, tuple(info.shape)) for name, info in found.tensors.items()}


def resolve_revision(model_id: str) -> str:
    """The commit hash that a Hub model's main branch has now.

    Raises:
        RefusedError: there is no such model.
        UnavailableError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with _reaching(model_id, where="model.id", fix="connect and run the command again"):
        revision = HfApi().model_info(model_id).sha
    assert revision, "the Hub names a commit for every model"
    return revision


def fetch_text_files(source: HubText, split: str, revision: str | None = None) -> Iterator[FetchedFile]:
    """Download the files of a text set's split one by one, as they are asked for.

    Args:
        source: the set.
        split: whose files.
        revision: commit; None takes the set's own, or the main branch's.

    Raises:
        RefusedError: there is no such set or commit, or it has no file of a name that is looked for.
        UnavailableError: the Hub cannot be reached; the remedy names the text that ships with quantkit.
    """
    from huggingface_hub import HfApi, hf_hub_download

    where = f"{split}.texts"
    revision = revision or source.revision
    wanted = f"text set {source.dataset} at revision {revision or 'main'}"
    with _reaching(wanted, where=where, fix=SHIPPED_TEXT, absent=TEXT_ABSENT):
        info = HfApi().dataset_info(source.dataset, revision=revision)
    names = sorted(sibling.rfilename for sibling in info.siblings or [])
    commit = info.sha or ""
    for pattern in source.files[split]:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise RefusedError(
                f"{source.dataset} has no file {pattern} at revision {commit}, only {', '.join(names) or 'nothing'}",
                where=where,
                fix="name a commit that has it, SET@COMMIT, or another text set",
            )
        for name in found:
            with _reaching(f"{name} of {source.dataset}", where=where, fix=SHIPPED_TEXT, absent=TEXT_ABSENT):
                path = hf_hub_download(source.dataset, name, repo_type="dataset", revision=commit)
            yield FetchedFile(Path(path), commit)


@contextmanager
def _reaching_model(model_id: str, revision: str | None) -> Iterator[None]:
    """`_reaching` a model, where it is the revision that the Hub may not have."""
    from huggingface_hub.errors import RevisionNotFoundError

    wanted = f"{model_id} at revision {revision or 'main'}"
    with _reaching(wanted, where="model.id", fix=f"{ONLINE}, or give a folder with --model"):
        try:
            yield
        except RevisionNotFoundError as error:
            if revision is None:
                raise
            raise _absent(wanted, error, where="model.revision", fix=REVISION_ABSENT) from None


@contextmanager
def _reaching(what: str, *, where: str, fix: str, absent: str = MODEL_ABSENT) -> Iterator[None]:
    """Turn the Hub's refusals and an unreachable network into errors with a remedy.

    Args:
        what: is fetched.
        where: the recipe key that names it.
        fix: what to do where the Hub cannot be reached.
        absent: what to do where the Hub has no such thing.
    """
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _absent(what, error, where=where, fix=absent) from None
    except QuantkitError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise RunFailedError(
                f"the disk is full; {what} was not fetched whole",
                where=str(error.filename or where),
                fix="free some space, or set HF_HOME to a folder on another disk; what arrived is kept",
            ) from None
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in HTTP_LIBRARIES:
            raise
        raise UnavailableError(f"cannot fetch {what}: {_first_line(error)}", where=where, fix=fix) from None


def _absent(what: str, error: Exception, *, where: str, fix: str) -> RefusedError:
    return RefusedError(f"the Hub has no {what}: {_first_line(error)}", where=where, fix=fix)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


TRIES = 5
FIRST_PAUSE_S = 1.0  # doubled after each failed try
LONGEST_PAUSE_S = 300.0  # the window in which the Hub counts requests
# draft-ietf-httpapi-ratelimit-headers: no request is left, and in how many seconds there are more; RFC 9110's header
NONE_LEFT = re.compile(r";\s*r=0\s*;\s*t=(\d+)")
SECONDS = re.compile(r"\s*(\d+)\s*")
PASSING_STATUS = (408, 429, 500, 502, 503, 504)
SMALL_BYTES = 10_000_000  # smaller files are read once: the bytes that were hashed are the bytes that are sent


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size, and one of the two hashes that the Hub knows it by."""

    size_bytes: int
    sha256: str | None
    blob_id: str

    def holds(self, path: Path, sha256: str) -> bool:
        """Whether this is the content of a local file whose SHA-256 is known."""
        if self.size_bytes != path.stat().st_size:
            return False
        if self.sha256 is not None:
            return self.sha256 == sha256
        content = path.read_bytes()
        return self.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Branch:
    """A branch of a model repository as it was found: its commit, None where it is not there, and its files."""

    commit: str | None
    files: dict[str, RemoteFile]

    def lacks(self, files: dict[str, tuple[Path, str]]) -> dict[str, tuple[Path, str]]:
        """Those of local files, path and SHA-256 by name, that it does not hold as they are."""
        return {
            name: (path, sha256)
            for name, (path, sha256) in files.items()
            if name not in self.files or not self.files[name].holds(path, sha256)
        }

    def is_as(self, files: dict[str, tuple[Path, str]], removed: Sequence[str]) -> bool:
        """Whether it holds all files as they are and none of those that were to be removed."""
        return not self.lacks(files) and not any(name in self.files for name in removed)


def read_branch(repo: str, revision: str) -> Branch:
    """What a branch holds now; an empty one where repository or branch do not exist.

    Raises:
        RefusedError: the token may not read it.
        UnavailableError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    try:
        commit = _insist(lambda: api.model_info(repo, revision=revision).sha, repo)
        tree = _insist(lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit)), repo)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return Branch(None, {})
    found = [entry for entry in tree if isinstance(entry, RepoFile)]
    files = {file.path: RemoteFile(file.size, file.lfs.sha256 if file.lfs else None, file.blob_id) for file in found}
    return Branch(commit, files)


def read_text(repo: str, name: str, commit: str) -> str:
    """The text of a small file as it is in a commit.

    Raises:
        RefusedError: the token may not read it.
        UnavailableError: the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch:
        path = _insist(lambda: hf_hub_download(repo, name, revision=commit, local_dir=scratch), repo)
        return Path(path).read_text(encoding="utf-8", errors="replace")


def upload(
    repo: str,
    revision: str,
    files: dict[str, tuple[Path, str]],
    *,
    removed: Sequence[str] = (),
    private: bool,
    message: str,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Put files on a branch by one commit; large ones go up first, one by one, and stay there if the run breaks off.

    Args:
        repo: `org/name`; made if it is not there.
        revision: branch; made from main if it is not there.
        files: local path and SHA-256 that it must have, by name in the repository.
        removed: names of files that the same commit takes away.
        private: of a repository that is made now.
        message: of the commit.
        say: told of every large file before it goes up.

    Returns:
        the hash of the commit.

    Raises:
        RunFailedError: a file changed while it was being uploaded; nothing is committed.
        RefusedError: the token may not write there.
        UnavailableError: the Hub cannot be reached, after several tries.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    try:
        _insist(lambda: api.create_repo(repo, private=private, exist_ok=True), repo)
        if revision != "main":
            _insist(lambda: api.create_branch(repo, branch=revision, exist_ok=True), repo)
        parent = _insist(lambda: api.model_info(repo, revision=revision).sha, repo)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(_sent(api, repo, revision, name, path, sha256, say) for name, (path, sha256) in files.items()),
            *(CommitOperationDelete(name) for name in removed),
        ]
        try:
            return _insist(
                lambda: str(
                    api.create_commit(
                        repo, operations, commit_message=message, revision=revision, parent_commit=parent
                    ).oid
                ),
                repo,
            )
        except UnavailableError:
            # the commit may have been made and its answer lost: a second try is refused then, for its parent is old
            branch = read_branch(repo, revision)
            if branch.commit is None or branch.commit == parent or not branch.is_as(files, removed):
                raise
            return branch.commit
    except RepositoryNotFoundError as error:
        raise RefusedError(
            f"the Hub has no repository {repo} that this token may write to: {_first_line(error)}",
            where=repo,
            fix="log in with `hf auth login` and a token with write permission, or choose another --repo",
        ) from None


def _sent(
    api: "HfApi", repo: str, revision: str, name: str, path: Path, sha256: str, say: Callable[[str], None]
) -> "CommitOperationAdd":
    """What a commit takes of a file, which goes up first if it is large.

    Raises:
        RunFailedError: it is another than the hash says.
    """
    from huggingface_hub import CommitOperationAdd

    size_bytes = path.stat().st_size
    small = size_bytes < SMALL_BYTES
    if not small:
        say(f"  {name}, {size_bytes / 1e6:.0f} MB")
    operation = CommitOperationAdd(name, path.read_bytes() if small else str(path))
    _insist(lambda: api.preupload_lfs_files(repo, [operation], revision=revision, free_memory=False), repo)
    # the hash that the commit will name, taken from the bytes as they were sent
    if operation.upload_info.sha256.hex() != sha256:
        raise RunFailedError(
            f"{name} changed while it was being published; nothing was committed",
            where=str(path),
            fix="build the artifact again, or restore the file",
        )
    return operation


def collect(repo: str, title: str, *, private: bool) -> None:
    """Put a repository into a collection of its owner's; both are left alone where it is in there.

    Args:
        repo: `org/name`.
        title: of the collection, which is made if there is none.
        private: of a collection that is made now.

    Raises:
        RefusedError: the token may not do that.
        UnavailableError: the Hub cannot be reached, after several tries.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    owner = repo.partition("/")[0]
    holding = _insist(lambda: list(api.list_collections(owner=owner, item=f"models/{repo}")), repo)
    if any(collection.title == title for collection in holding):
        return
    collection = _insist(lambda: api.create_collection(title, namespace=owner, private=private, exists_ok=True), repo)
    _insist(lambda: api.add_collection_item(collection.slug, repo, "model", exists_ok=True), repo)


def _insist(call: Callable[[], T], repo: str) -> T:
    """Call the Hub; again, with growing pauses or those that it asks for, while it fails in a way that passes.

    Raises:
        RefusedError: no permission.
        UnavailableError: it failed to the last try, or is switched off.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for attempt in range(TRIES):
        try:
            return call()
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except OfflineModeIsEnabled:
            raise UnavailableError(
                "the Hub is switched off by HF_HUB_OFFLINE",
                where=repo,
                fix="unset HF_HUB_OFFLINE, or TRANSFORMERS_OFFLINE if that is set, and run the same command again",
            ) from None
        except Exception as error:
            cause = _hub_cause(error)
            if cause is None:
                raise
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            if status in (401, 403):
                raise RefusedError(
                    f"the Hub does not let this token do that: {_first_line(cause)}",
                    where=repo,
                    fix="log in with `hf auth login` and a token with write permission",
                ) from None
            if attempt == TRIES - 1 or (status is not None and status not in PASSING_STATUS):
                raise UnavailableError(
                    f"the Hub failed: {_first_line(cause)}",
                    where=repo,
                    fix="run the same command again; what was uploaded is not sent twice",
                ) from None
        asked_s = _asked_pause_s(cause) if isinstance(cause, HfHubHTTPError) else 0.0
        time.sleep(max(FIRST_PAUSE_S * 2**attempt, asked_s))
    raise AssertionError("the last try returns or raises")


def _asked_pause_s(error: "HfHubHTTPError") -> float:
    """How long the Hub asks to wait with the next request, never more than LONGEST_PAUSE_S; 0 where it does not say."""
    headers = error.response.headers
    said = NONE_LEFT.search(headers.get("RateLimit", "")) or SECONDS.fullmatch(headers.get("Retry-After", ""))
    # it counts whole seconds
    return min(float(said[1]) + 1, LONGEST_PAUSE_S) if said else 0.0


def _hub_cause(error: BaseException) -> Exception | None:
    """The failure of HTTP or network behind an error, which the Hub's client may have wrapped."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None:
        library = type(cause).__module__.partition(".")[0]
        if isinstance(cause, HfHubHTTPError) or (isinstance(cause, Exception) and library in HTTP_LIBRARIES):
            return cause
        cause = cause.__cause__
    return None
