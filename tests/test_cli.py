"""The command line as a user sees it: exact output, exit codes, and what start-up must not load."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

from quantkit.cli.output import interrupted
from quantkit.files import hash_files
from tests.commands import COMMAND, ROOT, quantkit, run
from tests.tiny import WORDS

FROZEN = {
    "build": {
        *("--model", "--out", "--device", "--set", "--fresh", "--no-validate", "--release", "--ranks", "--junit"),
        "--json",
    },
    "validate": {"--model", "--text", "--runtime", "--device", "--junit", "--json"},
    "inspect": {"--verify", "--public-key", "--json"},
    "report": {"--out", "--json"},
    "publish": {"--repo", "--revision", "--private", "--dry-run", "--sign", "--report", "--json"},
    "plan": {"--model", "--out", "--device", "--set", "--ranks", "--json"},
    "demo": {"--out", "--device", "--json"},
    "submit": {
        *("--model", "--out", "--set", "--partition", "--account", "--qos", "--time", "--gpus", "--cpus", "--memory"),
        "--ranks",
        *("--at-once", "--publish", "--wait", "--dry-run", "--json"),
    },
    "jobs": {"--json"},
    "doctor": {"--json"},
    "recipes list": {"--json"},
    "recipes show": {"--set", "--json"},
    "recipes copy": set(),
    "recipes check": {"--set"},
    "recipes pin": set(),
    "recipes schema": set(),
    "engines list": {"--json"},
    "engines install": set(),
    "engines check": {"--json"},
}


def test_commands_and_options_are_frozen():
    """Knobs belong into recipes; a new option is a decision, made here."""
    import typer.main

    from quantkit.cli import app

    def walk(path, command):
        inner = getattr(command, "commands", {})
        if not inner:
            yield path, {name for option in command.params for name in option.opts if name.startswith("--")}
        for name, below in inner.items():
            yield from walk(f"{path} {name}".strip(), below)

    found = {path: options - {"--help"} for path, options in walk("", typer.main.get_command(app))}
    assert found == FROZEN


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_stream_is_no_error(closed, tmp_path):
    """As `>&-` in a shell and as some daemons start programs; nor is what is opened next written to in its place."""
    command = [sys.executable, "-m", "quantkit", "recipes", "copy", "gptq", str(tmp_path / "own.toml")]
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "own.toml").read_text("utf-8").startswith("format")


def test_help_starts_light():
    """Neither torch nor transformers nor pydantic is loaded before a command needs it."""
    program = (
        "import sys; sys.argv = ['quantkit', '--help']\n"
        "from quantkit.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    done = run(program)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_pipeline_starts_without_the_code_of_models():
    """It takes seconds, and what only searches weights needs none of it."""
    done = run("import sys, quantkit.pipeline\nprint(sorted({'transformers', 'numba'} & set(sys.modules)))")
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("arguments", [("recipes", "list"), ("build", "nothing-like-it"), ("plan", "--no-such-flag")])
def test_a_forked_command_is_the_command(arguments, tmp_path):
    """What the tests call, a process that finds torch loaded, against one that was started for it."""
    where = {"cwd": tmp_path, "COLUMNS": "50"}
    forked, started = quantkit(*arguments, **where), run(COMMAND, *arguments, **where)
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)


def test_a_forked_build_gives_the_bytes_of_a_started_one(own_recipe, tmp_path):
    for name, start in (("forked", quantkit), ("started", partial(run, COMMAND))):
        done = start("build", str(own_recipe), "--out", name, "--no-validate", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "started").iterdir())
    assert "model.safetensors" in files
    weights = [name for name in files if name not in ("README.md", "quantkit.json")]
    assert hash_files(tmp_path / "forked", weights) == hash_files(tmp_path / "started", weights)


def test_help_takes_little_time():
    """CPU of the whole process, best of three."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "quantkit", "--help"], capture_output=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert 0 < min(seconds) < 0.4, seconds


