"""Each format's own package: reads what quantkit wrote, runs the card's snippet, and builds what quantkit reads."""

import itertools
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.families import EMBEDDING, HEAD
from quantkit.engines import runtime
from quantkit.engines.env import Engine, environment_python, list_engines, own_variables
from quantkit.errors import RunFailedError
from quantkit.formats import READERS, mlx, open_variants
from quantkit.formats.contract import Artifact
from quantkit.pipeline import build
from quantkit.quantize import QUANTIZE
from quantkit.recipe import Recipe
from quantkit.solvers.rtn import RoundToNearest
from tests.tiny import UNEVEN_VARIANTS, VARIANTS, make_text, make_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CPU = torch.device("cpu")
# of the largest logit: what half precision costs a reader; mlx-lm computes in float32 here
TOLERANCE = {
    "autoawq": 0.004,
    "exllamav2": 0.006,
    "gptqmodel": 0.004,
    "hqq": 0.006,
    "llm-compressor": 1e-4,
    "mlx-lm": 1e-4,
}
CASES = [
    *(("awq", kind, {"group_size": 32, "scaling_windows": 4}) for kind in VARIANTS),
    ("awq", "mistral", {"group_size": 64, "scaling_steps": 0}),
    ("awq", "qwen2", {"group_size": 128, "scaling_windows": 4, "skip": ["mlp.down_proj"]}),
    *(("compressed-tensors", kind, {"group_size": 32}) for kind in VARIANTS),
    *(("compressed-tensors", "mistral", {"group_size": 32, "bits": bits, "symmetric": False}) for bits in (4, 8)),
    ("compressed-tensors", "mistral", {"group_size": -1, "bits": 8}),
    ("compressed-tensors", "mistral", {"group_size": 64, "skip": ["mlp.down_proj"]}),
    *(("hqq", "mistral", {"group_size": 32, "bits": bits}) for bits in (2, 3, 4, 8)),
    ("hqq", "mistral", {"group_size": 32, "bits": 3, "axis": 0}),
    ("hqq", "qwen2", {"group_size": 64, "bits": 3, "solver": "gptq"}),
    ("hqq", "llama", {"group_size": 128, "bits": 4}),
    ("hqq", "qwen3", {"group_size": 16, "bits": 2, "skip": ["mlp.down_proj", "self_attn.v_proj"]}),
    *(("mlx", "mistral", {"group_size": 32, "bits": bits}) for bits in (2, 3, 4, 5, 6, 8)),
    ("mlx", "mistral", {"group_size": 64, "mixed": "mixed_3_6", "dtype": "bfloat16"}),
    *(("mlx", kind, {"group_size": 32}) for kind in ("llama", "qwen2", "qwen3")),
    *(("mlx", "mistral", {"group_size": 32, "skip": [end]}) for end in ("lm_head", "embed_tokens")),
]
# every engine that reads a case's format
READ = [(engine.name, *case) for case in CASES for engine in list_engines() if case[0] in engine.reads]
BUILT = [
    ("autoawq", "awq", {"group_size": 32}),
    ("gptqmodel", "awq", {"group_size": 32}),
    ("hqq", "hqq", {"bits": 3, "group_size": 32}),
    ("hqq", "hqq", {"bits": 4, "group_size": 64, "axis": 0}),
    ("llm-compressor", "compressed-tensors", {"group_size": 32}),
    ("llm-compressor", "compressed-tensors", {"group_size": 64, "symmetric": False, "order": "natural"}),
    ("llm-compressor", "compressed-tensors", {"group_size": -1, "bits": 8}),
    ("mlx-lm", "mlx", {"bits": 4, "group_size": 64}),
    ("mlx-lm", "mlx", {"group_size": 64, "mixed": "mixed_4_6", "dtype": "bfloat16"}),
    ("mlx-lm", "mlx", {"group_size": 64, "solver": "gptq"}),
]


def named(case) -> str:
    return "-".join(str(part) for part in (*case[:-1], *case[-1].values()))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {kind: make_tiny(folder / kind, kind, **changes) for kind, changes in UNEVEN_VARIANTS.items()}


def test_no_size_follows_from_others(sources):
    """So that a reader which takes one for another is caught; of qwen2 transformers has no head_dim of its own."""
    for kind, folder in sources.items():
        config = json.loads((folder / "config.json").read_text())
        assert config["vocab_size"] % 32
        assert kind == "qwen2" or config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]


