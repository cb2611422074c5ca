"""Builds recipes, given as JSON after a folder, and prints how many bytes of tensors each left in cycles."""

import gc
import json
import sys
from pathlib import Path

import torch

from quantkit.pipeline import build
from quantkit.recipe import Recipe


def left_behind(recipe: Recipe, out: Path) -> int:
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    build(recipe, out=out, device=torch.device("cpu"), validated=False)
    gc.collect()
    # by their types: a weak reference among them may lead nowhere
    tensors = [each for each in gc.garbage if issubclass(type(each), torch.Tensor) and not each.is_meta]
    found = sum(each.nbytes for each in tensors)
    gc.set_debug(0)
    gc.garbage.clear()
    return found


if __name__ == "__main__":
    folder, recipes = Path(sys.argv[1]), map(json.loads, sys.argv[2:])
    print(*(left_behind(Recipe.of(recipe), folder / f"out {place}") for place, recipe in enumerate(recipes)))