def test_plain_progress_says_how_long_it_will_take(monkeypatch, capsys):
    from quantkit import display

    clock = iter([0.0, 3.0, 6.0, 66.0, 70.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(display, "_memory", lambda: "1.00 GB")
    steps = display.Display().progress.steps
    for done in (2, 3, 4, 5, 40):  # two were finished before; the second comes too soon after the first
        steps("quantize", done, 40)
    assert capsys.readouterr().err.splitlines() == [
        "quantize 2/40  memory 1.00 GB",
        "quantize 4/40  memory 1.00 GB  ETA 0:01:48",
        "quantize 5/40  memory 1.00 GB  ETA 0:12:50",
        "quantize 40/40  memory 1.00 GB",
    ]


def test_a_build_prints_the_table_and_says_it_passed(own_recipe, tmp_path):
    done = quantkit("build", str(own_recipe), "--out", str(tmp_path / "a"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "bits_per_byte" in done.stdout
    assert "passed" in done.stdout
    assert "model.layers" not in done.stdout
    assert "layers.1.mlp.down_proj" in done.stderr


def test_json_is_the_only_thing_on_stdout(own_recipe, tmp_path):
    done = quantkit("build", str(own_recipe), "--out", str(tmp_path / "a"), "--json")
    document = json.loads(done.stdout)
    assert document["validation"]["variants"][0]["results"][0]["status"] == "ok"
    checked = quantkit("inspect", str(tmp_path / "a"), "--verify", "--json")
    assert json.loads(checked.stdout)["changed"] == []
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    broken = quantkit("inspect", str(tmp_path / "a"), "--verify")
    assert broken.returncode == 1
    assert "tokenizer.json: changed" in broken.stdout
    # nor can this one be opened any more
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for command in (("inspect", "--verify"), ("validate",)):
        cut = quantkit(*command, str(tmp_path / "a"))
        assert cut.returncode == 1
        assert "error: the artifact is not what was built:" in cut.stderr
        assert "  model.safetensors: changed\n" in cut.stderr
        assert cut.stdout == ""


def test_a_failed_gate_keeps_the_artifact_exits_with_3_and_is_not_published(own_recipe, tmp_path):
    gate = ("--set", "validation.gates.top1_agreement=1.0")
    junit, out = tmp_path / "results" / "a.xml", tmp_path / "a"
    done = quantkit("build", str(own_recipe), "--out", str(out), *gate, "--junit", str(junit))
    assert done.returncode == 3
    (failure,) = ElementTree.parse(junit).iter("failure")
    assert failure.get("message").startswith("reference: top1_agreement")
    validation = json.loads((out / "quantkit.json").read_text())["validation"]
    agreement = validation["variants"][0]["results"][0]["top1_agreement"]
    assert agreement < 1
    why = (
        f"  reference: top1_agreement {agreement:.4f} < 1\n"
        f"  at:  {out}\n"
        "  fix: more bits, a smaller group, more calibration text, or other gates in the recipe\n"
    )
    assert done.stderr.endswith("\nerror: the artifact is kept but may not be published:\n" + why)
    assert quantkit("inspect", str(out), "--verify").returncode == 0
    published = quantkit("publish", str(out), "--repo", "an-org/a", "--dry-run")
    assert (published.returncode, published.stdout) == (3, "")
    assert published.stderr == "error: no variant passed its gates:\n" + why


NO_SUCH_TEXT = (
    "error: no text set 'polish-cor'\n"
    "  at:  {key}\n"
    "  fix: use one of polish-core, polish-core-documents, polish-plus, polish-plus-documents, nkjp1m, "
    "wikipedia-pl, poleval2018, or the path of a .jsonl or .txt file that exists\n"
)


@pytest.mark.parametrize(
    ("content", "change", "expected"),
    [
        (
            WORDS * 20,
            'calibration.texts={"TEXT"=4000}',
            "error: the text set text.txt gives 12 windows of 16 tokens, not 4000\n"
            "  at:  calibration.texts\n"
            "  fix: ask for fewer or shorter windows, or add text\n",
        ),
        (WORDS, 'calibration.texts={"polish-cor"=4}', NO_SUCH_TEXT.format(key="calibration.texts")),
        (
            b"ab\x00\xc3\x28",
            "quantize.bits=4",
            "error: not valid UTF-8 at byte 3\n  at:  TEXT\n  fix: save the file as UTF-8\n",
        ),
        (
            " \n\n",
            "quantize.bits=4",
            "error: there is no text in it\n  at:  TEXT\n  fix: give a file with at least one document\n",
        ),
    ],
    ids=["too short", "unknown", "not UTF-8", "empty"],
)
def test_text_that_will_not_do_is_refused(own_recipe, tmp_path, content, change, expected):
    text, out = tmp_path / "text.txt", tmp_path / "a"
    text.write_bytes(content if isinstance(content, bytes) else content.encode())
    change = change.replace("TEXT", str(text))
    done = quantkit("build", str(own_recipe), "--out", str(out), "--device", "cpu", "--set", change)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("\n" + expected.replace("TEXT", str(text))), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not out.exists()
    assert not (tmp_path / "a.work").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("validation.texts=['polish-cor']", NO_SUCH_TEXT.format(key="validation.texts")),
        (
            "validation.window_tokens=257",
            "error: 257 tokens per window are more than the model's 256\n"
            "  at:  validation.window_tokens\n"
            "  fix: set validation.window_tokens to 256 or less\n",
        ),
        (
            "validation.generated_tokens=3",
            "error: the model has no chat template, so it cannot be asked validation.prompt\n"
            "  at:  validation.generated_tokens\n"
            "  fix: leave the question out with --set validation.generated_tokens=0 and take text without chats, "
            "such as polish-core-documents; or add the chat template to the model's tokenizer files\n",
        ),
    ],
    ids=["unknown text", "long window", "no template"],
)
def test_plan_refuses_a_validation_that_cannot_be_made(own_recipe, tiny_mistral, tmp_path, change, expected):
    model = shutil.copytree(tiny_mistral, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    changes = ("--set", "validation.generated_tokens=0", "--set", change)
    done = quantkit("plan", str(own_recipe), "--model", str(model), "--out", str(tmp_path / "a"), *changes)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith(expected), done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["plan", "build"])
def test_a_text_set_that_cannot_be_reached_exits_with_4(command, own_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    done = quantkit(command, str(own_recipe), "--out", str(tmp_path / "a"), "--set", "validation.texts={nkjp1m=4}")
    assert done.returncode == 4, done.stderr
    assert "error: cannot fetch text set ipipan/nkjp1m at revision 20b5dcb" in done.stderr
    assert done.stderr.endswith(
        "  at:  validation.texts\n"
        "  fix: connect, or use the text that ships with quantkit: "
        """--set 'calibration.texts={"polish-core"=24}' --set 'validation.texts=["polish-core"]'\n"""
    )
    assert not (tmp_path / "a.work").exists()


def test_what_fails_before_the_gates_is_an_error_in_the_junit_file(own_recipe, tmp_path):
    junit = tmp_path / "results" / "a.xml"
    wide = ("--set", "quantize.group_size=128")
    done = quantkit("build", str(own_recipe), "--out", str(tmp_path / "a"), *wide, "--junit", str(junit))
    assert done.returncode == 2
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("name"), suite.get("errors")) == ("a", "1")
    (error,) = suite.iter("error")
    said = error.get("message")
    assert said.startswith("14 linear(s) do not fit the format: model.layers.0.self_attn.q_proj: in_features 64 is not")
    assert "\n" not in said


def test_a_build_that_could_not_be_published_is_refused_before_it_begins(tmp_path):
    done = quantkit("build", "gptq", "--release", "--out", str(tmp_path / "a"))
    assert done.returncode == 2
    assert "does not say which revision of speakleash/Bielik-7B-Instruct-v0.1 it means" in done.stderr
    assert "quantkit recipes pin FILE" in done.stderr
    assert quantkit("submit", "gptq", "--publish", "--dry-run").stderr == done.stderr


def test_a_release_that_would_not_be_judged_is_refused(own_recipe, tmp_path):
    done = quantkit("build", str(own_recipe), "--release", "--no-validate", "--out", str(tmp_path / "a"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: only what passed its gates is published\n  at:  --release")
    assert not (tmp_path / "a").exists()


def test_submit_refuses_what_its_last_job_would(own_recipe, tmp_path):
    """It reports on all artifacts together, and publishes to where the recipes say."""
    other = tmp_path / "other.toml"
    other.write_text('format = "gptq"\n[model]\nid = "bielik-nano"\n', encoding="utf-8")
    done = quantkit("submit", str(own_recipe), str(other), "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert "these are recipes of several models, and a report is of one: " in done.stderr
    assert ", bielik-nano\n" in done.stderr
    done = quantkit("submit", str(other), "--publish", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the recipe names no repository to publish gptq of bielik-nano to\n")


@pytest.mark.parametrize("command", ["build", "plan", "submit"])
def test_a_name_that_is_none_is_said_before_torch_is_loaded(command):
    program = (
        f"import sys; sys.argv = ['quantkit', '{command}', 'nothing-like-it']\n"
        "from quantkit.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    done = run(program)
    assert done.stdout == "2 False\n", done.stderr
    assert "no recipe named 'nothing-like-it'" in done.stderr


def test_letters_that_a_stream_does_not_have():
    """Names and tables have them."""
    table = run(
        "import sys\n"
        "from quantkit import recipe_files\n"
        "from quantkit.cli import main\n"
        "from quantkit.display import print_table\n"
        "recipe_files.list_recipes = lambda: print_table('żółw', [{'variant': 'gęś', 'gate': '✓'}]) or []\n"
        "sys.argv = ['quantkit', 'recipes', 'list']\n"
        "main()",
        PYTHONIOENCODING="ascii",
        PYTHONUTF8="0",
    )
    assert table.returncode == 0, table.stderr
    assert "\\u017c\\xf3\\u0142w" in table.stdout


def test_plan_refuses_what_does_not_fit(own_recipe, tmp_path):
    good = quantkit("plan", str(own_recipe), "--json", "--out", str(tmp_path / "a"))
    assert json.loads(good.stdout)["linears"] == 14
    done = quantkit("plan", str(own_recipe), "--set", "quantize.group_size=128", "--out", str(tmp_path / "a"))
    assert done.returncode == 2
    assert "model.layers.0.self_attn.q_proj: in_features 64 is not divisible by group_size 128" in done.stderr
    assert 'quantize.skip = ["self_attn.q_proj"]' in done.stderr
    assert "and 6 more" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "nothing-like-it"], 2, "error: no recipe named 'nothing-like-it'"),
        (["build", "bielik-nano/gptq", "--device", "tpu"], 2, "error: unknown device 'tpu'"),
        (["build", "bielik-nano/gptq", "--sets", "x"], 2, "No such option"),
        (["build", "bielik-nano/gptq", "--model", "/no/such/folder"], 2, "error: no such folder: /no/such/folder"),
        (["build", "bielik-nano/gptq", "--model", "no/such/model"], 2, "error: the Hub has no no/such/model"),
        (["recipes", "pin", "nope.toml"], 2, "error: no such recipe file: nope.toml"),
        (["recipes", "pin", str(ROOT / "docs")], 2, "error: the recipe file cannot be read: Is a directory"),
        (["build", "bielik-nano/gptq", "--junit", str(ROOT / "docs")], 2, "docs cannot be written\n  at:  --junit"),
        (["validate", "x", "--junit", str(ROOT / "README.md" / "a.xml")], 2, "a.xml cannot be written\n  at:  --junit"),
        (["build", "bielik-nano/gptq", "--no-validate", "--junit", "a.xml"], 2, "error: there are no gates to write"),
        (["report", str(ROOT / "docs")], 2, "error: the folder has no record"),
        (["report", "/no/such/folder"], 2, "error: no such folder: /no/such/folder"),
        (["publish", "/no/such/folder"], 2, "error: no such folder: /no/such/folder"),
        (["validate", "/no/such/folder"], 2, "error: no such folder: /no/such/folder"),
        (["validate", "/no/such/folder", "--text", "none"], 2, "error: no text set 'none'\n  at:  --text\n"),
        (["inspect", str(ROOT / "docs")], 2, "error: config.json is missing"),
        (["inspect", str(ROOT / "docs"), "--verify", "--public-key", "no.pem"], 2, "error: no such key: no.pem"),
        (["recipes", "check", "gptq", "--set", "quantize.bit=3"], 2, "quantize.bit: unknown key; did you mean 'bits'?"),
        (["recipes", "copy", "gptq", str(ROOT / "README.md")], 2, "README.md exists"),
        (["recipes", "copy", "gptq", str(ROOT / "README.md" / "a.toml")], 1, "error: cannot be written there: File ex"),
        (["build", "bielik-nano/gptq", "--out", "/"], 2, "error: / is no place for an artifact"),
        (["build", "bielik-nano/gptq", "--out", "x" * 300], 1, "error: cannot be written there: File name too long"),
        (["build", "bielik-nano/gptq", "--out", str(ROOT / "README.md" / "a")], 1, "error: cannot be written there"),
    ],
)
def test_mistakes_get_one_clear_error(arguments, code, message):
    done = quantkit(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_recipe_is_copied_into_a_folder_that_is_not_there_yet(tmp_path):
    assert quantkit("recipes", "copy", "no-such", str(tmp_path / "none" / "a.toml")).returncode == 2
    unnamed = quantkit("recipes", "copy", "gptq", str(tmp_path / "none" / "a"))
    assert unnamed.returncode == 2
    assert f"error: {tmp_path / 'none' / 'a'} would not be taken for a recipe\n  fix: let its name end in .toml" in (
        unnamed.stderr
    )
    assert not (tmp_path / "none").exists()
    own = tmp_path / "made" / "for" / "a.toml"
    assert quantkit("recipes", "copy", "gptq", str(own)).returncode == 0
    assert quantkit("recipes", "check", str(own)).returncode == 0


def test_what_no_command_foresaw_on_a_disk_is_one_error(monkeypatch, capsys):
    from quantkit import recipe_files
    from quantkit.cli import main

    def fail():
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/a/file")

    monkeypatch.setattr(recipe_files, "list_recipes", fail)
    monkeypatch.setattr(sys, "argv", ["quantkit", "recipes", "list"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert capsys.readouterr() == (
        "",
        "error: Input/output error\n"
        "  at:  /a/file\n"
        "  fix: see that it can be read or written, and run the same command again\n",
    )


LISTING = [sys.executable, "-m", "quantkit", "recipes", "list"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_an_output_that_is_full_is_one_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(LISTING, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (
        1,
        "error: No space left on device\n  fix: see that it can be read or written, and run the same command again\n",
    )


def test_a_reader_that_has_left_is_no_error_to_tell_of():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(LISTING, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(("command", "code"), [(("recipes", "list"), 0), (("recipes", "show", "nothing-like-it"), 2)])
def test_only_a_success_ends_without_taking_modules_apart(command, code):
    program = (
        "import atexit, sys\n"
        "atexit.register(print, 'taken apart', file=sys.stderr)\n"
        "from quantkit.cli import run\n"
        "run()"
    )
    done, plain = run(program, *command), run(COMMAND, *command)
    assert (done.returncode, done.stdout) == (plain.returncode, plain.stdout)
    assert done.returncode == code
    assert done.stderr == plain.stderr + ("taken apart\n" if code else "")


# a command that says when it has begun; a shell may have told its background jobs to ignore an interrupt
ENDLESS = """
import signal, sys, time
from quantkit import recipe_files
from quantkit.cli import main

def wait():
    print("begun", flush=True)
    time.sleep(600)

recipe_files.list_recipes = wait
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["quantkit", "recipes", "list"]
main()
"""


@pytest.mark.parametrize(
    ("by", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted; finished layers are kept, the same command goes on\n"),
        (signal.SIGTERM, -signal.SIGTERM, ""),
    ],
)
def test_who_interrupts_a_command_is_told_what_is_kept(by, code, said):
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        assert process.stdout, "it has a pipe"
        assert process.stdout.readline() == "begun\n"
        process.send_signal(by)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (code, "", said)


def test_the_command_that_goes_on_throws_nothing_away(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quantkit", "build", "gptq", "--fresh"])
    assert "the same command without --fresh goes on" in interrupted()
    monkeypatch.setattr(sys, "argv", ["quantkit", "build", "gptq"])
    assert interrupted().endswith(", the same command goes on")


def test_cuda_that_is_not_there_exits_with_4(own_recipe):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = quantkit("build", str(own_recipe), "--device", "cuda")
    assert done.returncode == 4
    assert "error: no CUDA device is there" in done.stderr


def test_recipes_are_listed_shown_and_checked():
    names = quantkit("recipes", "list").stdout.split()
    assert len(names) >= 3
    assert 'format = "gptq"' in quantkit("recipes", "show", "gptq").stdout
    assert quantkit("recipes", "check", names[0]).returncode == 0
    assert json.loads(quantkit("recipes", "schema").stdout)["title"] == "Recipe"


def test_of_several_recipes_each_is_checked(tmp_path):
    names = quantkit("recipes", "list").stdout.split()
    nanos = [name for name in names if name.startswith("bielik-nano/")]
    done = quantkit("recipes", "check", "bielik-nano/all")
    assert (done.returncode, done.stderr) == (0, "".join(f"{name} is a good recipe\n" for name in nanos))
    bad = tmp_path / "bad.toml"
    bad.write_text('format = "gptq"\n[model]\nid = "bielik-nano"\n[quantize]\nbit = 3\n', encoding="utf-8")
    done = quantkit("recipes", "check", str(bad), "nope.toml", names[0])
    assert done.returncode == 2
    first, second = f"error: {bad}: 1 problem(s) in the recipe:", "error: nope.toml: no such recipe file: nope.toml"
    assert first in done.stderr
    assert second in done.stderr
    assert f"{names[0]} is a good recipe" in done.stderr


def test_doctor_says_what_each_format_needs():
    import torch

    from quantkit.engines.env import find_engine
    from quantkit.formats import READERS

    found = json.loads(quantkit("doctor", "--json").stdout)["formats"]
    assert found.keys() == READERS.keys()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for name, reading in READERS.items():
        assert found[name]["builds_on"] == devices
        readers = {reader["engine"]: reader for reader in found[name]["readers"]}
        assert reading.native_engine in readers
        assert all(find_engine(engine) for engine in readers)
        assert all(reader["installed"] is None and reader["why_not"] for reader in readers.values())
    install = "mlx-lm is not installed: `quantkit engines install mlx-lm`"
    line = f"mlx               builds on {' and '.join(devices)}; its own readers: {install}"
    told = quantkit("doctor").stdout.splitlines()
    assert line in told
    assert any(line.startswith("compressed-tensors  builds on ") for line in told)


def test_doctor_tells_of_a_rival_package(monkeypatch):
    from importlib import metadata

    from quantkit import conflicts
    from quantkit.doctor import diagnose

    assert not any("llm-quantkit" in problem for problem in diagnose()["problems"])
    plain = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.29" if name == "llm-quantkit" else plain(name))
    said = []
    conflicts.warn_of_conflicts(said.append)
    assert said == [
        "warning: llm-quantkit 0.29 is installed too\n  fix: pip uninstall llm-quantkit, then install quantkit again: "
        "both write the `quantkit` command and package"
    ]
    assert any("pip uninstall llm-quantkit" in problem for problem in diagnose()["problems"])
