"""Publishing as a user runs it, against a hub that speaks real HTTP on this machine."""

import base64
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from quantkit import signature
from quantkit.errors import GateError, RefusedError, RunFailedError, UnavailableError
from quantkit.files import sha256_of
from quantkit.pipeline import build
from quantkit.publish import publish as publish_here
from quantkit.recipe import Recipe
from quantkit.report.card import keep
from quantkit.report.inspect import inspect_artifact, inspection_lines
from quantkit.report.page import write_report
from quantkit.report.record import output_entries, read_record, write_record
from tests import commands
from tests.commands import COMMAND, ROOT
from tests.hub_server import READ_ONLY, TOKEN, HubServer, Repo
from tests.tiny import WORDS, make_tiny

REPO = "an-org/tiny-GPTQ"
PROGRAM = "from quantkit import hub; hub.FIRST_PAUSE_S = 0.01; from quantkit.cli import main; main()"
DOWNLOAD = """
import sys, huggingface_hub
huggingface_hub.snapshot_download(sys.argv[1], revision=sys.argv[2], local_dir=sys.argv[3])
"""
PLANTED = "hf_plantedSecret0123456789"
# what names a machine to a program; `platform` asks `os`, once
SOMEWHERE = (
    (socket, "gethostname", lambda: PLANTED),
    (os, "uname", lambda: os.uname_result(("Linux", PLANTED, "6.1", "1", "x86_64"))),
)
PLANTING = f"""
import os, socket
socket.gethostname = lambda: {PLANTED!r}
os.uname = lambda: os.uname_result(("Linux", {PLANTED!r}, "6.1", "1", "x86_64"))
{COMMAND}
"""


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
        for module, name, planted in SOMEWHERE:
            patch.setattr(module, name, planted)
        return build(recipe, out=folder / "tiny-GPTQ", device=torch.device("cpu")).out


@pytest.fixture
def artifact(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "tiny-GPTQ"))


