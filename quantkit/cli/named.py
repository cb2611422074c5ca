"""What a recipe's name on the command line means."""

from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.job import Job
    from quantkit.recipe import Recipe


def recipe_of(name: str, changes: list[str] | None, model: str | None) -> "tuple[Recipe, str]":
    """The recipe of a name, changed as the command line says, and what its file is called."""
    from quantkit.recipe_files import find_recipe, load_recipe

    path = find_recipe(name)
    return load_recipe(path, tuple(changes or ()), model=model), path.stem


def means_several(name: str) -> bool:
    """Whether a name on the command line stands for several recipes, even if they are one."""
    from quantkit.recipe_files import recipes_named

    return recipes_named(name) != [name]


def jobs_named(
    name: str, changes: list[str] | None, model: str | None, out: Path | None
) -> "tuple[list[Job], dict[str, QuantkitError]]":
    """The builds that a name means, and of several those that their recipes rule out."""
    from quantkit.job import Job, default_out
    from quantkit.recipe_files import recipes_named

    if not means_several(name):
        chosen, stem = recipe_of(name, changes, model)
        return [Job(name, chosen, out or default_out(chosen, stem))], {}
    jobs, errors = [], {}
    for each in recipes_named(name):
        try:
            chosen, stem = recipe_of(each, changes, model)
        except QuantkitError as error:
            errors[each.rpartition("/")[2]] = error
            continue
        target = default_out(chosen, stem)
        jobs.append(Job(stem, chosen, target if out is None else out / target.name))
    return jobs, errors
