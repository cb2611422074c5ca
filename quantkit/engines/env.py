"""Engines and their isolated environments: what there is, what is installed, and how to install the rest.

An environment is a virtual environment under QUANTKIT_HOME, named by the hash of its pins. It cannot be moved, so it is
made in place, and counts as installed only once a marker file, written last, says so.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from quantkit.errors import RefusedError, RunFailedError, UnavailableError
from quantkit.files import write_json
from quantkit.home import quantkit_home

MARKER = "installed.json"
INSTALL_LOG = "install.log"
LAST_LINES = 12
# runs a module, and ends with all that it has started once its standard input is closed: nothing is ever written there,
# and whoever holds its other end may be killed; what it starts finds an empty one
SUPERVISED = """
import os, runpy, signal, sys, threading

held = os.dup(0)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

def end():
    os.read(held, 1)
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=end, daemon=True).start()
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
CHECKPOINT = "checkpoint"
REFERENCE_RUNTIME = "reference"  # the one runtime that is no engine: our own decode
# of the caller's environment, what would make a runner import from elsewhere than its own environment
FOREIGN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


@dataclass(frozen=True)
class Engine:
    """One row of engines.toml, which says what each field means."""

    name: str
    package: str
    runner: str
    reads: tuple[str, ...]
    hardware: tuple[str, ...]
    python: tuple[str, ...]
    first: tuple[str, ...]
    requirements: tuple[str, ...]
    pip_flags: tuple[str, ...]
    pip_variables: dict[str, str]
    run_variables: dict[str, str]
    download_mb: int
    released: str
    archived: bool
    note: str
    settings: dict[str, dict[str, tuple[Any, ...]]]
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    narrower: dict[str, dict[str, dict[str, dict[str, list[Any]]]]] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    starts_from: str = CHECKPOINT

    @property
    def builds(self) -> tuple[str, ...]:
        """Formats it can make."""
        return tuple(self.settings)

    @property
    def takes_checkpoint(self) -> bool:
        """Whether its builds are given the checkpoint itself, and hold the whole of it."""
        return self.starts_from == CHECKPOINT

    @property
    def activations(self) -> str:
        """What `calibration.activations` says of its builds."""
        return "quantized" if self.takes_checkpoint else "float"

    @property
    def pins(self) -> str:
        """Hex digest of what decides the environment's content."""
        deciding = [self.first, self.requirements, self.pip_flags, sorted(self.pip_variables.items())]
        return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:12]

    @property
    def install_command(self) -> str:
        return f"quantkit engines install {self.name}"

    def own_values(self, made: str) -> dict[str, Any]:
        """What holds where a recipe leaves keys of [quantize] out; a key that is not named takes quantkit's value."""
        listed = {key: possible[0] for key, possible in self.settings[made].items() if possible}
        return listed | self.defaults.get(made, {})

    def require_model(self, model_type: str) -> None:
        """Stop where the engine cannot build a model.

        Raises:
            RefusedError: its type is none of those that it has code for.
        """
        if self.models and model_type not in self.models:
            raise RefusedError(
                f"the engine {self.name} knows no {model_type}; it knows {', '.join(self.models)}",
                where="engine",
                fix='choose another, or engine = "quantkit"',
            )

    def refusals(self, made: str, settings: dict[str, Any]) -> dict[str, str]:
        """One line for each setting of a build that the engine cannot honour, by its key; empty if it can honour all.

        Args:
            made: the format to be made.
            settings: the recipe's [quantize].
        """
        rows: list[tuple[str, Mapping[str, Sequence[Any]]]] = [("", self.settings[made])]
        rows += [
            (f" with {key} = {settings[key]!r}", beside[settings[key]])
            for key, beside in self.narrower.get(made, {}).items()
            if settings.get(key) in beside
        ]
        return {
            key: f"{key} = {value!r}: {self.name} knows {', '.join(map(str, known[key]))}{condition}"
            # what is refused whatever stands beside it is said so
            for condition, known in reversed(rows)
            for key, value in settings.items()
            if known.get(key) and value not in known[key]
        }


def list_engines() -> list[Engine]:
    """All engines, by name."""
    content = tomllib.loads(Path(__file__).with_name("engines.toml").read_text(encoding="utf-8"))
    return [_engine(name, table) for name, table in sorted(content.items())]


