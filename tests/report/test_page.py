"""The report: its data, that the page stands alone, and the page in a real browser."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer

from quantkit.cli.artifacts import report
from quantkit.errors import RefusedError, RunFailedError, UnavailableError
from quantkit.lock import lock_file
from quantkit.report.card import keep
from quantkit.report.page import page, report_of, write_report
from quantkit.workdir import work_folder
from tests.commands import quantkit
from tests.conftest import KEPT
from tests.report.records import HASH, record_of, result, variant

AXE = "4.14.1"
FLAGS = [
    f"--{flag}"
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
]
EVIL = '</script><img src=x onerror="alert(1)">'
LOADING = {"src", "srcset", "poster", "action", "formaction", "background", "xlink:href"}


def put(folder: Path, name: str, record: dict) -> Path:
    (folder / name).mkdir()
    keep(folder / name, record)
    return folder / name


@pytest.fixture
def artifacts(tmp_path) -> list[Path]:
    """Of every kind: one variant, several of which one failed, two runtimes, not validated, no calibration."""
    blind = record_of("hqq", variant("hqq", 3.7, 1.03), calibration=None)
    for item in blind["build"]["items"].values():
        for linear in item["linears"]:
            linear["loss"] = None
    seen_twice = variant("gptq", 4.25, 1.01)
    seen_twice["results"].append(result(1.011, runtime="gptqmodel", answer=None, package="gptqmodel", version="7.6.0"))
    seen_twice["results"][0]["answer"] = {"text": f"Zażółć {EVIL}", "num_tokens": 3, "finite": True, "repeats": False}
    several = (
        variant("Q2_K", 2.6, 1.2, ("reference: perplexity_ratio 1.2000 > 1.05",)),
        variant("Q4_K_M", 4.8, 1.012),
        variant("Q8_0", 8.5, 1.0),
    )
    records = {
        "Żuraw-7B-GPTQ": record_of("gptq", seen_twice),
        "Żuraw-7B-GGUF": record_of("gguf", *several),
        "Żuraw-7B-HQQ-3BIT": blind,
        "Żuraw-7B-MLX": record_of("mlx", validation=None),
    }
    return [put(tmp_path, name, record) for name, record in records.items()]


class Links(HTMLParser):
    """Every address that a page would load or go to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, key, value or "") for key, value in attrs if key in LOADING | {"href"}]
        assert not [key for key, _ in attrs if key.startswith("on")], f"{tag} has a handler in its markup"

    def handle_data(self, data):
        self.text.append(data)


def test_a_folder_without_a_record_is_left_out_and_told_of(artifacts, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="of the extra `report`")
    junk = tmp_path / "junk"
    junk.mkdir()
    # of `artifacts/*`: what a build that was stopped has beside its artifact
    beside = [lock_file(artifacts[0]), work_folder(artifacts[1])]
    beside[0].touch()
    report([artifacts[0], *beside, artifacts[1]], tmp_path / "whole")
    assert capsys.readouterr().err.count("error") == 0
    beside[0].unlink()
    with pytest.raises(typer.Exit) as left:
        report([artifacts[0], junk, artifacts[1]], tmp_path / "report")
    assert left.value.exit_code == 2
    assert f"error: {junk}: the folder has no record" in capsys.readouterr().err
    found = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert [each["name"] for each in found["artifacts"]] == [folder.name for folder in artifacts[:2]]


@pytest.mark.parametrize("below", [".", "report"])
def test_no_report_is_written_into_an_artifact(below, artifacts):
    before = sorted(artifacts[0].iterdir())
    with pytest.raises(RefusedError) as caught:
        write_report(artifacts, artifacts[0] / below)
    assert str(caught.value) == (
        "a report would be written into an artifact\n"
        f"  at:  {artifacts[0]}\n"
        "  fix: choose a folder outside of it with --out"
    )
    assert sorted(artifacts[0].iterdir()) == before


