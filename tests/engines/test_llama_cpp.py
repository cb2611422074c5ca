"""llama.cpp itself: its encoder's error, its choice of types, its token ids and its logits, held against ours."""

import ctypes
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from quantkit.calibration.tokens import calibration_windows
from quantkit.checkpoint.index import open_checkpoint, read_json
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.demo import Demo, run_natively
from quantkit.engine_check import check_engine
from quantkit.engines.env import environment_of, environment_python
from quantkit.engines.runtime import evaluate
from quantkit.errors import RefusedError, RunFailedError
from quantkit.formats.gguf.mixtures import MIXTURES
from quantkit.formats.gguf.names import checkpoint_name
from quantkit.formats.gguf.tokenizer import PRE_TOKENIZERS, Splitting
from quantkit.grids.blocks import TYPES, error_weights, quantize
from quantkit.job import Build
from quantkit.judgement import validate
from quantkit.pipeline import build
from quantkit.progress import Progress
from quantkit.quantize import NEED_IMPORTANCE
from quantkit.recipe import Recipe, fingerprint
from quantkit.recipe_files import find_recipe, load_recipe
from quantkit.report.record import read_record
from quantkit.solvers import ggml
from quantkit.texts import load_text_set
from tests.formats.test_gguf import byte_level, rewritten
from tests.tiny import VARIANTS, WORDS, make_text, make_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CPU = torch.device("cpu")
NASTY = [
    "Zażółć gęślą jaźń. PCHNĄĆ W TĘ ŁÓDŹ JEŻA!",
    "  dwie spacje na początku, trzy   w środku i na końcu  ",
    "1234567890 1 000 000,50 zł (3,14159) 2024-01-31 ²½Ⅷ",
    "def f(x):\n\treturn {'a': x ** 2}  # komentarz\n\n\n",
    "😀 👩‍👩‍👧 ﬁ № ½ ☃ 漢字 \u00a0\u2003x",
    "„cudzysłów” — myślnik… it's IT'S",
    "\n\n\tŚ\r\n",
    " ",
    "<|im_start|>user\nCo to?<|im_end|>\n<|im_start|>assistant\n",
    "<s>raz</s> dwa <unk>trzy",
    "<|im_start|><|im_start|> <|im_end|>",
    "naciśnij [[przycisk]] albo[[przycisk]]  [[przycisk]]!",
    "niby <|im_star|> i [[przycis]]",
]
PLAIN = 8  # so many of them have no special tokens
DECOMPOSED = "zaz\u0307o\u0301l\u0107 e\u0301"
TOKENIZE = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], vocab_only=True, verbose=False)
ways = [(ends, special) for ends in (False, True) for special in (False, True)]
texts = [text.encode() for text in json.loads(sys.argv[2])]
print(json.dumps([[model.tokenize(text, add_bos=ends, special=special) for ends, special in ways] for text in texts]))
"""
LLAMA_QUANTIZE = """
import ctypes, sys
import llama_cpp
import numpy
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_quantize_default_params()
params.nthread = 2
params.ftype = int(sys.argv[3])
if len(sys.argv) > 4:
    given = dict(numpy.load(sys.argv[4]))
    entries = (llama_cpp.llama_model_imatrix_data * (len(given) + 1))()
    for entry, (name, values) in zip(entries, given.items()):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = entries
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
# what llama-imatrix collects: squares of what every product with a weight reads, over all rows of all windows
LLAMA_IMATRIX = """
import ctypes, sys
import llama_cpp
import numpy

class Tensor(ctypes.Structure):
    pass

Tensor._fields_ = [
    ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
]
op_name = llama_cpp.llama_cpp._lib.ggml_op_name
op_name.restype = ctypes.c_char_p
windows = numpy.load(sys.argv[2])
count, length = windows.shape
sums, counts = {}, {}

@llama_cpp.ggml_backend_sched_eval_callback
def collect(address, asked, _):
    tensor = Tensor.from_address(address)
    if op_name(tensor.op) != b"MUL_MAT":
        return False
    name, inputs = tensor.src[0].contents.name.decode(), tensor.src[1].contents
    if not name.startswith("blk.") and name != "output.weight":
        return False
    if not asked:
        columns, rows = inputs.ne[0], inputs.ne[1]
        assert inputs.type == 0 and list(inputs.nb[:2]) == [4, 4 * columns] and list(inputs.ne[2:]) == [1, 1]
        values = numpy.ctypeslib.as_array((ctypes.c_float * (rows * columns)).from_address(inputs.data))
        squares = values.reshape(rows, columns) ** 2
        sums[name + ".in_sum2"] = sums.get(name + ".in_sum2", 0) + squares.sum(0, keepdims=True)
        counts[name + ".counts"] = counts.get(name + ".counts", numpy.zeros((1, 1), numpy.float32)) + rows
    return True

llama_cpp.llama_backend_init()
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
params = llama_cpp.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = length
params.n_threads = params.n_threads_batch = 2
params.type_k = params.type_v = 0
params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cb_eval = collect
context = llama_cpp.llama_init_from_model(model, params)
batch = llama_cpp.llama_batch_init(length, 0, 1)
batch.n_tokens = length
for window in windows:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    for place, token in enumerate(window):
        batch.token[place], batch.pos[place] = int(token), place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        # the last layer goes on with those that are asked for alone
        batch.logits[place] = 1
    assert llama_cpp.llama_decode(context, batch) == 0
numpy.savez(sys.argv[3], **sums, **counts)
"""


