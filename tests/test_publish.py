"""Publishing as a user runs it, against a hub that speaks real HTTP on this machine."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from quantkit.pipeline import build
from quantkit.recipe import Recipe
from quantkit.report.record import read_record, write_record
from quantkit.workdir import sha256_of
from tests.hub_server import READ_ONLY, TOKEN, HubServer
from tests.tiny import WORDS

ROOT = Path(__file__).parent.parent
REPO = "an-org/tiny-GPTQ"
PLANTED = "hf_plantedSecret0123456789"


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_mistral) -> Path:
    folder = tmp_path_factory.mktemp("built")
    text = folder / "text.txt"
    text.write_text(WORDS * 20, encoding="utf-8")
    recipe = Recipe.of(
        {
            "format": "gptq",
            "model": {"id": str(tiny_mistral)},
            "quantize": {"group_size": 32, "scale_candidates": 0},
            "calibration": {"texts": {str(text): 4}, "window_tokens": 16},
            "validation": {"texts": (str(text),), "window_tokens": 32, "generated_tokens": 0},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_HOME", str(folder / "home"))
        for name in ("USER", "LOGNAME", "HOSTNAME", "HF_TOKEN"):
            patch.setenv(name, PLANTED)
        patch.setattr(platform, "node", lambda: PLANTED)
        patch.setattr(socket, "gethostname", lambda: PLANTED)
        return build(recipe, out=folder / "tiny-GPTQ", device=torch.device("cpu")).out


@pytest.fixture
def artifact(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "tiny-GPTQ"))


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(hub: HubServer, program: str, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    surroundings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | surroundings,
        timeout=120,
    )


def publish(hub: HubServer, artifact: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    program = "from quantkit import hub; hub.FIRST_PAUSE_S = 0.01; from quantkit.cli import main; main()"
    done = run(hub, program, "publish", str(artifact), "--repo", REPO, *arguments, token=token)
    assert "Traceback" not in done.stderr, done.stderr
    assert token not in done.stdout + done.stderr
    return done


def on_hub(hub: HubServer, branch: str = "main") -> dict[str, bytes]:
    repo = hub.repos[REPO]
    files = repo.commits[repo.branches[branch]]
    return {path: content for path, (content, _) in files.items() if path != ".gitattributes"}


def test_record_and_card_hold_no_secret_and_no_path(built, tiny_mistral):
    text = "".join(path.read_text("utf-8") for path in built.iterdir() if path.suffix in (".json", ".md", ".jinja"))
    assert "fingerprint" in text
    for secret in (
        PLANTED,
        str(built.parent),
        str(tiny_mistral),
        str(Path.home()) + "/",
        str(ROOT),
        socket.gethostname(),
    ):
        assert secret not in text, secret


def test_the_card_announces_what_passed(built):
    """The front matter as the Hub reads it: the figures of the record, tags of this format only."""
    card = ModelCard.load(built / "README.md")
    result = read_record(built)["validation"]["variants"][0]["results"][0]
    announced = {found.metric_type: found.metric_value for found in card.data.eval_results}
    assert announced == {
        "word_perplexity": round(result["ppl_per_word"], 6),
        "bits_per_byte": round(result["bits_per_byte"], 6),
        "kl_divergence": round(result["mean_kld"], 6),
        "top1_agreement": round(result["top1_agreement"], 6),
    }
    assert {"gptq", "quantized"} <= set(card.data.tags)
    assert not {"gguf", "awq", "mlx", "exl2", "hqq"} & set(card.data.tags)
    assert card.data.language == ["pl"]


def test_everything_arrives_once_in_one_private_commit_and_comes_back_whole(hub, artifact, tmp_path):
    done = publish(hub, artifact, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["variants"] == ["gptq"]
    assert hub.repos[REPO].private
    assert on_hub(hub) == {path.name: path.read_bytes() for path in artifact.iterdir()}
    assert len(hub.sent(r"POST .*/commit/")) == 1
    assert len(hub.sent(r"^PUT ")) == 1

    before = len(hub.requests)
    again = publish(hub, artifact)
    assert again.returncode == 0
    assert "nothing to upload" in again.stdout
    assert not [request for request in hub.requests[before:] if not request.startswith("GET ")]

    program = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], local_dir=sys.argv[2]))"
    fetched = run(hub, program, REPO, str(tmp_path / "fetched"))
    assert fetched.returncode == 0, fetched.stderr
    verified = run(hub, "from quantkit.cli import main; main()", "inspect", str(tmp_path / "fetched"), "--verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "files are as recorded" in verified.stdout


def test_a_dry_run_prints_the_plan_and_changes_nothing(hub, artifact):
    done = publish(hub, artifact, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert "would be uploaded" in done.stdout
    assert hub.repos == {}
    assert all(request.startswith("GET ") for request in hub.requests)


def test_a_branch_of_its_own_and_a_public_repository(hub, artifact):
    assert publish(hub, artifact, "--public", "--revision", "4bit").returncode == 0
    assert not hub.repos[REPO].private
    assert "model.safetensors" in on_hub(hub, "4bit")
    assert on_hub(hub) == {}


def test_only_what_changed_is_sent_and_foreign_files_stay(hub, artifact):
    assert publish(hub, artifact).returncode == 0
    repo = hub.repos[REPO]
    repo.commit("main", repo.commits[repo.branches["main"]] | {"logo.png": (b"png", False), "README.md": (b"x", False)})
    found = json.loads(publish(hub, artifact, "--json").stdout)
    assert [file["name"] for file in found["upload"]] == ["README.md"]
    assert found["others"] == ["logo.png"]
    assert on_hub(hub)["logo.png"] == b"png"
    assert len(hub.sent(r"^PUT ")) == 1


@pytest.mark.parametrize(
    ("request_pattern", "fault"), [("^PUT ", 500), ("^PUT ", "reset"), ("/preupload/", 429), ("/commit/", 503)]
)
def test_a_failure_that_passes_is_tried_again(hub, artifact, request_pattern, fault):
    hub.faults = [[request_pattern, fault, 1]]
    done = publish(hub, artifact)
    assert done.returncode == 0, done.stderr
    assert hub.faults[0][2] == 0
    assert on_hub(hub) == {path.name: path.read_bytes() for path in artifact.iterdir()}


def test_an_upload_that_breaks_off_publishes_nothing_and_is_finished_by_the_next_run(hub, artifact):
    hub.faults = [["/commit/main", 400, 1]]
    broken = publish(hub, artifact)
    assert broken.returncode == 4, broken.stderr
    assert "run the same command again" in broken.stderr
    assert on_hub(hub) == {}
    assert publish(hub, artifact).returncode == 0
    assert len(hub.sent(r"^PUT ")) == 1  # the weights were there already
    assert "model.safetensors" in on_hub(hub)


def test_an_edited_file_is_refused_and_named(hub, artifact):
    with (artifact / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    done = publish(hub, artifact)
    assert done.returncode == 1
    assert "model.safetensors: changed" in done.stderr
    assert hub.requests == []


def test_a_file_edited_after_the_check_is_not_committed(hub, artifact):
    """The weights change between the check of the hashes and their upload."""
    program = f"""
