"""How long functions and files of quantkit may be; what is longer is named here, and can only become shorter."""

import ast
from collections.abc import Iterator
from pathlib import Path

import quantkit

ROOT = Path(quantkit.__file__).parent
LINES, PARAMETERS, FILE_LINES = 60, 8, 500
# commands have their options as parameters, kernels what a launch is given
WIDE = ("cli/", "kernels/")
LONG = {
    "cli/builds.py:build": 63,
    "cli/cluster.py:submit": 63,
    "footprint.py:footprint_of": 71,
    "kernels/compiled.py:_fit_ranges": 63,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT).as_posix()}:{node.name}", node


def lines_of(node: Function) -> int:
    """From the signature to the end, without the docstring."""
    documented = 0
    if ast.get_docstring(node) is not None:
        documented = node.body[0].end_lineno - node.body[0].lineno + 1
    return node.end_lineno - node.lineno + 1 - documented


def test_functions_are_short():
    lines = {name: lines_of(node) for name, node in functions()}
    assert {name: found for name, found in lines.items() if found > LINES} == LONG


def test_functions_take_few_things():
    taken = {
        name: len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        for name, node in functions()
        if not name.startswith(WIDE)
    }
    assert {name: found for name, found in taken.items() if found > PARAMETERS} == {}


def test_files_are_short():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.rglob("*.py")}
    assert {path: found for path, found in lines.items() if found > FILE_LINES} == {}
