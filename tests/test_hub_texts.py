"""Text sets of the Hub, from a hub on this machine that holds files of the same shape as the real ones.

The sentences are our own; field names and their meaning are those of the data set's card.
"""

import gzip
import json
from pathlib import Path

import pytest

from quantkit.texts import HUB_TEXTS
from tests.commands import forked, quantkit
from tests.hub_server import HubServer, Repo

DATASET = "datasets/ipipan/nkjp1m"
READ = (
    "import json, sys\nfrom quantkit.texts import load_text_set\n"
    "found = load_text_set(*sys.argv[1:])\n"
    "print(json.dumps([found.name, found.revision, [document.text for document in found.documents]]))"
)


def sentence(text_id: str, paragraph: int, *words: str) -> dict:
    """A line of the set: a word that begins with ~ has no space before it in the source."""
    return {
        "nkjp_text": text_id,
        "nkjp_par": f"morph_{paragraph}-p",
        "nkjp_sent": f"morph_{paragraph}.9-s",
        "tokens": [word.removeprefix("~") for word in words],
        "lemmas": [word.removeprefix("~").lower() for word in words],
        "tags": ["interp"] * len(words),
        "nps": [word.startswith("~") for word in words],
        "nkjp_ids": [f"morph_{paragraph}.{number}-seg" for number in range(len(words))],
    }


def packed(*sentences: dict) -> tuple[bytes, bool]:
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in sentences)
    return gzip.compress(lines.encode(), mtime=0), True


TEST = packed(
    sentence("NKJP_1M_1", 1, "-", "Dokąd", "płynie", "Wisła", "~?"),
    sentence("NKJP_1M_1", 1, "Do", "morza", "~,", "a", '"', "~Warta", '~"', "do", "Odry", "~."),
    sentence("NKJP_1M_1", 2, "Robił", "~by", "~m", "to", "samo", "~..."),
    sentence("NKJP_1M_2", 1, "Jeż", "śpi", "~."),
)
DEV = packed(sentence("NKJP_1M_2", 3, "Zażółć", "gęślą", "jaźń", "~."), sentence("NKJP_1M_3", 1, "Koniec", "~."))
TRAIN = packed(
    *(sentence(f"NKJP_1M_{1000 + n}", 1, "Jeż", "numer", str(n), "śpi", "pod", "figą", "~.") for n in range(40))
)
FILES = {"nkjp1m_train.jsonl.gz": TRAIN, "nkjp1m_dev.jsonl.gz": DEV, "nkjp1m_test.jsonl.gz": TEST}


def held(hub: HubServer, **changes: tuple[bytes, bool] | None) -> str:
    """Let the hub hold the set, with files changed or taken away; its commit."""
    files = {name: changes.get(name.partition(".")[0], stored) for name, stored in FILES.items()}
    hub.repos[DATASET] = Repo(private=False)
    return hub.repos[DATASET].commit("main", {name: stored for name, stored in files.items() if stored is not None})


def test_sentences_become_documents_as_they_were_written(hub):
    commit = held(hub)
    done = forked(READ, f"nkjp1m@{commit}", "validation", **hub.variables())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        f"nkjp1m@{commit}",
        commit,
        [
            '- Dokąd płynie Wisła? Do morza, a "Warta" do Odry.\nRobiłbym to samo...',
            "Jeż śpi.",
            "Zażółć gęślą jaźń.",
            "Koniec.",
        ],
    ]


@pytest.mark.parametrize(("most", "read"), [(1, ["nkjp1m_test"]), (3, ["nkjp1m_test", "nkjp1m_dev"])])
def test_of_a_large_set_no_more_is_taken_than_any_recipe_uses(hub, most, read):
    commit = held(hub)
    limited = READ.replace("found =", f"import quantkit.texts\nquantkit.texts.MOST_DOCUMENTS = {most}\nfound =")
    done = forked(limited, f"nkjp1m@{commit}", "validation", **hub.variables())
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)[2]) == most
    assert sorted(hub.served) == sorted(f"{name}.jsonl.gz" for name in read)


