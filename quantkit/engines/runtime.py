"""Engines at work: a runner script as a subprocess inside its environment, with files in and out.

Shape legend: W windows, T tokens, N predicted tokens of one window, V vocabulary.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from quantkit.engines.env import (
    Engine,
    environment_of,
    environment_python,
    last_lines,
    own_variables,
    why_not,
)
from quantkit.errors import RefusedError, RunFailedError, UnavailableError

THREADS = 2
RUNNERS = Path(__file__).with_name("runners")
CHECK_TOKENS = 32
CHECK_SETTINGS = {"bits": 4, "group_size": 32}


class Window(Protocol):
    """Tokens that go through the model together; `quantkit.validation.text.Window` is one."""

    @property
    def inputs(self) -> Sequence[int]: ...

    @property
    def targets(self) -> Sequence[int]: ...


class _Running:
    """A runner that was started: its answers line by line, and what it left when it ended."""

    def __init__(self, engine: Engine, verb: str, process: "subprocess.Popen[str]", log: Path) -> None:
        self.engine, self.verb, self.process, self.log = engine, verb, process, log

    def answer(self) -> str:
        """Its next line.

        Raises:
            RunFailedError: it ended instead.
        """
        line = _open(self.process.stdout).readline()
        if not line:
            raise self.failure()
        return line.rstrip("\n")

    def ask(self, word: str) -> None:
        """Send it a line; a runner that has ended is noticed at the next answer."""
        pipe = _open(self.process.stdin)
        try:
            pipe.write(word + "\n")
            pipe.flush()
        except BrokenPipeError:
            raise self.failure() from None

    def result(self) -> dict[str, Any]:
        """The JSON document on its last line, once it ended well.

        Raises:
            RunFailedError: it ended badly, or said nothing of the kind.
        """
        lines = [line for line in _open(self.process.stdout) if line.strip()]
        if self.process.wait() or not lines:
            raise self.failure()
        try:
            found: dict[str, Any] = json.loads(lines[-1])
        except json.JSONDecodeError:
            raise self.failure() from None
        return found

    def failure(self) -> RunFailedError:
        """What to raise when it did not do as it should; its log is kept."""
        code = self.process.wait()
        return RunFailedError(
            f"the engine {self.engine.name} failed at {self.verb} (exit code {code}):\n{last_lines(self.log)}",
            where=str(self.log),
            fix=f"read the log; `quantkit engines check {self.engine.name}` tells whether the engine works at all",
        )


def run(engine: Engine, verb: str, request: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The JSON document that one verb of an engine's runner answers with.

    Args:
        verb: "build"; `evaluate` is a conversation, see there.
        request: what the runner is told; "threads" and "device" are filled in where they are missing.
        arrays: written to files, whose paths join the request under the same names.

    Raises:
        RunFailedError: the runner failed; the error has its last lines.
    """
    with _started(engine, verb, request, arrays) as running:
        return running.result()


def evaluate(
    engine: Engine,
    artifact: Path,
    windows: Sequence[Window],
    *,
    files: Sequence[str] = (),
    device: str = "cpu",
    threads: int = THREADS,
) -> Iterator[np.ndarray]:
    """Logits float32 [N, V] of each window's predicted positions, in window order; each array is the caller's own.

    Args:
        artifact: a folder of a format that the engine reads.
        windows: at least one.
        files: names of the weight files that are meant, where the folder holds several variants.
        device: "cpu" or "cuda".
        threads: of the CPU.

    Raises:
        UnavailableError: the engine cannot run here; at once, not at the first window.
        RunFailedError: its runner failed.
    """
    require(engine, device)
    assert windows, "an engine is asked about at least one window"
    lengths = np.array([len(window.inputs) for window in windows], dtype=np.int32)
    padded = np.zeros((len(windows), int(lengths.max())), dtype=np.int32)
    for row, window in zip(padded, windows, strict=True):
        row[: len(window.inputs)] = window.inputs
    request = {"artifact": str(artifact.resolve()), "files": list(files), "device": device, "threads": threads}
    return _logits(engine, windows, request, {"windows": padded, "lengths": lengths})


