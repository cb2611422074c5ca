"""The wheel alone, away from the checkout, finds its recipes and text and builds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_installed_wheel_builds(tmp_path, nano):
    wheels, target = tmp_path / "wheels", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.glob("quantkit-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    home = nano.parent.parent
    program = "import quantkit; print(quantkit.__file__, flush=True); from quantkit.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "build", "bielik-nano/gptq", "--out", "out", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target), "QUANTKIT_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))
    record = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert record["environment"]["commit"] is None
    assert record["calibration"]["texts"][0]["name"] == "polish-core"
    pytest.importorskip("matplotlib", reason="of the extra `report`")
    drawn = subprocess.run(
        [sys.executable, "-c", program, "report", "out", "--out", "report"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert drawn.returncode == 0, drawn.stderr
    assert "bielik-nano" in (tmp_path / "report" / "report.html").read_text("utf-8")
