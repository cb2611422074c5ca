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
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PlainValidator,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from quantkit.engines.env import Engine, find_engine, list_engines
from quantkit.errors import RefusedError
from quantkit.quantize import QUANTIZE, Section

DEMONSTRATION = "bielik-nano"
OWN_ENGINE = "quantkit"
ENGINES = tuple(engine.name for engine in list_engines() if engine.builds)
WIDTH_IN_NAME = re.compile(r"(?<!\d)(\d)[-_ ]?bit", re.IGNORECASE)
COMMIT = r"^[0-9a-f]{40}$"
# as the Hub's own client has it, which is slow to load
REPO = re.compile(r"(?!.*(?:--|\.\.|\.git$))\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)
REPO_RULES = (
    "two names, at most 96 long each, of A-Z, a-z, 0-9, '_', '-' and '.'; "
    "neither begins or ends with '-' or '.', none holds '--' or '..', and '.git' is no end"
)
LONGEST_PATH = 4096  # Linux takes no longer one

WHOLE: Final = "all"


def _windows(value: Any) -> int | Literal["all"]:
    if value == WHOLE or (type(value) is int and value >= 1):
        return value
    raise PydanticCustomError("windows", 'Input should be "all" or a number of windows from 1 up')


Windows = Annotated[
    int | Literal["all"],
    PlainValidator(_windows, json_schema_input_type=Annotated[int, Field(ge=1)] | Literal["all"]),
]


def is_repository(name: str) -> bool:
    """Whether the Hub takes it for the `org/name` of a repository."""
    return REPO.fullmatch(name) is not None


def _repository(value: str) -> str:
    if is_repository(value):
        return value
    raise PydanticCustomError(
        "repository", "Input should be ORG/NAME as the Hub has it: {rules}", {"rules": REPO_RULES}
    )


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
        description="Windows to take from each text set: `polish-core`, `polish-plus`, either with `-documents` behind "
        "it for a model without a chat template, `wikipedia-pl`, `nkjp1m`, `poleval2018`, or the path of a .jsonl or "
        ".txt file (.gz too). A set of the Hub may be pinned: `NAME@COMMIT`.",
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
    generated_tokens: int = Field(
        default=32, ge=0, le=4096, description="Tokens generated for that check; 0 leaves it out."
    )
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
    windows_per_batch: int = Field(default=8, ge=1, le=65536, description="Windows that go through a layer together.")


class ReleaseSection(Section):
    """Where the artifact is meant to go and what its card says."""

    repo: Annotated[str, AfterValidator(_repository)] | None = Field(
        default=None, description="Hub repository, `org/name`.", json_schema_extra={"pattern": f"^{REPO.pattern}$"}
    )
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
        found = error.errors()
        # a list that is too short without those of its items that are named already
        found = [detail for detail in found if detail["type"] != "too_short" or not _holds_another(detail, found)]
        problems = [_problem(detail, RECIPES.get(str(content.get("format")), Recipe)) for detail in found]
        raise RefusedError(
            f"{len(problems)} problem(s) in the recipe:\n  " + "\n  ".join(problems),
            where=where,
            fix="docs/recipe.md lists every key; `quantkit recipes schema` prints the schema",
        ) from None


def _holds_another(detail: Any, found: Sequence[Any]) -> bool:
    """Whether one of pydantic's findings is about a part of what this one is about."""
    location = detail["loc"]
    return any(other["loc"][: len(location)] == location and other["loc"] != location for other in found)


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


def require_repository(recipe: Recipe) -> None:
    """Stop before the work where publishing without `--repo` would refuse its result.

    Raises:
        RefusedError: the recipe names no repository.
    """
    if recipe.release.repo is None:
        raise RefusedError(
            f"the recipe names no repository to publish {recipe.format} of {public_name(recipe.model.id)} to",
            where="release.repo",
            fix="write it into the recipe as ORG/NAME",
        )
