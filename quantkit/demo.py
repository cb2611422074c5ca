"""The demonstration: bielik-nano, every recipe of it, and one table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.nano import NAME
from quantkit.pipeline import Build, Job, build_all, default_out
from quantkit.progress import Progress
from quantkit.recipe import ALL, find_recipe, load_recipe, recipes_named
from quantkit.report.table import rows_of_several

# the 4-bit recipe with 2 bits: it shows a gate that fails
SPOILT = "gptq-2bit-under-4bit-gates"


@dataclass(frozen=True)
class Demo:
    """What the demonstration built, by recipe name."""

    builds: dict[str, Build]

    @property
    def rows(self) -> list[list[str]]:
        """One table over all artifacts; the reference comes once."""
        return rows_of_several({name: (done.record["validation"], done.seconds) for name, done in self.builds.items()})

    @property
    def remarks(self) -> list[str]:
        """What did not pass its gate, and why."""
        return [
            f"{name} failed its gate: {failure}"
            for name, done in self.builds.items()
            for failure in done.record["validation"]["gate"]["failures"]
        ]

    def document(self) -> dict[str, Any]:
        """All records by recipe name."""
        return {name: done.record for name, done in self.builds.items()}


def run_demo(out: Path, *, device: torch.device, progress: Progress) -> Demo:
    """Build and judge every recipe of bielik-nano, and one that fails its gate; what is there already is kept.

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
    builds = {}
    for outcome in build_all(jobs, device=device, progress=progress):
        if outcome.error is not None:
            raise outcome.error
        assert outcome.build is not None, "neither built nor failed"
        builds[outcome.name] = outcome.build
    return Demo(builds)
