"""Builds killed at every moment: what is on disk is whole, and the same command ends in the same bytes.

One process imports everything and forks a child for each build, so that a kill costs a second and not an import.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantkit.home import quantkit_home
from quantkit.lock import lock_file, locked
from quantkit.pipeline import build
from quantkit.recipe import Recipe
from quantkit.report.record import changed_files, read_record
from quantkit.workdir import JOURNAL, work_folder
from tests.test_pipeline import changed, hashes, recipe, text_file  # noqa: F401 (fixtures)

CPU = torch.device("cpu")
SIDES = ("before", "after")
# of a build that validates, and of one that replaces an artifact; a new rename is a new moment to be killed at
RENAMES, RENAMES_OF_REPLACING = 16, 18
SERVER = """
import json, os, signal, sys, time
from pathlib import Path

import torch, transformers  # noqa: F401
from quantkit.pipeline import build
from quantkit.recipe import Recipe

plain, count = Path.replace, 0

def run(asked):
    def replace(self, target):
        global count
        count += 1
        mine = count == asked["renames"]
        if mine and asked["side"] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        done = plain(self, target)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    Path.replace = replace
    os.environ["QUANTKIT_HOME"] = asked["home"]
    recipe = Recipe.of(json.loads(asked["recipe"]))
    build(recipe, out=Path(asked["out"]), device=torch.device("cpu"), fresh=asked["fresh"])

for line in sys.stdin:
    asked = json.loads(line)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(asked)
            os.write(writer, b"%d" % count)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    if asked["seconds"] is not None:
        time.sleep(asked["seconds"])
        os.kill(child, signal.SIGKILL)
    counted = os.read(reader, 20)
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, int(counted or 0)]), flush=True)
"""


class Builds:
    """Builds in children of a process of their own."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )

    def run(self, wanted: Recipe, out: Path, *, fresh=False, renames=0, side="before", seconds=None) -> tuple[int, int]:
        """Exit code and renames of a build that is killed at its n-th rename, after so long, or not at all."""
        asked = {"recipe": wanted.model_dump_json(), "out": str(out), "fresh": fresh, "home": str(quantkit_home())}
        asked |= {"renames": renames, "side": side, "seconds": seconds}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        status, counted = json.loads(self._server.stdout.readline())
        return status, counted

    def close(self) -> None:
        self._server.kill()
        self._server.wait()


@pytest.fixture(scope="module")
def builds() -> Iterator[Builds]:
    server = Builds()
    yield server
    server.close()


@pytest.fixture
def seed() -> Iterator[random.Random]:
    """Different in every run; the seed is printed, and pytest shows it where the test fails."""
    number = int.from_bytes(os.urandom(4))
    print(f"seed {number}")
    return random.Random(number)


def nothing_is_left(out: Path) -> None:
    """No work file, lock or half-written file: beside the artifact, in it, or among the cached references."""
    assert not work_folder(out).exists()
    assert not lock_file(out).exists()
    assert changed_files(out, read_record(out)) == []
    assert not list(out.rglob(".*"))
    assert not list(quantkit_home().rglob("*.partial"))


def goes_on(wanted: Recipe, out: Path, whole: dict[str, str], *, fresh: bool = False) -> None:
    done = build(wanted, out=out, device=CPU, fresh=fresh)
    assert hashes(out) == whole
    assert done.record["validation"] is not None
    nothing_is_left(out)


def killed_at_renames(wanted: Recipe, tmp_path: Path, builds: Builds, moments: list[tuple[int, str]]) -> None:
    status, counted = builds.run(wanted, tmp_path / "whole")
    assert (status, counted) == (0, RENAMES)
    whole = hashes(tmp_path / "whole")
    for renames, side in dict.fromkeys(moments):
        forget_references()
        out = tmp_path / f"{side}-{renames}"
        assert builds.run(wanted, out, renames=renames, side=side)[0] == -signal.SIGKILL
        print(f"killed {side} rename {renames}")
        goes_on(wanted, out, whole)


