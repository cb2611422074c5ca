# mypy: ignore-errors
"""exllamav2, inside its environment; see start.py. It compiles its CUDA code when it is first imported."""

import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
from start import read_json, versions

CONVERTER = "exllamav2.conversion.convert_exl2"
MEASURED_WINDOWS = 16  # the converter's own default


def load(request):
    """Read one folder, an artifact's or a variant's, with exllamav2's own loader."""
    model = opened(request, int(np.load(request["lengths"]).max()))
    return (lambda ids: logits(model, ids)), facts()


def opened(request, longest):
    """exllamav2's model of the folder, ready for windows of `longest` tokens."""
    set_attention()
    from exllamav2 import ExLlamaV2, ExLlamaV2Config

    files = request["files"]
    config = ExLlamaV2Config(os.path.join(request["artifact"], os.path.dirname(files[0]) if files else ""))
    config.max_seq_len = config.max_input_len = longest + 32
    config.max_attention_size = config.max_seq_len**2
    config.max_batch_size = 1
    config.no_graphs = True
    model = ExLlamaV2(config)
    model.load()
    return model


def logits(model, ids):
    """float32 [T, V] of int [T]."""
    with torch.inference_mode():
        # the embedding is on the CPU by design; columns beyond the vocabulary are padding
        found = model.forward(torch.as_tensor(ids, dtype=torch.long)[None])
    return found[0, :, : model.config.vocab_size].float().cpu().numpy()


def build(request):
    """One folder for each target, by exllamav2's own converter: measured once, then quantized for each."""
    set_attention()
    with tempfile.TemporaryDirectory(prefix="exllamav2-", dir=os.path.dirname(request["out"])) as scratch:
        checkpoint = with_rope_theta(request["checkpoint"], os.path.join(scratch, "checkpoint"))
        text = os.path.join(scratch, "calibration.parquet")
        rows, length = write_parquet(request, text)
        os.mkdir(os.path.join(scratch, "work"))
        for arguments, made in conversions(request, checkpoint, text, rows, length, scratch):
            # it leaves with code 0 when it refuses: what it made decides
            subprocess.run([sys.executable, "-I", "-m", CONVERTER, *arguments], check=True, stdin=subprocess.DEVNULL)
            if not os.path.isfile(made):
                sys.exit(f"exllamav2's converter did not write {os.path.basename(made)}")
    return facts()


def conversions(request, checkpoint, text, rows, length, scratch):
    """Arguments of every run of the converter, and a file that it then must have made."""
    settings, out = request["settings"], request["out"]
    bits = settings["bits"]
    length, rows, fewer = str(length), str(rows), str(min(rows, MEASURED_WINDOWS))
    common = ["-i", checkpoint, "-o", os.path.join(scratch, "work"), "-nr", "-hb", str(settings["head_bits"])]
    common += ["-c", text, "-r", rows, "-l", length, "-mr", fewer, "-ml", length]
    found = []
    measured = settings.get("measurement")
    if not measured:
        measured = os.path.join(scratch, "measurement.json")
        found.append(([*common, "-om", measured], measured))
    for target in bits if isinstance(bits, list) else [bits]:
        folder = os.path.join(out, f"{float(target)}bpw")
        own = ["-m", measured, "-b", str(target), "-cf", folder]
        found.append(([*common, *own], os.path.join(folder, "config.json")))
    return found


def with_rope_theta(checkpoint, folder):
    """The checkpoint as links, with rope_theta where its reader looks: it would calibrate with 10000 for any other.

    An index of the source's shards stays behind, which it would copy beside its own.
    """
    os.mkdir(folder)
    for name in os.listdir(checkpoint):
        if name != "config.json" and not name.endswith(".index.json"):
            os.symlink(os.path.join(checkpoint, name), os.path.join(folder, name))
    config = read_json(checkpoint, "config.json")
    config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=4)
    return folder


def write_parquet(request, path):
    """The calibration windows as text, one in a row, which is how the converter takes them; (rows, tokens of each)."""
    import pandas
    from tokenizers import Tokenizer

    windows = np.load(request["tokens"])
    tokenizer = Tokenizer.from_file(os.path.join(request["checkpoint"], "tokenizer.json"))
    texts = [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in windows]
    # it fails on a token too few, and text that was cut may come back as fewer
    pandas.DataFrame({"text": texts * 2}).to_parquet(path, engine="fastparquet")
    return windows.shape


def set_attention():
    # without flash-attn its SDPA path gives causal text no mask: every token would see those after it
    os.environ["EXLLAMA_NO_SDPA"] = "1"
    # one that is there but broken is not caught
    os.environ["EXLLAMA_NO_FLASH_ATTN"] = "1"


def facts():
    return versions("exllamav2", "torch") | {"cuda": torch.version.cuda}
