"""Recipes: TOML files that say what decides an artifact's bytes, one per published artifact.

A recipe is data in a closed schema: an unknown key is an error with a suggestion, and every problem is reported at
once. `extends` names a file beside it whose tables it continues. Nothing below the pipeline sees a recipe, only
values taken from it.
"""

import difflib
import hashlib
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import tomlkit
from pydantic import (
    BaseModel,
    Field,
    PlainValidator,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from tomlkit.exceptions import TOMLKitError

from quantkit.engines.env import Engine, find_engine, list_engines
from quantkit.errors import RefusedError
from quantkit.files import write_text
from quantkit.home import shipped
from quantkit.quantize import QUANTIZE, Section

DEFAULT_MODEL = "bielik-7b-instruct-v0.1"
DEMONSTRATION = "bielik-nano"
OWN_ENGINE = "quantkit"
ALL = "all"
ENGINES = tuple(engine.name for engine in list_engines() if engine.builds)
WIDTH_IN_NAME = re.compile(r"(?<!\d)(\d)[-_ ]?bit", re.IGNORECASE)
COMMIT = r"^[0-9a-f]{40}$"
REPO = r"^[\w.-]+/[\w.-]+$"
LONGEST_PATH = 4096  # Linux takes no longer one
BOM = "\ufeff"  # what some editors begin a file with; TOML has none

WHOLE: Final = "all"


def _windows(value: Any) -> int | Literal["all"]:
    if value == WHOLE or (type(value) is int and value >= 1):
        return value
    raise PydanticCustomError("windows", 'Input should be "all" or a number of windows from 1 up')


Windows = Annotated[
    int | Literal["all"],
    PlainValidator(_windows, json_schema_input_type=Annotated[int, Field(ge=1)] | Literal["all"]),
]


class ModelSection(Section):
    """The source checkpoint."""

    id: str = Field(
        min_length=1,
        max_length=LONGEST_PATH,
        description="Hub id (`org/name`), a folder, or `bielik-nano`, which is made when it is absent.",
    )
    revision: str | None = Field(
        default=None,
        pattern=COMMIT,
        description="Commit hash on the Hub. Left out, a build resolves and records it; publishing refuses that.",
    )


class CalibrationSection(Section):
    """Which text the statistics come from."""

    texts: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default={"polish-core": 64},
        description="Windows to take from each text set: `polish-core`, `polish-plus`, `wikipedia-pl`, `nkjp1m`, "
        "`poleval2018`, or the path of a .jsonl or .txt file (.gz too). A set of the Hub may be pinned: `NAME@COMMIT`.",
    )
    window_tokens: int = Field(default=512, ge=16, description="Tokens per window.")
    seed: int = Field(default=0, description="Order in which documents are drawn.")
    activations: Literal["quantized", "float"] = Field(
        default="quantized",
        description="Statistics come from the stream as `quantized` so far, or from the unquantized model (`float`).",
    )

    @property
    def tokens(self) -> int:
        """Of all windows together."""
        return sum(self.texts.values()) * self.window_tokens


class GatesSection(Section):
    """Limits that a variant must keep to be published; a limit left out is not checked."""

    perplexity_ratio: float | None = Field(
        default=None, ge=1, description="Largest perplexity of the artifact over the reference's."
    )
    mean_kld: float | None = Field(
        default=None,
        ge=0,
        description="Largest mean Kullback-Leibler divergence from the reference, in nats per token.",
    )
    top1_agreement: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Smallest share of tokens where both models prefer the same next token.",
    )


class ValidationSection(Section):
    """On which text, and how strictly, an artifact is judged."""

    texts: dict[str, Windows] = Field(
        default={"polish-core": WHOLE},
        min_length=1,
        description='Text sets, named as for calibration, each `"all"` of it, document by document, or a sample of so '
        'many windows, drawn by `seed`. A list of names means `"all"` of each.',
    )
    window_tokens: int = Field(default=512, ge=16, description="Most tokens predicted per window.")
    seed: int = Field(default=0, description="Draws the samples.")
    require: tuple[str, ...] = Field(
        default=("reference",), strict=False, description="Runtimes without whose result the gate fails."
    )
    prompt: str = Field(
        default="Jakie mamy pory roku w Polsce?", description="Chat prompt of the greedy generation check."
    )
    generated_tokens: int = Field(default=32, ge=0, description="Tokens generated for that check; 0 leaves it out.")
    gates: GatesSection = Field(default=GatesSection(), description="Limits for every variant.")
    variant_gates: dict[str, GatesSection] = Field(
        default={}, description="Limits by variant name; they replace those of `gates` key by key."
    )

    @field_validator(
        "texts",
        mode="before",
        json_schema_input_type=Annotated[dict[str, Windows], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)],
    )
    @classmethod
    def _named(cls, value: Any) -> Any:
        """A list of names means all of each."""
        named = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        return dict.fromkeys(value, WHOLE) if named else value