@pytest.fixture
def engine(kept_engine):
    return kept_engine("llama-cpp")


@pytest.fixture
def text(tmp_path) -> Path:
    return make_text(tmp_path / "text.jsonl")


def within(engine, script: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(environment_python(engine)), "-I", "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def encoder(engine):
    """`ggml_quantize_chunk` of the engine's library, decoded by gguf-py."""
    path = next(environment_of(engine).rglob("libggml-base.so"))
    chunk = ctypes.CDLL(str(path)).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def encode(weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
        kind = gguf.GGMLQuantizationType[name]
        values = np.ascontiguousarray(weight.numpy())
        out = np.zeros((values.shape[0], values.shape[1] // TYPES[name].block * TYPES[name].size_bytes), np.uint8)
        given = None if importance is None else np.ascontiguousarray(importance.numpy())
        pointer = None if given is None else given.ctypes.data
        chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, *values.shape, pointer)
        return torch.from_numpy(gguf.dequantize(out, kind))

    return encode


@pytest.fixture(scope="module")
def collected(nano, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs of bielik-nano's linears on Polish text, by the linears' names."""
    folder = tmp_path_factory.mktemp("collected")
    content = {
        "format": "gguf",
        "model": {"id": str(nano)},
        "quantize": {"types": ("F16",), "name": "nano"},
        "calibration": {"texts": {"polish-core": 32}, "window_tokens": 128, "activations": "float"},
    }
    out = build(Recipe.of(content), out=folder / "out", device=CPU, validated=False).out
    return {
        str(checkpoint_name(name)).removesuffix(".weight"): torch.from_numpy(mean)
        for name, mean in means_of(out / "nano.imatrix.gguf").items()
    }


def means_of(path: Path) -> dict[str, np.ndarray]:
    """An importance matrix's mean squares by tensor, as gguf-py reads it."""
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    return {
        name.removesuffix(".in_sum2"): (sums / stored[name.replace("in_sum2", "counts")]).ravel()
        for name, sums in stored.items()
        if name.endswith(".in_sum2")
    }


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighting", ["none", "random", "collected"])
def test_our_weighted_error_is_not_above_ggmls(name, weighting, engine, nano, collected):
    kind, encode, checkpoint = TYPES[name], encoder(engine), open_checkpoint(nano)
    random = torch.rand(512, generator=torch.Generator().manual_seed(0)) ** 3 * 4 + 1e-3
    ours = theirs = 0.0
    compared = 0
    for module, _, columns in checkpoint.linear_shapes(ends=True):
        importance = {"none": None, "random": random[:columns], "collected": collected.get(module)}[weighting]
        if weighting == "collected" and importance is None:
            continue  # an embedding has no inputs
        weight = checkpoint.tensors.read([f"{module}.weight"])[f"{module}.weight"].float()
        w = error_weights(weight, kind, importance)
        codes, grid = quantize(weight, kind, importance)
        mine = float((w * (grid.decode(codes) - weight).square()).sum())
        other = float((w * (encode(weight, name, importance) - weight).square()).sum())
        assert mine <= other * 1.005, module
        ours, theirs, compared = ours + mine, theirs + other, compared + 1
    assert compared == 4 * 7 + (1 if weighting == "collected" else 2)
    assert ours <= theirs


def test_ggml_is_not_trusted_blindly(engine, monkeypatch):
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    even = torch.ones(256)
    with pytest.raises(RefusedError, match="1 value\\(s\\) of the weights are not finite"):
        ggml.encode(weight.masked_fill(weight == weight[2, 5], float("nan")), "Q4_K", None)
    with pytest.raises(RefusedError, match="of the importance are not finite"):
        ggml.encode(weight, "IQ2_XXS", even / 0)
    with pytest.raises(RefusedError, match="too large for Q8_0"):
        ggml.encode(weight * 1e9, "Q8_0", None)
    library = ggml.library()

    class Short:
        def __getattr__(self, name):
            return (lambda *_: 0) if name == "ggml_quantize_chunk" else getattr(library, name)

    monkeypatch.setattr(ggml, "library", Short)
    with pytest.raises(RunFailedError, match="ggml wrote 0 bytes of Q4_K instead of 576"):
        ggml.encode(weight, "Q4_K", None)


SHAPES = {
    "grouped heads": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8},
    "tied": {"hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": True},
    "rows of 96 and 160": {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "rows of 144": {"hidden_size": 256, "intermediate_size": 144},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_ggmls_encoder_writes_what_llama_quantize_writes(shape, weighted, engine, text, tmp_path):
    """Types and bytes, tensor by tensor, for every file type and for rows that make types fall back."""
    sizes = {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 416, "sharded": False} | SHAPES[shape]
    source = make_tiny(tmp_path / "model", "mistral", layers=9, **sizes)
    names = [name for name in MIXTURES if weighted or name not in NEED_IMPORTANCE]
    recipe = Recipe.of(
        {
            "format": "gguf",
            "model": {"id": str(source)},
            "quantize": {"types": tuple(names), "imatrix": weighted, "name": "tiny", "encoder": "ggml"},
            "calibration": {"texts": {str(text): 8}, "window_tokens": 16, "activations": "float"},
        }
    )
    ours = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    given = []
    if weighted:
        np.savez(tmp_path / "importance.npz", **means_of(ours / "tiny.imatrix.gguf"))
        given = [str(tmp_path / "importance.npz")]
    seen = set()
    for name in names:
        if name == "BF16":  # is what both start from
            continue
        theirs = tmp_path / "theirs.gguf"
        within(engine, LLAMA_QUANTIZE, str(ours / "tiny.BF16.gguf"), str(theirs), str(MIXTURES[name].number), *given)
        found, expected = (
            {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}
            for path in (ours / f"tiny.{name}.gguf", theirs)
        )
        assert {key: kind for key, (kind, _) in found.items()} == {key: kind for key, (kind, _) in expected.items()}
        assert [key for key in found if found[key] != expected[key]] == [], name
        assert len(found) == 9 * 9 + (2 if "tie_word_embeddings" in sizes else 3)
        seen |= {kind for kind, _ in found.values()}
    low = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"} if weighted else set()
    if sizes["hidden_size"] == 256:
        assert seen > {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ3_S", "IQ4_XS"} | low
    else:
        assert seen == {"F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"}


def content_of(path: Path) -> dict[str, Any]:
    """Tensors with their types and bytes, and every key."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in reader.tensors}
    return tensors | {field.name: field.contents() for field in reader.fields.values()}


def test_what_llama_cpp_builds_is_read_judged_and_recorded(engine, text, tmp_path):
    """Every file as our own build with ggml's encoder has it, metadata too; so is what stands beside the files."""
    source = make_tiny(tmp_path / "model", "mistral", hidden_size=256, intermediate_size=512, vocab_size=416)
    types = ("Q4_K_M", "IQ2_XXS", "Q8_0", "F16", "BF16")

    def built(name: str, **keys: Any) -> Build:
        content = {
            "format": "gguf",
            "model": {"id": str(source)},
            "quantize": {"types": types, "name": "tiny", "base_model": "zuraw/Zuraw", "imatrix_dat": True},
            "calibration": {"texts": {str(text): 8}, "window_tokens": 16, "activations": "float"},
            "validation": {
                "texts": (str(text),),
                "window_tokens": 32,
                "generated_tokens": 0,
                "require": ("reference", engine.name),
            },
        }
        content["quantize"] |= keys.pop("quantize", {})
        return build(Recipe.of(content | keys), out=tmp_path / name, device=CPU)

    theirs, ours = built("theirs", engine=engine.name), built("ours", quantize={"encoder": "ggml"})
    files = {path.name for path in ours.out.iterdir()}
    assert {path.name for path in theirs.out.iterdir()} == files
    for name in files - {"quantkit.json", "README.md"}:
        if name.endswith(".gguf") and "imatrix" not in name:
            found, expected = (content_of(done.out / name) for done in (theirs, ours))
            # llama.cpp orders tensors as it likes
            assert [key for key in found | expected if found.get(key) != expected.get(key)] == [], name
        else:
            assert (theirs.out / name).read_bytes() == (ours.out / name).read_bytes(), name
    record = theirs.record
    assert record["validation"]["gate"] == {"passed": True, "failures": []}
    assert len(record["validation"]["variants"]) == len(types)
    assert record["variants"] == ours.record["variants"]
    assert (record["engine_facts"]["package"], record["reproducible"]) == ("llama-cpp-python", False)
    assert record["recipe"]["quantize"]["encoder"] == "ggml"
    assert not (tmp_path / "theirs.work").exists()


def test_the_demonstration_asks_llama_cpp_once(engine, text, tmp_path, monkeypatch):
    source = make_tiny(tmp_path / "model", "mistral", hidden_size=256, intermediate_size=256, vocab_size=416)
    content = {
        "format": "gguf",
        "model": {"id": str(source)},
        "quantize": {"types": ("Q4_0", "Q8_0"), "imatrix": False},
        "validation": {"texts": (str(text),), "window_tokens": 32, "generated_tokens": 0},
    }
    # the record names the text without its folder
    monkeypatch.chdir(text.parent)
    done = build(Recipe.of(content), out=tmp_path / "out", device=CPU)
    judged, not_run = run_natively(done, str(source), device=CPU, progress=Progress())
    assert not_run == ""
    assert judged.record == read_record(done.out)
    for variant in judged.record["validation"]["variants"]:
        assert [result["runtime"] for result in variant["results"]] == ["reference", "llama-cpp"]
    assert len(Demo({"gguf": judged}).rows) == 1 + 2 * 2
    assert run_natively(judged, str(source), device=CPU, progress=Progress()) == (judged, "")


def test_llama_cpp_is_checked_on_what_it_builds(engine, nano):
    facts = check_engine(engine, str(nano), Progress())
    assert facts["package"] == "llama-cpp-python"
    assert facts["read"] == "Q2_K"
    assert facts["ratio"] == pytest.approx(facts["ratio_of_reference"], rel=0.02)


UNMERGED = "Ġalbo"  # a word of the vocabulary that no merge makes
SENTENCEPIECE = ("tokenizer.model", "tokenizer.json alone", "with both ends", "no space in front")


def test_i_quants_stand_beside_types_of_ours(engine, text, tmp_path):
    """One run: the I-quants are ggml's bytes, the rest is what the same recipe without them makes."""
    source = make_tiny(tmp_path / "model", "mistral", hidden_size=256, intermediate_size=256, vocab_size=416)

    def built(name: str, **quantize: object) -> dict[str, dict[str, tuple[str, bytes]]]:
        recipe = {
            "format": "gguf",
            "model": {"id": str(source)},
            "quantize": quantize,
            "calibration": {"texts": {str(text): 8}, "window_tokens": 16, "activations": "float"},
        }
        out = build(Recipe.of(recipe), out=tmp_path / name, device=CPU, validated=False).out
        return {
            path.name: {
                tensor.name: (tensor.tensor_type.name, tensor.data.tobytes())
                for tensor in gguf.GGUFReader(path).tensors
            }
            for path in out.glob("model.*Q*.gguf")
        }

    mixed = built("mixed", solver="gptq", types=("IQ1_M", "IQ3_XXS", "Q4_K_M"))
    ours = built("ours", solver="gptq", types=("Q4_K_M",))
    ggmls = built("ggml", encoder="ggml", types=("IQ1_M", "IQ3_XXS", "Q4_K_M"))
    assert mixed["model.Q4_K_M.gguf"] == ours["model.Q4_K_M.gguf"] != ggmls["model.Q4_K_M.gguf"]
    seen = set()
    for name in ("model.IQ1_M.gguf", "model.IQ3_XXS.gguf"):
        for tensor, (kind, content) in mixed[name].items():
            if kind.startswith("IQ"):
                assert content == ggmls[name][tensor][1], (name, tensor)
                seen.add(kind)
            elif kind != "F32":
                assert content != ggmls[name][tensor][1], (name, tensor)
    assert seen == {"IQ1_M", "IQ2_XXS", "IQ3_XXS", "IQ3_S", "IQ2_S"}


@pytest.fixture(
    params=[*SENTENCEPIECE, *PRE_TOKENIZERS], ids=[*SENTENCEPIECE, *(f"bytes {number}" for number in range(5))]
)
def tokenized(request, nano, tmp_path) -> tuple[str | Splitting, Path]:
    """A checkpoint with a tokenizer of each kind, each with control tokens and one that users may write."""
    name, folder, words = request.param, tmp_path / "model", tmp_path / "words"
    if name in SENTENCEPIECE:
        make_tiny(folder, "mistral", vocab_size=800)
        shutil.copytree(nano, words, ignore=lambda _, names: [name for name in names if "token" not in name])
        if name != "tokenizer.model":
            (words / "tokenizer.model").unlink()
    else:
        # transformers rebuilds the tokenizer of a Qwen2 by its own rules, whatever tokenizer.json says
        make_tiny(folder, "qwen2" if PRE_TOKENIZERS[name] == "qwen2" else "llama", vocab_size=700)
        byte_level(words, name, text="".join(NASTY[:PLAIN]), vocab_size=600)
    content = read_json(words / "tokenizer.json")
    token = max([*content["model"]["vocab"].values(), *(entry["id"] for entry in content["added_tokens"])])
    if name not in SENTENCEPIECE:
        # the tokenizers package numbers added tokens behind the vocabulary, whatever their ids are
        content["model"]["vocab"][UNMERGED] = len(content["model"]["vocab"])
        content["added_tokens"] = [entry | {"id": entry["id"] + 1} for entry in content["added_tokens"]]
        token += 1
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for text, special in (("<|im_start|>", True), ("<|im_end|>", True), ("[[przycisk]]", False)):
        if text not in [entry["content"] for entry in content["added_tokens"]]:
            token += 1
            content["added_tokens"].append({"id": token, "content": text, "special": special} | plain)
    if name == "no space in front":
        content["normalizer"] = content["normalizer"]["normalizers"][1]
    if name == "with both ends":
        end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
        content["post_processor"]["single"].append(end)
        content["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (words / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for path in words.iterdir():
        shutil.copyfile(path, folder / path.name)
    return name, folder


def test_token_ids_are_those_of_the_checkpoints_tokenizer(engine, tokenized, tmp_path):
    """With and without special tokens in the text, and at its ends; of every kind of token."""
    name, folder = tokenized
    quantize = {"types": ("Q4_0",), "imatrix": False}
    recipe = Recipe.of({"format": "gguf", "model": {"id": str(folder)}, "quantize": quantize})
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    (path,) = out.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = json.loads(within(engine, TOKENIZE, str(path), json.dumps([*NASTY, DECOMPOSED])))
    settings = [(ends, special) for ends in (False, True) for special in (False, True)]
    seen = set()
    for line, answers in zip(NASTY, found, strict=False):
        for (ends, special), ids in zip(settings, answers, strict=True):
            expected = tokenizer.encode(line, add_special_tokens=ends, split_special_tokens=not special)
            assert ids == expected, (line, ends, special, tokenizer.convert_ids_to_tokens(ids))
            seen |= set(ids)
    added = {entry["content"]: entry["id"] for entry in read_json(folder / "tokenizer.json")["added_tokens"]}
    assert {added["<|im_start|>"], added["<|im_end|>"], added["[[przycisk]]"]} <= seen
    assert (read_json(folder / "tokenizer.json")["model"]["vocab"].get(UNMERGED) in seen) is getattr(
        name, "ignore_merges", False
    )
    # llama.cpp has no Unicode normalization: where the checkpoint's composes, other ids come of letters and accents
    composes = name not in SENTENCEPIECE
    assert (found[-1][0] != tokenizer.encode(DECOMPOSED, add_special_tokens=False)) is composes


@pytest.fixture
def words(tmp_path) -> Path:
    """Words drawn anew for every document: those that repeat have the same rounding errors, which add up."""
    path = tmp_path / "words.jsonl"
    drawn = [random.Random(number).choices(WORDS.split(), k=60) for number in range(40)]
    path.write_text("\n".join(json.dumps({"text": " ".join(each)}) for each in drawn))
    return path


def model_of(kind: str, folder: Path) -> Path:
    """A random model of a family whose every row is a multiple of 256."""
    changes = VARIANTS[kind] | ({"head_dim": 128} if kind == "qwen3" else {})
    sizes = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 416, "sharded": False}
    return make_tiny(folder, kind, **(sizes | changes))


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_importance_matrix_is_what_llama_cpp_collects(kind, engine, words, tmp_path):
    """Weights, cache and products in float32 there as here, on the windows that the build saw, each by itself."""
    source = model_of(kind, tmp_path / "model")
    content = {
        "format": "gguf",
        "model": {"id": str(source)},
        "quantize": {"types": ("BF16",), "name": "tiny"},
        "calibration": {"texts": {str(words): 8}, "window_tokens": 48, "activations": "float"},
    }
    done = build(Recipe.of(content), out=tmp_path / "out", device=CPU, validated=False)
    given = [(load_text_set(str(words), "calibration"), 8)]
    tokens = calibration_windows(given, load_tokenizer(source, vocab_size=416), window_tokens=48, seed=0)
    assert fingerprint(tokens.tolist()) == done.record["calibration"]["tokens_sha256"]
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    stored = gguf.GGUFReader(done.out / "tiny.BF16.gguf").tensors
    wide = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in stored}
    model = rewritten(done.out / "tiny.BF16.gguf", tmp_path / "wide.gguf", tensors=wide)
    within(engine, LLAMA_IMATRIX, str(model), str(tmp_path / "tokens.npy"), str(tmp_path / "theirs.npz"))
    theirs = dict(np.load(tmp_path / "theirs.npz"))
    ours = {tensor.name: tensor.data for tensor in gguf.GGUFReader(done.out / "tiny.imatrix.gguf").tensors}
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * (2 * 7 + (not VARIANTS[kind].get("tie_word_embeddings")))
    for name, values in theirs.items():
        assert len(np.unique(values)) > 200 or name.endswith("counts")
        np.testing.assert_allclose(ours[name], values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", VARIANTS)
def test_llama_cpp_computes_what_our_decode_computes(kind, engine, words, tmp_path):
    source = model_of(kind, tmp_path / "model")
    recipe = Recipe.of(
        {
            "format": "gguf",
            "model": {"id": str(source)},
            "quantize": {"types": ("Q2_K", "Q4_K_M", "Q8_0"), "name": "tiny"},
            "calibration": {"texts": {str(words): 8}, "window_tokens": 32, "activations": "float"},
            "validation": {"texts": (str(words),), "window_tokens": 128, "generated_tokens": 0},
        }
    )
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    result = validate(out, model=str(source), texts=(str(words),), runtime="both", device=CPU)
    for variant in result["variants"]:
        ours, theirs = variant["results"]
        assert (theirs["runtime"], theirs["status"]) == ("llama-cpp", "ok"), theirs
        assert theirs["package"] == "llama-cpp-python"
        # llama.cpp rounds activations to 8 bits in front of every product, which a random model makes much of
        assert theirs["ppl_per_token"] == pytest.approx(ours["ppl_per_token"], rel=4e-3)
        assert theirs["mean_kld"] == pytest.approx(ours["mean_kld"], rel=0.03, abs=4e-4)


@pytest.mark.parametrize("changes", [{}, {"attention_factor": 1.5}, {"rope_type": "linear"}])
def test_llama_cpp_turns_scaled_heads_as_transformers_does(changes, engine, text, tmp_path):
    """Unquantized, on windows longer than the original context; each setting counts, so that a lost one shows."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    rope = linear if "rope_type" in changes else yarn | changes
    sizes = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 416, "sharded": False}
    source = make_tiny(tmp_path / "model", "mistral", **sizes, rope_parameters=rope)
    recipe = Recipe.of(
        {
            "format": "gguf",
            "model": {"id": str(source)},
            "quantize": {"types": ("F16",), "imatrix": False},
            "validation": {"texts": (str(text),), "window_tokens": 200, "generated_tokens": 0},
        }
    )
    out = build(recipe, out=tmp_path / "out", device=CPU, validated=False).out
    (variant,) = validate(out, model=str(source), texts=(str(text),), runtime="native", device=CPU)["variants"]
    right = variant["results"][0]
    assert right["mean_kld"] < 1e-5
    (path,) = out.glob("*.gguf")
    lost = "attn_factor" if "attention_factor" in rope else "factor"
    rewritten(path, tmp_path / "other.gguf", keys={f"llama.rope.scaling.{lost}": None})
    (logits,), (wrong,) = (
        evaluate(engine, folder, [Longest()], files=[name])
        for folder, name in ((out, path.name), (tmp_path, "other.gguf"))
    )
    assert np.abs(logits - wrong).max() > 0.05


class Longest:
    """A window of any tokens."""

    inputs = targets = tuple(range(3, 203))


def test_llama_cpp_reads_a_split_file_as_the_whole(engine, text, tmp_path):
    source = make_tiny(tmp_path / "model", "mistral", hidden_size=256, intermediate_size=256, vocab_size=416)
    results = {}
    for name, most in (("whole", 1.0), ("split", 0.0005)):
        recipe = Recipe.of(
            {
                "format": "gguf",
                "model": {"id": str(source)},
                "quantize": {"types": ("Q8_0",), "imatrix": False, "shard_gb": most},
                "validation": {"texts": (str(text),), "window_tokens": 64, "generated_tokens": 0},
            }
        )
        out = build(recipe, out=tmp_path / name, device=CPU, validated=False).out
        result = validate(out, model=str(source), texts=(str(text),), runtime="native", device=CPU)
        (variant,) = result["variants"]
        assert len(variant["files"]) == (3 if name == "split" else 1)
        results[name] = variant["results"][-1]
        assert (results[name]["runtime"], results[name]["status"]) == ("llama-cpp", "ok"), results[name]
    assert results["split"]["ppl_per_token"] == results["whole"]["ppl_per_token"]


def test_the_shipped_recipe_passes_its_gates_natively_too(engine, nano, tmp_path, monkeypatch):
    recipe = load_recipe(find_recipe("bielik-nano/gguf"), ('validation.require=["reference", "llama-cpp"]',))
    done = build(recipe, out=tmp_path / "out", device=CPU)
    assert done.record["validation"]["gate"] == {"passed": True, "failures": []}
    assert len(done.record["validation"]["variants"]) == 10
