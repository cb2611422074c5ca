"""The reference model's side of a comparison, computed once per model and text and kept a while under QUANTKIT_HOME.

What is kept are the final hidden states, not logits: logits are recomputed chunk by chunk from the head.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.source import WeightSource, head_tensors
from quantkit.checkpoint.tokenizer import Tokenizer
from quantkit.files import disk_errors, replacing, shared, write_json
from quantkit.home import quantkit_home
from quantkit.validation.generation import Answer, greedy_answer
from quantkit.validation.perplexity import final_states
from quantkit.validation.text import EvaluationText

KEPT_BYTES = 16 << 30  # of all models' states together: nine of a 7B's in bfloat16, judged on 217,000 tokens


@dataclass(frozen=True)
class Settings:
    """How a model is run for judging.

    Attributes:
        windows_per_batch: windows per forward pass.
        prompt: user message of the generation check.
        generated_tokens: most tokens of its answer; 0 leaves the check out.
    """

    windows_per_batch: int
    prompt: str
    generated_tokens: int


@dataclass(frozen=True)
class Judged:
    """What one model made of a text.

    Attributes:
        states_ND: final hidden states of every predicted position.
        head_VD: its output matrix, on the device it was run on.
        answer: to the prompt; None if the check was left out.
    """

    states_ND: Tensor
    head_VD: Tensor
    answer: Answer | None


def run(
    source: WeightSource, text: EvaluationText, decoder: Decoder, tokenizer: Tokenizer, settings: Settings
) -> Judged:
    """Run a model over a text and let it answer the prompt."""
    states = final_states(source, text, decoder, windows_per_batch=settings.windows_per_batch)
    answer = None
    if settings.generated_tokens:
        answer = greedy_answer(source, decoder, tokenizer, prompt=settings.prompt, num_tokens=settings.generated_tokens)
    return Judged(states, decoder.head(head_tensors(source)), answer)


def run_reference(
    source: WeightSource,
    text: EvaluationText,
    decoder: Decoder,
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    fingerprint: str,
    still_so: Callable[[], None] = lambda: None,
) -> Judged:
    """`run`, or what an earlier call kept, if it can be read.

    Args:
        fingerprint: of everything that decides the result: model, text, settings, versions, device.
        still_so: raises where the model is no longer what the fingerprint says; nothing is kept then.
    """
    folder = quantkit_home() / "cache" / "reference"
    states_path, answer_path = folder / f"{fingerprint}.safetensors", folder / f"{fingerprint}.json"
    kept = _kept(states_path, answer_path)
    if kept is not None:
        # a home that others keep may be read only
        with suppress(OSError):
            os.utime(states_path)
        return Judged(kept[0], decoder.head(head_tensors(source)), kept[1])
    judged = run(source, text, decoder, tokenizer, settings)
    still_so()
    from safetensors.torch import save_file

    with disk_errors(folder, "choose a writable folder with QUANTKIT_HOME"), shared(folder):
        with replacing(states_path) as temporary:
            save_file({"states": judged.states_ND.contiguous()}, temporary)
        write_json(answer_path, asdict(judged.answer) if judged.answer else None)
        _drop_oldest(folder)
    return judged


def _drop_oldest(folder: Path) -> None:
    """Remove the states that were used longest ago where all take more than `KEPT_BYTES`; the last used stay."""
    used: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.safetensors"):
        # another command may have removed it
        with suppress(FileNotFoundError):
            found = path.stat()
            used.append((found.st_mtime, found.st_size, path))
    together = 0
    for place, (_, size, path) in enumerate(sorted(used, reverse=True)):
        together += size
        if place and together > KEPT_BYTES:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)


def _kept(states_path: Path, answer_path: Path) -> tuple[Tensor, Answer | None] | None:
    """States and answer as an earlier call kept them; None where a file is not there or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        answer = json.loads(answer_path.read_text(encoding="utf-8"))
        return load_file(states_path)["states"], None if answer is None else Answer(**answer)
    # what is neither UTF-8 nor JSON is a ValueError
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
