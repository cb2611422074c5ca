"""Recipe files: where they are, what they extend, what the command line changes in them; and writing them."""

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from quantkit.errors import RefusedError
from quantkit.files import write_text
from quantkit.home import shipped
from quantkit.recipe import Recipe, checked, is_on_hub, public_name

DEFAULT_MODEL = "bielik-7b-instruct-v0.1"
ALL = "all"
SUFFIX = ".toml"  # by which a path is told from a name
# what recipes say of their model, by table
OF_ITS_MODEL = {
    "release": ("repo", "collection", "license", "quantized_by", "notes"),
    "quantize": ("name", "license", "base_model", "quantized_by", "system"),
}
UNFIT_FOR_NAMES = re.compile(r"[^\w.+-]+")
BOM = "\ufeff"  # what some editors begin a file with; TOML has none


def find_recipe(name: str) -> Path:
    """The file a name on the command line means: a path, `<model>/<name>`, or a name of the default model.

    Raises:
        RefusedError: nothing is there; the closest shipped names are suggested.
    """
    path = Path(name)
    if path.suffix == SUFFIX:
        if os.path.isfile(path):
            return path
        raise RefusedError(f"no such recipe file: {name}", fix="`quantkit recipes list` shows what is shipped")
    full = name if "/" in name else f"{DEFAULT_MODEL}/{name}"
    found = shipped("recipes") / f"{full}.toml"
    if os.path.isfile(found) and found.stem != "base":
        return found
    known = list_recipes()
    close = difflib.get_close_matches(name, known + [short.split("/")[1] for short in known], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(dict.fromkeys(close))}? " if close else ""
    raise RefusedError(f"no recipe named {name!r}", fix=f"{hint}`quantkit recipes list` shows all")


def recipes_named(name: str) -> list[str]:
    """The recipes that a name on the command line means: `all` and `<model>/all` stand for each shipped one of a model.

    Raises:
        RefusedError: the model has none.
    """
    model, _, last = name.rpartition("/")
    if last != ALL:
        return [name]
    known = list_recipes()
    found = [each for each in known if each.startswith(f"{model or DEFAULT_MODEL}/")]
    if not found:
        close = difflib.get_close_matches(model, {each.split("/")[0] for each in known}, n=1)
        hint = f"did you mean {close[0]}/{ALL}? " if close else ""
        raise RefusedError(f"no recipes of a model {model!r}", fix=f"{hint}`quantkit recipes list` shows all")
    return found


def list_recipes() -> list[str]:
    """Names of all shipped recipes, `<model>/<name>`, sorted."""
    folder = shipped("recipes")
    found = (path for path in folder.glob("*/*.toml") if path.stem != "base")
    return sorted(f"{path.parent.name}/{path.stem}" for path in found)


def load_recipe(path: Path, changes: tuple[str, ...] = (), *, model: str | None = None) -> Recipe:
    """A checked recipe.

    Args:
        path: the TOML file.
        changes: "table.key=value" from the command line; the value is TOML, a bare word is taken as a string.
        model: replaces model.id, and with it the revision, unless the Hub's model is the same; where it is called
            otherwise than the recipe's own, what the recipe says of that does not apply (OF_ITS_MODEL).

    Raises:
        RefusedError: every problem of the recipe, one per line.
    """
    content = _read(path)
    if model is not None:
        _give_model(content, model)
    for change in changes:
        _apply(content, change)
    return checked(content, where=str(path))


def _give_model(content: dict[str, Any], model: str) -> None:
    """Name another model in a recipe, and leave out what it says of its own; a folder may be a copy of that."""
    section = content.get("model")
    own = str(section.get("id")) if isinstance(section, dict) else ""
    if own == model and is_on_hub(model):
        return
    content["model"] = {"id": model}
    if _last_part(own) == _last_part(model):
        return
    for table, keys in OF_ITS_MODEL.items():
        if isinstance(section := content.get(table), dict):
            named = "name" in section
            content[table] = {key: value for key, value in section.items() if key not in keys}
            if named and (name := UNFIT_FOR_NAMES.sub("-", _last_part(model)).strip(".-")):
                content[table]["name"] = name


def _last_part(model: str) -> str:
    return public_name(model).rpartition("/")[2]


