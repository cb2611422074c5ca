"""The lock of an artifact's folder, a disk that is really full, and what does not belong into an artifact."""

import errno
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from quantkit.errors import RefusedError, RunFailedError
from quantkit.files import disk_errors, shared
from quantkit.judgement import validate
from quantkit.lock import lock_file, locked
from quantkit.pipeline import build
from quantkit.progress import Progress
from quantkit.publish import publish
from quantkit.report.inspect import inspect_artifact
from quantkit.workdir import RECORD, is_being_replaced, open_workdir, work_folder
from tests.test_pipeline import hashes, recipe, text_file  # noqa: F401 (fixtures)

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
MIB = 1024**2
# more than a plan wants to see free; what a test needs to fail is filled up
DISK_BYTES = 80 * MIB


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    try:
        done = subprocess.run(mounting, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command is here")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted (it takes root): {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take what is left of a disk; returns the file that does."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(MIB)):
            pass
    assert not shutil.disk_usage(folder).free
    return path


def test_a_full_disk_keeps_finished_layers(recipe, small_disk, tmp_path):  # noqa: F811
    out, fillers = small_disk / "a", []

    def fill_in_the_second_layer(facts):
        if facts.name.startswith("model.layers.1.") and not fillers:
            fillers.append(fill(small_disk))

    with pytest.raises(RunFailedError) as caught:
        build(recipe, out=out, device=CPU, validated=False, progress=Progress(linear=fill_in_the_second_layer))
    assert str(caught.value) == (
        "the disk is full; what was finished is kept\n"
        f"  at:  {work_folder(out)}\n"
        "  fix: free some space and run the same command again: it goes on where it stopped"
    )
    assert not out.exists()
    fillers[0].unlink()
    solved = []
    build(recipe, out=out, device=CPU, validated=False, progress=Progress(linear=solved.append))
    assert {facts.name.split(".")[2] for facts in solved} == {"1"}  # layer 0 was kept
    assert hashes(out) == hashes(build(recipe, out=tmp_path / "whole", device=CPU, validated=False).out)


