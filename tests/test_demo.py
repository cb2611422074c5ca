"""The demonstration's table and what it says beside it."""

import torch

from quantkit.demo import Demo, run_natively
from quantkit.pipeline import build
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from tests.tiny import WORDS

CPU = torch.device("cpu")


def test_what_cannot_judge_the_gguf_files_is_said_with_the_command_that_mends_it(tiny_mistral, tmp_path):
    (tmp_path / "text.txt").write_text(WORDS * 20)
    content = {
        "format": "gguf",
        "model": {"id": str(tiny_mistral)},
        "quantize": {"types": ("Q8_0",), "imatrix": False},
        "validation": {"texts": (str(tmp_path / "text.txt"),), "window_tokens": 64, "generated_tokens": 0},
    }
    done = build(Recipe.of(content), out=tmp_path / "out", device=CPU)
    same, not_run = run_natively(done, str(tiny_mistral), device=CPU, progress=Progress())
    assert same is done
    assert not_run == "gguf by llama-cpp: not run: llama-cpp is not installed: `quantkit engines install llama-cpp`"
    found = Demo({"gguf": done}, not_run)
    assert [row[0] for row in found.rows] == ["reference", "gguf"]
    assert found.remarks == [not_run]
    assert Demo({"gguf": done}).remarks == []