def forget_references() -> None:
    """Make the next build run its reference model, as the first did."""
    for path in (quantkit_home() / "cache").rglob("*.*"):
        path.unlink()


def killed_while_replacing(wanted: Recipe, tmp_path: Path, builds: Builds, moments: list[tuple[int, str]]) -> None:
    """An artifact of another recipe stands there; at every instant one of the two is there, whole."""
    old, out = changed(wanted, "quantize", bits=3), tmp_path / "out"
    assert builds.run(old, tmp_path / "old")[0] == 0
    earlier = hashes(tmp_path / "old")
    shutil.copytree(tmp_path / "old", out)
    forget_references()
    assert builds.run(wanted, out, fresh=True) == (0, RENAMES_OF_REPLACING)
    whole = hashes(out)
    for renames, side in moments:
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "old", out)
        forget_references()
        assert builds.run(wanted, out, fresh=True, renames=renames, side=side)[0] == -signal.SIGKILL
        print(f"killed {side} rename {renames}")
        with locked(out):
            assert hashes(out) in (earlier, whole)
            assert changed_files(out, read_record(out)) in ([], ["README.md: changed"])
        # what the killed run kept is gone on with; before it has kept anything, it has to be asked for again
        begun = (work_folder(out) / JOURNAL).exists() or hashes(out) == whole
        goes_on(wanted, out, whole, fresh=not begun)


def test_a_build_killed_at_a_rename_ends_in_the_same_bytes(recipe, tmp_path, builds, seed):  # noqa: F811
    # 12 the artifact itself, 16 the record with its validation
    moments = [(12, "after"), (16, "before"), (seed.randint(1, RENAMES), seed.choice(SIDES))]
    killed_at_renames(recipe, tmp_path, builds, moments)


def test_an_artifact_is_whole_while_another_replaces_it(recipe, tmp_path, builds):  # noqa: F811
    # 12 the old artifact goes aside, 13 the new one takes its place
    killed_while_replacing(recipe, tmp_path, builds, [(12, "after"), (13, "after")])


@pytest.mark.slow
def test_a_build_killed_at_any_rename_ends_in_the_same_bytes(recipe, tmp_path, builds):  # noqa: F811
    moments = [(renames, side) for renames in range(1, RENAMES + 1) for side in SIDES]
    killed_at_renames(recipe, tmp_path, builds, moments)


@pytest.mark.slow
def test_an_artifact_is_whole_at_any_rename_of_another_that_replaces_it(recipe, tmp_path, builds):  # noqa: F811
    moments = [(renames, side) for renames in range(1, RENAMES_OF_REPLACING + 1) for side in SIDES]
    killed_while_replacing(recipe, tmp_path, builds, moments)


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_build_killed_at_any_moment_ends_in_the_same_bytes(kills, recipe, tmp_path, builds, seed):  # noqa: F811
    """One build, killed again and again, each time after longer, and not thrown away between."""
    whole = hashes(build(recipe, out=tmp_path / "whole", device=CPU).out)
    out = tmp_path / "out"
    for _ in range(kills):
        forget_references()
        seconds = seed.uniform(0.0, 2.0)
        print(f"killed after {seconds:.3f} s")
        builds.run(recipe, out, seconds=seconds)
    goes_on(recipe, out, whole)


def test_the_seconds_of_a_build_that_was_killed_count(recipe, tmp_path, builds):  # noqa: F811
    """From the source on the disk, and with those of the run that did not come to the end."""
    assert builds.run(recipe, tmp_path / "a", renames=7)[0] == -signal.SIGKILL
    journal = json.loads((work_folder(tmp_path / "a") / "journal.json").read_text())
    facts = build(recipe, out=tmp_path / "a", device=CPU).record["build"]
    assert facts["seconds"]["earlier runs"] == round(journal["seconds"], 3) > 0
    assert facts["wall_seconds"] == pytest.approx(sum(facts["seconds"].values()), abs=0.01)
    assert facts["seconds"]["source"] > 0
    whole = build(recipe, out=tmp_path / "b", device=CPU).record["build"]
    assert "earlier runs" not in whole["seconds"]
