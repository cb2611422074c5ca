"""The model's tokenizer and chat template, checked against the weights."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import RefusedError

FILES = ("tokenizer.json", "tokenizer.model")


class Tokenizer:
    """Text to token ids, with the special tokens a document needs put in by hand and in one place.

    Args:
        inner: transformers' tokenizer.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.eos: int | None = inner.eos_token_id
        # what lm-evaluation-harness conditions the first token on: BOS, or EOS for models without one
        start = inner.bos_token_id if inner.bos_token_id is not None else inner.eos_token_id
        if start is None:
            raise RefusedError(
                "the tokenizer names neither a BOS nor an EOS token",
                where="tokenizer_config.json",
                fix="take the tokenizer files from the model's own repository",
            )
        self.start: int = start
        self.has_template: bool = inner.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=False)
        return ids

    def render(self, messages: Sequence[tuple[str, str]], *, answer: bool = False) -> str:
        """A conversation as the model's template writes it, without the leading start token.

        Args:
            messages: (role, content) turns.
            answer: end where the assistant is to speak.

        Raises:
            RefusedError: the model has no chat template, or the template refuses the roles.
        """
        if not self.has_template:
            raise RefusedError(
                "the model has no chat template, and the text has chats in it",
                where="chat template",
                fix="take text without: --set 'calibration.texts={\"polish-core-documents\"=64}' "
                "--set 'validation.texts=[\"polish-core-documents\"]' --set validation.generated_tokens=0 "
                "(validate: --text polish-core-documents); or add the chat template to the model's tokenizer files",
            )
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self._inner.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)
        except Exception as error:  # noqa: BLE001 (a template is foreign code; whatever it raises is its answer)
            raise RefusedError(
                f"the chat template cannot render the conversation: {error}",
                where="chat template",
                fix="take text without chats (calibration.texts, validation.texts, or --text of validate), such as "
                "polish-core-documents; or mend the template",
            ) from None
        return text.removeprefix(self._inner.bos_token or "")

    @property
    def end(self) -> str | None:
        """The end token's text."""
        token: str | None = self._inner.eos_token
        return token

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text


def load_tokenizer(folder: Path, *, vocab_size: int) -> Tokenizer:
    """The tokenizer in a checkpoint's folder.

    Raises:
        RefusedError: it is missing, cannot be loaded, or has ids that the embedding has no row for.
    """
    if not any((folder / name).exists() for name in FILES):
        raise RefusedError(
            "the tokenizer is missing",
            where=str(folder),
            fix=f"put {' or '.join(FILES)} from the model's repository beside the weights",
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except StrictDataclassError as error:
        raise RefusedError(
            f"config.json is refused by transformers: {' '.join(str(error).split())}",
            where=str(folder / "config.json"),
            fix="take config.json from the model's own repository",
        ) from None
    except Exception as error:  # noqa: BLE001 (tokenizers raises no class of its own, and damage has many others)
        lines = str(error).splitlines() or [type(error).__name__]
        raise RefusedError(
            f"the tokenizer cannot be loaded: {lines[0]}",
            where=str(folder),
            # transformers reads config.json too, and fails at what is wrong there
            fix="take the tokenizer files and config.json from the model's own repository",
        ) from None
    if len(inner) > vocab_size:
        raise RefusedError(
            f"the tokenizer has {len(inner)} tokens, the embedding {vocab_size} rows",
            where=str(folder),
            fix="tokenizer and weights are of different models; download both again",
        )
    # documents are cut into windows afterwards; a warning about their length would mislead
    inner.model_max_length = sys.maxsize
    return Tokenizer(inner)
