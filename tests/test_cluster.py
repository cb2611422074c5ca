"""Builds as Slurm jobs: what is asked of Slurm here, and in the slow tier a real Slurm that runs them."""

import json
import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantkit.cli.cluster import job_of
from quantkit.cli.named import recipe_of
from quantkit.cluster.jobs import LOST, BuildJob, ReleaseJob, exit_code
from quantkit.cluster.resources import MEMORY_SLACK, Resources, minutes_of, ranks_of, resources
from quantkit.cluster.status import submitted_jobs
from quantkit.cluster.submit import JOBS, _beside, _refused
from quantkit.errors import RefusedError
from tests.commands import quantkit
from tests.interruption import until
from tests.slurm import WITH_USER_SIGNAL, missing, running_slurm
from tests.tiny import WORDS, make_tiny

REPO = "an-org/tiny-GPTQ"
Interruption = Callable[[dict[str, Any], dict[str, str]], None]
ATHENA = Resources(240, 0, 0, partition="plgrid-gpu-a100", account="plggrant-gpu-a100")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("4:00:00", 240), ("0:00:30", 1), ("1:30:01", 91), ("2-00", 2880), ("1-12:30", 2190)],
)
def test_time_limits_are_slurms(text, minutes):
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "0", "0:00:00", "4:00", "1:2:3:4", "-5", "4h"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(RefusedError) as caught:
        minutes_of(text)
    assert caught.value.where == "--time"


def test_a_build_asks_for_what_its_plan_needs():
    asked = resources(Resources(60, 0, 0, partition="cpu"), threads=4, rank_bytes=8 * 10**9)
    assert asked == Resources(60, 4, 10, partition="cpu")
    assert resources(Resources(60, 16, 64), threads=4, rank_bytes=8 * 10**9) == Resources(60, 16, 64)
    # a job judges what it has built, in one process
    assert resources(Resources(60, 0, 0, ranks=2), threads=4, rank_bytes=10**9, judging_bytes=8 * 10**9).memory_gb == 10


def test_ranks_share_what_a_build_asks_for():
    asked = resources(Resources(60, 0, 0, ranks=3), threads=4, rank_bytes=8 * 10**9)
    assert asked == Resources(60, 12, 30, ranks=3)
    assert resources(Resources(60, 5, 7, ranks=3), threads=4, rank_bytes=8 * 10**9) == Resources(60, 5, 7, ranks=3)
    on_athena = resources(replace(ATHENA, ranks=4), threads=2, rank_bytes=10**9)
    assert (on_athena.gpus, on_athena.cpus, on_athena.memory_gb) == (4, 64, 512)


@pytest.mark.parametrize(
    ("gpus", "asked", "divisible", "ranks"),
    [(0, 0, True, 1), (4, 0, True, 4), (4, 0, False, 1), (4, 2, True, 2), (4, 1, True, 1), (0, 2, True, 2)],
)
def test_a_build_has_a_process_for_each_gpu(gpus, asked, divisible, ranks):
    assert ranks_of(Resources(60, 0, 0, gpus, asked), divisible=divisible) == ranks


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(RefusedError) as caught:
        ranks_of(Resources(60, 0, 0, 2, 3), divisible=True)
    assert caught.value.where == "--ranks"


def test_a_gpu_of_athena_comes_with_16_cores_and_128_gb():
    given = resources(ATHENA, threads=2, rank_bytes=10**9)
    assert (given.gpus, given.cpus, given.memory_gb) == (1, 16, 128)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [({"account": "plggrant"}, "--account"), ({"account": None}, "--account"), ({"minutes": 2881}, "--time")],
)
def test_what_athena_would_refuse_is_refused_here(wrong, where):
    with pytest.raises(RefusedError) as caught:
        resources(replace(ATHENA, **wrong), threads=2, rank_bytes=10**9)
    assert caught.value.where == where