def test_a_full_disk_leaves_card_and_record_as_they_were(recipe, small_disk):  # noqa: F811
    out = build(recipe, out=small_disk / "a", device=CPU, validated=False).out
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    fill(small_disk)
    with pytest.raises(RunFailedError, match="the disk is full") as caught:
        validate(out, model=recipe.model.id, texts=recipe.validation.texts, runtime="reference", device=CPU)
    assert caught.value.where == str(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_full_disk_under_the_cache(recipe, small_disk, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("QUANTKIT_HOME", str(small_disk / "home"))
    filler = fill(small_disk)
    with pytest.raises(RunFailedError, match="the disk is full") as caught:
        build(recipe, out=tmp_path / "a", device=CPU)
    assert caught.value.where == str(small_disk / "home" / "cache" / "reference")
    filler.unlink()
    assert build(recipe, out=tmp_path / "a", device=CPU).reused


def test_what_is_damaged_under_the_cache_is_computed_again(recipe, tmp_path):  # noqa: F811
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out

    def judged() -> dict:
        return validate(out, model=recipe.model.id, texts=recipe.validation.texts, runtime="reference", device=CPU)

    first = judged()["reference"]
    kept = {path: path.read_bytes() for path in (tmp_path / "home" / "cache" / "reference").glob("*.[js]*")}
    assert sorted(path.suffix for path in kept) == [".json", ".safetensors"]
    for path, content in kept.items():
        for damaged in (b"", content[: len(content) // 2], b"{}", b"\xff" * 16):
            path.write_bytes(damaged)
            assert judged()["reference"] == first
            assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("number", "what", "fix"),
    [
        (errno.EACCES, "cannot write: Permission denied", "choose another"),
        (errno.ENOTDIR, "cannot be written there: Not a directory", "choose another"),
        (errno.EEXIST, "cannot be written there: File exists", "choose another"),
        (errno.EISDIR, "cannot be written there: Is a directory", "choose another"),
        (errno.ENAMETOOLONG, "cannot be written there: File name too long", "choose another"),
        (
            errno.EFBIG,
            "a file may not become as large as it has to; what was finished is kept",
            "raise the limit (ulimit -f) and run the same command again",
        ),
        (
            errno.EIO,
            "the disk fails: Input/output error",
            "look into the system's log (dmesg), or choose a folder on another disk",
        ),
    ],
)
def test_what_the_disk_does_not_take_is_told_with_the_place(number, what, fix, tmp_path):
    with pytest.raises(RunFailedError) as caught, disk_errors(tmp_path, "choose another"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"{what}\n  at:  {tmp_path}\n  fix: {fix}"
    with pytest.raises(RunFailedError, match=re.escape(what)), disk_errors(tmp_path):
        raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")


def refusal(out: Path) -> str:
    return (
        f"another quantkit is at work on {out.name} (process {os.getpid()} on {platform.node()})\n"
        f"  at:  {out}\n"
        "  fix: wait for it to end, or choose another folder with --out"
    )


def test_one_command_at_a_time_on_one_folder(recipe, tmp_path):  # noqa: F811
    out = build(recipe, out=tmp_path / "a", device=CPU).out
    commands = {
        "build": lambda: build(recipe, out=out, device=CPU),
        "validate": lambda: validate(out, model=recipe.model.id, texts=(), runtime="reference", device=CPU),
        "publish": lambda: publish(out, repo="an-org/a", revision="main", private=True, dry_run=True),
    }
    for name, command in commands.items():
        with locked(out), pytest.raises(RunFailedError) as caught:
            command()
        assert str(caught.value) == refusal(out), name
    assert not lock_file(out).exists()


def test_another_users_command_sees_the_lock(tmp_path):
    """Another QUANTKIT_HOME, another name of the same folder."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    program = (
        "import sys\nfrom pathlib import Path\nfrom quantkit.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    pass"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "link" / "a")]
    surroundings = os.environ | {"QUANTKIT_HOME": str(tmp_path / "other")}
    with locked(tmp_path / "real" / "a"):
        held = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=surroundings)
    assert f"another quantkit is at work on a (process {os.getpid()} on " in held.stderr
    assert subprocess.run(command, cwd=ROOT, env=surroundings).returncode == 0


def test_a_lock_whose_file_is_removed_is_never_held_twice(tmp_path, monkeypatch):
    """The second has opened the file of the first, which ends then; a third begins before the second asks for it."""
    first, third, plain = locked(tmp_path / "a"), locked(tmp_path / "a"), fcntl.flock

    def flock(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", plain)
        first.__exit__(None, None, None)
        third.__enter__()
        plain(descriptor, how)

    first.__enter__()
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunFailedError, match="another quantkit is at work on a"), locked(tmp_path / "a"):
        pass
    third.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_made_for_a_lock_go_with_it(tmp_path):
    with locked(tmp_path / "made" / "for" / "a"):
        assert lock_file(tmp_path / "made" / "for" / "a").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_only_read_needs_no_lock_where_none_can_be_made(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with locked(tmp_path / "a", needed=False):
        pass
    with pytest.raises(RunFailedError, match="cannot write: Read-only file system"), locked(tmp_path / "a"):
        pass


def test_a_folder_that_takes_no_file_ends_in_an_error(tmp_path, monkeypatch):
    """As /proc does: a new file is not forbidden there, it is "not found"."""
    opened = []

    def refuse(*_):
        opened.append(1)
        assert len(opened) < 1000
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunFailedError) as caught, locked(tmp_path / "made" / "a"):
        pass
    assert str(caught.value) == (
        "the lock's file was not there after 100 attempts to make it\n"
        f"  at:  {tmp_path / 'made' / 'a.lock'}\n"
        "  fix: choose a folder on another disk with --out"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"made/{'x' * 300}", "cannot be written there: File name too long"),
        (f"{'x' * 300}/a", "cannot be written there: File name too long"),
        ("file/a", "cannot be written there: File exists"),
        ("file/deeper/a", "cannot be written there: Not a directory"),
    ],
)
def test_what_can_be_no_folder_leaves_nothing(name, what, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFailedError) as caught, locked(tmp_path / name):
        pass
    assert (caught.value.what, caught.value.where) == (what, f"{tmp_path / name}.lock")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_root_is_no_artifact():
    with pytest.raises(RefusedError) as caught, locked(Path("/")):
        pass
    assert str(caught.value) == "/ is no place for an artifact\n  at:  /\n  fix: name a folder below it with --out"


def test_a_disk_that_cannot_lock_is_no_place_to_build(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunFailedError) as caught, locked(tmp_path / "a"):
        pass
    assert str(caught.value) == (
        "the disk cannot lock files: Function not implemented\n"
        f"  at:  {tmp_path}\n"
        "  fix: mount it with locks (Lustre: flock), or choose a folder on another disk"
    )


def test_only_what_nobody_writes_is_removed_from_a_shared_folder(tmp_path):
    orphan, other = tmp_path / ".a.json.123.partial", tmp_path / ".b.partial"
    other.touch()
    with shared(tmp_path):
        orphan.touch()
        with shared(tmp_path):
            assert orphan.exists()
    with shared(tmp_path):
        assert not orphan.exists()
        assert other.exists()


def test_verify_names_every_file_that_does_not_belong_there(recipe, tmp_path):  # noqa: F811
    out = build(recipe, out=tmp_path / "a", device=CPU, validated=False).out
    (out / ".gitattributes").touch()
    (out / ".cache" / "huggingface").mkdir(parents=True)
    (out / ".cache" / "huggingface" / "x.metadata").touch()
    assert inspect_artifact(out, verify=True)["changed"] == []
    (out / ".notes").touch()
    (out / "deep" / ".hidden").mkdir(parents=True)
    (out / "deep" / ".hidden" / "more.txt").touch()
    (out / ".README.md.77.partial").touch()
    assert inspect_artifact(out, verify=True)["changed"] == [
        ".README.md.77.partial: not in the record",
        ".notes: not in the record",
        "deep/.hidden/more.txt: not in the record",
    ]
    with locked(out):  # as the next command does
        assert not (out / ".README.md.77.partial").exists()
        assert (out / ".notes").exists()


def test_work_of_another_build_that_was_half_thrown_away_is_not_used(recipe, tmp_path):  # noqa: F811
    """The journal went first, and notes of a survey stayed."""
    notes = work_folder(tmp_path / "a") / "notes"
    notes.mkdir(parents=True)
    (notes / "layers.0.json").write_text("{}")
    seen = []
    progress = Progress(linear=lambda _: seen.append(notes.exists()))
    build(recipe, out=tmp_path / "a", device=CPU, validated=False, progress=progress)
    assert set(seen) == {False}


@pytest.mark.parametrize(
    "journal",
    [
        b"",
        b'{"identity": {"format"',
        b"{}",
        b"null",
        b"\xff",
        b'{"identity": {}, "items": {"head": 1}, "seconds": 1.0}',
        b'{"identity": {}, "items": {"head": {}}, "seconds": 1.0}',
        b'{"identity": {}, "items": {}, "seconds": "long"}',
    ],
)
def test_a_damaged_journal_is_named_with_its_remedy(tmp_path, journal):
    path = work_folder(tmp_path / "a") / "journal.json"
    path.parent.mkdir()
    path.write_bytes(journal)
    with pytest.raises(RunFailedError, match="the journal of an earlier run is damaged") as caught:
        open_workdir(tmp_path / "a", dict, fresh=False)
    assert (caught.value.where, "--fresh" in caught.value.fix) == (str(path), True)
    assert path.read_bytes() == journal
    assert open_workdir(tmp_path / "a", dict, fresh=True).facts == {}


@pytest.mark.parametrize("there", [True, False])
def test_a_fresh_build_that_was_interrupted_is_told_from_work_that_a_kill_left(tmp_path, there):
    """Of the first the artifact that is there is not what was asked for; what the second made is in its place."""
    out, mine = tmp_path / "a", {"recipe": {"bits": 4}}
    if there:
        out.mkdir()
        (out / RECORD).write_text("{}")
    assert not is_being_replaced(out, lambda: mine), "nothing was begun"
    open_workdir(out, lambda: mine, fresh=True).finish("head", lambda path: path.write_bytes(b"x"), {"n": 1})
    assert is_being_replaced(out, lambda: mine) == there
    assert not is_being_replaced(out, lambda: {"recipe": {"bits": 3}}), "another's work"
    assert open_workdir(out, lambda: mine, fresh=False).facts == {"head": {"n": 1}}
    assert open_workdir(out, lambda: mine, fresh=True).facts == {}, "begun once more"
