"""The demonstration: bielik-nano, every recipe of it, and one table."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantkit.engines.env import find_engine, why_not
from quantkit.formats import READERS
from quantkit.job import Build, Job, default_out
from quantkit.judgement import validate
from quantkit.nano import NAME, ensure_nano
from quantkit.pipeline import build_all
from quantkit.progress import Progress
from quantkit.recipe_files import ALL, find_recipe, load_recipe, recipes_named
from quantkit.report.record import read_record
from quantkit.report.table import rows_of_several

# the 4-bit recipe with 2 bits: it shows a gate that fails
SPOILT = "gptq-2bit-under-4bit-gates"
# the recipe whose artifact its format's own reader judges, too; the others' would take longer than all builds
NATIVE = "gguf"


@dataclass(frozen=True)
class Demo:
    """What the demonstration built.

    Attributes:
        builds: by recipe name.
        not_run: what could not judge an artifact, and why; empty if all could.
    """

    builds: dict[str, Build]
    not_run: str = ""

    @property
    def rows(self) -> list[list[str]]:
        """One table over all artifacts; the reference comes once."""
        return rows_of_several({name: (done.record["validation"], done.seconds) for name, done in self.builds.items()})

    @property
    def remarks(self) -> list[str]:
        """What did not pass its gate, and what could not judge, with the reasons."""
        failed = [
            f"{name} failed its gate: {failure}"
            for name, done in self.builds.items()
            for failure in done.record["validation"]["gate"]["failures"]
        ]
        return failed + [self.not_run] * bool(self.not_run)

    def document(self) -> dict[str, Any]:
        """All records by recipe name."""
        return {name: done.record for name, done in self.builds.items()}


def run_demo(out: Path, *, device: torch.device, progress: Progress) -> Demo:
    """Build and judge every recipe of bielik-nano, and one that fails its gate; what is there already is kept.

    llama.cpp judges the GGUF files, too, where it is installed.

    Args:
        out: artifacts go into folders of this one.
        device: where to compute.
        progress: told what is going on.

    Raises:
        QuantkitError: the first that a recipe met, when all others are done.
    """
    names = [name.removeprefix(f"{NAME}/") for name in recipes_named(f"{NAME}/{ALL}")]
    wanted = {name: load_recipe(find_recipe(f"{NAME}/{name}")) for name in names}
    wanted[SPOILT] = load_recipe(find_recipe(f"{NAME}/gptq"), ("quantize.bits=2",))
    jobs = [Job(name, recipe, out / default_out(recipe, name).name) for name, recipe in wanted.items()]
    ensure_nano(progress.steps)  # before the first build, whose seconds would count it
    builds = {}
    for outcome in build_all(jobs, device=device, progress=progress):
        if outcome.error is not None:
            raise outcome.error
        assert outcome.build is not None, "neither built nor failed"
        builds[outcome.name] = outcome.build
    native, not_run = run_natively(builds[NATIVE], NAME, device=device, progress=progress)
    return Demo(builds | {NATIVE: native}, not_run)


def run_natively(done: Build, model: str, *, device: torch.device, progress: Progress) -> tuple[Build, str]:
    """A build judged by its format's own reader, too, and no word; or as it is, and why that reader did not run.

    Args:
        done: the build; one that its reader judged before stays as it is.
        model: its source.
        device: where to compute.
        progress: told what is going on.
    """
    engine = find_engine(READERS[done.record["format"]].native_engine)
    if reason := why_not(engine, device.type):
        return done, f"{done.record['format']} by {engine.name}: not run: {reason}"
    variants = done.record["validation"]["variants"]
    if all(any(result["runtime"] == engine.name for result in variant["results"]) for variant in variants):
        return done, ""
    validate(done.out, model=model, texts=(), runtime=engine.name, device=device, progress=progress)
    record = read_record(done.out)
    assert record is not None, "what was judged has a record"
    return replace(done, record=record), ""
