"""Every test gets its own home and no network; uninitialised memory is filled with NaN."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.hub_server import HubServer
from tests.pretended_gpu import pretended_gpu, why_not
from tests.tiny import WORDS, make_tiny

# without a GPU its kernels are interpreted; Triton asks for this when it is first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

THREADS = 2
# what is expensive to make, and the same for every run: bielik-nano and the engines' environments
KEPT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "quantkit-tests"


def pytest_report_header() -> str:
    import transformers

    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return f"torch {torch.__version__}, transformers {transformers.__version__}, CUDA device: {cuda}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is run on a GPU if there is one belongs to the tests for one there."""
    for item in items:
        if torch.cuda.is_available() and "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _sandbox(tmp_path, monkeypatch, request):
    """A home of the test's own, two threads, and no sockets unless the test is marked `hub`."""
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(THREADS)
    if "hub" not in request.keywords:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

        def refuse(*_):
            raise OSError("the network is not for this test")

        monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """torch.empty and new_empty hand out NaN (255 for bytes), so that a value never written shows."""
    plain, plain_new, plain_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        if tensor.is_meta:
            return tensor
        return (
            tensor.fill_(float("nan"))
            if tensor.is_floating_point()
            else tensor.fill_(tensor.dtype == torch.uint8 and 255)
        )

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(plain(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(plain_like(*args, **kwargs)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *args, **kwargs: poison(plain_new(self, *args, **kwargs))
    )


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory) -> Path:
    """A random two-layer Mistral with a tokenizer; read it, do not write to it."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "mistral", "mistral")


@pytest.fixture
def own_recipe(tmp_path, tiny_mistral) -> Path:
    """The file of a recipe for `tiny_mistral` on a text of its own: builds and judges in seconds."""
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 20, encoding="utf-8")
    path = tmp_path / "own.toml"
    path.write_text(
        f"""format = "gptq"
[model]
id = "{tiny_mistral}"
[quantize]
group_size = 32
scale_candidates = 2
[calibration]
window_tokens = 16
texts = {{ "{text}" = 4 }}
[validation]
window_tokens = 32
generated_tokens = 2
texts = ["{text}"]
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def gpu(request) -> torch.device:
    """A GPU: a real one, or where there is none the pretended one."""
    return torch.device("cuda") if torch.cuda.is_available() else request.getfixturevalue("pretended")


@pytest.fixture
def pretended(tmp_path_factory, monkeypatch) -> Iterator[torch.device]:
    """A GPU that is none; see `tests.pretended_gpu`."""
    if reason := why_not():
        pytest.skip(reason)
    with pretended_gpu(tmp_path_factory.getbasetemp(), monkeypatch) as device:
        yield device


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A hub on this machine that holds nothing yet."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def nano() -> Path:
    """The real, trained bielik-nano: the tests' own in the user's cache, or the one that `make demo` made."""
    from quantkit.home import quantkit_home
    from quantkit.nano import NAME, ensure_nano

    homes = (KEPT, quantkit_home())
    home = next((home for home in homes if (home / "models" / NAME).is_dir()), KEPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_HOME", str(home))
        return ensure_nano()


@pytest.fixture
def kept_engine(monkeypatch):
    """A function that gives an engine, really installed; its first use takes minutes and needs a package index."""
    from quantkit.engines.env import find_engine, install

    def installed(name: str):
        monkeypatch.setenv("QUANTKIT_HOME", str(KEPT))
        engine = find_engine(name)
        install(engine, print)
        return engine

    return installed