def recipe_of(name: str, source: Path, quantize: dict, folder: Path, **keys) -> Recipe:
    text = make_text(folder / "text.jsonl")
    return Recipe.of(
        {
            "format": name,
            "model": {"id": str(source)},
            "quantize": quantize,
            "calibration": {"texts": {str(text): 8}, "window_tokens": 32},
            **keys,
        }
    )


def opened(name: str, folder: Path) -> Artifact:
    (artifact,) = READERS[name].variants(folder).values()
    return artifact


def windows() -> list[SimpleNamespace]:
    ids = torch.randint(3, 384, (2, 40), generator=torch.Generator().manual_seed(0)).tolist()
    return [SimpleNamespace(inputs=row[:-1], targets=row[1:]) for row in ids]


def decoded_logits(source: Path, artifact: Artifact) -> list[np.ndarray]:
    """Of quantkit's decode in transformers' own whole model, float32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    weights = {}
    for item in (EMBEDDING, "layers.0", "layers.1", HEAD):
        weights |= {name: tensor.float() for name, tensor in artifact.read(item).items()}
    found = model.load_state_dict(weights, strict=False)
    assert set(found.missing_keys) <= {"lm_head.weight"}
    assert not found.unexpected_keys
    with torch.inference_mode():
        return [model(torch.tensor([window.inputs])).logits[0].numpy() for window in windows()]


def largest_difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    scale = max(float(np.abs(array).max()) for array in expected)
    return max(float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True)) / scale


def test_scales_of_compressed_tensors_that_are_read_are_of_either_sign(sources, tmp_path):
    recipe = recipe_of("compressed-tensors", sources["mistral"], {"group_size": 32}, tmp_path)
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    files = [load_file(path) for path in out.glob("*.safetensors")]
    scales = [tensor for file in files for name, tensor in file.items() if name.endswith(".weight_scale")]
    assert any((tensor < 0).any() for tensor in scales)
    assert any((tensor > 0).any() for tensor in scales)


@pytest.mark.parametrize("case", READ, ids=named)
def test_the_native_reader_sees_what_quantkit_decodes(case, sources, kept_engine, tmp_path):
    reader, name, kind, quantize = case
    recipe = recipe_of(name, sources[kind], quantize, tmp_path)
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    engine = kept_engine(reader)
    found = list(runtime.evaluate(engine, out, windows()))
    difference = largest_difference(found, decoded_logits(sources[kind], opened(name, out)))
    print(f"{named(case)}: {difference:.6f} of the largest logit")
    assert difference <= TOLERANCE[engine.name]


def test_16_bits_in_one_layer_only_are_read_by_gptqmodel_and_refused_by_autoawq(sources, kept_engine, tmp_path):
    quantize = {"group_size": 32, "scaling_steps": 0, "skip": ["layers.1.mlp.down_proj"]}
    recipe = recipe_of("awq", sources["mistral"], quantize, tmp_path)
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    found = list(runtime.evaluate(kept_engine("gptqmodel"), out, windows()))
    expected = decoded_logits(sources["mistral"], opened("awq", out))
    assert largest_difference(found, expected) <= TOLERANCE["gptqmodel"]
    with pytest.raises(RunFailedError, match=r"in some layers only for packed ones: model\.layers\.1\.mlp\.down_proj"):
        list(runtime.evaluate(kept_engine("autoawq"), out, windows()))


def test_hqqs_own_loader_opens_the_pickle(sources, kept_engine, tmp_path):
    quantize = {"group_size": 32, "bits": 3, "qmodel_pt": True}
    recipe = recipe_of("hqq", sources["mistral"], quantize, tmp_path)
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    expected = decoded_logits(sources["mistral"], opened("hqq", out))
    for path in out.glob("*.safetensors"):
        path.unlink()
    found = list(runtime.evaluate(kept_engine("hqq"), out, windows()))
    assert largest_difference(found, expected) <= TOLERANCE["hqq"]


def inside(engine: Engine, script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run Python in an engine's environment."""
    return subprocess.run(
        [environment_python(engine), "-I", "-c", script, *map(str, arguments)],
        env=own_variables() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )


def test_transformers_refuses_our_hqq_folder_where_it_would_make_random_weights(sources, kept_engine, tmp_path):
    """With hqq beside it; the same folder under the usual file name shows what is avoided."""
    recipe = recipe_of("hqq", sources["mistral"], {"group_size": 32, "bits": 3}, tmp_path)
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    script = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = inside(kept_engine("hqq"), script, out)
    assert done.returncode != 0
    assert "no file named model.safetensors" in done.stderr
    assert "newly initialized" not in done.stderr
    (out / "hqq_model.safetensors").rename(out / "model.safetensors")
    done = inside(kept_engine("hqq"), script, out)
    assert done.returncode == 0
    assert "newly initialized" in done.stderr