def test_a_refusal_of_sbatch_names_the_option_that_it_is_about():
    """As sbatch 22.05 writes it, and a line that is none of its own."""
    said = (
        "sbatch: error: invalid partition specified: gpu\nsbatch: error: Batch job submission failed: Invalid partition"
    )
    found = _refused(said + " name specified\n")
    assert found.what == "Slurm does not take it: invalid partition specified: gpu; Invalid partition name specified"
    assert found.where == "--partition"
    assert _refused("slurm_load: Socket timed out\n").where == "sbatch"


@pytest.mark.parametrize(
    ("codes", "worst"), [([0, 0], 0), ([0, 3], 3), ([3, 1], 1), ([None, 0], 1), ([4, 3, 1], 4), ([], 0)]
)
def test_one_exit_code_stands_for_all(codes, worst):
    assert exit_code([{"exit_code": code} for code in codes]) == worst


def test_an_ended_job_needs_no_queue(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    job = {"name": "a-GPTQ", "id": "7_1", "log": str(tmp_path / "7_1_0_log.out"), "recipe": "a/gptq", "resources": {}}
    (tmp_path / JOBS).write_text(json.dumps([job | {"id": "6"}, job]))
    (tmp_path / "7_1_ended.json").write_text(json.dumps({"exit_code": 3, "host": "node"}))
    begins = "submitit INFO - Starting with JobEnvironment(job_id=7_1)\n"
    old = f"{begins}slurmstepd-node: error: *** JOB 7 ON node CANCELLED DUE TO JOB REQUEUE ***\nerror: an older one\n"
    new = f"{begins}error: not good enough:\n  top-1 0.5\n  KLD 2\n  at:  out\n  fix: more bits\nsrun: error: code 3\n"
    Path(job["log"]).write_text(old + new)
    assert [(each["id"], each["state"], each["exit_code"], each["reason"]) for each in submitted_jobs(tmp_path)] == [
        ("7_1", "gate failed", 3, "not good enough: top-1 0.5 KLD 2")
    ]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> list[Path]:
    """Two recipes of a checkpoint of eight layers, the second with a gate that it cannot pass."""
    folder = tmp_path_factory.mktemp("recipes")
    model = make_tiny(folder / "model", "mistral", layers=8)
    text = folder / "text.txt"
    text.write_text(WORDS * 20, encoding="utf-8")
    gates = {"good": "perplexity_ratio = 100", "bad": "perplexity_ratio = 1.0\ntop1_agreement = 1.0"}
    for name, gate in gates.items():
        (folder / f"{name}.toml").write_text(
            f"""format = "gptq"
[model]
id = "{model}"
[quantize]
bits = 2
group_size = 32
[calibration]
window_tokens = 16
texts = {{ "{text}" = 4 }}
[compute]
threads = 1
[validation]
window_tokens = 32
generated_tokens = 2
texts = ["{text}"]
[validation.gates]
{gate}
""",
            encoding="utf-8",
        )
    return [folder / f"{name}.toml" for name in gates]


def test_a_dry_run_shows_what_would_be_asked(recipes, tmp_path):
    found = quantkit("submit", *map(str, recipes), "--time", "30", "--dry-run", "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    good, bad = json.loads(found.stdout)
    assert (good["name"], bad["name"]) == ("model-GOOD", "model-BAD")
    assert good["resources"]["minutes"] == 30
    assert good["resources"]["cpus"] == 1
    assert good["resources"]["memory_gb"] >= 1
    assert not (tmp_path / "artifacts").exists()


def test_ranks_are_planned_and_asked_for(recipes, tmp_path):
    """Each has its threads and its memory; an engine, which is one process, cannot be divided."""
    command = ("submit", str(recipes[0]), "--time", "30", "--dry-run", "--json", "--set", "compute.threads=2")
    found = quantkit(*command, "--ranks", "2", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    planned = json.loads(quantkit("plan", str(recipes[0]), "--device", "cpu", "--ranks", "2", "--json").stdout)
    asked = json.loads(found.stdout)[0]["resources"]
    assert (asked["ranks"], asked["cpus"], asked["gpus"]) == (2, 4, 0)
    assert asked["memory_gb"] == math.ceil(2 * planned["rank_bytes"] * MEMORY_SLACK / 1e9)
    refused = quantkit(*command, "--ranks", "2", "--set", "engine=gptqmodel", cwd=tmp_path)
    assert refused.returncode == 2
    assert "error: the engine gptqmodel is one process" in refused.stderr


def test_what_a_job_runs_is_what_a_user_would_type(recipes, tmp_path):
    asked = replace(ATHENA, gpus=4, ranks=0)
    name, changes = str(recipes[0]), ["compute.threads=3"]
    job, granted = job_of(name, *recipe_of(name, changes, None), tmp_path, changes, None, asked)
    assert (granted.gpus, granted.ranks, granted.cpus) == (4, 4, 64)
    assert job.options == ("--device", "cuda", "--ranks", "4", "--set", "compute.threads=3")
    job, _ = job_of(name, *recipe_of(name, [], None), tmp_path, [], None, replace(ATHENA, ranks=0))
    assert job.options == ("--device", "cuda")


def test_without_slurm_it_says_so(recipes, tmp_path):
    found = quantkit("submit", str(recipes[0]), cwd=tmp_path, PATH=str(tmp_path))
    assert found.returncode == 4
    assert "sbatch is not on the PATH" in found.stderr
    assert quantkit("jobs", cwd=tmp_path).returncode == 2


def test_a_recipe_named_twice_is_refused(recipes, tmp_path):
    found = quantkit("submit", str(recipes[0]), str(recipes[0]), "--dry-run", cwd=tmp_path)
    assert (found.returncode, "named twice" in found.stderr) == (2, True)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with running_slurm(tmp_path_factory.mktemp("slurm")) as config:
        yield {"SLURM_CONF": str(config)}


def files(folder: Path) -> dict[str, bytes]:
    """Everything of an artifact but its record and its card."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("quantkit.json", "README.md")
    }


def direct(recipe: Path, cwd: Path) -> dict[str, bytes]:
    """What the recipe gives without Slurm."""
    out = cwd / f"direct-{recipe.stem}"
    assert quantkit("build", str(recipe), "--device", "cpu", "--out", str(out), cwd=cwd).returncode in (0, 3)
    return files(out)


@pytest.mark.slow
def test_an_array_of_builds_and_the_report_behind_it(slurm, recipes, tmp_path):
    found = quantkit("submit", *map(str, recipes), "--time", "10", "--wait", "--json", cwd=tmp_path, **slurm)
    assert found.returncode == 3, found.stderr
    good, bad, report = json.loads(found.stdout)
    assert [job["state"] for job in (good, bad, report)] == ["done", "gate failed", "done"]
    assert good["id"].split("_")[0] == bad["id"].split("_")[0] != report["id"]
    for job, recipe in zip((good, bad), recipes, strict=True):
        assert "gate" in Path(job["log"]).read_text()
        assert files(tmp_path / "artifacts" / job["name"]) == direct(recipe, tmp_path)
    assert (tmp_path / "artifacts" / "report" / "report.html").is_file()
    listed = quantkit("jobs", cwd=tmp_path, **slurm)
    assert listed.returncode == 0
    assert ["done" in line for line in listed.stdout.splitlines()] == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--partition", "gpu"), "invalid partition specified: gpu"),
        (("--partition", "grant", "--account", "other"), "Invalid account"),
        (("--time", "2:00:00"), "Requested time limit is invalid"),
    ],
)
def test_what_slurm_does_not_take_is_one_error_with_its_reason(slurm, recipes, tmp_path, options, said):
    found = quantkit("submit", str(recipes[0]), *options, cwd=tmp_path, **slurm)
    assert found.returncode == 2
    error = found.stderr[found.stderr.index("error: ") :]
    assert error.startswith("error: Slurm does not take it: ")
    assert said in error
    assert options[-2] in error
    assert "sbatch: " not in found.stderr
    assert "Traceback" not in found.stderr


def slurms(*command: str, slurm: dict[str, str]) -> str:
    """A command of Slurm's own."""
    return subprocess.run(command, env=os.environ | slurm, check=True, capture_output=True, text=True).stdout


def jobs(cwd: Path, slurm: dict[str, str]) -> dict[str, dict[str, Any]]:
    found = quantkit("jobs", "--json", cwd=cwd, **slurm)
    assert found.returncode == 0, found.stderr
    return {job["name"]: job for job in json.loads(found.stdout)}


def requeue(job: dict[str, Any], slurm: dict[str, str]) -> None:
    slurms("scontrol", "requeue", job["id"], slurm=slurm)


def preempt(job: dict[str, Any], slurm: dict[str, str]) -> None:
    """What Slurm sends before a preemption where it is set up so."""
    slurms("scancel", "--signal=USR2", job["id"], slurm=slurm)


def take_too_long(job: dict[str, Any], slurm: dict[str, str]) -> None:
    """Nothing is done until Slurm itself announces the time limit."""
    for build in builds_of(job):
        build.suspend()


def builds_of(job: dict[str, Any]) -> list[psutil.Process]:
    """All processes of a job's build; another Slurm on this machine may have one of the same name."""

    def is_its(part: str) -> bool:
        return Path(part).name == job["name"] and Path(part).parent in Path(job["log"]).parents

    found = [(each, each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    return [each for each, command in found if "build" in command and any(map(is_its, command))]


def interrupt_in_its_layers(
    job: dict[str, Any], folder: Path, interruption: Interruption, slurm: dict[str, str]
) -> None:
    """Let a job finish a layer, interrupt it, and spare it the two minutes before Slurm begins it again."""
    journal = folder / f"{job['name']}.work" / "journal.json"
    until(lambda: journal.is_file() and "layers.0" in journal.read_text(), job["log"])
    interruption(job, slurm)
    until(lambda: "BeginTime" in slurms("squeue", "-h", "-r", "-j", job["id"], "-o", "%r", slurm=slurm), job["log"])
    # what its first run still has to report would end a second one that has begun by then
    slurms("scontrol", "update", f"JobId={job['id']}", "StartTime=now+10", slurm=slurm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interruption", "minutes", "ranks"),
    [(requeue, "30", "1"), (preempt, "30", "1"), (take_too_long, "2", "1"), (requeue, "30", "2"), (preempt, "30", "2")],
    ids=["kill", "warn", "limit", "kill two", "warn two"],
)
def test_an_interrupted_job_goes_on_and_ends_in_the_same_bytes(slurm, recipes, tmp_path, interruption, minutes, ranks):
    interrupted_to_the_same_bytes(recipes[0], tmp_path, slurm, interruption, "--time", minutes, "--ranks", ranks)


def displace(job: dict[str, Any], slurm: dict[str, str]) -> None:
    """A job of a higher partition takes the whole node."""
    wanted = ("-p", "urgent", "-c", "2", "-o", "/dev/null", "--wrap", "sleep 1")
    urgent = slurms("sbatch", "--parsable", *wanted, slurm=slurm).strip()
    until(lambda: "JobState=COMPLETED" in slurms("scontrol", "show", "job", urgent, slurm=slurm), job["log"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partition", "ranks", "config", "said"),
    [
        ("grace", "1", "", "Caught signal SIGTERM"),
        ("cancel", "2", "", "Caught signal SIGTERM"),
        ("grace", "2", WITH_USER_SIGNAL, "Caught signal SIGUSR2"),
        ("cpu", "1", WITH_USER_SIGNAL, "DUE TO PREEMPTION"),
    ],
)
def test_a_preempted_job_goes_on_and_ends_in_the_same_bytes(recipes, tmp_path, partition, ranks, config, said):
    """With time of grace or none, and whatever signal Slurm is set up to send; no finished layer is solved again."""
    if reason := missing():
        pytest.skip(reason)
    kept: list[str] = []

    def preempted(job: dict[str, Any], slurm: dict[str, str]) -> None:
        take_too_long(job, slurm)
        journal = tmp_path / "artifacts" / f"{job['name']}.work" / "journal.json"
        kept.extend(item for item in json.loads(journal.read_text())["items"] if item.startswith("layers."))
        displace(job, slurm)

    (tmp_path / "slurm").mkdir()
    with running_slurm(tmp_path / "slurm", config) as running:
        options = ("--time", "30", "--ranks", ranks, "--partition", partition)
        log = interrupted_to_the_same_bytes(recipes[0], tmp_path, {"SLURM_CONF": str(running)}, preempted, *options)
    assert said in log
    assert 0 < len(kept) < 8
    assert {log.count(f"{layer}.self_attn.q_proj  loss") for layer in kept} == {1}
    assert {log.count(f"layers.{index}.self_attn.q_proj  loss") for index in range(8)} <= {1, 2}


def interrupted_to_the_same_bytes(
    recipe: Path, cwd: Path, slurm: dict[str, str], interruption: Interruption, *options: str
) -> str:
    """Submit a build, interrupt it in its layers, and see it go on from these to its end; returns its log."""
    submitted = quantkit("submit", str(recipe), *options, "--json", cwd=cwd, **slurm)
    assert submitted.returncode == 0, submitted.stderr
    job = json.loads(submitted.stdout)[0]
    ranks = job["resources"]["ranks"]
    interrupted: list[psutil.Process] = []

    def interrupt(job: dict[str, Any], slurm: dict[str, str]) -> None:
        interrupted.extend(builds_of(job))
        interruption(job, slurm)

    interrupt_in_its_layers(job, cwd / "artifacts", interrupt, slurm)
    # the ranks and who has started them; none is at work on what the next run goes on with
    assert len(interrupted) == (1 if ranks == 1 else 1 + ranks)
    assert psutil.wait_procs(interrupted, timeout=10)[1] == []
    until(lambda: jobs(cwd, slurm)[job["name"]]["state"] in ("done", "failed", LOST), job["log"])
    log = Path(job["log"]).read_text()
    assert jobs(cwd, slurm)[job["name"]]["state"] == "done", log
    assert log.count("quantkit build") == 2
    assert "Traceback" not in log
    artifact = cwd / "artifacts" / "model-GOOD"
    assert json.loads((artifact / "quantkit.json").read_text())["environment"]["ranks"] == ranks
    assert files(artifact) == direct(recipe, cwd)
    return log


@pytest.mark.slow
def test_what_follows_waits_for_a_requeued_build_and_takes_what_passed(slurm, hub, recipes, tmp_path):
    """One build is killed and begins again, one fails: report and publication have the first alone, after its end."""
    broken = recipes[0].with_name("broken.toml")
    broken.write_text(recipes[0].read_text())
    # what is in the way of an artifact is seen where it is built
    occupied = tmp_path / "artifacts" / "model-BROKEN"
    occupied.mkdir(parents=True)
    (occupied / "notes.txt").write_text("mine")
    around = slurm | hub.variables()
    named = [str(recipes[0]), str(broken)]
    options = ["--set", f"release.repo={REPO}", "--time", "10", "--publish", "--json"]
    submitted = quantkit("submit", *named, *options, cwd=tmp_path, **around)
    assert submitted.returncode == 0, submitted.stderr
    good, bad, report = json.loads(submitted.stdout)
    interrupt_in_its_layers(good, tmp_path / "artifacts", requeue, slurm)
    until(lambda: jobs(tmp_path, slurm)["report"]["exit_code"] is not None, report["log"])
    log = Path(report["log"]).read_text()
    found = jobs(tmp_path, slurm)
    assert [found[job["name"]]["state"] for job in (good, bad, report)] == ["done", "failed", "done"], log
    assert "Traceback" not in log + Path(bad["log"]).read_text()
    assert "exists and is no artifact of quantkit" in found[bad["name"]]["reason"]
    assert f"{bad['name']} is left out: its build made no artifact" in log
    drawn = (tmp_path / "artifacts" / "report" / "report.html").read_text()
    assert (good["name"] in drawn, bad["name"] in drawn) == (True, False)
    assert list(hub.repos) == [REPO]
    artifact = tmp_path / "artifacts" / good["name"]
    there = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    assert {name: there[name][0] for name in files(artifact)} == files(artifact)


@pytest.mark.slow
def test_slurm_is_asked_for_what_the_plan_says(slurm, recipes, tmp_path):
    planned = json.loads(quantkit("plan", str(recipes[0]), "--device", "cpu", "--json", cwd=tmp_path).stdout)
    submitted = quantkit("submit", str(recipes[0]), "--time", "0:30:00", "--json", cwd=tmp_path, **slurm)
    build, report = json.loads(submitted.stdout)
    for job in (build, report):
        shown = slurms("scontrol", "show", "job", job["id"], slurm=slurm)
        assert "TimeLimit=00:30:00" in shown
        assert "CPUs/Task=1 " in shown
        assert f"MinMemoryNode={math.ceil(planned['memory_bytes'] * MEMORY_SLACK / 1e9)}G" in shown
        slurms("scancel", job["id"], slurm=slurm)


@pytest.mark.slow
def test_a_cancelled_job_is_lost(slurm, recipes, tmp_path):
    submitted = quantkit("submit", str(recipes[0]), "--time", "30", "--json", cwd=tmp_path, **slurm)
    build, report = json.loads(submitted.stdout)
    until(lambda: "quantkit build" in Path(build["log"]).read_text() if Path(build["log"]).is_file() else False)
    for job in (report, build):
        slurms("scancel", job["id"], slurm=slurm)
    until(lambda: all(job["state"] == LOST for job in jobs(tmp_path, slurm).values()), build["log"])
    until(lambda: "CANCELLED" in (jobs(tmp_path, slurm)[build["name"]]["reason"] or ""), build["log"])
    assert builds_of(build) == []


def test_what_follows_takes_no_gpu():
    given = [resources(replace(ATHENA, memory_gb=size), threads=2, rank_bytes=10**9) for size in (200, 128)]
    assert _beside(given) == replace(given[1], gpus=0)


@pytest.mark.parametrize(("partition", "suffix", "holds"), [("a100", "a100", 40), ("gh200", "gh200", 96)])
def test_a_build_too_large_for_the_gpus_is_refused_before_it_queues(partition, suffix, holds):
    asked = replace(ATHENA, partition=f"plgrid-gpu-{partition}", account=f"grant-gpu-{suffix}")
    assert resources(asked, threads=2, rank_bytes=holds * 10**9).gpus == 1
    # activations can wait in the host's memory
    assert resources(asked, threads=2, rank_bytes=(holds + 5) * 10**9, waiting_bytes=5 * 10**9).gpus == 1
    with pytest.raises(RefusedError, match=f"have {holds}") as caught:
        resources(asked, threads=2, rank_bytes=holds * 10**9 + 10**8)
    with pytest.raises(RefusedError, match=f"have {holds}"):
        resources(asked, threads=2, rank_bytes=10**9, judging_bytes=holds * 10**9 + 10**8)
    assert caught.value.where == "--partition"


def test_an_artifact_of_an_earlier_build_is_neither_reported_nor_published(tmp_path, capsys):
    """What was rebuilt and failed has left its record of before; one that a gate stopped has variants that may pass."""
    folders = [tmp_path / name for name in ("passed", "gated", "failed", "lost")]
    for number, (folder, code) in enumerate(zip(folders, (0, 3, 1, None), strict=True)):
        folder.mkdir()
        (folder / "quantkit.json").write_text("{}")
        if code is not None:
            (tmp_path / f"9_{number}_ended.json").write_text(json.dumps({"exit_code": code, "host": "node"}))
    builds = tuple((folder.name, f"9_{number}") for number, folder in enumerate(folders))
    passed, gated, *_ = map(str, folders)
    report = tmp_path / "report"
    assert ReleaseJob(tuple(folders), report, True, builds).commands(tmp_path) == [
        ("report", passed, gated, "--out", str(report)),
        ("publish", passed),
        ("publish", gated),
    ]
    assert capsys.readouterr().out.splitlines() == [
        f"{name} is left out: its build made no artifact" for name in ("failed", "lost")
    ]


def test_jobs_are_pickled_by_name():
    """A node loads the package that is installed there; it is not sent along."""
    import pickle

    job = BuildJob("bielik-nano/gptq", Path("/out/bielik-nano-GPTQ"), ("--device", "cpu"))
    assert pickle.loads(pickle.dumps(job)) == job
    assert len(pickle.dumps(job)) < 500