class ComputeSection(Section):
    """What else decides the arithmetic, and so the bytes."""

    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="What the model is run in. Statistics are summed in float32 in any case.",
    )
    threads: int = Field(
        default=2,
        ge=1,
        le=1024,
        description="CPU threads. Another number gives other rounding, so it is part of the recipe.",
    )
    windows_per_batch: int = Field(default=8, ge=1, description="Windows that go through a layer together.")


class ReleaseSection(Section):
    """Where the artifact is meant to go and what its card says."""

    repo: str | None = Field(default=None, pattern=REPO, description="Hub repository, `org/name`.")
    collection: str | None = Field(
        default=None, description="Title of a collection of the repository's owner that it belongs to; made if absent."
    )
    license: str | None = Field(
        default=None,
        description="Licence, where the source's own card states none; another than it states is refused.",
    )
    languages: tuple[str, ...] = Field(default=("pl",), strict=False, description="ISO 639-1 codes for the card.")
    quantized_by: str | None = Field(default=None, description="Organization named on the card.")
    notes: str | None = Field(
        default=None, description="Markdown of your own near the top of the card; a card edited by hand is refused."
    )


class Recipe(Section):
    """One artifact. Made by `Recipe.of`, which knows the format's own [quantize] table."""

    format: Literal[tuple(QUANTIZE)] = Field(description="Artifact format.")  # type: ignore[valid-type]
    engine: Literal[OWN_ENGINE, *ENGINES] = Field(  # type: ignore[valid-type]
        default=OWN_ENGINE,
        description="Who quantizes: quantkit's own solvers, or an upstream package in its own environment "
        "(docs/engines.md).",
    )
    model: ModelSection
    quantize: Any = None
    calibration: CalibrationSection = CalibrationSection()
    validation: ValidationSection = ValidationSection()
    compute: ComputeSection = ComputeSection()
    release: ReleaseSection = ReleaseSection()

    @model_validator(mode="after")
    def _repository_says_the_width(self) -> "Recipe":
        bits, named = getattr(self.quantize, "bits", None), WIDTH_IN_NAME.findall(self.release.repo or "")
        if isinstance(bits, int) and named and str(bits) not in named:
            raise ValueError(
                f"release.repo = {self.release.repo!r} says {named[0]} bits, quantize.bits = {bits}; "
                "give them a repository of their own with --set release.repo=ORG/NAME"
            )
        return self

    @property
    def upstream(self) -> Engine | None:
        """The engine that quantizes; None where quantkit does."""
        return None if self.engine == OWN_ENGINE else find_engine(self.engine)

    @staticmethod
    def of(content: dict[str, Any]) -> "Recipe":
        """A checked recipe.

        Raises:
            pydantic.ValidationError: with every problem.
        """
        return RECIPES.get(str(content.get("format")), Recipe).model_validate(content)

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, ready for JSON; local paths are cut to their last part."""
        content = self.model_dump(mode="json")
        content["model"]["id"] = public_name(self.model.id)
        for key in getattr(self.quantize, "files", ()):
            content["quantize"][key] = content["quantize"][key] and public_name(content["quantize"][key])
        calibration, validation = content["calibration"], content["validation"]
        calibration["texts"] = {public_name(name): number for name, number in calibration["texts"].items()}
        validation["texts"] = {public_name(name): number for name, number in validation["texts"].items()}
        return content

    def deciding(self) -> dict[str, Any]:
        """The part of `resolved` that decides the weights: what is only judged or announced is left out."""
        return {key: value for key, value in self.resolved().items() if key not in ("validation", "release")}


RECIPES: dict[str, type[Recipe]] = {
    name: create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, quantize=(type(section), section))
    for name, section in QUANTIZE.items()
}
"""A recipe's class by its format: the same but for [quantize]."""


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe of any format."""
    return {"title": "Recipe", "oneOf": [kind.model_json_schema() for kind in RECIPES.values()]}


def public_name(name: str) -> str:
    """A name as it may be published: the last part of a local path, anything else as it is."""
    # unlike Path's, os's test has an answer for what can be no path, such as a name that is too long
    return Path(name).resolve().name if os.path.exists(name) else name


def fingerprint(content: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of key order."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def find_recipe(name: str) -> Path:
    """The file a name on the command line means: a path, `<model>/<name>`, or a name of the default model.

    Raises:
        RefusedError: nothing is there; the closest shipped names are suggested.
    """
    path = Path(name)
    if path.suffix == ".toml":
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
        model: replaces model.id; the recipe's revision does not apply to it then.

    Raises:
        RefusedError: every problem of the recipe, one per line.
    """
    content = _read(path)
    for change in changes:
        _apply(content, change)
    if model is not None:
        content["model"] = {"id": model}
    return checked(content, where=str(path))


