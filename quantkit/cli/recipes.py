"""Commands about recipes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.named import recipe_of
from quantkit.cli.options import Json, Name, Set
from quantkit.cli.output import fail, print_document, say
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.recipe import Recipe


def names(as_json: Json = False) -> None:
    """Names of all shipped recipes."""
    from quantkit.recipe_files import list_recipes

    found = list_recipes()
    print_document(found if as_json else None, found)


def show(recipe: Name, changes: Set = None, as_json: Json = False) -> None:
    """A recipe with every key resolved."""
    from quantkit.recipe_files import as_toml

    whole = recipe_of(recipe, changes, None)[0].model_dump(mode="json")
    print_document(whole if as_json else None, [as_toml(whole)])


def copy(
    recipe: Name, target: Annotated[Path, typer.Argument(metavar="FILE", help="New recipe file; must not exist.")]
) -> None:
    """Write a shipped recipe, resolved, as a file of your own."""
    from quantkit.files import disk_errors
    from quantkit.recipe_files import copy_recipe

    with disk_errors(target, "choose another file"):
        copy_recipe(recipe, target)
    say(f"wrote {target}")


def check(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...", help="Recipes of the default model, <model>/<name>, paths, or all."),
    ],
    changes: Set = None,
) -> None:
    """Check recipes and print every problem of each at once."""
    from quantkit.recipe_files import recipes_named

    names = [name for given in recipes for name in recipes_named(given)]
    errors = {}
    for name in names:
        try:
            _require_names(recipe_of(name, changes, None)[0])
        except QuantkitError as error:
            errors[name] = error
        else:
            say(f"{name} is a good recipe")
    fail(errors, several=len(names) > 1)


def _require_names(recipe: "Recipe") -> None:
    """Stop at a text set or a runtime that is none; nothing is fetched."""
    from quantkit.engines.env import require_readers
    from quantkit.texts import require_known

    for name in recipe.calibration.texts:
        require_known(name, "calibration")
    for name in recipe.validation.texts:
        require_known(name, "validation")
    require_readers(recipe.validation.require, recipe.format)


def pin(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe file, or base.toml, to write into.")],
) -> None:
    """Write the commit hash that the model's main branch has now into a recipe file, or one that recipes extend."""
    from quantkit.hub import resolve_revision
    from quantkit.recipe_files import model_named_in, pin_recipe

    revision = resolve_revision(model_named_in(path))
    pin_recipe(path, revision)
    say(f"{path}: model.revision = {revision}")


def schema() -> None:
    """The JSON Schema of a recipe."""
    from quantkit.recipe import schema as found

    print_document(found(), [])
