# mypy: ignore-errors
"""Run by a Python that has exllamav2: logits of token windows and the weights that its kernels decode, as files.

    python exllamav2_reads.py RUNNER REQUEST.json OUT

RUNNER is quantkit/engines/runners/exllamav2.py; REQUEST holds {"artifact", "files", "windows": [[id]], "modules"}.
OUT gets 0.npy, 1.npy, ... with float32 [T, V], `<module>.npy` with float16 [in, out], and last of all facts.json.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np


def main():
    script, request, out = sys.argv[1:]
    request, out = json.loads(Path(request).read_text(encoding="utf-8")), Path(out)
    spec = importlib.util.spec_from_file_location("runner", script)
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    model = runner.opened(request, max(map(len, request["windows"])))
    for place, ids in enumerate(request["windows"]):
        np.save(out / f"{place}.npy", runner.logits(model, ids))
    for module in request["modules"]:
        np.save(out / f"{module}.npy", model.modules_dict[module].get_weight_tensor_dq().cpu().numpy())
    (out / "facts.json").write_text(json.dumps(runner.facts()))


if __name__ == "__main__":
    main()