def checked(content: dict[str, Any], *, where: str) -> Recipe:
    """A checked recipe.

    Args:
        content: its tables.
        where: they are from.

    Raises:
        RefusedError: every problem of the recipe, one per line.
    """
    try:
        return Recipe.of(content)
    except ValidationError as error:
        problems = [_problem(detail, RECIPES.get(str(content.get("format")), Recipe)) for detail in error.errors()]
        raise RefusedError(
            f"{len(problems)} problem(s) in the recipe:\n  " + "\n  ".join(problems),
            where=where,
            fix="docs/recipe.md lists every key; `quantkit recipes schema` prints the schema",
        ) from None


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
    keys, found, text = change.partition("=")
    if not found or not keys.strip():
        raise RefusedError(f"--set {change!r} is not key=value", fix="write --set quantize.bits=3")
    *tables, last = keys.strip().split(".")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    place = content
    for table in tables:
        place = place.setdefault(table, {})
        if not isinstance(place, dict):
            raise RefusedError(f"--set {change!r}: {table} is not a table", fix="see docs/recipe.md")
    place[last] = value


def _problem(detail: Any, kind: type[Recipe]) -> str:
    """One line of pydantic's findings in the words of a recipe."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(detail["loc"][-1]), _keys_beside(detail["loc"], kind), n=1, cutoff=0.5)
        return f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    if detail["type"] == "value_error":
        return ": ".join(filter(None, (key, str(detail["ctx"]["error"]))))
    if detail["type"] == "missing":
        return f"{key}: required"
    return f"{key}: {detail['msg']}, got {detail['input']!r}"


def _keys_beside(location: tuple[Any, ...], kind: type[Recipe]) -> list[str]:
    model: type[BaseModel] = kind
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def as_toml(resolved: dict[str, Any]) -> str:
    """A resolved recipe as TOML; keys without a value are left out."""
    return tomlkit.dumps(_given(resolved))


def copy_recipe(name: str, target: Path) -> None:
    """Write a recipe, resolved, to a new file.

    Raises:
        RefusedError: the file exists, or the recipe is not to be found.
    """
    resolved = load_recipe(find_recipe(name)).resolved()
    if target.exists():
        raise RefusedError(f"{target} exists", fix="choose another file name")
    write_text(target, as_toml(resolved))


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


def is_path(model_id: str) -> bool:
    """Whether a model.id can only mean a folder, there or not: absolute, from . or .., or with a separator behind."""
    return model_id.startswith(("/", "./", "../")) or model_id.endswith("/")


def is_on_hub(model_id: str) -> bool:
    """Whether a model.id means a repository on the Hub: neither the demonstration model nor a folder."""
    return model_id != DEMONSTRATION and not is_path(model_id) and not os.path.exists(model_id)


def require_pinned(recipe: Recipe) -> None:
    """Stop before the work where publishing would refuse its result.

    Raises:
        RefusedError: the model is on the Hub and the recipe does not say which revision of it is meant.
    """
    if is_on_hub(recipe.model.id) and recipe.model.revision is None:
        raise RefusedError(
            f"the recipe does not say which revision of {recipe.model.id} it means, so it could not be published",
            where="model.revision",
            fix="write it with `quantkit recipes pin FILE`: the recipe's file, or the base.toml that it extends",
        )


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
