"""Engines without installing any: the table, where environments go, and every message."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from quantkit.engines import env, runtime
from quantkit.engines.env import environment_of, find_engine, install, is_installed, list_engines, why_not
from quantkit.errors import RefusedError, RunFailedError, UnavailableError
from tests.interruption import until

WINDOWS = [SimpleNamespace(inputs=(1, 2, 3), targets=(5, 6)), SimpleNamespace(inputs=(4, 5), targets=(6, 7))]

FAKE_RUNNER = """
import sys
import numpy as np

def load(request):
    print("a package that prints to stdout")
    open("a log of the package", "w").close()
    return (lambda ids: np.outer(ids, np.arange(7)).astype(np.float32)), {"package": "fake", "version": "1"}

def build(request):
    if request["settings"]["bits"] == 3:
        print("3 bits are not for me", file=sys.stderr)
        raise SystemExit(7)
    import os
    os.makedirs(request["out"])
    with open(os.path.join(request["out"], "config.json"), "w") as file:
        file.write("{}")
    tokens, threads = np.load(request["tokens"]).shape, os.environ["OMP_NUM_THREADS"]
    return {"package": "fake", "version": "1", "tokens": tokens, "threads": threads}
"""
SETTINGS = {"bits": 4, "group_size": 32, "symmetric": True, "order": "natural", "damping": 0.01}
TOKENS = np.zeros((3, 8), dtype=np.int64)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An engine whose environment is this interpreter's, with a runner of six lines."""
    engine = dataclasses.replace(find_engine("gptqmodel"), name="fake")
    runners = tmp_path / "runners"
    runners.mkdir()
    (runners / "start.py").write_text((runtime.RUNNERS / "start.py").read_text())
    (runners / engine.runner).write_text(FAKE_RUNNER)
    monkeypatch.setattr(runtime, "RUNNERS", runners)
    environment = environment_of(engine)
    (environment / "bin").mkdir(parents=True)
    # a script, not a link: an interpreter looks for its packages from where it was called
    python = environment / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (environment / env.MARKER).write_text("{}")
    return engine


def test_the_table_is_whole():
    engines = list_engines()
    assert [engine.name for engine in engines] == [
        "auto-gptq",
        "auto-round",
        "autoawq",
        "exllamav2",
        "gptqmodel",
        "hqq",
        "llama-cpp",
        "llm-compressor",
        "mlx-lm",
    ]
    for engine in engines:
        assert engine.reads
        assert set(engine.hardware) <= {"cpu", "cuda"}
        assert (runtime.RUNNERS / engine.runner).is_file()
        assert all("==" in pin for pin in engine.requirements), "every requirement names its version"
        assert any(pin.startswith(f"{engine.package}==") for pin in engine.requirements)


def test_another_pin_is_another_environment():
    engine = find_engine("gptqmodel")
    other = dataclasses.replace(engine, requirements=(*engine.requirements[:-1], "torch==2.14.1"))
    assert environment_of(engine).name == f"gptqmodel-{engine.pins}"
    assert environment_of(other) != environment_of(engine)
    assert environment_of(dataclasses.replace(engine, note="words")) == environment_of(engine)


def test_environments_lie_under_the_home(tmp_path):
    assert environment_of(find_engine("auto-gptq")).parent == tmp_path / "home" / "engines"


def test_an_unknown_engine_is_refused_with_a_suggestion():
    with pytest.raises(RefusedError) as caught:
        find_engine("autogptq")
    assert str(caught.value) == (
        "no engine named 'autogptq'\n"
        "  fix: did you mean 'auto-gptq'? there are: auto-gptq, auto-round, autoawq, exllamav2, gptqmodel, "
        "hqq, llama-cpp, llm-compressor, mlx-lm"
    )


