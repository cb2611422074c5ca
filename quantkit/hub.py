"""All network access but engine installation: pinned downloads from the Hugging Face Hub."""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import RefusedError, UnavailableError

CHECKPOINT_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "LICENSE*", "README.md")
# the Hub's client lets errors of its HTTP library through, which is not the same one in every version
HTTP_LIBRARIES = ("httpx", "httpx2", "requests")
ONLINE = "connect, or set HF_HOME to a cache that holds it and HF_HUB_OFFLINE=1"
SHIPPED_TEXT = (
    "connect, or use the text that ships with quantkit: "
    """--set 'calibration.texts={"polish-core"=24}' --set 'validation.texts=["polish-core"]'"""
)


@dataclass(frozen=True)
class HubText:
    """A text set on the Hub: data set id, patterns of its files in order of preference, and its licence."""

    dataset: str
    patterns: tuple[str, ...]
    licence: str


@dataclass(frozen=True)
class FetchedFile:
    """A downloaded file and the commit it is from."""

    path: Path
    revision: str


def fetch_checkpoint(model_id: str, revision: str | None) -> tuple[Path, str]:
    """The folder of a Hub model's files, and the commit hash it is.

    Raises:
        RefusedError: there is no such model or revision.
        UnavailableError: the Hub cannot be reached and the cache does not hold it.
    """
    from huggingface_hub import snapshot_download

    wanted = f"{model_id} at revision {revision or 'main'}"
    with _reaching(wanted, where="model.id", fix=f"{ONLINE}, or give a folder with --model"):
        folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=list(CHECKPOINT_FILES)))
    # a snapshot's folder is named by its commit
    return folder, folder.name


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


def fetch_text_files(source: HubText) -> Iterator[FetchedFile]:
    """Download a text set's files one by one, as they are asked for.

    Raises:
        UnavailableError: the Hub cannot be reached; the remedy names the text that ships with quantkit.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with _reaching(f"the text set {source.dataset}", where="texts", fix=SHIPPED_TEXT):
        info = HfApi().dataset_info(source.dataset)
        names = sorted(sibling.rfilename for sibling in info.siblings or [])
        wanted = next(filter(None, (fnmatch.filter(names, pattern) for pattern in source.patterns)), [])
        revision = info.sha or ""
    for name in wanted:
        with _reaching(f"{name} of {source.dataset}", where="texts", fix=SHIPPED_TEXT):
            path = hf_hub_download(source.dataset, name, repo_type="dataset", revision=revision)
        yield FetchedFile(Path(path), revision)


@contextmanager
def _reaching(what: str, *, where: str, fix: str) -> Iterator[None]:
    """Turn the Hub's refusals and an unreachable network into errors with a remedy."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise RefusedError(
            f"the Hub has no {what}: {_first_line(error)}",
            where=where,
            fix="give a Hub id (org/name), an existing folder, or bielik-nano; private models need `hf auth login`",
        ) from None
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in HTTP_LIBRARIES:
            raise
        raise UnavailableError(f"cannot fetch {what}: {_first_line(error)}", where=where, fix=fix) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
