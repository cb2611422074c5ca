"""What the benches compute beside what they measure, and that every one of them starts."""

import json
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench.floor import floors, stages
from bench.quality import interval, verdict
from bench.ways import command_line

BENCH = Path(__file__).parent.parent / "bench"
MODULES = sorted(
    ".".join(path.relative_to(BENCH.parent).with_suffix("").parts)
    for path in BENCH.rglob("*.py")
    if "ArgumentParser" in path.read_text(encoding="utf-8")
)


def test_the_benches_are_found():
    assert len(MODULES) == 10


@pytest.mark.parametrize("name", MODULES)
def test_a_bench_says_how_it_is_called(name, monkeypatch, capsys):
    """In this process; what its examples give it are options that it has."""
    if name == "bench.gpu.kernels" and find_spec("triton") is None:
        pytest.skip("no triton here")
    module = import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        module.main()
    said, _, options = capsys.readouterr().out.partition("\noptions:\n")
    assert left.value.code == 0
    assert module.__doc__.strip() in said
    assert f"python -m {name}" in said
    named = set(re.findall(r"(?<!\S)--[a-z-]+", module.__doc__))
    assert named <= set(re.findall(r"--[a-z-]+", options))


# of a time when benches did not write it down, or measured with changes that were not committed
SAID_LESS = {
    "growth-7b-layer.json": {"command"},
    "growth-7b-layer-plain.json": {"command"},
    "memory-gptq-2048-5632-20-float32.json": {"commit"},
}


def told(content: object, key: str) -> list[object]:
    """Everything that stands under a key, at any depth."""
    if isinstance(content, list):
        return [found for part in content for found in told(part, key)]
    if not isinstance(content, dict):
        return []
    own = [content[key]] if key in content else []
    return own + [found for part in content.values() for found in told(part, key)]


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_figure_says_what_it_is_of(path):
    """The command that gives it, the machine, the versions, and a commit that holds all of the code."""
    content = json.loads(path.read_text(encoding="utf-8"))
    missing = {key for key in ("command", "device_model", "versions", "commit") if not told(content, key)}
    if any(not re.fullmatch("[0-9a-f]{40}", str(commit)) for commit in told(content, "commit")):
        missing.add("commit")
    assert missing == SAID_LESS.get(path.name, set())
    assert not [command for command in told(content, "command") if re.search(r"[\s='\"]/\w", str(command))], "a place"


TOKENS = torch.tensor([100.0, 20.0, 7.0, 300.0], dtype=torch.float64)


@pytest.mark.parametrize(("nats_per_token", "said"), [(-0.01, "better"), (0.0, "tie"), (0.01, "worse")])
def test_a_difference_that_all_documents_share_is_certain(nats_per_token, said):
    found = interval(nats_per_token * TOKENS, TOKENS)
    assert found == pytest.approx((nats_per_token,) * 3, abs=1e-15)
    assert verdict(found) == said


def test_long_documents_count_by_their_tokens():
    nats = torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    mean, low, high = interval(nats, TOKENS)
    assert mean == pytest.approx(3 / 427)
    assert low == 0.0
    assert high > mean


def test_the_interval_is_that_of_a_mean_over_documents():
    """Alike in length, so that it is known: the normal one, 1.96 standard errors to either side."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.full((400,), 50.0, dtype=torch.float64)
    nats = 50 * (0.02 + 0.3 * torch.randn(400, generator=generator, dtype=torch.float64))
    mean, low, high = interval(nats, tokens)
    half = 1.96 * float((nats / 50).std()) / 400**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.07 * half)
    assert interval(nats, tokens) == (mean, low, high), "the resamples are the same for every pair of ways"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.2, -0.1, "better"), (-0.2, 0.0, "tie"), (-0.2, 0.2, "tie"), (0.0, 0.2, "tie"), (0.1, 0.2, "worse")],
)
def test_an_interval_that_holds_0_is_a_tie(low, high, said):
    assert verdict(((low + high) / 2, low, high)) == said


RATES = {"matmul_flops": 1e12, "float32_flops": 1e10, "copy_bytes": 4e9, "write_bytes": 5e8, "read_bytes": 1e9}
# of a build of two items
RECORD = {
    "build": {
        "operations": {"forward": 6e12, "factorise": 2e10, "solve": 5e9, "survey": 0.0},
        "bytes": {"read": 3_000_000_000, "written": 1_000_000_000},
        "items": {
            "embedding": {"seconds": {"read": 4.0, "embed": 1.0, "load": 0.5}},
            "layers.0": {"seconds": {"read": 5.0, "forward": 9.0, "advance": 2.0, "factorise": 3.0, "solve": 0.25}},
        },
    }
}


def test_a_floor_is_what_is_counted_at_the_rate_of_its_kind():
    counts = RECORD["build"]
    found = floors(counts["operations"], counts["bytes"]["read"], counts["bytes"]["written"], RATES)
    # products in the recipe's dtype, in float32, a file read, a copy (read and written), a file written
    assert found == {"forward": 6.0, "factorise": 2.0, "solve": 0.5, "read": 3.0, "pack": 0.5, "write": 2.0}


def test_stages_are_held_against_their_floors():
    rows = [tuple(row.values()) for row in stages(RECORD, RATES)]
    assert rows == [
        ("forward", 12.0, 6.0, 2.0),
        ("read", 9.0, 3.0, 3.0),
        ("factorise", 3.0, 2.0, 1.5),
        ("load", 0.5, None, None),
        ("solve", 0.25, 0.5, 0.5),
    ]


def test_a_command_holds_no_place_not_even_one_that_is_not_there_yet(monkeypatch, tmp_path):
    there = tmp_path / "model"
    there.touch()
    monkeypatch.setattr(sys, "argv", ["bench", "--model", str(there), "--out", str(tmp_path / "none" / "a.json")])
    assert command_line("bench.speed") == "python -m bench.speed --model model --out a.json"