def find_engine(name: str) -> Engine:
    """The engine of a name.

    Raises:
        RefusedError: there is none; the closest name is suggested.
    """
    engines = {engine.name: engine for engine in list_engines()}
    if name in engines:
        return engines[name]
    near = difflib.get_close_matches(name, engines, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RefusedError(f"no engine named {name!r}", fix=f"{hint}there are: {', '.join(engines)}")


def require_readers(runtimes: Iterable[str], form: str, *, where: str = "validation.require") -> None:
    """Stop at the name of a runtime that is none, or does not read a format.

    Args:
        runtimes: their names.
        form: the format.
        where: they are named.

    Raises:
        RefusedError: naming those that read it.
    """
    for name in sorted({*runtimes} - {REFERENCE_RUNTIME}):
        if form not in find_engine(name).reads:
            raise RefusedError(
                f"the engine {name} does not read {form}",
                where=where,
                fix=f"leave it out; {form} is read by "
                + ", ".join(engine.name for engine in list_engines() if form in engine.reads),
            )


def describe(engine: Engine) -> dict[str, Any]:
    """What `quantkit engines list` says of an engine; `reason` is None where it runs."""
    requirement = next(pin for pin in engine.requirements if pin.startswith(engine.package))
    return asdict(engine) | {"builds": engine.builds, "requirement": requirement, "reason": why_not(engine)}


def engine_lines(found: list[dict[str, Any]]) -> list[str]:
    """What `quantkit engines list` says, for people: columns as wide as what stands in them."""
    widths = {key: max(len(engine[key]) for engine in found) for key in ("name", "requirement")}
    return [
        "  ".join([*(engine[key].ljust(width) for key, width in widths.items()), engine["reason"] or "installed"])
        for engine in found
    ]


def environment_of(engine: Engine) -> Path:
    """Where the engine's environment is or would be."""
    return quantkit_home() / "engines" / f"{engine.name}-{engine.pins}"


def is_installed(engine: Engine) -> bool:
    """Whether its environment is complete."""
    return (environment_of(engine) / MARKER).is_file()


def installed_facts(engine: Engine) -> dict[str, Any]:
    """What `install` noted: {"engine", "package", "version", "python", "seconds", "packages": {name: version}}.

    Raises:
        UnavailableError: it is not installed.
    """
    if not is_installed(engine):
        raise UnavailableError(f"the engine {engine.name} is not installed", fix=f"`{engine.install_command}`")
    facts: dict[str, Any] = json.loads((environment_of(engine) / MARKER).read_text(encoding="utf-8"))
    return facts


def why_not(engine: Engine, device: str | None = None) -> str | None:
    """Why the engine cannot run here, with what mends it; None if it can.

    Args:
        device: "cpu" or "cuda"; None asks whether any of its devices is here.
    """
    wanted = (device,) if device else engine.hardware
    unfit = [name for name in wanted if name not in engine.hardware]
    cuda_only = engine.hardware == ("cuda",)
    if not has_cuda() and (cuda_only or (wanted == ("cuda",) and not unfit)):
        return f"no CUDA device: {engine.name} needs an NVIDIA GPU; run it on a machine that has one"
    if unfit and cuda_only:
        return f"{engine.name} runs on cuda only: run it with `--device cuda`"
    if unfit:
        return f"{engine.name} does not run on {unfit[0]}; it runs on {' and '.join(engine.hardware)}"
    if is_installed(engine):
        return None
    if interpreter(engine) is None:
        known = " or ".join(engine.python)
        return f"{engine.name} needs Python {known}, and none is found: install it, then `{engine.install_command}`"
    return f"{engine.name} is not installed: `{engine.install_command}`"


def has_cuda() -> bool:
    """Whether an NVIDIA GPU's driver answers; asked without torch."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def interpreter(engine: Engine) -> str | None:
    """A Python that the engine can live in: this one, else one found by name; None if there is none."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" in engine.python:
        return sys.executable
    for version in reversed(engine.python):
        found = shutil.which(f"python{version}")
        # a version manager's shim exists for versions that are not switched on: only running it tells
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    return None


def install(engine: Engine, say: Callable[[str], None]) -> Path:
    """Make the engine's environment if it is not complete; returns its folder.

    Args:
        say: told the size of the download first, then each step.

    Raises:
        UnavailableError: no fitting Python, or pip failed; the error has its last lines and says where its log is.
    """
    environment = environment_of(engine)
    with _writing(environment):
        environment.parent.mkdir(parents=True, exist_ok=True)
    # a lock file that is removed can be locked twice, so it stays
    with FileLock(environment.parent / f"{engine.name}.lock"):
        if is_installed(engine):
            say(f"{engine.name} is installed already")
            return environment
        python = interpreter(engine)
        if python is None:
            raise UnavailableError(why_not(engine) or "", fix=f"install Python {engine.python[-1]}")
        say(f"{engine.name}: about {engine.download_mb} MB to download, 3 GB more where torch brings CUDA libraries")
        started = time.monotonic()
        # what a killed install left is of no use
        shutil.rmtree(environment, ignore_errors=True)
        with _writing(environment):
            _make(engine, python, environment, say)
            facts = _facts(engine, environment) | {"seconds": round(time.monotonic() - started, 1)}
            write_json(environment / MARKER, facts)
    say(f"{engine.name} {facts['version']} is installed")
    return environment


def environment_python(engine: Engine) -> Path:
    """The interpreter inside the engine's environment."""
    folder = environment_of(engine)
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def own_variables() -> dict[str, str]:
    """The caller's environment variables without those that would mix another Python's packages in."""
    return {key: value for key, value in os.environ.items() if key not in FOREIGN_VARIABLES}


def last_lines(log: Path) -> str:
    """The end of a log, indented for an error message."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(f"  {line[:300]}" for line in lines[-LAST_LINES:]) or "  (it printed nothing)"


@contextmanager
def _writing(environment: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailedError(
            f"cannot write the environment: {error.strerror or error}",
            where=str(environment),
            fix="an environment takes about 2 GB, 8 GB with CUDA libraries; QUANTKIT_HOME chooses another place",
        ) from error


def _engine(name: str, table: dict[str, Any]) -> Engine:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    values["settings"] = {
        made: {key: tuple(possible) for key, possible in keys.items()} for made, keys in table["settings"].items()
    }
    return Engine(name, **values)


def _make(engine: Engine, python: str, environment: Path, say: Callable[[str], None]) -> None:
    environment.mkdir(parents=True)
    _step(engine, python, ["venv", str(environment)], say, "making the environment")
    own = str(environment_python(engine))
    pip = ["pip", "install", "--disable-pip-version-check", "--no-input"]
    _step(engine, own, [*pip, *engine.pip_flags, *engine.first], say, f"installing {' '.join(engine.first)}")
    # torch and the build tools are there already: packages that look at torch while they are built must see this one
    rest = [*engine.pip_flags, "--no-build-isolation", *engine.requirements]
    _step(engine, own, [*pip, *rest], say, f"installing {' '.join(engine.requirements)}")


def _step(engine: Engine, python: str, module: list[str], say: Callable[[str], None], what: str) -> None:
    """Run a Python module with its arguments; neither it nor what it starts outlives this process."""
    say(what)
    log = environment_of(engine) / INSTALL_LOG
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {python} -I -m {' '.join(module)}\n")
        output.flush()
        with subprocess.Popen(
            [python, "-I", "-c", SUPERVISED, *module],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=own_variables() | engine.pip_variables,
            start_new_session=True,
        ) as process:
            code = process.wait()
    if code:
        raise UnavailableError(
            f"{what} failed for the engine {engine.name}:\n{last_lines(log)}",
            where=str(log),
            fix=f"connect to a package index and run `{engine.install_command}` again",
        )


def _facts(engine: Engine, environment: Path) -> dict[str, Any]:
    """Versions of everything in a finished environment."""
    script = (
        "import json, platform; from importlib.metadata import distributions; "
        "print(json.dumps([platform.python_version(), {d.metadata['Name']: d.version for d in distributions()}]))"
    )
    command = [str(environment_python(engine)), "-I", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=own_variables(), check=True)
    python, packages = json.loads(done.stdout)
    packages = dict(sorted((_plain(name), version) for name, version in packages.items()))
    return {
        "engine": engine.name,
        "package": engine.package,
        "version": packages[engine.package],
        "python": python,
        "packages": packages,
    }


def _plain(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def engine_rows() -> list[dict[str, Any]]:
    """What `quantkit engines list --json` shows: each engine, where it is and why it cannot run (None if it can)."""
    rows = []
    for engine in list_engines():
        table = asdict(engine) | {"builds": engine.builds}
        shown = {key: table[key] for key in ("name", "package", "reads", "builds", "hardware", "python")}
        shown |= {key: table[key] for key in ("requirements", "download_mb", "released", "archived", "note")}
        version = installed_facts(engine)["version"] if is_installed(engine) else None
        rows.append(shown | {"installed": version, "why_not": why_not(engine)})
    return rows
