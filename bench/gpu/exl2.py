"""EXL2 in exllamav2 on a GPU, held directly against quantkit's decode; and what making one of a 7B's shape takes.

    quantkit engines install exllamav2
    python -m bench.gpu.exl2
    python -m bench.gpu.exl2 --artifact artifacts/bielik-nano-EXL2 --layers 32 --hidden 4096 --feed-forward 14336

Where nothing can be downloaded, exllamav2's wheel or source archive is unpacked beside a Python that has the rest
(torch for CUDA, and what pure-Python wheels it lacks, in the same way); nvcc and a C++ compiler build it at its import:

    python -m bench.gpu.exl2 --python /usr/bin/python3 --package exllamav2-0.3.2-py3-none-any.whl --package rich.whl

Of every variant: the weights that exllamav2's kernels decode, bit for bit; logits of windows of up to 32 tokens, which
go through its fused kernels, and of longer ones, which do not; that no token sees a later one; perplexity by both.
Without --artifact a small random model is made first. Prints one JSON document. --dry does everything but run exllamav2
and compare with it, on any machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.models import make_model
from quantkit.checkpoint.families import item_names
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.source import head_tensors
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.engines.env import environment_python, find_engine, has_cuda, own_variables
from quantkit.engines.runtime import RUNNERS, require, variables
from quantkit.errors import UnavailableError
from quantkit.formats.exl2 import decode_linear, open_variants
from quantkit.formats.parts import PartsArtifact
from quantkit.grids.exl2 import Exl2Grid
from quantkit.machine import environment
from quantkit.pipeline import build
from quantkit.recipe import Recipe
from quantkit.texts import load_text_set
from quantkit.validation.text import evaluation_text

ENGINE = find_engine("exllamav2")
READS = Path(__file__).with_name("exllamav2_reads.py")
SHORT, LONG, TEXT = (1, 8, 32), (33, 200), 256  # tokens of the windows that are compared
TEXTS = 8
CHANGED, LOOKED_AT = 40, 20  # a token, and an earlier position that must not notice
WINDOW = 64


def make_artifact(folder: Path) -> Path:
    """An artifact of two variants from a small random model, made on the CPU."""
    make_model(folder / "model", layers=2, hidden=256, feed_forward=768)
    recipe = Recipe.of(
        {
            "format": "exl2",
            "model": {"id": str(folder / "model")},
            "quantize": {"bits": [3.5, 6.0], "scale_candidates": 4, "measure_tokens": 128},
            "calibration": {"texts": {"polish-core": 8}, "window_tokens": 128, "activations": "float"},
        }
    )
    return build(recipe, out=folder / "artifact", device=torch.device("cpu"), validated=False).out


def windows_for(artifact: PartsArtifact) -> dict[str, list[list[int]]]:
    """Token windows by what they are for."""
    draw = np.random.default_rng(0)
    vocabulary = int(artifact.config["vocab_size"])
    first = artifact.tensors.folder / Path(artifact.tensors.files[0]).parent
    tokenizer = load_tokenizer(first, vocab_size=vocabulary)
    text = evaluation_text([(load_text_set("polish-core", "validation"), TEXTS)], tokenizer, window_tokens=TEXT)
    causal = draw.integers(3, vocabulary, WINDOW).tolist()
    other = list(causal)
    other[CHANGED] = 3 + (other[CHANGED] - 2) % (vocabulary - 3)
    return {
        "short": [draw.integers(3, vocabulary, length).tolist() for length in SHORT],
        "long": [draw.integers(3, vocabulary, length).tolist() for length in LONG],
        "causal": [causal, other],
        "text": [[*window.inputs, window.targets[-1]] for window in text.windows],
    }


def our_logits(artifact: PartsArtifact, windows: Sequence[Sequence[int]], device: torch.device) -> list[np.ndarray]:
    """float32 [T, V] of every window, by quantkit's decode in transformers' code."""
    decoder = Decoder(artifact.config, artifact.family, device=device, dtype=torch.float32)
    embedding, *layers, _ = item_names(artifact.num_layers)
    tables = artifact.read(embedding)
    hidden = [decoder.embed(tables, torch.tensor([list(ids)])) for ids in windows]
    for index, name in enumerate(layers):
        layer = decoder.layer(index, artifact.read(name))
        hidden = [layer.forward(states, decoder.rope(states.shape[1])) for states in hidden]
    ends = head_tensors(artifact)
    head_VD = decoder.head(ends)
    return [(decoder.normed(ends, states)[0] @ head_VD.t()).cpu().numpy() for states in hidden]


def loaded_weights(artifact: PartsArtifact) -> dict[str, Tensor]:
    """float16 [in, out] of every quantized linear as exllamav2 holds it once it is loaded.

    It takes the permutation out of down_proj and permutes the columns of gate_proj and up_proj instead.
    """
    names = [name.removesuffix(".q_weight") for name in artifact.tensors.tensors if name.endswith(".q_weight")]
    linears = {}
    for module in names:
        parts = [name for name in artifact.tensors.tensors if name.rpartition(".")[0] == module]
        linears[module] = decode_linear(module, artifact.tensors.read(parts))
    found = {module: linear.dequantize().t().half() for module, linear in linears.items()}
    for module, linear in linears.items():
        parent, _, last = module.rpartition(".")
        if last == "down_proj":
            assert isinstance(linear.grid, Exl2Grid), "its reader makes no other"
            order_I = linear.grid.order_I
            found[module] = found[module][order_I]
            for opening in (f"{parent}.gate_proj", f"{parent}.up_proj"):
                found[opening] = found[opening][:, order_I]
    return found


def their_reading(
    artifact: PartsArtifact, windows: list[list[int]], modules: list[str], options: argparse.Namespace, scratch: Path
) -> tuple[list[np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """Logits, weights and versions of exllamav2."""
    out = scratch / "read"
    out.mkdir()
    request = {"artifact": str(artifact.tensors.folder.resolve()), "files": artifact.tensors.files}
    path = scratch / "request.json"
    path.write_text(json.dumps(request | {"windows": windows, "modules": modules}))
    command = [str(READS), str(RUNNERS / ENGINE.runner), str(path), str(out)]
    if options.package:
        packages = enumerate(options.package)
        unpacked = [str(unpack(Path(package), scratch / f"package{place}")) for place, package in packages]
        command = [options.python, *command]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(unpacked)}
    else:
        command = [str(environment_python(ENGINE)), "-I", *command]
        environ = own_variables() | variables(ENGINE, options.threads, "cuda")
    subprocess.run(command, env=environ, check=True, stdout=sys.stderr)
    found = [np.load(out / f"{place}.npy") for place in range(len(windows))]
    facts = json.loads((out / "facts.json").read_text())
    return found, {module: np.load(out / f"{module}.npy") for module in modules}, facts


def unpack(package: Path, folder: Path) -> Path:
    """The folder to import from of a wheel or a source archive."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            wheel.extractall(folder)
        return folder
    with tarfile.open(package) as archive:
        archive.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