def _read(path: Path, extended: str | None = None, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a recipe file, those that it extends among them.

    Args:
        path: the file.
        extended: how the last one of `seen` names it; None for the file that the command line names.
        seen: the files that extend it.
    """
    text = _text_of(path, extended, seen)
    try:
        content = tomllib.loads(text)
    # a number of thousands of digits is a ValueError, too
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the recipe is not TOML: {error}", where=str(path), fix="mend the line it names") from None
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise RefusedError("`extends` must be a file name", where=str(path), fix='write extends = "base.toml"')
    return _merged(_read(path.parent / parent, parent, (*seen, path.resolve())), content)


def _text_of(path: Path, extended: str | None, seen: tuple[Path, ...]) -> str:
    """What a recipe file says; for the arguments see `_read`."""
    try:
        if path.resolve() in seen:
            raise RefusedError("`extends` goes in a circle", where=str(path), fix="let one of the files stand alone")
        return path.read_text(encoding="utf-8").removeprefix(BOM)
    except UnicodeDecodeError as error:
        raise RefusedError(f"the recipe is not TOML: {error}", where=str(path), fix="save it as UTF-8") from None
    # what can be no path is a ValueError, links in a circle are a RuntimeError
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        absent = isinstance(error, FileNotFoundError)
        if extended is not None:
            raise RefusedError(
                f"the recipe extends {extended!r}, which "
                + ("is not there" if absent else f"cannot be read: {reason}"),
                where=str(seen[-1]),
                fix='name a recipe file beside it: extends = "base.toml"',
            ) from None
        raise RefusedError(
            f"no such recipe file: {path}" if absent else f"the recipe file cannot be read: {reason}",
            where="" if absent else str(path),
            fix="give the path of a recipe's .toml file",
        ) from None


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Tables are joined key by key, anything else is replaced; a table of text sets is one value."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        joined = isinstance(old, dict) and isinstance(value, dict) and key != "texts"
        merged[key] = _merged(old, value) if joined else value  # type: ignore[arg-type]
    return merged


def _apply(content: dict[str, Any], change: str) -> None:
    try:
        change.encode()
    except UnicodeEncodeError:
        shown = change.encode("utf-8", "backslashreplace").decode()
        raise RefusedError(f"--set {shown!r} is not valid UTF-8", fix="write it in UTF-8") from None
    keys, found, text = change.partition("=")
    if not found or not keys.strip():
        raise RefusedError(f"--set {change!r} is not key=value", fix="write --set quantize.bits=3")
    *tables, last = keys.strip().split(".")
    value = _value_of(keys.strip(), text)
    place = content
    for table in tables:
        place = place.setdefault(table, {})
        if not isinstance(place, dict):
            raise RefusedError(f"--set {change!r}: {table} is not a table", fix="see docs/recipe.md")
    place[last] = value


def _value_of(key: str, text: str) -> Any:
    """What stands behind the = of a change: TOML, or a bare word."""
    try:
        content = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    # a number of thousands of digits, or brackets as deep
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the value of --set {key} is not TOML: {error}", fix="see docs/recipe.md") from None
    if len(content) > 1:
        raise RefusedError(f"--set {key}={text!r} sets more than one key", fix="write a --set for each of them")
    return content["value"]


def as_toml(resolved: dict[str, Any]) -> str:
    """A resolved recipe as TOML; keys without a value are left out."""
    return tomlkit.dumps(_given(resolved))


def copy_recipe(name: str, target: Path) -> None:
    """Write a recipe, with every key and its paths as they are, to a new file; its folder is made.

    Raises:
        RefusedError: the file exists or has another suffix, or the recipe is not to be found.
    """
    whole = load_recipe(find_recipe(name)).model_dump(mode="json")
    if target.exists():
        raise RefusedError(f"{target} exists", fix="choose another file name")
    if target.suffix != SUFFIX:
        raise RefusedError(f"{target} would not be taken for a recipe", fix=f"let its name end in {SUFFIX}")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, as_toml(whole))


def model_named_in(path: Path) -> str:
    """The model.id of a recipe file, or of a file that recipes extend.

    Raises:
        RefusedError: it names none, or one that is not on the Hub.
    """
    model = _read(path).get("model")
    named = model.get("id") if isinstance(model, dict) else None
    if not isinstance(named, str):
        raise RefusedError("the file names no model", where=f"{path}: model.id", fix="pin the file that has [model] id")
    if not is_on_hub(named):
        raise RefusedError(
            f"{named!r} is not on the Hub, so it has no revision", where=f"{path}: model.id", fix="pin Hub models alone"
        )
    return named


def pin_recipe(path: Path, revision: str) -> None:
    """Set model.revision in a recipe file, leaving everything else of it as it stands.

    Raises:
        RefusedError: it is not one that can be edited.
    """
    text = path.read_text(encoding="utf-8")
    begin = BOM if text.startswith(BOM) else ""
    try:
        document = tomlkit.parse(text.removeprefix(BOM))
    # it goes less deep than what reads recipes
    except (TOMLKitError, RecursionError) as error:
        raise RefusedError(
            f"the recipe cannot be edited: {error}", where=str(path), fix="write model.revision into it by hand"
        ) from None
    document.setdefault("model", tomlkit.table())["revision"] = revision
    write_text(path, begin + tomlkit.dumps(document))


def _given(table: dict[str, Any]) -> dict[str, Any]:
    """A table without the keys that have no value."""
    return {
        key: _given(value) if isinstance(value, dict) else value for key, value in table.items() if value is not None
    }
