"""What Ollama wants beside a GGUF file: `Modelfile`, `template` (Go's text/template), `params` (JSON) and `system`.

A chat template is a program; what it writes around the turns of a conversation is found by giving it turns of known
text, and kept only if putting the findings together again gives what the template gives, for every conversation tried.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import RefusedError

Turns = Sequence[tuple[str, str]]
Render = Callable[[Turns, bool], str]
"""(role, content) turns, and whether the assistant is to speak next, to text without the start token."""

MARKS = ("SYSTEM-MARK", "FIRST-MARK", "REPLY-MARK", "SECOND-MARK", "ANSWER-MARK")
TRIED: tuple[Turns, ...] = (
    [("user", "a")],
    [("system", "Bądź zwięzły.\nPo polsku."), ("user", "dzień dobry")],
    [("user", "{{ x }}"), ("assistant", 'dwa "słowa"'), ("user", "\\n")],
    [("system", "s"), *(3 * [("user", "pytanie"), ("assistant", "odpowiedź")]), ("user", "a\n\nb")],
)
KEPT = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
"""Keys of generation_config.json with Ollama's names for them."""
MODELFILE = "Modelfile"
PREFERRED = ("Q4_K_M", "Q8_0")


@dataclass(frozen=True)
class ChatPieces:
    """What stands around the turns of a conversation.

    Attributes:
        preamble: in front of a conversation that does not begin with a system turn.
        system: before and after a system turn, which comes first and opens the first user turn.
        user: before and after a user turn; the first is left out behind a system turn.
        assistant: before and after an assistant turn.
    """

    preamble: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]

    def write(self, turns: Turns) -> str:
        """A conversation that the assistant is to go on with."""
        text, opened = "" if turns[0][0] == "system" else self.preamble, False
        for role, content in turns:
            before, after = {"system": self.system, "user": self.user, "assistant": self.assistant}[role]
            text += ("" if opened and role == "user" else before) + content + after
            opened = role == "system"
        return text

    def template(self) -> str:
        """The same in Go's text/template, over Ollama's `.Messages`."""
        (system, close), (user, end), (reply, stop) = self.system, self.user, self.assistant
        preamble = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_said(self.preamble)}{{{{ end }}}}'
        return (
            f"{{{{- $opened := false }}}}{preamble if self.preamble else ''}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "system" }}}}{_said(system)}{{{{ .Content }}}}{_said(close)}{{{{ $opened = true }}}}'
            f'{{{{ else if eq .Role "user" }}}}{{{{ if not $opened }}}}{_said(user)}{{{{ end }}}}'
            f"{{{{ $opened = false }}}}{{{{ .Content }}}}{_said(end)}"
            f'{{{{ else if eq .Role "assistant" }}}}{_said(reply)}{{{{ .Content }}}}{_said(stop)}'
            "{{ end }}{{ end }}"
        )


def chat_pieces(render: Render) -> ChatPieces | None:
    """What a chat template writes around turns; None if it does more than that.

    Args:
        render: the template; may raise RefusedError for conversations that it does not take.
    """
    system, first, reply, second, answer = MARKS
    talk = [("user", first), ("assistant", reply), ("user", second)]
    try:
        told = _between(render([("system", system), *talk], True), (system, first, reply, second))
        plain = _between(render(talk, True), (first, reply, second))
        ended = _between(render([*talk, ("assistant", answer)], False), (first, reply, second, answer))
        if told is None or plain is None or ended is None:
            return None
        opening, middle, later, asking = plain
        stop = ended[-1]
        user = later.removeprefix(stop)
        # a prompt that opens the answer belongs to the user's turn, for that is what comes before an answer
        found = ChatPieces(
            opening.removesuffix(user), (told[0], told[1]), (user, asking), (middle.removeprefix(asking), stop)
        )
        return found if all(found.write(turns) == render(turns, True) for turns in TRIED) else None
    except RefusedError:
        return None


def _between(text: str, marks: tuple[str, ...]) -> list[str] | None:
    """What stands before, between and after the marks; None if one is missing, moved or repeated."""
    pieces, rest = [], text
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        pieces.append(before)
    return None if any(mark in piece for piece in [*pieces, rest] for mark in marks) else [*pieces, rest]


def _said(text: str) -> str:
    """Text as a Go string in an action, so that neither braces nor white space around it mean anything."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def parameters(generation: dict[str, Any], pieces: ChatPieces | None, end: str | None) -> dict[str, Any]:
    """Ollama's parameters.

    Args:
        generation: generation_config.json of the source.
        pieces: of its chat template; where the assistant's words end, generation stops.
        end: the end token's text.
    """
    found = {name: generation[key] for key, name in KEPT.items() if generation.get(key) is not None}
    stops = [end, pieces.user[0].strip() if pieces else None]
    return {"stop": list(dict.fromkeys(stop for stop in stops if stop))} | found


def modelfile(file: str, template: str | None, params: dict[str, Any], system: str | None) -> str:
    """A Modelfile that `ollama create -f` takes.

    Args:
        file: name of the GGUF file beside it.
        template, params, system: as in the files of these names.
    """
    lines = [f"FROM ./{file}"]
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# the model's chat template is more than text around turns; Ollama goes by the file's own")
    if system:
        lines.append(f'SYSTEM """{system}"""')
    for key, value in params.items():
        lines += [f"PARAMETER {key} {json.dumps(each, ensure_ascii=False)}" for each in _listed(value)]
    return "\n".join(lines) + "\n"


def retold(folder: Path, variants: dict[str, list[str]]) -> dict[str, str | None]:
    """A folder's Modelfile for fewer types than it was written for; None for one of which no type is left.

    Args:
        folder: the artifact's.
        variants: files of each type that stays.
    """
    path = folder / MODELFILE
    if not path.is_file():
        return {}
    text, file = path.read_text(encoding="utf-8"), written_for(variants)
    return {MODELFILE: None if file is None else f"FROM ./{file}\n{text.partition(chr(10))[2]}"}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def written_for(files: dict[str, list[str]]) -> str | None:
    """The file that a Modelfile names: of a usual type if it is there; None if all are split, as Ollama cannot read."""
    whole = {kind: names[0] for kind, names in files.items() if len(names) == 1}
    return next((whole[kind] for kind in (*PREFERRED, *whole) if kind in whole), None)
