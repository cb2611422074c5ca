# mypy: ignore-errors
"""Run inside an engine's environment: one verb of one engine. Plain Python with numpy, nothing of quantkit.

    python -I start.py <engine script> <verb> <request.json>

An engine's script has `load(request) -> (logits, facts)`, where `logits(ids)` returns float32 [T, V] for int [T], and
`build(request) -> facts`; it may import what stands at the end of this file, as `from start import causal_logits`. The
last line on stdout is one JSON document. Before it, `evaluate` speaks with its parent:

    runner   open <V>         the model is loaded, the buffer [T, V] float32 exists
    parent   next
    runner   ready <i> <n>    the buffer's first n rows are the logits of window i
    ...                       until every window was asked for; an end of input stops it earlier
"""

import importlib.util
import json
import os
import sys
import threading
import time
from importlib.metadata import version

import numpy as np


def main():
    # packages print to stdout as they please: keep the real one for answers, and send everybody else to the log
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    script, verb, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    started = time.monotonic()
    engine = engine_of(script)
    if verb == "evaluate":
        facts = evaluate(engine, request, answers)
    else:
        threading.Thread(target=end_with_parent, daemon=True).start()
        facts = engine.build(request)
    facts["seconds"] = round(time.monotonic() - started, 3)
    print(json.dumps(facts), file=answers)
    answers.flush()
    # some packages leave threads behind that would keep the process from ending
    sys.stderr.flush()
    os._exit(0)


def end_with_parent():
    """A build takes hours: nobody wants it once the parent is gone, whose end closes our input."""
    sys.stdin.read()
    os._exit(1)


def engine_of(script):
    """The engine's script as a module; its name must not be that of the package it drives."""
    # by this name scripts import from here: their folder is on no path, for they are named like the packages they drive
    sys.modules["start"] = sys.modules[__name__]
    spec = importlib.util.spec_from_file_location("quantkit_engine", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluate(engine, request, answers):
    windows, lengths = np.load(request["windows"]), np.load(request["lengths"])
    started = time.monotonic()
    logits, facts = engine.load(request)
    facts["load_seconds"] = round(time.monotonic() - started, 3)
    # one window tells the width of the vocabulary as the model has it, which config.json may not
    first = logits(windows[0, : lengths[0]])
    shape = (windows.shape[1], first.shape[1])
    buffer = np.lib.format.open_memmap(request["buffer"], mode="w+", dtype=np.float32, shape=shape)
    print("open", first.shape[1], file=answers)
    for index, length in enumerate(lengths):
        if not sys.stdin.readline():
            sys.exit("the parent went away")
        found = logits(windows[index, :length]) if index else first
        first = None
        buffer[:length] = found
        buffer.flush()
        print("ready", index, length, file=answers)
    return facts


def causal_logits(model, device):
    """`logits` of one of transformers' causal language models on a device."""
    import torch

    def logits(ids):
        with torch.inference_mode():
            tokens = torch.as_tensor(ids, dtype=torch.long, device=device)[None]
            found = model(input_ids=tokens, use_cache=False)
        return found.logits[0].float().cpu().numpy()

    return logits


def versions(package, *beside):
    """What is told of an engine: its package and version, and the versions of those that it computes with."""
    return {"package": package, "version": version(package)} | {name: version(name) for name in beside}


def read_json(folder, name):
    """The content of a JSON file."""
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return json.load(file)


if __name__ == "__main__":
    main()