def run(hub: HubServer, program: str, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """A program that finds the hub."""
    return commands.forked(program, *arguments, **hub.variables(token))


def publish(hub: HubServer, artifact: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    done = run(hub, PROGRAM, "publish", str(artifact), "--repo", REPO, *arguments, token=token)
    assert "Traceback" not in done.stderr, done.stderr
    assert token not in done.stdout + done.stderr
    return done


def refuses(artifact: Path, error: type[Exception], match: str, **options) -> None:
    """It is refused before the Hub is asked: tests have no network."""
    wanted = {"repo": REPO, "revision": "main", "private": True, "dry_run": False} | options
    with pytest.raises(error) as found:
        publish_here(artifact, **wanted)
    assert re.search(match, str(found.value)), found.value


def on_hub(hub: HubServer, branch: str = "main") -> dict[str, bytes]:
    repo = hub.repos[REPO]
    files = repo.commits[repo.branches[branch]]
    return {path: content for path, (content, _) in files.items() if path != ".gitattributes"}


def arrived_whole(hub: HubServer, artifact: Path, branch: str = "main") -> None:
    """All files are on a branch, the weights as they are here; record and card are those of the repository."""
    there = on_hub(hub, branch)
    here = {path.name: path.read_bytes() for path in artifact.iterdir() if path.is_file()}
    assert there.keys() == here.keys()
    own = ("README.md", "quantkit.json")
    assert {name: there[name] for name in there if name not in own} == {
        name: here[name] for name in here if name not in own
    }
    assert json.loads(there["quantkit.json"])["published"]["repo"] == REPO


def fetched(hub: HubServer, folder: Path, branch: str = "main") -> Path:
    """A branch as somebody downloads it, held against its own record."""
    done = run(hub, DOWNLOAD, REPO, branch, str(folder))
    assert done.returncode == 0, done.stderr
    verified = run(hub, COMMAND, "inspect", str(folder), "--verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "files are as recorded" in verified.stdout
    return folder


def downloads(card: str) -> list[str]:
    """The commands with which a card has its files fetched."""
    return re.findall(r"hf download [^`\n]+", card)


def followed(hub: HubServer, command: str, folder: Path) -> Path:
    """The folder that a card's command fetches into, run as it stands in a folder that is made for it."""
    folder.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command.split(), cwd=folder, env=os.environ | hub.variables() | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / command.split()[-1]


def judged(hub: HubServer, folder: Path, source: Path, *texts: Path) -> dict:
    """What `validate --json` makes of a folder, with exit code 0."""
    options = [option for text in texts for option in ("--text", str(text))]
    done = run(hub, COMMAND, "validate", str(folder), "--model", str(source), *options, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def told(content: bytes) -> list[str]:
    """What a file tells of who made it, where, and with which token."""
    # sources, artifacts, keys and what is staged for the Hub: tests have them all in the system's folder for such
    secrets = (PLANTED, TOKEN, f"{tempfile.gettempdir()}/", f"{Path.home()}/", str(ROOT))
    return [secret for secret in secrets if secret.encode() in content]


def test_an_artifact_tells_of_nobody(built):
    contents = {path.name: path.read_bytes() for path in built.iterdir()}
    assert b"fingerprint" in contents["quantkit.json"]
    assert {name: told(content) for name, content in contents.items() if told(content)} == {}


@pytest.mark.slow
def test_what_goes_up_tells_of_nobody(hub, artifact, tmp_path):
    """Record, card, plots and signature on the Hub, and the report that the plots are from."""
    pytest.importorskip("matplotlib", reason="of the extra `report`")
    pytest.importorskip("model_signing", reason="of the extra `sign`")
    private, _ = make_key(tmp_path, "own")
    somebody = hub.variables() | dict.fromkeys(("USER", "LOGNAME", "HOSTNAME", "LNAME", "USERNAME"), PLANTED)
    report = tmp_path / "report"
    # started, not forked: `platform` asks for the name once, and a fork may find it known
    drawn = commands.run(PLANTING, "report", str(artifact), "--out", str(report), **somebody)
    assert drawn.returncode == 0, drawn.stderr
    options = ("--repo", REPO, "--sign", str(private), "--report", str(report))
    done = commands.run(PLANTING, "publish", str(artifact), *options, **somebody)
    assert done.returncode == 0, done.stderr
    contents = on_hub(hub) | {path.name: path.read_bytes() for path in report.iterdir()}
    signature = json.loads(contents["model.sig"])
    contents["what is signed"] = base64.b64decode(signature["dsseEnvelope"]["payload"])
    assert b"model.safetensors" in contents["what is signed"]
    assert len(contents) == len(on_hub(hub)) + 5
    assert {name: told(content) for name, content in contents.items() if told(content)} == {}


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
    arrived_whole(hub, artifact)
    assert len(hub.sent(r"POST .*/commit/")) == 1
    assert len(hub.sent(r"^PUT ")) == 1

    before = len(hub.requests)
    again = publish(hub, artifact)
    assert again.returncode == 0
    assert "nothing to upload" in again.stdout
    assert not [request for request in hub.requests[before:] if not request.startswith("GET ")]

    fetched(hub, tmp_path / "fetched")


@pytest.mark.parametrize("branch", ["", "../../x", "-x", "a b"])
def test_what_is_no_branch_is_refused(artifact, branch):
    refuses(artifact, RefusedError, f"{branch!r} is no branch", revision=branch)


@pytest.mark.parametrize("repo", ["my-org/--x", "an-org/a..b", "an-org/x.git", "an-org/" + "x" * 97, "żółw/a"])
def test_what_the_hub_does_not_take_for_a_repository_is_refused(artifact, repo):
    refuses(artifact, RefusedError, "is no repository", repo=repo)


def test_a_dry_run_prints_the_plan_and_changes_nothing(hub, artifact):
    done = publish(hub, artifact, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert "would be uploaded" in done.stdout
    assert hub.repos == {}
    assert all(request.startswith("GET ") for request in hub.requests)


@pytest.mark.slow
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
    (branch,) = found["branches"]
    assert [file["name"] for file in branch["upload"]] == ["README.md"]
    assert branch["others"] == ["logo.png"]
    assert on_hub(hub)["logo.png"] == b"png"
    assert len(hub.sent(r"^PUT ")) == 1


@pytest.mark.parametrize(
    ("request_pattern", "fault"),
    [
        ("^PUT ", "reset"),
        *(
            pytest.param(pattern, fault, marks=pytest.mark.slow)
            for pattern, fault in (
                ("^PUT ", 500),
                ("^PUT ", "slow"),
                ("/preupload/", 429),
                ("/commit/", 503),
                ("/commit/", "reset"),
                ("/objects/batch", 504),
                ("POST /api/repos/create", 500),
                ("GET .*/tree/", 503),
                ("GET .*/revision/", 429),
            )
        ),
    ],
)
def test_a_failure_that_passes_is_tried_again(hub, artifact, request_pattern, fault):
    hub.faults = [[request_pattern, fault, 1]]
    done = publish(hub, artifact)
    assert done.returncode == 0, done.stderr
    assert hub.faults[0][2] == 0
    arrived_whole(hub, artifact)


@pytest.mark.slow
@pytest.mark.parametrize(
    "asks", [{"RateLimit": '"api";r=0;t=2'}, {"Retry-After": "2"}], ids=["RateLimit", "Retry-After"]
)
def test_it_waits_as_long_as_the_hub_asks(hub, artifact, asks):
    hub.faults, hub.asks = [["/commit/main", 429, 1]], asks
    done = publish(hub, artifact)
    assert done.returncode == 0, done.stderr
    first, second = (hub.moments[number] for number, name in enumerate(hub.requests) if "/commit/main" in name)
    assert 3 <= second - first < 13
    arrived_whole(hub, artifact)


def test_an_upload_that_breaks_off_publishes_nothing_and_is_finished_by_the_next_run(hub, artifact):
    hub.faults = [["/commit/main", 400, 1]]
    broken = publish(hub, artifact)
    assert broken.returncode == 4, broken.stderr
    assert "run the same command again" in broken.stderr
    assert on_hub(hub) == {}
    assert publish(hub, artifact).returncode == 0
    assert len(hub.sent(r"^PUT ")) == 1  # the weights were there already
    assert "model.safetensors" in on_hub(hub)


def test_large_files_go_up_in_parts_and_arrive_whole(hub, artifact):
    hub.part_bytes = 20_000
    hub.faults = [["PUT /part/", 500, 1]]
    size = (artifact / "model.safetensors").stat().st_size
    done = publish(hub, artifact)
    assert done.returncode == 0, done.stderr
    parts = -(-size // hub.part_bytes)
    assert parts > 2
    assert len(hub.sent("^PUT /part/")) == parts + 1  # one of them twice
    assert len(hub.sent("^POST /complete/")) == 1
    arrived_whole(hub, artifact)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["PUT /part/", "POST /complete/"])
def test_parts_that_never_arrive_publish_nothing(hub, artifact, pattern):
    hub.part_bytes = 20_000
    hub.faults = [[pattern, 400, 1]]
    broken = publish(hub, artifact)
    assert broken.returncode == 4, broken.stderr
    assert on_hub(hub) == {}
    assert publish(hub, artifact).returncode == 0
    assert on_hub(hub)["model.safetensors"] == (artifact / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_repository_that_is_removed_meanwhile_is_made_again_by_the_next_run(hub, artifact):
    program = """
from quantkit import hub
hub.FIRST_PAUSE_S = 0.01
import huggingface_hub
real = huggingface_hub.HfApi.preupload_lfs_files
def gone(self, repo, *arguments, **named):
    self.delete_repo(repo)
    return real(self, repo, *arguments, **named)
huggingface_hub.HfApi.preupload_lfs_files = gone
from quantkit.cli import main
main()
"""
    done = run(hub, program, "publish", str(artifact), "--repo", REPO)
    assert done.returncode == 2, done.stderr
    assert f"the Hub has no repository {REPO} that this token may write to" in done.stderr
    assert "Traceback" not in done.stderr
    assert publish(hub, artifact).returncode == 0
    assert "model.safetensors" in on_hub(hub)


@pytest.mark.slow
def test_a_branch_that_is_there_keeps_its_history(hub, artifact):
    assert publish(hub, artifact, "--revision", "4bit").returncode == 0
    first = hub.repos[REPO].branches["4bit"]
    record = read_record(artifact)
    write_record(artifact, record | {"chat": "other"})
    assert publish(hub, artifact, "--revision", "4bit").returncode == 0
    assert len(hub.sent("POST .*/branch/4bit")) == 2
    assert hub.repos[REPO].branches["4bit"] != first
    assert len(hub.sent("^PUT ")) == 1


def test_what_is_there_and_is_no_earlier_state_of_it_is_not_replaced(hub, artifact, tmp_path):
    """A --repo that is another's by mistake: the source itself, another format, another model."""
    hub.repos[REPO] = Repo(private=False)
    by_hand = {"config.json": (b"{}", False), "README.md": (b"# Mine", False), "model.bin": (b"bin", True)}
    hub.repos[REPO].commit("main", by_hand)
    refused = publish(hub, artifact)
    assert refused.returncode == 2, refused.stderr
    assert f"{REPO} has files that quantkit did not put there and this would replace: config.json\n" in refused.stderr
    assert publish(hub, artifact, "--dry-run").returncode == 2
    assert on_hub(hub) == {name: content for name, (content, _) in by_hand.items()}
    # a card that was begun by hand gives way, and a branch of its own takes nothing from anybody
    assert publish(hub, artifact, "--revision", "own").returncode == 0
    hub.repos[REPO].commit("main", {"README.md": by_hand["README.md"]})
    assert publish(hub, artifact).returncode == 0
    record = read_record(artifact)
    renamed = record["source"] | {"id": "an-org/other", "sha256": {"model.safetensors": "0" * 64}}
    for told, kind in (
        ({"format": "awq"}, f"{REPO} holds gptq, and this is awq"),
        ({"source": renamed}, f"{REPO} holds an artifact of {record['source']['id']}, and this is one of an-org/other"),
    ):
        other = Path(shutil.copytree(artifact, tmp_path / next(iter(told))))
        keep(other, record | told)
        refused = publish(hub, other)
        assert refused.returncode == 2, refused.stderr
        assert kind in refused.stderr
        assert publish(hub, other, "--revision", next(iter(told))).returncode == 0
    arrived_whole(hub, artifact)


@pytest.fixture
def source_on_hub(hub, tiny_mistral) -> str:
    """The Hub id of a checkpoint whose card states a licence."""
    content = {path.name: (path.read_bytes(), path.suffix == ".safetensors") for path in tiny_mistral.iterdir()}
    card = "---\nlicense: cc-by-nc-4.0\nlanguage: [pl]\n---\n# Żuraw\n"
    hub.repos["an-org/zuraw"] = Repo(private=False)
    hub.repos["an-org/zuraw"].commit("main", content | {"README.md": (card.encode(), False)})
    return "an-org/zuraw"


@pytest.mark.slow
def test_from_the_hub_to_the_hub(hub, source_on_hub, tmp_path):
    """Fetched, built, refused while no revision is pinned, pinned, published, fetched, judged: the same figures."""
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 20, encoding="utf-8")
    base, recipe = tmp_path / "base.toml", tmp_path / "own.toml"
    base.write_text(f'[model]\nid = "{source_on_hub}"\n', encoding="utf-8")
    recipe.write_text(
        f"""extends = "base.toml"
format = "gptq"
[quantize]
group_size = 32
[calibration]
window_tokens = 16
texts = {{ "{text}" = 4 }}
[validation]
window_tokens = 32
generated_tokens = 0
texts = ["{text}"]
[release]
repo = "{REPO}"
""",
        encoding="utf-8",
    )
    out = tmp_path / "tiny-GPTQ"
    assert run(hub, COMMAND, "build", str(recipe), "--out", str(out)).returncode == 0
    refused = run(hub, COMMAND, "publish", str(out))
    assert refused.returncode == 2
    assert "does not say which revision" in refused.stderr
    assert run(hub, COMMAND, "recipes", "pin", str(base)).returncode == 0
    built = run(hub, COMMAND, "build", str(recipe), "--out", str(out))
    assert built.returncode == 0, built.stderr
    assert "was complete already" in built.stderr, "a pin to what it was made from is no other build"
    published = run(hub, COMMAND, "publish", str(out))
    assert published.returncode == 0, published.stderr
    data = ModelCard(on_hub(hub)["README.md"].decode()).data
    assert (data.license, data.base_model) == ("cc-by-nc-4.0", "an-org/zuraw")
    folder = tmp_path / "fetched"
    assert run(hub, DOWNLOAD, REPO, "main", str(folder)).returncode == 0
    assert run(hub, COMMAND, "inspect", str(folder), "--verify").returncode == 0
    expected = read_record(folder)["validation"]
    judged = run(hub, COMMAND, "validate", str(folder), "--text", str(text), "--json")
    assert judged.returncode == 0, judged.stderr
    figures = ("ppl_per_token", "ratio", "mean_kld", "top1_agreement")
    (now,), (then,) = json.loads(judged.stdout)["variants"][0]["results"], expected["variants"][0]["results"]
    assert {key: now[key] for key in figures} == {key: then[key] for key in figures}


@pytest.mark.slow
def test_a_full_disk_while_the_source_is_fetched(hub, source_on_hub):
    program = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from quantkit.cli import main
main()
"""
    done = run(hub, program, "plan", "bielik-nano/gptq", "--model", source_on_hub)
    assert done.returncode == 1, done.stderr
    assert "the disk is full; an-org/zuraw at revision main was not fetched whole" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_full_disk_while_downloading_leaves_no_artifact(hub, artifact, tmp_path):
    """The client's file system refuses the weights; what it left does not pass for the artifact."""
    assert publish(hub, artifact).returncode == 0
    program = """
import resource, signal, sys, huggingface_hub as h
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
h.snapshot_download(sys.argv[1], local_dir=sys.argv[2], max_workers=1)
"""
    half = (artifact / "model.safetensors").stat().st_size // 2
    fetched = tmp_path / "fetched"
    broken = run(hub, program, REPO, str(fetched), str(half))
    assert broken.returncode != 0
    assert "File too large" in broken.stderr
    assert not (fetched / "model.safetensors").exists()
    assert run(hub, program, REPO, str(fetched), str(1 << 40)).returncode == 0
    verified = run(hub, COMMAND, "inspect", str(fetched), "--verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr


@pytest.mark.slow
def test_the_family_is_collected_once(hub, artifact):
    record = read_record(artifact)
    record["recipe"]["release"]["collection"] = "Żuraw, quantized"
    write_record(artifact, record)
    assert publish(hub, artifact).returncode == 0
    (collection,) = hub.collections.values()
    assert (collection["title"], collection["private"]) == ("Żuraw, quantized", True)
    assert [item["id"] for item in collection["items"]] == [REPO]
    assert run(hub, PROGRAM, "publish", str(artifact), "--repo", f"{REPO}-2").returncode == 0
    before = len(hub.requests)
    assert publish(hub, artifact).returncode == 0
    assert [item["id"] for item in collection["items"]] == [REPO, f"{REPO}-2"]
    assert len(hub.collections) == 1
    assert not [request for request in hub.requests[before:] if not request.startswith("GET ")]


def test_a_card_or_record_edited_by_hand_is_refused(artifact):
    with (artifact / "README.md").open("a", encoding="utf-8") as file:
        file.write("Better than the source.\n")
    refuses(artifact, RunFailedError, r"README\.md: changed(.|\n)*\[release\] notes")
    path = artifact / "quantkit.json"
    path.write_text(path.read_text("utf-8").replace('"mean_kld": 0.', '"mean_kld": 0.0'), "utf-8")
    refuses(artifact, RunFailedError, r"quantkit\.json was edited after it was written")


def make_key(folder: Path, name: str, kind: str = "ec") -> tuple[Path, Path]:
    """A new private key and its public part."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization", reason="of the extra `sign`")
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    key = {
        "ec": lambda: ec.generate_private_key(ec.SECP256R1()),
        "rsa": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
    }[kind]()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.mark.slow
def test_a_signature_goes_up_holds_and_breaks(hub, artifact, tmp_path):
    pytest.importorskip("model_signing", reason="of the extra `sign`")
    private, public = make_key(tmp_path, "own")
    _, foreign = make_key(tmp_path, "foreign")
    folder = tmp_path / "fetched"

    def inspect(key: Path | None) -> tuple[str, str | None]:
        found = inspect_artifact(folder, verify=True, public_key=key)
        assert found["changed"] == []
        assert any(line.startswith("signature") for line in inspection_lines(found))
        return found["signature"], found["signature_problem"]

    dry = json.loads(publish(hub, artifact, "--sign", str(private), "--dry-run", "--json").stdout)
    assert "model.sig" in [file["name"] for file in dry["branches"][0]["upload"]]
    assert not (artifact / ".signatures").exists()
    done = publish(hub, artifact, "--sign", str(private))
    assert done.returncode == 0, done.stderr
    again = publish(hub, artifact, "--sign", str(private))
    assert "nothing to upload" in again.stdout, "a signature that holds is kept"

    fetched(hub, folder)
    assert inspect(public) == ("good", None)
    assert inspect(None) == ("not checked", None)
    assert inspect(foreign)[0] == "broken"
    assert "Key mismatch" in inspect(foreign)[1]
    record = read_record(folder)
    write_record(folder, record | {"chat": "other"})
    assert inspect(public)[0] == "broken"
    assert "quantkit.json" in inspect(public)[1]

    record = read_record(artifact)
    write_record(artifact, record | {"chat": "other"})
    refused = publish(hub, artifact)
    assert refused.returncode == 2
    assert "its signature would not hold" in refused.stderr
    assert publish(hub, artifact, "--sign", str(private)).returncode == 0
    fetched(hub, tmp_path / "again")
    assert inspect_artifact(tmp_path / "again", verify=True, public_key=public)["signature"] == "good"
    (folder / "model.sig").unlink()
    assert inspect(public) == ("broken", "model.sig is missing")
    done = run(hub, PROGRAM, "inspect", str(folder), "--verify", "--public-key", str(public))
    assert done.returncode == 1
    assert "signature         model.sig is missing" in done.stdout

    assert publish(hub, artifact, "--revision", "unsigned").returncode == 0
    assert "model.sig" not in on_hub(hub, "unsigned"), "the signature that a branch begins with holds no more"


def test_a_key_that_is_none_is_refused(artifact, tmp_path):
    pytest.importorskip("model_signing", reason="of the extra `sign`")
    (tmp_path / "key.pem").write_text("no key")
    refuses(artifact, RefusedError, "the key cannot sign", key=tmp_path / "key.pem")
    refuses(artifact, RefusedError, "no such key", key=tmp_path / "none.pem")


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_a_key_of_another_kind_is_refused(artifact, tmp_path, kind):
    pytest.importorskip("model_signing", reason="of the extra `sign`")
    private, public = make_key(tmp_path, "own", kind)
    refuses(artifact, RefusedError, "the key cannot sign: it is no elliptic curve key", key=private)
    with pytest.raises(RefusedError, match="the key cannot verify: it is no elliptic curve key") as caught:
        signature.problem(artifact, tmp_path / "model.sig", public, covers=())
    assert "elliptic curve key as PEM" in caught.value.fix


def test_without_the_package_signing_says_what_to_install(artifact, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    refuses(artifact, UnavailableError, r'pip install "quantkit\[sign\]"', key=tmp_path / "key.pem")


def several(folder: Path, source: Path, form: str, quantize: dict, failing: str) -> Path:
    """A real artifact of several variants, one of which cannot keep its gate."""
    text = folder / "text.txt"
    text.write_text(WORDS * 20, encoding="utf-8")
    recipe = Recipe.of(
        {
            "format": form,
            "model": {"id": str(source)},
            "quantize": quantize,
            "calibration": {"texts": {str(text): 4}, "window_tokens": 16, "activations": "float"},
            "validation": {
                "texts": (str(text),),
                "window_tokens": 32,
                "generated_tokens": 0,
                "variant_gates": {failing: {"top1_agreement": 1.0, "mean_kld": 0.0}},
            },
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_HOME", str(folder / "home"))
        return build(recipe, out=folder / f"tiny-{form.upper()}", device=torch.device("cpu")).out


@pytest.fixture(scope="module")
def tiny_exl2(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("exl2")
    source = make_tiny(folder / "source", "mistral")
    return source, several(folder, source, "exl2", {"bits": [4.0, 5.0, 8.0]}, "4.0bpw")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    source = make_tiny(folder / "source", "mistral", hidden_size=256, intermediate_size=256)
    quantize = {"name": "tiny", "types": ["Q2_K", "Q4_K_M", "Q8_0"]}
    return source, several(folder, source, "gguf", quantize, "Q4_K_M")


@pytest.mark.slow
def test_exl2_goes_to_a_branch_for_each_size_that_passed(hub, tiny_exl2, tmp_path):
    source, built = tiny_exl2
    artifact = Path(shutil.copytree(built, tmp_path / built.name))
    done = publish(hub, artifact, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [branch["revision"] for branch in found["branches"]] == ["5.0bpw", "8.0bpw", "main"]
    assert found["left_out"] == ["4.0bpw"]
    assert set(hub.repos[REPO].branches) == {"5.0bpw", "8.0bpw", "main"}
    assert on_hub(hub).keys() == {"README.md", "quantkit.json", "measurement.json"}
    card = on_hub(hub)["README.md"].decode()
    assert f"hf download {REPO} --revision 5.0bpw" in card
    assert "| exl2 8.0bpw |" in card
    assert "* 4.0bpw: reference: " in card
    (command,) = downloads(card)
    inside = inspect_artifact(followed(hub, command, tmp_path / "followed"), verify=True)
    assert ([variant["name"] for variant in inside["variants"]], inside["changed"]) == (["5.0bpw"], [])
    shown = run(hub, COMMAND, "inspect", str(fetched(hub, tmp_path / "main")), "--json")
    assert [branch["name"] for branch in json.loads(shown.stdout)["branches"]] == ["5.0bpw", "8.0bpw"]
    for branch in ("5.0bpw", "8.0bpw"):
        folder = fetched(hub, tmp_path / branch, branch)
        card = (folder / "README.md").read_text("utf-8")
        assert f"hf download {REPO} --revision {branch}" in card
        now = judged(hub, folder, source, built.parent / "text.txt")
        assert [variant["name"] for variant in now["variants"]] == [branch]
        assert read_record(folder)["build"]["allotments"].keys() == {branch}
        then = read_record(folder)["validation"]
        for validation in (now, then):
            del validation["variants"][0]["results"][0]["seconds"], validation["artifact"]
        assert now == then
        assert (folder / "README.md").read_text("utf-8").splitlines()[-8:] == card.splitlines()[-8:]
        fetched(hub, tmp_path / f"{branch}-again", branch)
    assert "nothing to upload" in publish(hub, artifact).stdout
    assert len(hub.sent(r"POST .*/commit/")) == 3
    assert publish(hub, artifact, "--revision", "other").returncode == 2


@pytest.mark.slow
def test_a_branch_that_is_added_later_begins_clean(hub, tiny_exl2, artifact, tmp_path):
    """Its first commit takes away what it has from main: somebody's picture stays, files of ours do not."""
    other = Path(shutil.copytree(tiny_exl2[1], tmp_path / "exl2"))
    assert publish(hub, artifact).returncode == 0
    refused = publish(hub, other)
    assert f"{REPO} holds gptq, and this is exl2" in refused.stderr
    assert hub.repos[REPO].branches.keys() == {"main"}, "refused before the first upload"
    del hub.repos[REPO]
    assert publish(hub, other).returncode == 0
    repo = hub.repos[REPO]
    repo.commit("main", repo.commits[repo.branches["main"]] | {"logo.png": (b"png", False)})
    assert on_hub(hub).keys() == {"README.md", "quantkit.json", "measurement.json", "logo.png"}
    assert publish(hub, artifact, "--revision", "later").returncode == 0
    assert on_hub(hub, "later").keys() == {path.name for path in artifact.iterdir()} | {"logo.png"}


@pytest.mark.slow
def test_gguf_types_that_passed_go_up_as_an_artifact_of_their_own(hub, tiny_gguf, tmp_path):
    source, built = tiny_gguf
    artifact = Path(shutil.copytree(built, tmp_path / built.name))
    assert "tiny.Q4_K_M.gguf" in (artifact / "Modelfile").read_text("utf-8")
    done = publish(hub, artifact, "--json")
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["variants"], json.loads(done.stdout)["left_out"]) == (["Q2_K", "Q8_0"], ["Q4_K_M"])
    folder = fetched(hub, tmp_path / "fetched")
    assert sorted(path.name for path in folder.glob("tiny.Q*.gguf")) == ["tiny.Q2_K.gguf", "tiny.Q8_0.gguf"]
    for name in ("README.md", "Modelfile"):
        text = (folder / name).read_text("utf-8")
        assert "tiny.Q4_K_M.gguf" not in text
        assert "tiny.Q8_0.gguf" in text
    assert f"ollama run hf.co/{REPO}:Q8_0" in (folder / "README.md").read_text("utf-8")
    (command,) = downloads((folder / "README.md").read_text("utf-8"))
    (file,) = followed(hub, command, tmp_path / "followed").glob("*.gguf")
    assert file.read_bytes() == (artifact / file.name).read_bytes()
    assert (folder / "Modelfile").read_text("utf-8").splitlines()[1:] == (artifact / "Modelfile").read_text(
        "utf-8"
    ).splitlines()[1:]
    now = judged(hub, folder, source, built.parent / "text.txt")
    assert [variant["name"] for variant in now["variants"]] == ["Q2_K", "Q8_0"]
    assert now["gate"] == {"passed": True, "failures": []}
    assert "nothing to upload" in publish(hub, artifact).stdout


def test_an_edited_file_is_refused_and_named(artifact):
    with (artifact / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    refuses(artifact, RunFailedError, r"model\.safetensors: changed")


def test_a_file_edited_after_the_check_is_not_committed(hub, artifact):
    """The weights change between the check of the hashes and their upload."""
    program = f"""
from quantkit import branches, hub
real = branches.read_branch
def edit(repo, revision):
    path = {str(artifact / "model.safetensors")!r}
    content = open(path, "rb").read()
    open(path, "wb").write(content[:-1] + bytes([content[-1] ^ 1]))
    return real(repo, revision)
branches.read_branch = edit
from quantkit.cli import main
main()
"""
    done = run(hub, program, "publish", str(artifact), "--repo", REPO)
    assert done.returncode == 1, done.stderr
    assert "model.safetensors changed while it was being published; nothing was committed" in done.stderr
    assert on_hub(hub) == {}


@pytest.mark.parametrize(
    "token", [READ_ONLY, pytest.param("hf_expiredTestToken0123456789abcdefgh", marks=pytest.mark.slow)]
)
def test_a_token_that_may_not_write(hub, artifact, token):
    done = publish(hub, artifact, token=token)
    assert done.returncode == 2, done.stderr
    assert "hf auth login" in done.stderr
    assert hub.repos == {}


@pytest.mark.slow
def test_no_hub(hub, artifact):
    hub.server.shutdown()
    hub.server.server_close()
    done = publish(hub, artifact, "--dry-run")
    assert done.returncode == 4, done.stderr


def test_a_hub_that_is_switched_off(hub, artifact):
    switched = hub.variables() | {"HF_HUB_OFFLINE": "1"}
    done = commands.forked(PROGRAM, "publish", str(artifact), "--repo", REPO, **switched)
    assert done.returncode == 4, done.stderr
    assert "error: the Hub is switched off by HF_HUB_OFFLINE\n" in done.stderr
    assert "fix: unset HF_HUB_OFFLINE" in done.stderr
    assert not hub.requests


def test_without_a_pass_nothing_is_published(artifact):
    record = read_record(artifact)
    write_record(artifact, record | {"validation": None})
    refuses(artifact, GateError, "never validated")
    record["validation"]["variants"][0]["gate"] = {"passed": False, "failures": ["reference: too bad"]}
    write_record(artifact, record)
    refuses(artifact, GateError, "no variant passed")


def test_an_unpinned_source_is_refused(artifact):
    record = read_record(artifact)
    record["source"] |= {"on_hub": True, "revision": "0" * 40}
    write_record(artifact, record)
    refuses(artifact, RefusedError, "quantkit recipes pin")


@pytest.fixture
def partly(artifact) -> Path:
    """An artifact with a second variant in a file of its own, below its gate."""
    (artifact / "worse.safetensors").write_bytes(b"bad")
    record = read_record(artifact)
    entry = {"name": "worse.safetensors", "size_bytes": 3, "sha256": sha256_of(artifact / "worse.safetensors")}
    record["outputs"].append(entry)
    record["variants"]["worse"] = ["worse.safetensors"]
    failed = record["validation"]["variants"][0] | {"name": "worse", "gate": {"passed": False, "failures": ["too bad"]}}
    record["validation"]["variants"].append(failed)
    record["validation"]["gate"] = {"passed": False, "failures": ["worse: too bad"]}
    keep(artifact, record)
    return artifact


def test_variants_that_failed_are_left_out_with_their_files(hub, partly, tmp_path):
    """What goes up is whole by itself: its record and card know of what is there, and say what is not."""
    found = json.loads(publish(hub, partly, "--json").stdout)
    assert (found["variants"], found["left_out"]) == (["gptq"], ["worse"])
    folder = fetched(hub, tmp_path / "fetched")
    record = read_record(folder)
    assert record["variants"] == {"gptq": ["model.safetensors"]}
    assert "worse.safetensors" not in [entry["name"] for entry in record["outputs"]]
    assert [variant["name"] for variant in record["validation"]["variants"]] == ["gptq"]
    assert record["validation"]["gate"] == {"passed": True, "failures": []}
    card = (folder / "README.md").read_text("utf-8")
    assert "Passed the recipe's gates." in card
    assert "* worse: too bad" in card
    assert "gptq worse" not in card
    assert "nothing to upload" in publish(hub, partly).stdout


def test_the_card_names_the_repository_it_is_in(hub, artifact):
    record = read_record(artifact)
    record["recipe"]["release"]["repo"] = "somebody/else-GPTQ"
    keep(artifact, record)
    assert "somebody/else-GPTQ" in (artifact / "README.md").read_text("utf-8")
    assert publish(hub, artifact).returncode == 0
    card = on_hub(hub)["README.md"].decode()
    assert card.count(REPO) >= 2
    assert "else-GPTQ" not in card
    assert "\n# tiny-GPTQ\n" in card


@pytest.mark.slow
def test_a_branch_is_named_by_the_card_that_lies_on_it(hub, artifact):
    assert publish(hub, artifact, "--revision", "4bit").returncode == 0
    assert "on the branch `4bit`" in on_hub(hub, "4bit")["README.md"].decode()


def test_a_verdict_on_another_text_publishes_nothing(artifact):
    """Neither one that stands in the record, nor figures that do not keep the recipe's gates."""
    record = read_record(artifact)
    easy = record | {"validation": record["validation"] | {"text": record["validation"]["text"] | {"sha256": "0" * 64}}}
    keep(artifact, easy)
    refuses(artifact, GateError, "not on the texts of the recipe(.|\n)*quantkit build")
    record["recipe"]["validation"]["gates"]["perplexity_ratio"] = 1.0
    record["validation"]["variants"][0]["results"][0]["ratio"] = 1.5
    keep(artifact, record)
    refuses(artifact, GateError, r"perplexity_ratio 1\.5000 > 1")


def test_files_of_an_earlier_publication_go_with_the_next_commit(hub, artifact, tmp_path):
    """Shards that have other names now are removed with it; what somebody else put there stays."""
    assert publish(hub, artifact).returncode == 0
    repo = hub.repos[REPO]
    human = {"logo.png": (b"png", False), "examples/own.safetensors": (b"own", True)}
    repo.commit("main", repo.commits[repo.branches["main"]] | human)
    (artifact / "model.safetensors").rename(artifact / "model-00001-of-00001.safetensors")
    record = read_record(artifact)
    record["variants"]["gptq"] = ["model-00001-of-00001.safetensors"]
    record["validation"]["variants"][0]["files"] = ["model-00001-of-00001.safetensors"]
    keep(artifact, record | {"outputs": output_entries(artifact)})
    dry = publish(hub, artifact, "--dry-run")
    assert "removed  model.safetensors" in dry.stdout
    assert "model.safetensors" in on_hub(hub)
    found = json.loads(publish(hub, artifact, "--json").stdout)
    (branch,) = found["branches"]
    assert branch["remove"] == ["model.safetensors"]
    assert branch["others"] == ["examples/own.safetensors", "logo.png"]
    assert len(hub.sent(r"POST .*/commit/")) == 2
    assert on_hub(hub).keys() == {path.name for path in artifact.iterdir()} | human.keys()
    assert "nothing to upload" in publish(hub, artifact).stdout


@pytest.mark.parametrize("fault", ["lost", pytest.param("late", marks=pytest.mark.slow)])
def test_a_commit_whose_answer_is_lost_was_made(hub, artifact, fault):
    """The server has committed, the client hears nothing or an error; its next try has an old parent."""
    hub.faults = [["/commit/main", fault, 1]]
    done = publish(hub, artifact)
    assert done.returncode == 0, done.stderr
    arrived_whole(hub, artifact)
    assert "nothing to upload" in publish(hub, artifact).stdout


@pytest.mark.slow
def test_somebody_elses_commit_is_not_taken_for_ours(hub, artifact):
    program = f"""
from quantkit import hub
hub.FIRST_PAUSE_S = 0.01
import huggingface_hub
real = huggingface_hub.HfApi.create_commit
def meanwhile(self, repo, operations, **named):
    if named["parent_commit"]:
        other = huggingface_hub.CommitOperationAdd("other.txt", b"other")
        real(self, repo, [other], commit_message="other", revision=named["revision"])
    return real(self, repo, operations, **named)
huggingface_hub.HfApi.create_commit = meanwhile
{COMMAND}
"""
    done = run(hub, program, "publish", str(artifact), "--repo", REPO)
    assert done.returncode == 4, done.stderr
    assert "run the same command again" in done.stderr
    assert on_hub(hub).keys() == {"other.txt"}
    assert publish(hub, artifact).returncode == 0


def test_other_bytes_on_the_hub_are_noticed(hub, artifact):
    """The Hub says yes and keeps something else."""
    hub.spoils = "tokenizer.json"
    done = publish(hub, artifact)
    assert done.returncode == 1, done.stderr
    assert "the Hub holds other bytes than were uploaded: tokenizer.json" in done.stderr
    hub.spoils = None
    assert publish(hub, artifact).returncode == 0
    arrived_whole(hub, artifact)


@pytest.fixture
def in_shards(artifact) -> Path:
    """An artifact whose weights are three large files."""
    record = read_record(artifact)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    content = (artifact / "model.safetensors").read_bytes()
    for number, name in enumerate(names):
        (artifact / name).write_bytes(content + bytes([number]))
    (artifact / "model.safetensors").unlink()
    record["variants"]["gptq"] = names
    keep(artifact, record | {"outputs": output_entries(artifact)})
    return artifact


def test_of_several_large_files_only_the_rest_goes_up_after_a_reset(hub, in_shards):
    hub.faults = [["^PUT ", None, 1], ["^PUT ", 400, 1]]
    broken = publish(hub, in_shards)
    assert broken.returncode == 4, broken.stderr
    assert on_hub(hub) == {}
    assert len(hub.large) == 1
    hub.faults = [["^PUT ", "reset", 1]]
    assert publish(hub, in_shards).returncode == 0
    arrived_whole(hub, in_shards)
    assert len(hub.sent("^PUT ")) == 2 + 3  # two tries of the first run; a reset and two files of the second


@pytest.mark.slow
def test_a_publication_that_is_killed_sends_only_the_rest_the_next_time(hub, in_shards):
    hub.faults = [["^PUT ", None, 1], ["^PUT ", "slow", 1]]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "publish", str(in_shards), "--repo", REPO],
        cwd=ROOT,
        env=os.environ | hub.variables(),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while len(hub.sent("^PUT ")) < 2:
        assert process.poll() is None, "it ends only when it is killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert on_hub(hub) == {}
    assert len(hub.large) == 1
    before = len(hub.sent("^PUT "))
    assert publish(hub, in_shards).returncode == 0
    arrived_whole(hub, in_shards)
    # the second file of the killed run may have arrived whole
    assert len(hub.sent("^PUT ")) - before <= 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", [429, 500, "reset", "half", "slow"])
def test_a_download_that_fails_for_a_moment_is_whole_in_the_end(hub, artifact, tmp_path, fault):
    """The client's own second try, or that of who runs it: never a folder that passes for the artifact and is not."""
    assert publish(hub, artifact).returncode == 0
    hub.faults = [["GET .*/resolve/.*model.safetensors", fault, 1]]
    program = "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1], local_dir=sys.argv[2], max_workers=1)"
    folder = tmp_path / "fetched"
    first = run(hub, program, REPO, str(folder))
    if first.returncode:
        assert not (folder / "model.safetensors").exists()
    fetched(hub, folder)
    assert (folder / "model.safetensors").read_bytes() == (artifact / "model.safetensors").read_bytes()
    assert hub.faults[0][2] == 0


@pytest.mark.slow
def test_the_card_shows_the_plots_of_the_report(hub, artifact, tmp_path):
    pytest.importorskip("matplotlib", reason="of the extra `report`")
    report = tmp_path / "report"
    write_report([artifact], report)
    assert publish(hub, artifact, "--report", str(report)).returncode == 0
    folder = fetched(hub, tmp_path / "fetched")
    for name in ("size-perplexity.png", "size-kld.png"):
        assert (folder / "plots" / name).read_bytes() == (report / name).read_bytes()
        assert f"](plots/{name})" in (folder / "README.md").read_text("utf-8")
    write_report([artifact], report)
    assert "nothing to upload" in publish(hub, artifact, "--report", str(report)).stdout
    assert publish(hub, artifact).returncode == 0
    assert not [name for name in on_hub(hub) if name.startswith("plots/")]
    keep(artifact, read_record(artifact) | {"chat": "other"})
    refuses(artifact, RefusedError, "does not show the artifact as it is now", report=report)
    refuses(artifact, RefusedError, "holds no report", report=tmp_path)


@pytest.mark.slow
def test_nothing_moves_where_nobody_watches(hub, artifact):
    """Without a terminal the Hub's client draws no bars; a large file has a line before it goes up."""
    program = PROGRAM.replace("hub.FIRST_PAUSE_S", "hub.SMALL_BYTES = 100_000; hub.FIRST_PAUSE_S")
    done = run(hub, program, "publish", str(artifact), "--repo", REPO)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  model\.safetensors, \d+ MB$", done.stderr, re.MULTILINE)
    assert "\r" not in done.stderr
    assert "%|" not in done.stderr