def compared(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float]:
    """Largest difference of the logits as a share of the largest logit, and how often both prefer the same token."""
    scale = max(float(np.abs(logits).max()) for logits in ours)
    pairs = list(zip(ours, theirs, strict=True))
    same = np.concatenate([one.argmax(-1) == other.argmax(-1) for one, other in pairs])
    return {
        "largest_difference": max(float(np.abs(one - other).max()) for one, other in pairs) / scale,
        "same_token": float(same.mean()),
    }


def perplexity(logits: list[np.ndarray], windows: list[list[int]]) -> float:
    """Per token, of windows whose first token is given."""
    total, count = 0.0, 0
    for found_TV, ids in zip(logits, windows, strict=True):
        scores = torch.log_softmax(torch.from_numpy(found_TV[:-1]).double(), -1)
        total -= float(scores.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        count += len(ids) - 1
    return float(np.exp(total / count))


def differing(ours: dict[str, Tensor], theirs: dict[str, np.ndarray]) -> dict[str, int]:
    """Modules whose weights are not the same to the bit, and how many are not; +0 and -0 are the same."""
    counts = {name: int((weight.numpy() != theirs[name][:, : weight.shape[1]]).sum()) for name, weight in ours.items()}
    return {name: count for name, count in counts.items() if count}


def judged(artifact: PartsArtifact, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything that is asked of one variant."""
    by_use = windows_for(artifact)
    flat = [ids for windows in by_use.values() for ids in windows]
    ours, weights = our_logits(artifact, flat, device), loaded_weights(artifact)
    places = by_place(by_use)
    found: dict[str, Any] = {"quantkit": seen(ours, flat, places), "weights": len(weights)}
    if options.dry:
        return found
    with tempfile.TemporaryDirectory() as scratch:
        theirs, decoded, facts = their_reading(artifact, flat, list(weights), options, Path(scratch))
    found["exllamav2"] = facts | seen(theirs, flat, places)
    found["weights_differing"] = differing(weights, decoded)
    return found | {use: compared(ours[here], theirs[here]) for use, here in places.items()}


def by_place(by_use: dict[str, list[list[int]]]) -> dict[str, slice]:
    """Where the windows of each use stand among all."""
    stops = np.cumsum([len(windows) for windows in by_use.values()]).tolist()
    return {use: slice(start, stop) for use, start, stop in zip(by_use, [0, *stops], stops, strict=False)}


def seen(logits: list[np.ndarray], windows: list[list[int]], places: dict[str, slice]) -> dict[str, float]:
    """What a reader's logits tell without another's: `looks_ahead` is 0 for a causal model."""
    one, other = logits[places["causal"]]
    ahead = np.abs(one[: LOOKED_AT + 1] - other[: LOOKED_AT + 1]).max()
    text = places["text"]
    return {"looks_ahead": float(ahead), "perplexity": perplexity(logits[text], windows[text])}


def build_times(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stage and peak memory for a random checkpoint of a shape."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shape = {"layers": options.layers, "hidden": options.hidden, "feed_forward": options.feed_forward}
        make_model(folder / "model", **shape)
        calibration = {"texts": {"polish-core": options.windows}, "window_tokens": options.window_tokens}
        recipe = Recipe.of(
            {
                "format": "exl2",
                "model": {"id": str(folder / "model")},
                "calibration": calibration | {"activations": "float"},
                "compute": {"dtype": "bfloat16"},
            }
        )
        made = build(recipe, out=folder / "out", device=torch.device("cuda"), validated=False).record["build"]
        return shape | {key: made[key] for key in ("seconds", "wall_seconds", "peak_memory_bytes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--package", action="append", default=[], metavar="FILE")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--feed-forward", type=int, default=14336)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window-tokens", type=int, default=512)
    options = parser.parse_args()
    if not options.dry and options.package and not has_cuda():
        raise UnavailableError("no CUDA device is here", fix="run it on a machine that has one, or with --dry")
    if not options.dry and not options.package:
        require(ENGINE, "cuda")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {"environment": environment(device), "dry": options.dry, "variants": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.artifact or make_artifact(Path(scratch))
        for name, artifact in open_variants(folder).items():
            facts["variants"][name] = judged(artifact, options, device)
    if options.layers:
        facts["build"] = build_times(options)
    print(json.dumps(facts, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