def test_calibration_reads_other_files_than_validation(hub):
    commit = held(hub)
    done = forked(READ, f"nkjp1m@{commit}", "calibration", **hub.variables())
    documents = json.loads(done.stdout)[2]
    assert len(documents) == 40
    assert documents[0] == "Jeż numer 0 śpi pod figą."
    read = [request.rpartition("/")[2] for request in hub.sent("GET .*resolve")]
    assert read == ["nkjp1m_train.jsonl.gz"]
    files = HUB_TEXTS["nkjp1m"].files
    assert not set(files["calibration"]) & set(files["validation"])


def test_without_a_commit_the_one_it_was_written_for_is_asked_for(hub):
    held(hub)
    done = forked(READ, "nkjp1m", "validation", **hub.variables())
    assert done.returncode != 0
    assert hub.sent(f"/revision/{HUB_TEXTS['nkjp1m'].revision}$")


@pytest.fixture
def recipe(own_recipe) -> Path:
    path = own_recipe.with_name("from-the-hub.toml")
    path.write_text(
        """extends = "own.toml"
format = "gptq"
[calibration]
texts = { "nkjp1m@COMMIT" = 8 }
[validation]
texts = { "polish-core" = 2, "nkjp1m@COMMIT" = 3 }
""",
        encoding="utf-8",
    )
    return path


def at(recipe: Path, commit: str) -> str:
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("COMMIT", commit), encoding="utf-8")
    return str(recipe)


def test_a_build_records_the_commit_it_read(hub, recipe, tmp_path):
    commit = held(hub)
    done = quantkit("build", at(recipe, commit), "--out", str(tmp_path / "a"), "--device", "cpu", **hub.variables())
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "a" / "quantkit.json").read_text())
    (calibrated,) = record["calibration"]["texts"]
    assert (calibrated["name"], calibrated["revision"], calibrated["windows"]) == (f"nkjp1m@{commit}", commit, 8)
    own, fetched = record["validation"]["text"]["parts"]
    assert (own["name"], own["revision"], own["windows"], own["sampled"]) == ("polish-core", None, 2, True)
    assert (fetched["name"], fetched["revision"], fetched["windows"]) == (f"nkjp1m@{commit}", commit, 3)
    assert fetched["sampled"]
    assert record["validation"]["text"]["name"] == f"polish-core+nkjp1m@{commit}"
    assert [text["name"] for text in record["validation_texts"]] == ["polish-core", f"nkjp1m@{commit}"]


NOT_TOKENIZED = {"nkjp_text": "NKJP_1M_9", "tokens": ["Jeż", "."], "nps": [False]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"nkjp1m_dev": None},
            "error: ipipan/nkjp1m has no file nkjp1m_dev.jsonl.gz at revision {commit}, only nkjp1m_test.jsonl.gz, "
            "nkjp1m_train.jsonl.gz\n"
            "  at:  validation.texts\n"
            "  fix: name a commit that has it, SET@COMMIT, or another text set\n",
        ),
        (
            {"nkjp1m_test": packed()},
            "error: there is no text in it\n  at:  {home}/nkjp1m_test.jsonl.gz\n"
            "  fix: give a file with at least one document\n",
        ),
        (
            {"nkjp1m_test": packed(NOT_TOKENIZED)},
            "error: the line is not a tokenized sentence\n  at:  {home}/nkjp1m_test.jsonl.gz:1\n"
            '  fix: it must have "tokens": [...] and "nps": [...] of the same length, true where no space precedes\n',
        ),
    ],
)
def test_a_set_of_another_shape_is_an_error_and_never_an_empty_text(hub, recipe, changes, expected, tmp_path):
    commit = held(hub, **changes)
    done = quantkit("plan", at(recipe, commit), "--device", "cpu", "--out", str(tmp_path / "a"), **hub.variables())
    assert done.returncode == 2, done.stderr
    home = tmp_path / "hf" / "hub" / "datasets--ipipan--nkjp1m" / "snapshots" / commit
    assert done.stderr.endswith(expected.format(commit=commit, home=home)), done.stderr


def test_a_commit_that_is_not_there(hub, recipe, tmp_path):
    held(hub)
    done = quantkit("plan", at(recipe, "0" * 40), "--device", "cpu", "--out", str(tmp_path / "a"), **hub.variables())
    assert done.returncode == 2, done.stderr
    assert f"error: the Hub has no text set ipipan/nkjp1m at revision {'0' * 40}: " in done.stderr
    assert "  at:  validation.texts\n  fix: mend the commit behind @, or leave it out" in done.stderr