# what HQQLinear did before it gave up on quantized zeros and scales
OLD_HQQ = """
import sys, torch
from hqq.core.quantize import Quantizer
torch.manual_seed(0)
quantized = set(sys.argv[2].split(","))
modules, weights = {}, {}
for name, rows, columns in (("mlp.down_proj", 128, 256), ("mlp.up_proj", 256, 128)):
    words, meta = Quantizer.quantize(torch.randn(rows, columns), nbits=3, group_size=64, axis=1, device="cpu")
    meta |= {"quant_zero": "zero" in quantized, "quant_scale": "scale" in quantized}
    dense = dict(meta)
    for which, grouped in (("zero", False), ("scale", True)):
        if which in quantized:
            keys = {"nbits": 8, "channel_wise": grouped, "group_size": 128 if grouped else None, "axis": 0}
            found = Quantizer.quantize(meta.pop(which), optimize=False, device="cpu", **keys)
            meta[f"{which}_q"], meta[f"meta_{which}"] = found
            dense[which] = Quantizer.dequantize(*(found[0], found[1] | {"compute_dtype": torch.float32}))
    full = f"model.layers.0.{name}"
    modules[full] = {"W_q": words, "bias": None, "meta": meta, "offload_meta": False}
    weights[full] = Quantizer.dequantize(words, dense | {"compute_dtype": torch.float32})
torch.save(modules, sys.argv[1] + "/qmodel.pt")
torch.save(weights, sys.argv[1] + "/expected.pt")
"""