def build(
    engine: Engine,
    made: str,
    checkpoint: Path,
    tokens: np.ndarray,
    settings: dict[str, Any],
    out: Path,
    *,
    device: str = "cpu",
    threads: int = THREADS,
) -> dict[str, Any]:
    """Let the engine quantize a checkpoint; `out` appears whole or not at all.

    Args:
        made: the format.
        checkpoint: the folder that it starts from, see `Engine.starts_from`.
        tokens: int64 [W, T], the calibration windows; none for an engine that is given statistics.
        settings: the recipe's [quantize], as the engine can honour it (`Engine.refusals`).
        out: must not exist.
        device: "cpu" or "cuda".
        threads: of the CPU.

    Returns:
        {"package", "version", "seconds"}, and versions of what else decides

    Raises:
        UnavailableError: the engine cannot run here.
        RefusedError: it cannot honour a setting, or `out` exists.
        RunFailedError: its runner failed.
    """
    require(engine, device)
    if refusals := engine.refusals(made, settings):
        raise RefusedError(
            f"the engine {engine.name} cannot honour the recipe:\n  " + "\n  ".join(refusals.values()),
            where="quantize",
            fix='change the keys, or choose engine = "quantkit"',
        )
    if out.exists():
        raise RefusedError(f"{out} exists", fix="choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    request = {
        "format": made,
        "checkpoint": str(checkpoint.resolve()),
        "out": str((partial / "artifact").resolve()),
        "settings": settings,
        "device": device,
        "threads": threads,
    }
    try:
        facts = run(engine, "build", request, {"tokens": np.asarray(tokens, dtype=np.int64)})
        (partial / "artifact").rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def check(engine: Engine, checkpoint: Path, *, device: str = "cpu") -> dict[str, Any]:
    """Let the engine make the first of its formats from a small checkpoint, in 4 bits, and read it back.

    Args:
        checkpoint: a folder; its linears must be in multiples of 32.

    Returns:
        what `build` returns, with "evaluate_seconds" and "largest_logit".

    Raises:
        UnavailableError: it cannot run here.
        RunFailedError: it does not work.
    """
    import time

    vocabulary = int(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    tokens = np.random.default_rng(0).integers(3, vocabulary, (8, CHECK_TOKENS))
    with tempfile.TemporaryDirectory(prefix="quantkit-check-") as folder:
        artifact = Path(folder) / "artifact"
        made = engine.builds[0]
        settings = engine.own_values(made) | CHECK_SETTINGS
        facts = build(engine, made, checkpoint, tokens, settings, artifact, device=device)
        started = time.monotonic()
        files = sorted(path.relative_to(artifact).as_posix() for path in artifact.rglob("*.safetensors"))
        found = list(evaluate(engine, artifact, [_Tokens(tokens[0].tolist())], files=files, device=device))
    if not np.isfinite(found[0]).all():
        raise RunFailedError(
            f"the engine {engine.name} reads its own artifact as numbers that are not finite",
            where=str(checkpoint),
            fix=f"remove {environment_of(engine)} and run `{engine.install_command}`",
        )
    return facts | {
        "evaluate_seconds": round(time.monotonic() - started, 3),
        "largest_logit": float(np.abs(found[0]).max()),
    }


class _Tokens:
    """A window in which every position predicts; nobody looks at what."""

    def __init__(self, inputs: list[int]) -> None:
        self.inputs = self.targets = inputs


def _logits(
    engine: Engine, windows: Sequence[Window], request: dict[str, Any], arrays: dict[str, np.ndarray]
) -> Iterator[np.ndarray]:
    with tempfile.TemporaryDirectory(prefix="quantkit-logits-") as folder:
        buffer_path = Path(folder) / "logits.npy"
        with _started(engine, "evaluate", request | {"buffer": str(buffer_path)}, arrays) as running:
            word, *_ = running.answer().split()
            assert word == "open", "the runner's first word"
            buffer_TV = np.load(buffer_path, mmap_mode="r")
            for index, window in enumerate(windows):
                running.ask("next")
                word, which, number = running.answer().split()
                stop = len(window.inputs)
                assert (word, int(which), int(number)) == ("ready", index, stop), "the runner answers what was asked"
                yield np.array(buffer_TV[stop - len(window.targets) : stop])
            running.result()


@contextmanager
def _started(engine: Engine, verb: str, request: dict[str, Any], arrays: dict[str, np.ndarray]) -> Iterator[_Running]:
    """A runner at work; ended with the block; its log stays only if it failed."""
    logs = environment_of(engine) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantkit-engine-") as folder:
        full: dict[str, Any] = {"threads": THREADS, "device": "cpu"} | request
        for name, array in arrays.items():
            path = Path(folder) / f"{name}.npy"
            np.save(path, array)
            full[name] = str(path)
        request_path = Path(folder) / "request.json"
        request_path.write_text(json.dumps(full), encoding="utf-8")
        with tempfile.NamedTemporaryFile("w", prefix=f"{verb}-", suffix=".log", dir=logs, delete=False) as log:
            process = subprocess.Popen(
                command(engine, verb, request_path),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=variables(engine, full["threads"], full["device"]),
                # packages leave logs wherever they are started
                cwd=folder,
                # an interrupt is for this process, which then ends the runner and removes what it left
                start_new_session=True,
            )
        failed = False
        try:
            yield _Running(engine, verb, process, Path(log.name))
        except RunFailedError:
            failed = True
            raise
        finally:
            _end(process)
            if not failed:
                Path(log.name).unlink()


def _end(process: "subprocess.Popen[str]") -> None:
    """Close its pipes, and stop it if it still runs."""
    if process.poll() is None:
        process.kill()
    for pipe in (process.stdin, process.stdout):
        try:
            _open(pipe).close()
        except BrokenPipeError:
            continue
    process.wait()


def command(engine: Engine, verb: str, request: Path) -> list[str]:
    """The command line of a runner.

    Args:
        engine: installed.
        verb: "evaluate" or "build".
        request: the file with what it is told.
    """
    # -I keeps the script's own folder off the import path, where gptqmodel.py would hide the package
    python = str(environment_python(engine).absolute())
    return [python, "-I", str(RUNNERS / "start.py"), str(RUNNERS / engine.runner), verb, str(request)]


def variables(engine: Engine, threads: int, device: str) -> dict[str, str]:
    """Environment variables of a runner."""
    found = own_variables() | engine.run_variables
    # everything it needs is in folders it is given
    found |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
    # compilation at first use would take minutes and need a compiler
    found |= {"TORCHDYNAMO_DISABLE": "1"}
    if device == "cpu":
        # packages prefer a GPU that they see
        found |= {"CUDA_VISIBLE_DEVICES": ""}
    return found


def require(engine: Engine, device: str) -> None:
    """Stop where an engine cannot run.

    Raises:
        UnavailableError: it is not installed, or its hardware is not here; what mends it is a part of the reason.
    """
    if reason := why_not(engine, device):
        raise UnavailableError(reason)


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "both pipes are ours"
    return pipe
