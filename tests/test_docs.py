"""What the docs tell people to type is there."""

import re
from fnmatch import fnmatch
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def test_examples_for_ci_are_yaml_and_call_what_exists():
    found = blocks(ROOT / "docs" / "ci.md", "yaml")
    actions, gitlab = (yaml.safe_load(text) for text in found)
    steps = [step["run"] for step in actions["jobs"]["release"]["steps"] if "run" in step]
    assert gitlab["release"]["script"] == steps == ["make release JUNIT=results"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_and_commands_exist(page):
    import typer.main

    from quantkit.cli import app

    text = page.read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = {name for line in re.findall(r"^([\w% -]+):(?!=)", makefile, re.MULTILINE) for name in line.split()}
    recipes = {path.stem for path in (ROOT / "recipes").glob("*/*.toml")}
    wanted = set(re.findall(r"\bmake(?: -[jk]\d?)* ([a-z][\w-]+)", "\n".join(_code(text))))
    assert {
        name for name in wanted if name not in targets | recipes and f"{name.partition('-')[0]}-%" not in targets
    } == set()
    commands = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"^ {4}quantkit ([a-z]+)", text, re.MULTILINE)) <= commands


def _code(text: str) -> list[str]:
    """Indented and inline code, and what YAML runs."""
    return [
        *re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE),
        *re.findall(r"`([^`\n]+)`", text),
        *re.findall(r"- (?:run: )?(make .*)", text),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_result_is_drawn_or_named():
    """What no page tells of would go stale unseen."""
    spec = spec_from_file_location("results", ROOT / "docs" / "results.py")
    results = module_from_spec(spec)
    spec.loader.exec_module(results)
    judged = [each for tables in (results.QUALITIES, results.PARTS) for page in tables.values() for each in page]
    drawn = {f"quality-{file}.json" for each in judged for file in each.files}
    drawn |= {*results.FLOORS.values(), *(file for file, _ in results.GROWTHS.values())}
    drawn |= {file for _, file in results.SPEEDS}
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    named = re.findall(r"`(?:bench/results/)?([\w*.-]+\.(?:json|svg))`", text)
    found = {path.name for path in (ROOT / "bench" / "results").iterdir()}
    assert drawn <= found
    assert [name for name in sorted(found - drawn) if not any(fnmatch(name, pattern) for pattern in named)] == []
