"""The Makefile's own part of a release: what runs after what, what goes on after a failure, and what is removed.

The commands are written down and end as they are told; tests/test_release.py runs the real ones.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# ends with the code in the file that is named by step and recipe, and leaves a record where a build ends with 0 or 3
PROGRAM = """#!/bin/sh
echo "$*" >> {log}
case $1 in build) name=${{2#*/}};; report) name=all;; *) name=${{2##*-}};; esac
[ $1 != build ] || [ ! -f {folder}/wait ] || sleep 20
code=$(cat {folder}/$1-$name 2>/dev/null || echo 0)
if [ $1 = build ] && [ $code != 1 ]; then mkdir -p $4; echo '{{}}' > $4/quantkit.json; fi
if [ $1 = report ]; then shift; for one; do last=$one; done; mkdir -p $last; fi
exit $code
"""


class Made:
    """A folder to run make for, and what it ran."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "artifacts"
        self.log = folder / "log"
        self.interrupted = False
        (folder / "installed").touch()
        program = folder / "quantkit"
        program.write_text(PROGRAM.format(log=self.log, folder=folder))
        program.chmod(0o755)

    def ends(self, step: str, name: str, code: int) -> None:
        (self.folder / f"{step}-{name}").write_text(str(code))

    def run(self, *goals: str) -> tuple[int, list[list[str]]]:
        """The exit code, and the words of every command that was run, in order."""
        self.log.write_text("")
        given = ("MODEL=bielik-nano", f"OUT={self.out}", f"BIN={self.folder}", f"INSTALLED={self.folder / 'installed'}")
        process = subprocess.Popen(
            ["make", *goals, *given],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
            # who is started in the background inherits that interrupts are ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        if self.interrupted:
            while not self.log.read_text():
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)
        return process.wait(60), [line.split() for line in self.log.read_text().splitlines()]


@pytest.fixture
def made(tmp_path) -> Made:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return Made(tmp_path)


def steps(commands: list[list[str]]) -> list[str]:
    """ "build gptq" and the like."""
    return [f"{words[0]} {words[1].rpartition('/')[2].removeprefix('bielik-nano-')}" for words in commands]


THREE = "FORMATS=gptq awq mlx"


@pytest.mark.parametrize("together", ["-j1", "-j3"])
def test_what_passed_is_published_and_drawn_and_make_fails_at_the_end(made, together):
    made.ends("build", "gptq", 3)
    made.ends("publish", "gptq", 3)
    made.ends("build", "mlx", 1)
    code, commands = made.run(together, "release", THREE, "ORG=an-org", "JUNIT=results")
    assert code == 2
    assert sorted(steps(commands)[:3]) == ["build awq", "build gptq", "build mlx"]
    assert all("--release" in words for words in commands[:3])
    assert commands[3][0] == "report"
    assert commands[3][1:3] == [str(made.out / "bielik-nano-awq"), str(made.out / "bielik-nano-gptq")]
    assert sorted(steps(commands[4:])) == ["publish awq", "publish gptq"]
    awq = next(words for words in commands if words[:2] == ["publish", str(made.out / "bielik-nano-awq")])
    assert awq[2:] == ["--repo", "an-org/bielik-nano-awq", "--report", str(made.out / "bielik-nano-report")]


def test_a_variant_that_failed_makes_make_fail_though_the_others_go_up(made):
    made.ends("build", "gguf", 3)
    code, commands = made.run("release", "FORMATS=gguf")
    assert (code, steps(commands)) == (2, ["build gguf", "report gguf", "publish gguf"])


def test_where_all_is_well_make_ends_well_and_again(made):
    for _ in range(2):
        code, commands = made.run("-j2", "release", THREE)
        assert (code, len(commands)) == (0, 7)


def test_without_a_report_the_artifacts_go_up_without_plots(made):
    made.ends("report", "all", 4)
    code, commands = made.run("release", THREE)
    assert code == 2
    assert [len(words) for words in commands if words[0] == "publish"] == [2, 2, 2]


@pytest.mark.parametrize(
    ("goal", "expected", "code"),
    [
        ("build", ["build gptq", "build awq", "build mlx"], 0),
        ("validate", ["build gptq", "validate gptq", "build awq", "validate awq", "build mlx", "validate mlx"], 0),
        ("report", ["build gptq", "build awq", "build mlx", "report awq"], 0),
        ("gptq", ["build gptq"], 0),
        ("build-mlx", ["build mlx"], 0),
        ("publish-awq", ["build awq", "report awq", "publish awq"], 0),
    ],
)
def test_every_step_alone(made, goal, expected, code):
    assert made.run(goal, THREE)[0] == code
    assert sorted(steps(made.run(goal, THREE)[1])) == sorted(expected)


def test_a_step_alone_fails_with_its_command(made):
    made.ends("build", "gptq", 3)
    assert made.run("gptq")[0] == 2
    assert made.run("validate-gptq")[0] == 2
    assert made.run("report")[0] == 0, "what did not pass is what one wants to look at"
    made.ends("publish", "gptq", 3)
    assert made.run("publish-gptq")[0] == 2
    made.ends("build", "gptq", 1)
    shutil.rmtree(made.out)
    assert [words[0] for words in made.run("publish-gptq")[1]] == ["build"]
    assert made.run("report")[0] == 2, "there is nothing to report on"


def test_an_interrupted_make_publishes_nothing_and_the_next_one_does(made):
    made.interrupted = True
    (made.folder / "wait").touch()
    code, commands = made.run("release")
    assert (code != 0, steps(commands)) == (True, ["build gptq"])
    made.interrupted = False
    (made.folder / "wait").unlink()
    code, commands = made.run("release")
    assert (code, steps(commands)) == (0, ["build gptq", "report gptq", "publish gptq"])


def test_artifacts_are_removed_by_their_own_goal_and_nothing_of_others_is(made):
    made.run("release", THREE)
    (made.out / "bielik-nano-gptq.work").mkdir()
    (made.out / "other-gptq").mkdir()
    venv = f"VENV={made.folder / 'venv'}"
    assert made.run("clean", venv)[0] == 0
    assert (made.out / "bielik-nano-gptq" / "quantkit.json").exists()
    assert made.run("clean-artifacts", venv)[0] == 0
    assert [path.name for path in made.out.iterdir()] == ["other-gptq"]
