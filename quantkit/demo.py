"""The demonstration: bielik-nano, every recipe of it, and one table."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.nano import NAME, ensure_nano
from quantkit.pipeline import Build, build, default_out
from quantkit.progress import Progress
from quantkit.recipe import find_recipe, list_recipes, load_recipe
from quantkit.report.table import rows

# the 4-bit recipe with 2 bits: it shows a gate that fails
SPOILT = "gptq-2bit-under-4bit-gates"


@dataclass(frozen=True)
class Demo:
    """What the demonstration built: recipe names with their builds, and seconds each took just now."""

    builds: dict[str, Build]
    seconds: dict[str, float]

    @property
    def rows(self) -> list[list[str]]:
        """One table over all artifacts; the reference comes once."""
        table: list[list[str]] = []
        for name, done in self.builds.items():
            found = rows(name, done.record["validation"], seconds=self.seconds[name])
            table += found if not table else found[1:]
        return table

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


def run_demo(out: Path, *, device: torch.device, progress: Progress, say: Callable[[str], None]) -> Demo:
    """Build and judge every recipe of bielik-nano, and one that fails its gate; what is there already is kept.

    Args:
        out: artifacts go into folders of this one.
        device: where to compute.
        progress: told what is going on.
        say: told which recipe is next.
    """
    ensure_nano(progress.steps)
    builds, seconds = {}, {}
    names = [name.removeprefix(f"{NAME}/") for name in list_recipes() if name.startswith(f"{NAME}/")]
    wanted = {name: load_recipe(find_recipe(f"{NAME}/{name}")) for name in names}
    wanted[SPOILT] = load_recipe(find_recipe(f"{NAME}/gptq"), ("quantize.bits=2",))
    for name, recipe in wanted.items():
        say(f"{NAME}/{name}")
        started = time.perf_counter()
        builds[name] = build(recipe, out=out / default_out(recipe, name).name, device=device, progress=progress)
        seconds[name] = time.perf_counter() - started
    return Demo(builds, seconds)