@pytest.mark.parametrize("quantized", ["none", "zero", "zero,scale"])
def test_pickles_with_quantized_zeros_and_scales_decode_as_hqq_decodes_them(quantized, sources, kept_engine, tmp_path):
    done = inside(kept_engine("hqq"), OLD_HQQ, tmp_path, quantized)
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "config.json").write_text((sources["mistral"] / "config.json").read_text())
    found = opened("hqq", tmp_path).read("layers.0")
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert len(expected) == 2
    for name, weight in expected.items():
        torch.testing.assert_close(found[f"{name}.weight"], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_half_quadratic_codes_lose_no_more_than_the_packages(bits, axis, sources, kept_engine, tmp_path):
    """The squared error in every linear of a model that both quantized."""
    quantize = {"group_size": 32, "bits": bits, "axis": axis, "solver": "half-quadratic"}
    lost = {}
    for engine in ("quantkit", kept_engine("hqq").name):
        # the package has but one solver, which its recipe calls nothing
        keys = {key: value for key, value in quantize.items() if engine == "quantkit" or key != "solver"}
        recipe = recipe_of("hqq", sources["mistral"], keys, tmp_path, engine=engine)
        out = build(recipe, out=tmp_path / engine, device=CPU, validated=False).out
        weights = opened("hqq", out).read("layers.0")
        lost[engine] = {name: tensor.float() for name, tensor in weights.items() if name.endswith("_proj.weight")}
    model = AutoModelForCausalLM.from_pretrained(sources["mistral"], dtype=torch.float32)
    assert len(lost["quantkit"]) == 7
    for name in lost["quantkit"]:
        weight = model.get_parameter(name).detach()
        ours, theirs = ((weight - lost[engine][name]).square().sum() for engine in ("quantkit", "hqq"))
        assert ours <= theirs * (1 + 1e-6), name


@pytest.mark.parametrize("case", BUILT, ids=named)
def test_what_the_package_builds_is_read_judged_and_recorded(case, sources, kept_engine, tmp_path):
    maker, name, quantize = case
    engine = kept_engine(maker)
    validation = {"texts": [str(tmp_path / "text.jsonl")], "window_tokens": 32, "require": ["reference", engine.name]}
    recipe = recipe_of(name, sources["mistral"], quantize, tmp_path, engine=engine.name, validation=validation)
    done = build(recipe, out=tmp_path / "out", device=CPU)
    assert done.record["engine_facts"]["package"] == engine.package
    ours, theirs = done.record["validation"]["variants"][0]["results"]
    assert ours["ratio"] == pytest.approx(theirs["ratio"], abs=2e-3)
    assert not [path for path in done.out.rglob("*") if path.suffix == ".json" and str(tmp_path) in path.read_text()]


# every width and group size of a matrix, by the package
MX_QUANTIZE = """
import itertools, sys
import mlx.core as mx
found = {}
for dtype in ("float16", "bfloat16"):
    weight = mx.load(sys.argv[1])["weight"].astype(getattr(mx, dtype))
    for bits, size in itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128)):
        parts = mx.quantize(weight, group_size=size, bits=bits)
        found |= {f"{dtype}-{bits}-{size}.{part}": one for part, one in zip(("weight", "scales", "biases"), parts)}
mx.save_safetensors(sys.argv[2], found)
"""


def test_round_to_nearest_is_mx_quantize_bit_for_bit(kept_engine, tmp_path):
    """With groups of one sign, of one value, of zeros, and of magnitudes that float16 hardly holds among them."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    weight[2], weight[3] = 0.0, 0.125
    weight[4] *= 1e-6
    weight[5] *= 1e3
    weight[6, ::2] = 0
    save_file({"weight": weight}, tmp_path / "weight.safetensors")
    done = inside(kept_engine("mlx-lm"), MX_QUANTIZE, tmp_path / "weight.safetensors", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr[-2000:]
    expected = load_file(tmp_path / "out.safetensors")
    found = {}
    for dtype, bits, size in itertools.product((torch.float16, torch.bfloat16), mlx.WIDTHS, mlx.GROUP_SIZES):
        name = f"{str(dtype).removeprefix('torch.')}-{bits}-{size}"
        found |= mlx.encode_linear(name, RoundToNearest(bits, size, dtype).quantize(weight), dtype)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


ROUNDED = [
    *({"bits": bits, "group_size": 32, "dtype": "float16"} for bits in (2, 3, 4, 5, 6, 8)),
    *({"bits": bits, "group_size": size, "dtype": "bfloat16"} for bits, size in ((3, 64), (4, 128))),
    {"group_size": 64, "mixed": "mixed_3_6", "dtype": "float16"},
]


@pytest.mark.parametrize("quantize", ROUNDED, ids=lambda quantize: "-".join(map(str, quantize.values())))
def test_rounding_to_nearest_stores_what_mlx_lm_stores(quantize, sources, kept_engine, tmp_path):
    kept_engine("mlx-lm")
    ways = {"ours": {"quantize": quantize | {"solver": "round-to-nearest"}}, "theirs": {"engine": "mlx-lm"}}
    found = {}
    for way, keys in ways.items():
        recipe = recipe_of("mlx", sources["mistral"], **({"quantize": quantize, "folder": tmp_path} | keys))
        out = build(recipe, out=tmp_path / way, device=CPU, validated=False).out
        found[way] = load_file(out / "model.safetensors")
    assert found["ours"].keys() == found["theirs"].keys()
    assert sum(name.endswith(".scales") for name in found["ours"]) == 2 * 7 + 2
    assert [name for name, tensor in found["ours"].items() if not torch.equal(tensor, found["theirs"][name])] == []


# EXL2's card downloads and names a server: there is no Python in it
@pytest.mark.parametrize("name", sorted(READERS.keys() - {"exl2"}))
def test_the_cards_snippet_runs(name, kept_engine, tmp_path):
    # as many rows as the tokenizer has tokens: a random model says any of them
    source = make_tiny(tmp_path / "source", "mistral", vocab_size=384)
    # types of a file have their own block sizes; one type needs no pass of its own
    quantize = {"types": ["Q4_K_M"]} if "types" in type(QUANTIZE[name]).model_fields else {"group_size": 32}
    recipe = recipe_of(name, source, quantize, tmp_path)
    done = build(recipe, out=tmp_path / "out", device=CPU, validated=False)
    out, variants = done.out, list(done.record["variants"])
    snippet = READERS[name].use(str(out), recipe.quantize.model_dump(), variants).split("```python")[1].split("```")[0]
    engine = kept_engine(READERS[name].native_engine)
    ran = subprocess.run(
        [environment_python(engine), "-I", "-c", snippet.replace("=200", "=5")],
        env=own_variables() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count())},
        capture_output=True,
        text=True,
        cwd=out,  # where files are named without their folder
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="exllamav2 needs CUDA")
@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2", "qwen3"])
def test_exllamav2_sees_what_quantkit_decodes(kind, sources, kept_engine, tmp_path):
    quantize = {"bits": [3.0 if kind == "mistral" else 4.0, 6.0], "scale_candidates": 4, "measure_tokens": 64}
    recipe = recipe_of("exl2", sources[kind], quantize, tmp_path)
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"activations": "float"})})
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    engine = kept_engine("exllamav2")
    for artifact in open_variants("exl2", out).values():
        tensors = artifact.tensors
        found = list(runtime.evaluate(engine, tensors.folder, windows(), files=tensors.files, device="cuda"))
        assert largest_difference(found, decoded_logits(sources[kind], artifact)) <= TOLERANCE["exllamav2"]