def test_not_installed_names_the_command(tiny_mistral, tmp_path):
    engine = find_engine("gptqmodel")
    assert why_not(engine) == "gptqmodel is not installed: `quantkit engines install gptqmodel`"
    with pytest.raises(UnavailableError) as caught:
        runtime.evaluate(engine, tiny_mistral, WINDOWS)
    assert caught.value.what == "gptqmodel is not installed: `quantkit engines install gptqmodel`"
    assert str(caught.value) == caught.value.what, "the remedy is said once"
    assert caught.value.exit_code == 4
    with pytest.raises(UnavailableError, match="not installed"):
        runtime.build(engine, "gptq", tiny_mistral, TOKENS, SETTINGS, tmp_path / "out")
    with pytest.raises(UnavailableError, match="not installed"):
        runtime.check(engine, tiny_mistral)


def test_a_python_that_is_not_here_is_named():
    engine = dataclasses.replace(find_engine("auto-gptq"), python=("3.4",))
    assert why_not(engine) == (
        "auto-gptq needs Python 3.4, and none is found: install it, then `quantkit engines install auto-gptq`"
    )
    with pytest.raises(UnavailableError, match=r"needs Python 3\.4"):
        install(engine, lambda message: None)


def test_hardware_that_is_not_here_is_named(monkeypatch):
    monkeypatch.setattr(env, "has_cuda", lambda: False)
    engine = dataclasses.replace(find_engine("auto-gptq"), hardware=("cuda",))
    for device in (None, "cuda", "cpu"):
        assert why_not(engine, device) == (
            "no CUDA device: auto-gptq needs an NVIDIA GPU; run it on a machine that has one"
        )
    monkeypatch.setattr(env, "has_cuda", lambda: True)
    assert why_not(engine, "cpu") == "auto-gptq runs on cuda only: run it with `--device cuda`"
    other = dataclasses.replace(engine, hardware=("cpu",))
    assert why_not(other, "cuda") == "auto-gptq does not run on cuda; it runs on cpu"


def test_a_failed_install_says_why_and_what_a_killed_one_left_is_thrown_away(tmp_path, monkeypatch):
    """Nothing is fetched: pip is told of no index, and of a folder without packages."""
    # a constraint of the machine's own would make pip's words others
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    engine = dataclasses.replace(
        find_engine("gptqmodel"), pip_flags=("--no-index", "--isolated", "--find-links", str(tmp_path))
    )
    left_over = environment_of(engine) / "left-over"
    left_over.parent.mkdir(parents=True)
    left_over.touch()
    said: list[str] = []
    with pytest.raises(UnavailableError) as caught:
        install(engine, said.append)
    assert said[0].startswith("gptqmodel: about ")
    assert "No matching distribution found for torch==2.13.0" in caught.value.what
    assert caught.value.where == str(environment_of(engine) / env.INSTALL_LOG)
    assert not is_installed(engine)
    assert not left_over.exists()


