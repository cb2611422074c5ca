"""What people are told who bring something wrong: the whole of stderr and the exit code, case by case.

A new mistake is a row. `{m}` is the model's folder, `{t}` the test's, sizes and hashes are not compared.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.cli import main
from tests.checkpoint.test_index import edit, shards
from tests.test_workdir import fill, small_disk  # noqa: F401 (a fixture)
from tests.tiny import WORDS, make_tiny

RECIPE = """format = "gptq"
[model]
id = "{m}"
[quantize]
group_size = 32
scale_candidates = 2
[calibration]
window_tokens = 16
texts = {{ "{t}/text.txt" = 4 }}
[validation]
window_tokens = 32
generated_tokens = 2
texts = ["{t}/text.txt"]
"""


def lose_a_shard(model: Path) -> None:
    shards(model)[0].unlink()


def cut_a_shard(model: Path) -> None:
    shards(model)[0].write_bytes(shards(model)[0].read_bytes()[:-10])


def name_too_much(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = shards(model)[0].name
    path.write_text(json.dumps(index))


def leave_pickles(model: Path) -> None:
    for path in [*shards(model), model / "model.safetensors.index.json"]:
        path.unlink()
    torch.save({}, model / "pytorch_model.bin")


def spoil_a_weight(model: Path) -> None:
    path = next(path for path in shards(model) if "model.layers.1.mlp.up_proj.weight" in load_file(path))
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def make_odd(model: Path) -> None:
    shutil.rmtree(model)
    make_tiny(model, "mistral", intermediate_size=250)


def configured(**changes: object) -> Callable[[Path], None]:
    return lambda model: edit(model / "config.json", **changes)


def lose_the_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


AGAIN = "the weights and config.json are of different models; download both again"
KEYS = "docs/recipe.md lists every key; `quantkit recipes schema` prints the schema"
PACKED = "[250, 64] is not in multiples of 32, which the packing needs"
GROUPED = "in_features 250 is not divisible by group_size 32"
ODD = "".join(
    f'  model.layers.{index}.mlp.{name}: {why}; leave it in 16 bits with quantize.skip = ["mlp.{name}"]\n'
    for index in range(2)
    for name, why in (("gate_proj", PACKED), ("up_proj", PACKED), ("down_proj", GROUPED))
)


@dataclass(frozen=True)
class Case:
    """A mistake: what is done to the model and the recipe, and what `plan`, or `build`, says."""

    what: str
    at: str
    fix: str
    damage: Callable[[Path], None] = lambda model: None
    changes: tuple[str, ...] = ()
    command: str = "plan"


CASES = {
    "missing shard": Case(
        "shard model-00001-of-00005.safetensors is missing",
        "{m}",
        "download it again; model.safetensors.index.json names it",
        lose_a_shard,
    ),
    "truncated shard": Case(
        "shard model-00001-of-00005.safetensors cannot be read: "
        "Error while deserializing header: incomplete metadata, file not fully covered",
        "{m}",
        "it is truncated or damaged; download it again",
        cut_a_shard,
    ),
    "index naming an absent tensor": Case(
        "model.safetensors.index.json names model.layers.9.mlp.up_proj.weight "
        "in model-00001-of-00005.safetensors, but it is not there",
        "{m}/model.safetensors.index.json",
        "download the checkpoint again: index and shards are of different versions",
        name_too_much,
    ),
    "only pickles": Case(
        "the checkpoint holds only pickles (pytorch_model.bin), which can run code when opened",
        "{m}",
        "convert it to safetensors first (transformers: save_pretrained(..., safe_serialization=True))",
        leave_pickles,
    ),
    "weights that are not finite": Case(
        "model.layers.1.mlp.up_proj.weight holds 1 value(s) that are NaN or infinite",
        "{m}/model-00003-of-00005.safetensors",
        "download the checkpoint again, or ask its authors; quantizing it would spread the NaN",
        spoil_a_weight,
        command="build",
    ),
    "unknown architecture": Case(
        "unknown architecture: model_type is 'mamba'",
        "{m}/config.json",
        "known: llama, mistral, qwen2, qwen3; docs/add-a-family.md says how to add one",
        configured(model_type="mamba"),
    ),
    "code of its own": Case(
        "the checkpoint asks to run code of its own (auto_map, trust_remote_code)",
        "{m}/config.json",
        "quantkit never runs code from a checkpoint; use one of llama, mistral, qwen2, qwen3",
        configured(auto_map={"AutoModel": "modeling.X"}),
    ),
    "a config of another model": Case(
        "model.layers.0.mlp.down_proj.weight has shape [64, 96]; config.json calls for [64, 128] (hidden, inner)",
        "{m}/model-00002-of-00005.safetensors",
        AGAIN,
        configured(intermediate_size=128),
    ),
    "a config that transformers refuses": Case(
        "config.json is refused by transformers: Validation error for field 'initializer_range': "
        "TypeError: Field 'initializer_range' expected float, got str (value: 'small')",
        "{m}/config.json",
        "take config.json from the model's own repository",
        configured(initializer_range="small"),
    ),
    "a config of no model, where nothing would run it": Case(
        "config.json does not describe a MistralForCausalLM: Padding_idx must be within num_embeddings",
        "config.json",
        "take config.json from the model's own repository",
        configured(pad_token_id=999),
        changes=("format=mlx", 'quantize={{solver="least-squares",group_size=32}}'),
    ),
    "an activation that only transformers would compute": Case(
        "config.json says hidden_act = 'gelu'; a MistralForCausalLM has silu in every engine",
        "{m}/config.json",
        "take config.json from the model's own repository; a model of another activation cannot be quantized",
        configured(hidden_act="gelu"),
    ),
    "a file in place of the model's folder": Case(
        "not a folder: {m}/tokenizer.json",
        "{m}/tokenizer.json/config.json",
        "give the folder that the file is in",
        changes=("model.id={m}/tokenizer.json",),
    ),
    "a model's folder that is not there": Case(
        "no such folder: {t}/nope",
        "model.id",
        "give a folder with config.json and *.safetensors, a Hub id (org/name), or bielik-nano",
        changes=("model.id={t}/nope",),
    ),
    "no tokenizer": Case(
        "the tokenizer is missing",
        "{m}",
        "put tokenizer.json or tokenizer.model from the model's repository beside the weights",
        lose_the_tokenizer,
    ),
    "in_features that no group fits": Case(
        f"6 linear(s) do not fit the format:\n{ODD.rstrip()}",
        "{m}",
        "change the recipe as said, or choose another group_size",
        make_odd,
    ),
    "windows longer than the context": Case(
        "512 tokens per window are more than the model's 256",
        "calibration.window_tokens",
        "set calibration.window_tokens to 256 or less",
        changes=("calibration.window_tokens=512",),
    ),
    "an answer beyond the context": Case(
        "the prompt's 39 tokens and 250 of an answer are more than the model's 256",
        "validation.generated_tokens",
        "ask for fewer, or a shorter validation.prompt",
        changes=("validation.generated_tokens=250",),
    ),
    "a runtime that does not read the format": Case(
        "the engine mlx-lm does not read gptq",
        "validation.require",
        "leave it out; gptq is read by auto-gptq, auto-round, gptqmodel",
        changes=('validation.require=["reference","mlx-lm"]',),
    ),
    "too little text": Case(
        "the text set text.txt gives 12 windows of 16 tokens, not 9999",
        "calibration.texts",
        "ask for fewer or shorter windows, or add text",
        changes=('calibration.texts={{"{t}/text.txt"=9999}}',),
        command="build",
    ),
    "more memory than there is": Case(
        "the build needs about SIZE of memory on cpu, SIZE are free",
        "calibration and compute",
        "use fewer or shorter windows (calibration.texts, calibration.window_tokens), or a larger machine",
        changes=('calibration.texts={{"{t}/text.txt"=999999999}}',),
    ),
    "an unknown key": Case(
        "1 problem(s) in the recipe:\n  quantize.bit: unknown key; did you mean 'bits'?",
        "{t}/own.toml",
        KEYS,
        changes=("quantize.bit=3",),
    ),
    "four errors at once": Case(
        "4 problem(s) in the recipe:\n"
        "  model.revision: String should match pattern '^[0-9a-f]{{40}}$', got 'main'\n"
        "  quantize.bits: Input should be 2, 3, 4 or 8, got 5\n"
        "  quantize.damping: Input should be a valid number, got 'x'\n"
        "  calibration.seeds: unknown key; did you mean 'seed'?",
        "{t}/own.toml",
        KEYS,
        changes=("quantize.bits=5", "quantize.damping=x", "model.revision=main", "calibration.seeds=1"),
    ),
}


@pytest.fixture
def model(tiny_mistral, tmp_path) -> Path:
    """A copy that a test may damage."""
    (tmp_path / "text.txt").write_text(WORDS * 20, encoding="utf-8")
    return Path(shutil.copytree(tiny_mistral, tmp_path / "model"))


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """A function that runs a command on the recipe; gives its exit code and stderr without sizes and hashes."""
    recipe = tmp_path / "own.toml"
    recipe.write_text(RECIPE.format(m=model, t=tmp_path), encoding="utf-8")

    def command(name: str, *arguments: str, out: Path = tmp_path / "a") -> tuple[int, str]:
        given = [argument.format(m=model, t=tmp_path) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["quantkit", name, str(recipe), "--out", str(out), "--device", "cpu", *given])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        printed = capsys.readouterr()
        assert not (code and printed.out)
        said = re.sub(r"\b[0-9a-f]{64}\b", "HASH", printed.err)
        return code, re.sub(r"\b[\d.]+ [kMGT]?B\b", "SIZE", said)

    return command


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_mistake_gets_one_clear_error(case, run, model, tmp_path):
    case.damage(model)
    code, said = run(case.command, *(part for change in case.changes for part in ("--set", change)))
    progress, error = said[: said.index("error: ")], said[said.index("error: ") :]
    assert code == 2
    assert error == f"error: {case.what}\n  at:  {case.at}\n  fix: {case.fix}\n".format(m=model, t=tmp_path)
    # a build has begun; its lines tell seconds and memory
    assert progress.partition("\n")[0] == ("hashing the source" if case.command == "build" else "")


def test_a_folder_that_holds_something_else(run, tmp_path):
    out = tmp_path / "other"
    out.mkdir()
    (out / "thesis.tex").write_text("słowa")
    for command in ("plan", "build"):
        assert run(command, out=out) == (
            2,
            f"error: {out} exists and is no artifact of quantkit\n  at:  {out}\n"
            "  fix: choose another folder with --out\n",
        )


@pytest.mark.parametrize(
    ("home", "error"),
    [
        ("file", "quantkit's own folder cannot be written: File exists\n  at:  {t}/file\n"),
        ("file/in", "quantkit's own folder cannot be written: Not a directory\n  at:  {t}/file/in\n"),
        (
            "~no-such-user/x",
            "~no-such-user/x is no folder: Could not determine home directory.\n  at:  QUANTKIT_HOME\n",
        ),
    ],
)
def test_a_home_that_is_none_is_refused_before_the_work(run, tmp_path, monkeypatch, home, error):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUANTKIT_HOME", home if home.startswith("~") else str(tmp_path / home))
    for command in ("plan", "build"):
        code, said = run(command)
        assert code == 2
        assert f"error: {error.format(t=tmp_path)}  fix: set " in said
        assert "quantize" not in said.partition("error: ")[0]
    # nothing is kept there by what is not judged
    assert run("build", "--no-validate")[0] == 0


def test_a_link_to_an_artifact_stays_one(run, tmp_path):
    """Whose folder lies on another disk, say."""
    scratch, link = tmp_path / "scratch" / "a", tmp_path / "a"
    scratch.parent.mkdir()
    link.symlink_to(scratch)
    for options in ((), ("--fresh",)):
        code, said = run("build", "--no-validate", *options)
        assert code == 0, said
        assert link.readlink() == scratch
        assert sorted(path.name for path in tmp_path.glob("a*")) == ["a"]
        assert [path.name for path in scratch.parent.iterdir()] == ["a"]
        assert (scratch / "quantkit.json").is_file()


def test_another_model_in_the_same_folder(run, model, tmp_path):
    assert run("build", "--no-validate")[0] == 0
    other = make_tiny(tmp_path / "other", "mistral", seed=5)
    differences = "".join(f'  source.model-0000{n}-of-00005.safetensors: "HASH" -> "HASH"\n' for n in range(1, 6))
    assert run("build", "--model", str(other)) == (
        2,
        "hashing the source\n"
        "error: the folder belongs to another build:\n"
        '  recipe.model.id: "model" -> "other"\n'
        f"{differences}"
        f"  at:  {tmp_path / 'a'}\n"
        "  fix: choose another --out, or build with --fresh, which throws the earlier build away\n",
    )


def test_less_disk_than_a_build_needs(run, small_disk):  # noqa: F811
    fill(small_disk)
    assert run("plan", out=small_disk / "a") == (
        2,
        "error: the build needs SIZE of disk and SIZE to spare, SIZE are free\n"
        f"  at:  {small_disk / 'a'}\n"
        "  fix: free some space, or choose another disk with --out\n",
    )
