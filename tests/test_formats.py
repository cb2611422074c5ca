"""What holds for every format alike: built, judged, resumed, the same bytes again, read back by the record's word."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit import keeping, pipeline
from quantkit.checkpoint.index import open_checkpoint, read_json
from quantkit.files import hash_files
from quantkit.formats import READERS, detect
from quantkit.methods import METHODS
from quantkit.pipeline import build
from quantkit.quantize import QUANTIZE
from quantkit.recipe import Recipe
from quantkit.report.record import artifact_files, changed_files, read_record
from quantkit.workdir import work_folder
from tests.interruption import interrupted
from tests.pretended_gpu import NAME as PRETENDED
from tests.test_pipeline import changed
from tests.tiny import WORDS, make_text, make_tiny

CPU = torch.device("cpu")
NOT_REPRODUCIBLE = ("quantkit.json", "README.md")
# a format's name, and what its [quantize] says beside the defaults, for a model 64 wide
CASES = {
    "gptq": ("gptq", {"group_size": 32}),
    "awq": ("awq", {"group_size": 32, "scaling_steps": 4, "scaling_windows": 4, "scale_candidates": 2}),
    "awq-rounded": (
        "awq",
        {
            "group_size": 32,
            "scaling_steps": 4,
            "scaling_windows": 4,
            "scale_candidates": 4,
            "solver": "round-to-nearest",
        },
    ),
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
    text = make_text(tmp_path / "text.jsonl")
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


def test_it_is_built_and_judged_on_a_gpu(recipe, gpu, tmp_path):
    recipe = changed(recipe, "compute", dtype="bfloat16")  # what the products of a GPU are made for
    done = build(recipe, out=tmp_path / "out", device=gpu)
    assert done.record["environment"]["device"] == "cuda"
    assert done.record["validation"]["gate"] == {"passed": True, "failures": []}
    if done.record["calibration"] is None and torch.cuda.get_device_name(gpu) == PRETENDED:
        # no products, whose order is a device's own, and the kernels are the CPU's
        assert hashes(done.out) == hashes(build(recipe, out=tmp_path / "cpu", device=CPU, validated=False).out)


@pytest.mark.parametrize("name", [name for name, section in QUANTIZE.items() if "skip" in type(section).model_fields])
def test_a_linear_may_be_skipped_in_one_layer_only(name, source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 20)
    # no scaling, so that what is dense is the source's
    scaling = {"scaling_steps": 0} if name == "awq" else {}
    content = {
        "format": name,
        "model": {"id": str(source)},
        "quantize": {"group_size": 32, "skip": ["layers.1.mlp.down_proj"]} | scaling,
        "calibration": {"texts": {str(text): 4}, "window_tokens": 16},
    }
    out = build(Recipe.of(content), out=tmp_path / "out", device=CPU, validated=False).out
    (found,), checkpoint = READERS[name].variants(out).values(), open_checkpoint(source)
    dense = []
    for item in ("layers.0", "layers.1"):
        (module,) = (key for key in checkpoint.read(item) if key.endswith("mlp.down_proj.weight"))
        dense.append(torch.allclose(found.read(item)[module].float(), checkpoint.read(item)[module].float(), rtol=1e-3))
    assert dense == [False, True]


@pytest.mark.parametrize("items", [1, 3])
def test_an_interrupted_build_ends_in_the_same_bytes(recipe, items, tmp_path):
    whole = build(recipe, out=tmp_path / "whole", device=CPU, validated=False)
    out = tmp_path / "out"
    with interrupted(keeping, "write_item", after=items):
        build(recipe, out=out, device=CPU, validated=False)
    assert work_folder(out).exists()
    build(recipe, out=out, device=CPU, validated=False)
    assert hashes(out) == hashes(whole.out)
    assert not work_folder(out).exists()


def test_no_format_is_named_where_all_are_alike():
    """A new format is rows in tables: stream, pipeline, plan, validation and command line know none by name."""
    root = Path(quantkit.__file__).parent
    alike = [
        "stream.py",
        "making.py",
        "keeping.py",
        "pipeline.py",
        "plan.py",
        "judgement.py",
        "activations.py",
        "survey.py",
        "footprint.py",
        "workload.py",
        "provenance.py",
        "job.py",
        "upstream.py",
        "report/card.py",
    ]
    alike += ["engine_check.py"]
    alike += [str(path.relative_to(root)) for folder in ("cli", "validation") for path in (root / folder).glob("*.py")]
    assert len(alike) > 25
    for name in alike:
        assert formats_named((root / name).read_text()) == set(), name


def formats_named(code: str) -> set[str]:
    """What of a module's text is a format's: its name, an import of its module, a class of it by whatever way."""
    own = set()
    for reading in READERS.values():
        package = reading.recognizes.__module__.removesuffix(".read")
        own |= {name for name, module in sys.modules.items() if name == package or name.startswith(f"{package}.")}
    classes = {
        each.__name__
        for module in own
        for each in vars(sys.modules[module]).values()
        if isinstance(each, type) and each.__module__ in own and each.__name__.endswith(("Format", "Artifact"))
    }
    found = set()
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Constant(value=str(text)) if text in QUANTIZE:
                found.add(text)
            case ast.Import(names=names):
                found |= {alias.name for alias in names} & own
            case ast.ImportFrom(module=module, names=names):
                found |= {str(module), *(f"{module}.{alias.name}" for alias in names)} & own
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in classes:
                found.add(name)
    return found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('if name == "gguf": pass', {"gguf"}),
        ("from quantkit.formats import READERS, detect", set()),
        ("from quantkit.formats.contract import InPlace\nisinstance(form, InPlace)", set()),
        ("from quantkit.formats import awq", {"quantkit.formats.awq"}),
        ("from quantkit.formats.gguf.write import GgufFormat", {"quantkit.formats.gguf.write"}),
        ("import quantkit.formats.hqq", {"quantkit.formats.hqq"}),
        ("isinstance(form, formats.mlx.MlxFormat)", {"MlxFormat"}),
    ],
)
def test_the_guard_sees_every_way_to_name_a_format(code, found):
    assert formats_named(code) == found