SLEEPING_BACKEND = """
import os, time
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, settings=None):
    Path(os.environ["TOLD"]).write_text(str(os.getpid()))
    time.sleep(600)
"""
INSTALLING = """
import dataclasses, signal, sys
# what is started in the background is deaf to it
signal.signal(signal.SIGINT, signal.default_int_handler)
from quantkit.engines.env import find_engine, install

flags = ("--no-index", "--isolated", "--find-links", sys.argv[1])
install(dataclasses.replace(find_engine("gptqmodel"), pip_flags=flags), print)
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_pip_has_started_ends_with_the_command(by, tmp_path, monkeypatch):
    """It would write on into an environment that the next command makes anew."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    source = tmp_path / "torch-2.13.0"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "slow"\nbackend-path = ["."]'
    )
    (source / "slow.py").write_text(SLEEPING_BACKEND)
    shutil.make_archive(str(source), "gztar", tmp_path, source.name)
    told = tmp_path / "told"
    process = subprocess.Popen(
        [sys.executable, "-c", INSTALLING, str(tmp_path)],
        env=os.environ | {"TOLD": str(told)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: told.exists() and told.read_text())
    backend = psutil.Process(int(told.read_text()))
    try:
        process.send_signal(by)
        process.wait(60)
        assert psutil.wait_procs([backend], timeout=20)[1] == []
    finally:
        process.kill()
        process.wait()
        with suppress(psutil.NoSuchProcess):
            backend.kill()


def test_what_is_supervised_finds_nobody_typing():
    """Its own standard input stays open as long as it is waited for; a module that reads one would wait as well."""
    command = [sys.executable, "-I", "-c", env.SUPERVISED, "base64", "-e"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.wait(20) == 0
            assert process.stdout.read() == b""
        finally:
            process.kill()


def test_a_setting_that_the_engine_does_not_know_is_refused(fake, tiny_mistral, tmp_path):
    engine = dataclasses.replace(fake, settings=find_engine("auto-gptq").settings)
    with pytest.raises(RefusedError) as caught:
        runtime.build(engine, "gptq", tiny_mistral, TOKENS, SETTINGS | {"order": "group-aware"}, tmp_path / "out")
    assert "order = 'group-aware': fake knows natural, activation" in caught.value.what


def test_logits_of_the_predicted_positions_come_back(fake, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("QUANTKIT_HOME", "../home")
    found = list(runtime.evaluate(fake, tmp_path, WINDOWS))
    assert [array.tolist() for array in found] == [np.outer(ids, range(7)).tolist() for ids in ((2, 3), (4, 5))]
    assert all(array.dtype == np.float32 for array in found)
    assert list((environment_of(fake) / "logs").iterdir()) == []
    assert list((tmp_path / "here").iterdir()) == [], "what packages leave lies elsewhere"


def test_a_reader_that_stops_early_leaves_nothing(fake, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    logits = runtime.evaluate(fake, tmp_path, WINDOWS)
    next(logits)
    assert list((tmp_path / "tmp").iterdir())
    logits.close()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert list((environment_of(fake) / "logs").iterdir()) == []


def test_a_build_appears_whole(fake, tiny_mistral, tmp_path):
    facts = runtime.build(fake, "gptq", tiny_mistral, TOKENS, SETTINGS, tmp_path / "out" / "artifact", threads=1)
    assert facts.pop("seconds") >= 0
    assert facts == {"package": "fake", "version": "1", "tokens": [3, 8], "threads": "1"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["artifact"]
    assert json.loads((tmp_path / "out" / "artifact" / "config.json").read_text()) == {}
    with pytest.raises(RefusedError, match="exists"):
        runtime.build(fake, "gptq", tiny_mistral, TOKENS, SETTINGS, tmp_path / "out" / "artifact")


def test_a_failed_runner_is_quoted_and_its_log_kept(fake, tiny_mistral, tmp_path):
    with pytest.raises(RunFailedError) as caught:
        runtime.build(fake, "gptq", tiny_mistral, TOKENS, SETTINGS | {"bits": 3}, tmp_path / "out" / "artifact")
    assert caught.value.what == "the engine fake failed at build (exit code 7):\n  3 bits are not for me"
    assert Path(caught.value.where).read_text() == "3 bits are not for me\n"
    assert os.listdir(tmp_path / "out") == []


INDIFFERENT = """
import json, os
import numpy as np

def load(request):
    with open(os.path.join(request["artifact"], "config.json")) as file:
        rows = json.load(file)["vocab_size"]
    return (lambda ids: np.zeros((len(ids), rows), np.float32)), {"package": "fake", "version": "1"}
"""


def test_an_engine_that_only_reads_is_checked_on_an_artifact_of_ours(fake, nano):
    from quantkit.engine_check import check_engine
    from quantkit.progress import Progress

    (runtime.RUNNERS / fake.runner).write_text(INDIFFERENT)
    with pytest.raises(RunFailedError, match="the engine fake reads gptq of ours as something else: its perplexity is"):
        check_engine(dataclasses.replace(fake, settings={}), str(nano), Progress())


def test_columns_of_the_list_are_as_wide_as_their_content():
    lines = env.engine_lines([env.describe(engine) for engine in list_engines()])
    assert len(lines) == len(list_engines())
    for engine, line in zip(list_engines(), lines, strict=True):
        name, requirement, reason = re.split(r"  +", line)
        assert name == engine.name
        assert requirement.startswith(f"{engine.package}==")
        assert reason == why_not(engine)
    for column in (1, 2):
        assert len({line.index(re.split(r"  +", line)[column]) for line in lines}) == 1
