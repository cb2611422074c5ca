"""Recipes that name an engine: what is refused, what the engine's own defaults are, and (slow) whole builds."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.index import open_checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.engines import env
from quantkit.engines.env import find_engine
from quantkit.errors import RefusedError, UnavailableError
from quantkit.formats import open_variants
from quantkit.pipeline import build, plan
from quantkit.progress import Progress
from quantkit.quantize import QUANTIZE
from quantkit.recipe import ENGINES, Recipe
from quantkit.recipe_files import find_recipe, list_recipes, load_recipe
from quantkit.report.record import read_record
from quantkit.source_pass import Calibration, SourcePass
from quantkit.stream import Sinks
from quantkit.upstream import adopt, prepare, settled
from tests.tiny import make_text, make_tiny

CPU = torch.device("cpu")
SHORT = {"calibration": {"window_tokens": 64}, "validation": {"window_tokens": 64}}
MAKERS = [name for name in ENGINES if "gptq" in find_engine(name).builds]


def recipe_of(engine: str, model="bielik-nano", **quantize) -> Recipe:
    content = {"format": "gptq", "engine": engine, "model": {"id": str(model)}, "quantize": quantize}
    return Recipe.of(content | SHORT)


def test_quantkits_own_recipes_are_left_alone():
    recipe = recipe_of("quantkit", order="natural")
    assert settled(recipe) is recipe


@pytest.mark.parametrize("engine", MAKERS)
def test_keys_that_are_left_out_take_the_engines_value(engine):
    found = settled(recipe_of(engine)).quantize
    assert found.order == {"auto-gptq": "natural", "auto-round": "natural", "gptqmodel": "group-aware"}[engine]
    assert (found.scale_candidates, found.asymmetric, found.bits) == (0, 0.0, 4)
    assert found.damping == {"auto-gptq": 0.01, "auto-round": 0.01, "gptqmodel": 0.05}[engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_key_of_a_format_that_it_makes_is_in_an_engines_table(engine):
    row = find_engine(engine)
    for name, known in row.settings.items():
        assert type(QUANTIZE[name]).model_fields.keys() == known.keys()


def test_what_the_engine_cannot_honour_is_named_at_once():
    with pytest.raises(RefusedError) as caught:
        settled(recipe_of("auto-gptq", order="group-aware", asymmetric=0.5, bits=3, skip=["mlp.down_proj"]))
    assert str(caught.value) == (
        "the engine auto-gptq cannot honour the recipe:\n"
        "  order = 'group-aware': auto-gptq knows natural, activation\n"
        "  asymmetric = 0.5: auto-gptq knows 0.0\n"
        "  skip = ['mlp.down_proj']: auto-gptq knows []\n"
        "  at:  quantize\n"
        "  fix: --set quantize.order=natural --set quantize.asymmetric=0.0 --set quantize.skip=[], "
        'or engine = "quantkit"'
    )


def test_what_a_package_can_do_under_one_solver_only_is_refused_under_the_other():
    content = {"format": "mlx", "engine": "mlx-lm", "model": {"id": "bielik-nano"}}
    keys = {"bits": 3, "mixed": "mixed_3_6", "dtype": "float16"}
    assert settled(Recipe.of(content | {"quantize": keys | {"solver": "round-to-nearest"}})).quantize.bits == 3
    with pytest.raises(RefusedError) as caught:
        settled(Recipe.of(content | {"quantize": keys | {"solver": "gptq"}}))
    assert str(caught.value) == (
        "the engine mlx-lm cannot honour the recipe:\n"
        "  bits = 3: mlx-lm knows 4, 2, 8 with solver = 'gptq'\n"
        "  mixed = 'mixed_3_6': mlx-lm knows none with solver = 'gptq'\n"
        "  at:  quantize\n"
        '  fix: --set quantize.bits=4 --set quantize.mixed=none, or engine = "quantkit"'
    )


def test_gptqmodel_corrects_towards_the_float_model_in_orders_that_it_does_so_in():
    found = settled(recipe_of("gptqmodel", order="natural", asymmetric=0.25)).quantize
    assert (found.asymmetric, found.asymmetric_every) == (0.25, 1)
    with pytest.raises(RefusedError, match=r"asymmetric = 0\.25: gptqmodel knows 0\.0 with order = 'group-aware'"):
        settled(recipe_of("gptqmodel", asymmetric=0.25))


@pytest.mark.parametrize(
    ("name", "key", "value"), [("gptq", "group_size", 96), ("gptq", "bits", 5), ("compressed-tensors", "bits", 3)]
)
def test_what_no_reader_of_a_format_takes_is_no_recipe(name, key, value):
    with pytest.raises(RefusedError, match=rf"quantize\.{key}: Input should be .*, got {value}"):
        load_recipe(find_recipe(f"bielik-nano/{name}"), (f"quantize.{key}={value}",))


def test_statistics_of_the_float_model_are_not_for_engines():
    recipe = Recipe.of(
        {
            "format": "gptq",
            "engine": "gptqmodel",
            "model": {"id": "bielik-nano"},
            "calibration": {"activations": "float"},
        }
    )
    with pytest.raises(RefusedError, match="'float': gptqmodel has its own way"):
        settled(recipe)


def gguf_recipe(source="bielik-nano", *, calibration=(), **quantize) -> Recipe:
    content = {"format": "gguf", "engine": "llama-cpp", "model": {"id": str(source)}, "quantize": quantize}
    return Recipe.of(content | SHORT | {"calibration": {"window_tokens": 64} | dict(calibration)})


def test_llama_cpp_is_given_statistics_of_the_float_model():
    found = settled(gguf_recipe())
    assert (found.quantize.encoder, found.quantize.imatrix, found.calibration.activations) == ("ggml", True, "float")
    assert settled(found) == found
    with pytest.raises(RefusedError) as caught:
        settled(gguf_recipe(solver="gptq", encoder="quantkit", calibration={"activations": "quantized"}))
    assert str(caught.value) == (
        "the engine llama-cpp cannot honour the recipe:\n"
        "  solver = 'gptq': llama-cpp knows search\n"
        "  encoder = 'quantkit': llama-cpp knows ggml\n"
        "  calibration.activations = 'quantized': llama-cpp has its own way\n"
        "  at:  quantize\n"
        "  fix: --set quantize.solver=search --set quantize.encoder=ggml --set calibration.activations=float, "
        'or engine = "quantkit"'
    )


def test_a_file_that_llama_cpp_would_have_to_split_is_refused_at_plan(tiny_mistral, tmp_path):
    recipe = gguf_recipe(tiny_mistral, types=["Q4_0", "Q8_0"], shard_gb=0.00011)
    with pytest.raises(
        RefusedError, match=r"llama-cpp does not split files, and Q8_0 would be larger than 0\.00011 GB"
    ):
        plan(recipe, out=tmp_path / "out", device=CPU, progress=Progress())
    with pytest.raises(UnavailableError, match="llama-cpp is not installed"):
        plan(gguf_recipe(tiny_mistral, types=["Q4_0"]), out=tmp_path / "out", device=CPU, progress=Progress())


@pytest.mark.parametrize("imatrix", [True, False])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_what_llama_cpp_starts_from_is_the_checkpoint_and_its_importance(dtype, kind, imatrix, tmp_path):
    source = make_tiny(tmp_path / "source", "mistral", dtype=dtype, hidden_size=256, intermediate_size=256)
    checkpoint = open_checkpoint(source)
    recipe = settled(gguf_recipe(source, types=["Q2_K", "Q8_0"], name="tiny", imatrix=imatrix))
    tokens_WT = torch.arange(64).reshape(2, 32) + 3
    calibration = Calibration(tokens_WT, 8, from_float=True) if imatrix else None
    decoder = Decoder(checkpoint.config, checkpoint.family, device=CPU, dtype=torch.float32)
    folder = tmp_path / "prepared"
    with SourcePass(checkpoint) as shared:
        for _ in prepare(checkpoint, recipe, calibration, folder, decoder=decoder, sinks=Sinks(), shared=shared):
            assert not (folder / "importance.npz").exists()
    assert [path.name for path in folder.glob("*.gguf")] == [f"tiny.{kind}.gguf"]
    (artifact,) = open_variants("gguf", folder).values()
    for item in checkpoint.items:
        for name, weight in checkpoint.read(item).items():
            assert torch.equal(artifact.read(item)[name], weight.float()), name
    assert (folder / "importance.npz").exists() is imatrix
    if imatrix:
        found = dict(np.load(folder / "importance.npz"))
        assert len(found) == 2 * 7 + 1
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        seen = []
        model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.inference_mode():
            model(tokens_WT)
        expected = seen[0].square().mean(dim=(0, 1))
        torch.testing.assert_close(torch.from_numpy(found["output.weight"]), expected, rtol=1e-4, atol=1e-6)


PAIRS = [
    (name, engine)
    for name in list_recipes()
    for engine in ENGINES
    if load_recipe(find_recipe(name)).format in find_engine(engine).builds
]


@pytest.mark.parametrize(("name", "engine"), PAIRS, ids=map("-".join, PAIRS))
def test_every_shipped_recipe_runs_with_every_engine_of_its_format(name, engine):
    """As it is, or with what the refusal says."""
    path, changes = find_recipe(name), (f"engine={engine}",)
    try:
        found = settled(load_recipe(path, changes))
    except RefusedError as error:
        offered, _, other = error.fix.rpartition(", or ")
        assert other == 'engine = "quantkit"'
        changes += tuple(filter(None, (change.strip() for change in offered.split("--set "))))
        assert len(changes) > 1
        found = settled(load_recipe(path, changes))
    assert found.engine == engine


def test_pairs_of_recipes_and_engines_are_many():
    assert len({engine for _, engine in PAIRS}) == len(ENGINES)
    assert len(PAIRS) > 20


def test_a_model_that_the_engine_has_no_code_for_is_refused_at_plan(tmp_path):
    source = make_tiny(tmp_path / "m", "qwen3")
    recipe = recipe_of("auto-gptq", source, group_size=32)
    with pytest.raises(RefusedError, match="the engine auto-gptq knows no qwen3; it knows llama, mistral, qwen2"):
        plan(recipe, out=tmp_path / "out", device=CPU, progress=Progress())


def test_an_engine_that_is_not_installed_stops_the_plan_and_the_build(tiny_mistral, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    recipe = recipe_of("gptqmodel", tiny_mistral, group_size=32)
    for run in (
        lambda: plan(recipe, out=tmp_path / "out", device=CPU, progress=Progress()),
        lambda: build(recipe, out=tmp_path / "out", device=CPU),
    ):
        with pytest.raises(UnavailableError) as caught:
            run()
        assert caught.value.what == "gptqmodel is not installed: `quantkit engines install gptqmodel`"
    assert not list(tmp_path.glob("out*"))


def test_of_what_an_engine_leaves_only_weights_and_settings_are_kept(tiny_mistral, tmp_path):
    scratch, folder = tmp_path / "scratch", tmp_path / "artifact"
    scratch.mkdir()
    folder.mkdir()
    settings = {"quant_method": "gptq", "bits": 4, "model_name_or_path": str(tmp_path)}
    left = {"model_type": "mistral", "torch_dtype": "bfloat16", "rope_theta": 1.0, "quantization_config": settings}
    (scratch / "config.json").write_text(json.dumps(left))
    (scratch / "quantize_config.json").write_text(json.dumps(settings))
    for name in ("model.safetensors", "quant_log.csv", "README.md", "tokenizer.json"):
        (scratch / name).write_text("left")
    adopt(scratch, open_checkpoint(tiny_mistral), folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "gptq", "bits": 4}
    assert json.loads((folder / "quantize_config.json").read_text()) == config["quantization_config"]
    assert (config["torch_dtype"], config["rope_theta"], config["hidden_size"]) == ("bfloat16", 10000.0, 64)
    assert (folder / "model.safetensors").read_text() == "left"
    assert (folder / "tokenizer.json").read_bytes() == (tiny_mistral / "tokenizer.json").read_bytes()
    assert not (folder / "quant_log.csv").exists()
    assert not (folder / "README.md").exists()


def test_a_folder_of_each_variant_is_kept(tiny_mistral, tmp_path):
    scratch, folder = tmp_path / "scratch", tmp_path / "artifact"
    folder.mkdir()
    for bits in (3.0, 4.0):
        left = scratch / f"{bits}bpw"
        left.mkdir(parents=True)
        settings = {"quant_method": "exl2", "bits": bits}
        (left / "config.json").write_text(json.dumps({"quantization_config": settings}))
        (left / "output.safetensors").write_text(str(bits))
    adopt(scratch, open_checkpoint(tiny_mistral), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["3.0bpw", "4.0bpw"]
    for bits in (3.0, 4.0):
        config = json.loads((folder / f"{bits}bpw" / "config.json").read_text())
        assert config["quantization_config"]["bits"] == bits
        assert config["hidden_size"] == 64
        assert (folder / f"{bits}bpw" / "output.safetensors").read_text() == str(bits)
        assert (folder / f"{bits}bpw" / "tokenizer.json").exists()


def test_an_engine_for_cuda_is_refused_without_it(tiny_mistral, tmp_path, monkeypatch):
    monkeypatch.setattr(env, "has_cuda", lambda: False)
    content = {"format": "exl2", "engine": "exllamav2", "model": {"id": str(tiny_mistral)}} | SHORT
    recipe = Recipe.of(content | {"quantize": {"bits": [4.0, 5.0]}})
    for run in (
        lambda: plan(recipe, out=tmp_path / "out", device=CPU, progress=Progress()),
        lambda: build(recipe, out=tmp_path / "out", device=CPU),
    ):
        with pytest.raises(UnavailableError, match="no CUDA device: exllamav2 needs an NVIDIA GPU"):
            run()
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(RefusedError, match=r"damping = 0\.1: exllamav2 knows 0\.01"):
        settled(Recipe.of(content | {"quantize": {"damping": 0.1}}))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", MAKERS)
def test_a_recipe_that_names_an_engine_gives_an_artifact_like_any_other(engine, tmp_path, kept_engine):
    kept_engine(engine)
    source = make_tiny(tmp_path / "source", "mistral", vocab_size=416, hidden_size=128, intermediate_size=256)
    text = make_text(tmp_path / "text.jsonl")
    recipe = Recipe.of(
        {
            "format": "gptq",
            "engine": engine,
            "model": {"id": str(source)},
            "quantize": {"group_size": 32},
            "calibration": {"texts": {str(text): 8}, "window_tokens": 32},
            "validation": {
                "texts": [str(text)],
                "window_tokens": 32,
                "require": ["reference", engine],
                "gates": {"perplexity_ratio": 1.5},
            },
        }
    )
    out = tmp_path / "out"
    done = build(recipe, out=out, device=CPU)
    assert done.record == read_record(out)
    assert done.record["engine"] == done.record["engine_facts"]["package"] == engine
    assert done.record["reproducible"] is False
    assert done.record["recipe"]["quantize"]["scale_candidates"] == 0
    results = done.record["validation"]["variants"][0]["results"]
    assert [result["runtime"] for result in results] == ["reference", engine]
    ratios = [result["ratio"] for result in results]
    assert abs(ratios[0] - ratios[1]) < 0.01
    assert done.record["validation"]["gate"]["passed"]
    assert build(recipe, out=out, device=CPU).reused
    assert not (tmp_path / "out.work").exists()
    texts = [path.read_text() for path in out.iterdir() if path.suffix in (".json", ".md")]
    assert not [text for text in texts if str(tmp_path) in text]
