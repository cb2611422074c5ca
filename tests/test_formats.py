"""What holds for every format alike: built, judged, resumed, the same bytes again, read back by the record's word."""

import ast
import json
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit import pipeline
from quantkit.checkpoint.index import read_json
from quantkit.formats import READERS, detect
from quantkit.methods import METHODS
from quantkit.pipeline import build
from quantkit.quantize import QUANTIZE
from quantkit.recipe import Recipe
from quantkit.report.record import artifact_files, changed_files, read_record
from quantkit.workdir import hash_files, work_folder
from tests.tiny import WORDS, make_tiny

CPU = torch.device("cpu")
NOT_REPRODUCIBLE = ("quantkit.json", "README.md")
# a format's name, and what its [quantize] says beside the defaults, for a model 64 wide
CASES = {
    "gptq": ("gptq", {"group_size": 32}),
    "awq": ("awq", {"group_size": 32, "scaling_steps": 4, "scaling_windows": 4, "scale_candidates": 2}),
    "awq-unscaled": ("awq", {"group_size": 32, "scaling_steps": 0, "scale_candidates": 2}),
    "compressed-tensors": ("compressed-tensors", {"group_size": 32}),
    "compressed-tensors-8": (
        "compressed-tensors",
        {"bits": 8, "group_size": -1, "symmetric": False, "dtype": "float16"},
    ),
    "hqq": ("hqq", {"group_size": 32}),
    "hqq-axis-0": ("hqq", {"group_size": 32, "axis": 0, "bits": 4}),
    "hqq-half-quadratic": ("hqq", {"group_size": 32, "solver": "half-quadratic", "bits": 4}),
    "hqq-gptq": ("hqq", {"group_size": 32, "solver": "gptq", "scale_candidates": 2, "qmodel_pt": True}),
    "mlx": ("mlx", {"group_size": 32, "scale_candidates": 2}),
    "mlx-mixed": ("mlx", {"group_size": 32, "mixed": "mixed_4_6", "scale_candidates": 2, "dtype": "bfloat16"}),
    "gguf": ("gguf", {"types": ["Q4_K_M"]}),
    "gguf-gptq": ("gguf", {"types": ["Q4_K_M"], "solver": "gptq"}),
    "gguf-unweighted": ("gguf", {"types": ["Q5_0"], "imatrix": False}),
    "exl2": ("exl2", {"bits": [4.5]}),
    "mlx-rounded": ("mlx", {"group_size": 32, "solver": "round-to-nearest", "bits": 8}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("source") / "m", "qwen2", vocab_size=416)


@pytest.fixture(params=CASES)
def recipe(request, source, tmp_path) -> Recipe:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{number}. {WORDS * 3}"}) for number in range(12)))
    name, quantize = CASES[request.param]
    return Recipe.of(
        {
            "format": name,
            "model": {"id": str(source)},
            "quantize": quantize,
            "calibration": {"texts": {str(text): 8}, "window_tokens": 16},
            "validation": {
                "texts": [str(text)],
                "window_tokens": 32,
                "generated_tokens": 0,
                "gates": {"perplexity_ratio": 1.3, "mean_kld": 0.3},
            },
        }
    )


def hashes(folder: Path) -> dict[str, str]:
    return hash_files(folder, [name for name in artifact_files(folder) if name not in NOT_REPRODUCIBLE])


def test_every_format_has_a_case():
    assert {name for name, _ in CASES.values()} == QUANTIZE.keys() == METHODS.keys() == READERS.keys()


def test_it_is_built_judged_and_read_back(recipe, source, tmp_path):
    out = tmp_path / "out"
    done = build(recipe, out=out, device=CPU)
    assert detect(out) == recipe.format
    verdict = done.record["validation"]
    assert verdict["gate"] == {"passed": True, "failures": []}
    assert done.record["reproducible"] is True
    assert changed_files(out, done.record) == []
    assert read_record(out) == done.record, "it keeps to the schema of records"
    named = {name for files in done.record["variants"].values() for name in files}
    assert named <= set(artifact_files(out))
    planned = pipeline.plan(recipe, out=tmp_path / "other", device=CPU, progress=pipeline.Progress())
    stored = verdict["variants"][0]["bits_per_weight"]
    assert planned.bits_per_weight >= stored * (1 - 1e-6), "the plan knows the most that the file will take"
    if METHODS[recipe.format](recipe.quantize, read_json(source / "config.json")).survey is None:
        assert planned.bits_per_weight == pytest.approx(stored, rel=1e-6), "and what exactly, if nothing is measured"
    everything = "".join(path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".md"))
    assert str(tmp_path) not in everything
    card = (out / "README.md").read_text()
    variants = list(done.record["variants"])
    assert READERS[recipe.format].use(f"m-{recipe.format.upper()}", recipe.quantize.model_dump(), variants) in card


@pytest.mark.parametrize("items", [1, 3])
def test_an_interrupted_build_ends_in_the_same_bytes(recipe, items, tmp_path, monkeypatch):
    whole = build(recipe, out=tmp_path / "whole", device=CPU, validated=False)
    plain, left = pipeline.write_item, [items]

    def give_up(path, tensors):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        plain(path, tensors)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_item", give_up)
        with pytest.raises(KeyboardInterrupt):
            build(recipe, out=out, device=CPU, validated=False)
    assert work_folder(out).exists()
    build(recipe, out=out, device=CPU, validated=False)
    assert hashes(out) == hashes(whole.out)
    assert not work_folder(out).exists()


def test_no_format_is_named_where_all_are_alike():
    """A new format is rows in tables: stream, pipeline, plan, validation and command line know none by name."""
    root = Path(quantkit.__file__).parent
    alike = ["stream.py", "pipeline.py", "plan.py", "judgement.py", "cli.py", "upstream.py", "report/card.py"]
    alike += [str(path.relative_to(root)) for path in (root / "validation").glob("*.py")]
    for name in alike:
        tree = ast.parse((root / name).read_text())
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not strings & set(QUANTIZE), name
