"""`make release` as a pipeline runs it: two formats at once, to a hub on this machine, and back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.commands import COMMAND, ROOT
from tests.hub_server import TOKEN, HubServer

FORMATS = ("hqq-3bit", "mlx")


def surroundings_of(hub: HubServer, folder: Path) -> dict[str, str]:
    """The environment of make; its cache of reference results is part of what runs at once."""
    return os.environ | hub.variables() | {"QUANTKIT_HOME": str(folder / "home")}


def run(*command: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=1500)


@pytest.mark.timeout(600)
def test_a_gate_that_fails_stops_its_own_artifact_alone(hub, tiny_mistral, tmp_path):
    """What passed is on the Hub, the report shows both, the JUnit files tell, and make fails."""
    env = surroundings_of(hub, tmp_path)
    if not (Path(sys.executable).parent / "quantkit").exists():
        pytest.skip("quantkit is not installed as a command beside this Python")
    (tmp_path / "installed").touch()
    keys = {
        "quantize.group_size": 32,
        "calibration.texts": '{"polish-core"=4}',
        "calibration.window_tokens": 16,
        "validation.texts": '{"polish-core"=4}',
        "validation.window_tokens": 32,
        "validation.generated_tokens": 0,
        "validation.gates.perplexity_ratio": 10.0,
        "validation.gates.top1_agreement": 0.0,
        "validation.gates.mean_kld": 0.04,
    }
    flags = " ".join(f"--set '{key}={value}'" for key, value in keys.items())
    out = tmp_path / "artifacts"
    done = run(
        *("make", "-j2", "release", "MODEL=bielik-nano", "FORMATS=gptq gptq-3bit", "ORG=an-org", f"OUT={out}"),
        *(f"JUNIT={tmp_path / 'junit'}", f"BIN={Path(sys.executable).parent}", f"INSTALLED={tmp_path / 'installed'}"),
        f"BUILD_FLAGS=--model {tiny_mistral} {flags}",
        env=env,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert (out / "bielik-nano-gptq-3bit" / "quantkit.json").exists(), done.stdout + done.stderr
    figures = {
        name: json.loads((out / f"bielik-nano-{name}" / "quantkit.json").read_text())["validation"]
        for name in ("gptq", "gptq-3bit")
    }
    told = {name: validation["variants"][0]["results"][0]["mean_kld"] for name, validation in figures.items()}
    assert told["gptq"] < 0.04 < told["gptq-3bit"], told
    assert hub.repos.keys() == {"an-org/bielik-nano-gptq"}
    (repo,) = hub.repos.values()
    card = repo.commits[repo.branches["main"]]["README.md"][0].decode()
    assert "an-org/bielik-nano-gptq" in card
    assert "](plots/size-kld.png)" in card
    page = (out / "bielik-nano-report" / "report.html").read_text("utf-8")
    assert "GPTQ-3BIT" in page.upper()
    suites = {name: ElementTree.parse(tmp_path / "junit" / f"bielik-nano-{name}.xml").getroot() for name in figures}
    assert {name: suite.get("failures") for name, suite in suites.items()} == {"gptq": "0", "gptq-3bit": "1"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_formats_are_released_at_once_and_come_back_whole(hub, nano, tmp_path):
    env = surroundings_of(hub, tmp_path)
    shutil.copytree(nano, tmp_path / "home" / "models" / nano.name)
    out = tmp_path / "artifacts"
    installed = tmp_path / "installed"
    installed.touch()
    release = (
        *("make", "-j2", "release", "MODEL=bielik-nano", f"FORMATS={' '.join(FORMATS)}", "ORG=an-org", f"OUT={out}"),
        *(f"JUNIT={tmp_path / 'junit'}", f"BIN={Path(sys.executable).parent}", f"INSTALLED={installed}"),
    )
    if not (Path(sys.executable).parent / "quantkit").exists():
        pytest.skip("quantkit is not installed as a command beside this Python")
    done = run(*release, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert hub.repos.keys() == {f"an-org/bielik-nano-{name}" for name in FORMATS}
    assert (out / "bielik-nano-report" / "report.html").exists()
    for name in FORMATS:
        suite = ElementTree.parse(tmp_path / "junit" / f"bielik-nano-{name}.xml").getroot()
        assert (suite.get("tests"), suite.get("failures")) == ("1", "0")

    before = len(hub.requests)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*") if path.parent.name != "bielik-nano-report"}
    again = run(*release, env=env)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("was complete already") == 2
    assert again.stdout.count("nothing to upload") == 2
    assert not [request for request in hub.requests[before:] if not request.startswith("GET ")]
    assert {path: path.stat().st_mtime_ns for path in times} == times

    for name in FORMATS:
        folder = tmp_path / "fetched" / f"bielik-nano-{name}"
        program = "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1], local_dir=sys.argv[2])"
        fetched = run(sys.executable, "-c", program, f"an-org/bielik-nano-{name}", str(folder), env=env)
        assert fetched.returncode == 0, fetched.stderr
        start = (sys.executable, "-c", COMMAND)
        verified = run(*start, "inspect", str(folder), "--verify", env=env)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        published = json.loads((folder / "quantkit.json").read_text())["validation"]
        judged = run(*start, "validate", str(folder), "--json", env=env)
        assert judged.returncode == 0, judged.stderr
        found = json.loads(judged.stdout)
        for validation in (published, found):
            for variant in validation["variants"]:
                for result in variant["results"]:
                    del result["seconds"]
        assert found == published
