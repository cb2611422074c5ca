"""bielik-nano: a small trained model with the shape of everything that Bielik-7B has, made where it is needed.

Nothing can be downloaded in a test or a demonstration, and a random model cannot tell good quantization from bad.
This one is trained in minutes on the calibration half of the shipped Polish text. So little text teaches a random
start hardly more than unigrams; so embedding and head start from the text's bigram statistics, and the decoder
layers learn what these leave over.

`quantkit.nano.training` makes it, and is imported only then.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock

from quantkit.home import quantkit_home
from quantkit.nano.settings import CHAT_TEMPLATE, USUAL, NanoSettings, Progress
from quantkit.recipe import DEMONSTRATION, fingerprint
from quantkit.texts import load_text_set

NAME = DEMONSTRATION
MARKER = "nano.json"


def ensure_nano(progress: Progress = lambda stage, done, total: None, settings: NanoSettings = USUAL) -> Path:
    """The folder of bielik-nano's checkpoint, made if it is absent or of other text or settings.

    Args:
        progress: told the stage, steps done and steps in all.
        settings: of the model; tests use smaller ones.
    """
    text_set = load_text_set("polish-core", "calibration")
    made_from = fingerprint([text_set.sha256, asdict(settings), CHAT_TEMPLATE])
    marker = json.dumps({"fingerprint": made_from}) + "\n"
    folder = quantkit_home() / "models" / NAME
    lock_path = quantkit_home() / "locks" / f"{NAME}.lock"
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_path):
        if not _is_current(folder, marker):
            partial = folder.with_name(f"{NAME}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            # transformers' models take a second to import, and most commands never make this one
            from quantkit.nano.training import make

            with _threads(settings.threads):
                make(partial, text_set.documents, settings, progress)
            (partial / MARKER).write_text(marker, encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
    return folder


def _is_current(folder: Path, marker: str) -> bool:
    # compared as bytes: a damaged marker is one of another model, not an error
    path = folder / MARKER
    return path.is_file() and path.read_bytes() == marker.encode()


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