def test_a_report_in_place_of_a_file_is_one_error(artifacts, tmp_path):
    pytest.importorskip("matplotlib", reason="of the extra `report`")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunFailedError, match="cannot be written there: File exists") as caught:
        write_report(artifacts, tmp_path / "file")
    assert caught.value.where == str(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_the_data_holds_every_variant_and_runtime(artifacts):
    report = report_of(artifacts)
    assert [(point["label"], point["runtime"], point["status"]) for point in report["points"]] == [
        ("GPTQ", "reference", "ok"),
        ("GPTQ", "gptqmodel", "ok"),
        ("GGUF Q2_K", "reference", "ok"),
        ("GGUF Q4_K_M", "reference", "ok"),
        ("GGUF Q8_0", "reference", "ok"),
        ("HQQ-3BIT", "reference", "ok"),
        ("MLX", "reference", "not run"),
    ]
    assert [point["short"] for point in report["points"]][2:4] == ["Q2_K", "Q4_K_M"]
    assert report["texts"] == [record_of("gptq")["validation"]["text"]]
    losses = report["artifacts"][0]["losses"]
    assert losses[0] == {"layer": 0, "linear": "self_attn.q_proj", "loss": 1e-3}
    assert report["artifacts"][2]["losses"] == []
    assert report["artifacts"][0]["record"]["source"]["sha256"] == {"model.safetensors": HASH}


def test_numbers_that_json_cannot_hold_are_null(tmp_path):
    broken = variant("gptq", 4.0, float("nan"), ("reference: not finite",))
    report = report_of([put(tmp_path, "a", record_of("gptq", broken))])
    assert report["points"][0]["ratio"] is None
    json.dumps(report, allow_nan=False)
    assert "did not pass" in page(report)


def test_the_page_stands_alone(artifacts):
    text = page(report_of(artifacts))
    links = Links(text)
    assert [value for tag, _, value in links.found if not value.startswith(("#", "data:"))] == []
    assert not [link for link in links.found if link[1] in LOADING]
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    downloads = [value for tag, _, value in links.found if value.startswith("data:application/json")]
    documents = [json.loads(base64.b64decode(value.partition(",")[2])) for value in downloads]
    assert [one.get("format") for one in documents[1:]] == ["gptq", "gguf", "hqq", "mlx"]
    assert documents[0]["model"]["id"] == "an-org/Żuraw-7B"


def test_what_a_model_says_is_text_and_never_markup(artifacts):
    text = page(report_of(artifacts))
    assert EVIL not in text
    assert f"Zażółć {EVIL}" in "".join(Links(text).text)


def test_what_cannot_be_compared_is_refused_or_said(artifacts, tmp_path):
    other = record_of("gptq")
    other["source"] = other["source"] | {"id": "an-org/Czapla-7B"}
    with pytest.raises(RefusedError, match="several models: an-org/Czapla-7B, an-org/Żuraw-7B"):
        report_of([*artifacts, put(tmp_path, "other", other)])
    other["source"] = record_of("gptq")["source"] | {"sha256": {"model.safetensors": "f" * 64}}
    with pytest.raises(RefusedError, match="different weights that are all called an-org/Żuraw-7B"):
        report_of([*artifacts, put(tmp_path, "changed", other)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedError, match="has no record"):
        report_of([tmp_path / "empty"])
    with pytest.raises(RefusedError, match="two artifacts are called Żuraw-7B-GPTQ"):
        report_of([artifacts[0], artifacts[0]])
    elsewhere = record_of("awq")
    elsewhere["validation"]["text"] = elsewhere["validation"]["text"] | {"name": "nkjp1m", "sha256": "e" * 64}
    text = page(report_of([*artifacts, put(tmp_path, "elsewhere", elsewhere)]))
    assert "Not all artifacts were judged on the same text" in text
    assert "Not all artifacts" not in page(report_of(artifacts))


def test_without_matplotlib_nothing_is_written(artifacts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnavailableError, match="matplotlib is not installed"):
        write_report(artifacts, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_command_writes_page_data_and_pictures(artifacts, tmp_path):
    pytest.importorskip("matplotlib", reason="of the extra `report`")
    out = tmp_path / "deep" / "report"
    done = quantkit("report", *map(str, artifacts), "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in out.iterdir())
    assert names == ["report.html", "report.json", "size-kld.png", "size-perplexity.png"]
    assert json.loads(done.stdout) == json.loads((out / "report.json").read_text("utf-8"))


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api", reason="of the development environment")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    # it starts its driver and talks to it by sockets of its own
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def opened(browser, artifacts, tmp_path) -> Iterator:
    """A function that opens the page: colour scheme and width; whatever it complains of or asks for fails the test."""
    path = tmp_path / "report.html"
    path.write_text(page(report_of(artifacts)), encoding="utf-8")
    complaints: list[str] = []
    contexts = []

    def open_page(scheme: str = "light", width: int = 1240, **options):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 850}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else complaints.append(request.url),
        )
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def column(tab, number: int) -> list[str]:
    """What stands in a column of the table, from above."""
    return tab.eval_on_selector_all(
        "#table tbody tr", f"rows => rows.map(row => row.cells[{number}]?.innerText.trim() ?? '')"
    )


@pytest.mark.slow
def test_the_table_sorts_by_click_and_by_keyboard(opened):
    tab = opened()
    head = tab.locator("#table thead th").nth(3)
    assert head.get_attribute("aria-sort") == "none"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    bits = column(tab, 3)
    assert bits == [*sorted(bits[:-1], key=float), "–"], "what has no value stays below"
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column(tab, 3)[0] == "16"
    assert column(tab, 3)[-1] == "–"
    top1 = tab.locator("#table thead th", has_text="top-1")
    top1.locator("button").press("Space")
    assert top1.get_attribute("aria-sort") == "descending"
    assert head.get_attribute("aria-sort") == "none"
    assert tab.locator("#said").inner_text() == "Sorted by top-1, descending."


@pytest.mark.slow
def test_marks_tell_their_figures_by_pointer_and_by_keyboard(opened):
    tab = opened()
    tip = tab.locator("#tip")
    assert not tip.is_visible()
    dots = tab.locator("figure").first.locator(".plot.wide .dot")
    dots.nth(1).hover()
    assert tip.inner_text().splitlines()[0] == "HQQ-3BIT"
    assert tab.locator("#table tr.lit").count() == 1
    tab.mouse.move(2, 2)
    assert not tip.is_visible()
    dots.first.focus()
    assert tip.inner_text().splitlines()[0] == "GGUF Q2_K"
    assert "did not pass: reference: perplexity_ratio" in tip.inner_text()
    tab.keyboard.press("ArrowRight")
    assert tip.inner_text().splitlines()[0] == "HQQ-3BIT"
    tab.keyboard.press("End")
    assert tip.inner_text().splitlines()[0] == "GGUF Q8_0"
    tab.keyboard.press("Escape")
    assert not tip.is_visible()
    assert tab.locator("figure").first.locator('.plot.wide .dot[tabindex="0"]').count() == 1


@pytest.mark.slow
def test_cells_tell_their_figures_by_keyboard(opened):
    tab = opened()
    tip = tab.locator("#tip")
    cells = tab.locator(".heat").first.locator("i")
    assert tab.locator(".heat").first.locator('i[tabindex="0"]').count() == 1
    cells.first.focus()
    assert tip.inner_text().splitlines() == ["layer 0, self_attn.q_proj", "1.00e-03"]
    assert cells.first.get_attribute("aria-label") == "layer 0, self_attn.q_proj: 1.00e-03"
    tab.keyboard.press("ArrowRight")
    assert tip.inner_text().splitlines() == ["layer 1, self_attn.q_proj", "2.00e-03"]
    tab.keyboard.press("ArrowDown")
    assert tip.inner_text().splitlines()[0] == "layer 1, self_attn.k_proj"
    tab.keyboard.press("End")
    assert tip.inner_text().splitlines()[0] == "layer 2, self_attn.o_proj"
    tab.keyboard.press("Tab")
    assert not tip.is_visible()
    assert tab.locator(".heat").first.locator('i[tabindex="0"]').count() == 1


@pytest.mark.slow
def test_marks_and_cells_tell_their_figures_by_touch(opened):
    """What a finger touched stays to be read until it touches something else."""
    tab = opened(width=375, has_touch=True, is_mobile=True)
    tip = tab.locator("#tip")
    dot = tab.locator("figure").first.locator(".plot.narrow .dot").nth(1)
    dot.locator(".reach").tap(force=True)
    assert tip.inner_text().splitlines()[0] == "HQQ-3BIT"
    tab.locator("h2").first.tap()
    assert not tip.is_visible()
    cell = tab.locator(".heat").first.locator("i").nth(4)
    cell.tap()
    assert tip.inner_text().splitlines()[0] == "layer 1, self_attn.k_proj"
    box = tip.bounding_box()
    assert 0 <= box["x"] <= box["x"] + box["width"] <= 375


@pytest.mark.slow
def test_a_record_is_downloaded_as_it_is(opened, artifacts):
    tab = opened(accept_downloads=True)
    with tab.expect_download() as waiting:
        tab.get_by_text("Download the record of GPTQ").click()
    assert waiting.value.suggested_filename == "Żuraw-7B-GPTQ.quantkit.json"
    assert Path(waiting.value.path()).read_bytes() == (artifacts[0] / "quantkit.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 375, 768, 1240])
def test_nothing_sticks_out(opened, width):
    tab = opened(width=width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    small = tab.eval_on_selector_all(
        "button, summary, .button",
        "found => found.filter(one => one.checkVisibility()).map(one => one.getBoundingClientRect())"
        ".filter(box => box.height < 24).length",
    )
    assert small == 0, "targets are large enough for a finger"
    size = tab.evaluate(
        "(() => { const plot = [...document.querySelectorAll('.plot')].find(one => one.checkVisibility());"
        "return 12 * plot.getBoundingClientRect().width / plot.viewBox.baseVal.width; })()"
    )
    assert size >= 9, "labels of plots can be read"


@pytest.mark.slow
def test_without_scripts_everything_is_there(opened):
    tab = opened(java_script_enabled=False)
    assert tab.locator("#table tbody tr").count() == 8
    assert tab.locator(".plot.wide .dot").count() == 9
    assert tab.locator("h1").inner_text() == "an-org/Żuraw-7B"


@pytest.fixture(scope="module")
def axe() -> Path:
    """axe-core, fetched once."""
    path = KEPT / f"axe-core-{AXE}" / "package" / "axe.min.js"
    if not path.exists():
        if shutil.which("npm") is None:
            pytest.skip("axe-core comes by npm, which is not installed")
        folder = path.parent.parent
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(["npm", "pack", f"axe-core@{AXE}"], cwd=folder, capture_output=True, text=True)
        if packed.returncode:
            pytest.skip(f"axe-core cannot be fetched: {packed.stderr.strip().splitlines()[-1]}")
        shutil.unpack_archive(folder / f"axe-core-{AXE}.tgz", folder)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1240), ("dark", 1240), ("light", 375), ("dark", 375)])
def test_axe_finds_nothing(opened, axe, scheme, width):
    tab = opened(scheme, width)
    tab.eval_on_selector_all("details", "found => found.forEach(one => { one.open = true; })")
    tab.evaluate(axe.read_text("utf-8"))
    found = tab.evaluate("axe.run()")
    told = [f"{rule['id']}: {node['html'][:120]}" for rule in found["violations"] for node in rule["nodes"]]
    assert told == []
    assert len(found["passes"]) > 20