from quantkit import hub, publish
real = publish.read_branch
def edit(repo, revision):
    path = {str(artifact / "model.safetensors")!r}
    content = open(path, "rb").read()
    open(path, "wb").write(content[:-1] + bytes([content[-1] ^ 1]))
    return real(repo, revision)
publish.read_branch = edit
from quantkit.cli import main
main()
"""
    done = run(hub, program, "publish", str(artifact), "--repo", REPO)
    assert done.returncode == 1, done.stderr
    assert "model.safetensors changed while it was being published; nothing was committed" in done.stderr
    assert on_hub(hub) == {}


@pytest.mark.parametrize("token", [READ_ONLY, "hf_expiredTestToken0123456789abcdefgh"])
def test_a_token_that_may_not_write(hub, artifact, token):
    done = publish(hub, artifact, token=token)
    assert done.returncode == 2, done.stderr
    assert "hf auth login" in done.stderr
    assert hub.repos == {}


def test_no_hub(hub, artifact):
    hub.server.shutdown()
    hub.server.server_close()
    done = publish(hub, artifact, "--dry-run")
    assert done.returncode == 4, done.stderr


def test_without_a_pass_nothing_is_published(hub, artifact):
    record = read_record(artifact)
    write_record(artifact, record | {"validation": None})
    done = publish(hub, artifact)
    assert done.returncode == 3
    assert "never validated" in done.stderr
    record["validation"]["variants"][0]["gate"] = {"passed": False, "failures": ["reference: too bad"]}
    write_record(artifact, record)
    assert publish(hub, artifact).returncode == 3
    assert hub.requests == []


def test_an_unpinned_source_is_refused(hub, artifact):
    record = read_record(artifact)
    record["source"] |= {"on_hub": True, "revision": "0" * 40}
    write_record(artifact, record)
    done = publish(hub, artifact)
    assert done.returncode == 2
    assert "quantkit recipes pin" in done.stderr
    assert hub.requests == []


def test_variants_that_failed_are_left_out_with_their_files(hub, artifact):
    """Two variants in a folder, one below its gate: its file stays here."""
    (artifact / "worse.safetensors").write_bytes(b"bad")
    record = read_record(artifact)
    entry = {"name": "worse.safetensors", "size_bytes": 3, "sha256": sha256_of(artifact / "worse.safetensors")}
    record["outputs"].append(entry)
    record["variants"]["worse"] = ["worse.safetensors"]
    failed = record["validation"]["variants"][0] | {"name": "worse", "gate": {"passed": False, "failures": ["bad"]}}
    record["validation"]["variants"].append(failed)
    write_record(artifact, record)
    found = json.loads(publish(hub, artifact, "--json").stdout)
    assert (found["variants"], found["left_out"]) == (["gptq"], ["worse"])
    assert "worse.safetensors" not in on_hub(hub)
    assert "model.safetensors" in on_hub(hub)
