"""Write docs/cli.md, docs/recipe.md and docs/record.schema.json from the code, and tables of other pages.

Those come from plans and from bench/results. With --check all are only compared.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import torch
import typer.main
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from results import (
    PARTS,
    QUALITIES,
    floor_table,
    growth_table,
    markdown,
    quality_table,
    readme_quality_table,
    speed_table,
)

from quantkit.checkpoint.index import describe_model
from quantkit.cli import app
from quantkit.cli.output import INTERRUPTED_CODE
from quantkit.methods import METHODS
from quantkit.plan import make_plan
from quantkit.quantize import QUANTIZE
from quantkit.recipe import Recipe
from quantkit.recipe_files import find_recipe, load_recipe
from quantkit.report.schema import record_schema

HERE = Path(__file__).parent
SHAPES = {"7B": "mistral-7b", "70B": "llama-3-70b", "405B": "llama-3.1-405b"}
ASSUMED_RATE = 400e12  # operations per second


def command_line() -> str:
    """Every command's help, as it is shown."""
    parts = ["# Command line\n", "Generated from the code by `make docs`.\n"]
    for path, command in _commands("quantkit", typer.main.get_command(app)):
        context = click.Context(command, info_name=path, terminal_width=100, max_content_width=100)
        parts.append(f"## {path}\n\n```\n{command.get_help(context)}\n```\n")
    parts.append(
        "## Exit codes\n\n| code | meaning |\n|---|---|\n| 0 | done |\n"
        "| 1 | the run failed: disk full, lock held, files that are not as recorded |\n"
        "| 2 | recipe, command line, checkpoint or plan refused |\n"
        "| 3 | a validation gate failed |\n"
        "| 4 | something needed is not installed or not reachable |\n"
        f"| {INTERRUPTED_CODE} | interrupted (Ctrl-C, SIGINT); finished layers are kept, the same command goes on, "
        "without `--fresh` |\n"
        "| 143 | what a shell has for a command that SIGTERM ended; the same holds |\n"
    )
    return "\n".join(parts)


def _commands(path: str, command: click.Command) -> list[tuple[str, click.Command]]:
    found = [(path, command)]
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        found += _commands(f"{path} {name}", inner)
    return found


def recipe_keys() -> str:
    """Every key of a recipe with its type, default and meaning."""
    parts = [
        "# Recipe keys\n",
        "Generated from the code by `make docs`. A recipe is TOML; `extends` names a file beside it whose tables it "
        "continues. Paths of models and texts start in the folder that a command is run in. Unknown keys are errors.\n",
    ]
    formats: list[str] = []
    for name, section in QUANTIZE.items():
        formats += _section(f'quantize, with format = "{name}"', type(section))
    return "\n".join(parts + _section("(top level)", Recipe) + formats)


def _section(title: str, model: type[BaseModel]) -> list[str]:
    rows, inner = [], []
    for name, field in model.model_fields.items():
        if field.annotation is Any:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner.append((name, field.annotation))
            continue
        default = "required" if field.default is PydanticUndefined else f"`{_shown(field.default)}`"
        rows.append(f"| `{name}` | {_kind(field.annotation)} | {default} | {field.description or ''} |")
    heading = [
        f"## {title}\n",
        f"{model.__doc__}\n",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    below = [_section(name if title.startswith("(") else f"{title}.{name}", found) for name, found in inner]
    return heading + [line for section in below for line in section]


def _kind(annotation: Any) -> str:
    if annotation is type(None):
        return "none"
    if hasattr(annotation, "__metadata__"):
        return _kind(annotation.__origin__)
    if get_origin(annotation) is None:
        return str(getattr(annotation, "__name__", annotation))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{_shown(value)}`" for value in get_args(annotation))
    kinds = [_kind(part) for part in get_args(annotation) if part not in (..., type(None))]
    name = getattr(get_origin(annotation), "__name__", "")
    if name == "dict":
        return f"table of {kinds[1]}"
    return f"list of {kinds[0]}" if name == "tuple" else " or ".join(kinds)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_shown(part) for part in value) + "]"
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{_shown(key)} = {_shown(part)}" for key, part in value.items()) + " }" if value else "{}"
        )
    if value is None:
        return "none"
    return f'"{value}"' if isinstance(value, str) else str(value)


def with_tables(page: str, tables: dict[str, str]) -> str:
    """A page with its tables, each written between the comments that name it."""
    text = (HERE / page).read_text(encoding="utf-8")
    for name, table in tables.items():
        before, begin, rest = text.partition(f"<!-- {name}: written by `make docs` -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        assert end, f"{page} has no place for {name}"
        text = before + begin + table + end + after
    return text


def _shape_table() -> str:
    recipe = load_recipe(find_recipe("bielik-7b-instruct-v0.1/gptq"))
    columns = {}
    for title, shape in SHAPES.items():
        checkpoint = describe_model(HERE.parent / "bench" / "shapes" / shape)
        method = METHODS[recipe.format](recipe.quantize, checkpoint.config)
        plan, divided = (
            make_plan(recipe, checkpoint, method, out=HERE, device=torch.device("cpu"), ranks=ranks) for ranks in (1, 4)
        )
        config, least = checkpoint.config, sum(plan.operations.values())
        columns[title] = [
            ", ".join(str(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")),
            *(f"{plan.operations[stage] / 1e15:.3g}" for stage in ("forward", "statistics", "factorise", "solve")),
            f"{least / 1e15:.3g}",
            f"{plan.source_bytes / 1e9:.0f}, {plan.artifact_bytes / 1e9:.0f}",
            f"{plan.memory_bytes / 1e9:.0f}",
            f"{divided.rank_bytes / 1e9:.0f}",
            f"{least / ASSUMED_RATE:.0f}",
        ]
    names = [
        "D, F, L",
        "forward, 10^15 operations",
        "statistics",
        "factorise",
        "solve",
        "sum",
        "read, written, GB",
        "memory by the plan, GB",
        "of each of four ranks, GB",
        f"seconds at {ASSUMED_RATE / 1e12:.0f} · 10^12 operations per second, if nothing else took time",
    ]
    return markdown([["", *columns], *([name, *row] for name, *row in zip(names, *columns.values(), strict=True))])


def main() -> int:
    """Write all pages, or return 1 and name those that are stale."""
    schema = json.dumps(record_schema(), indent=2, ensure_ascii=False) + "\n"
    grown = {"shapes": _shape_table(), "floors": floor_table(), "growths": growth_table()}
    pages = {
        "cli.md": command_line(),
        "recipe.md": recipe_keys(),
        "record.schema.json": schema,
        "growth.md": with_tables("growth.md", grown),
        "measured.md": with_tables("measured.md", {"speeds": speed_table()}),
        "../README.md": with_tables("../README.md", {"qualities": readme_quality_table()}),
    }
    for name, judged in QUALITIES.items():
        page = f"formats/{name}.md"
        tables = {"qualities": quality_table(judged)}
        if name in PARTS:
            tables["parts"] = quality_table(PARTS[name])
        pages[page] = with_tables(page, tables)
    if "--check" in sys.argv[1:]:
        stale = [
            name for name, text in pages.items() if not (HERE / name).exists() or (HERE / name).read_text() != text
        ]
        print("\n".join(f"docs/{name} is stale: run `make docs`" for name in stale) or "docs are up to date")
        return 1 if stale else 0
    for name, text in pages.items():
        (HERE / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
