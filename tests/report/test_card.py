"""Whole cards, held against what was read and found good; `python -m tests.report.test_card` writes them anew."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from quantkit.formats import READERS
from quantkit.report.card import card
from quantkit.report.schema import Record
from quantkit.units import size_text
from tests.report.records import record_of, variant

CARDS = Path(__file__).parent / "cards"
HINT = "read the difference; if it is meant: python -m tests.report.test_card"


@pytest.mark.parametrize("name", sorted(READERS))
def test_the_whole_card(name):
    assert card(record_of(name)) == (CARDS / f"{name}.md").read_text("utf-8"), HINT


@pytest.mark.parametrize("name", sorted(READERS))
def test_the_golden_record_is_a_record(name):
    Record.model_validate(record_of(name) | {"seal": "0" * 64})


def test_every_card_has_the_same_sections():
    sections = {
        tuple(line for line in card(record_of(name)).splitlines() if line.startswith("## ")) for name in READERS
    }
    assert len(sections) == 1


def test_the_front_matter_is_the_formats_own_and_the_sources_licence():
    for name, reading in READERS.items():
        data = ModelCard(card(record_of(name))).data
        assert (data.license, data.base_model) == ("cc-by-nc-4.0", "an-org/Żuraw-7B")
        assert data.tags == [*reading.tags, "quantized"]
        assert not set(data.tags) & (READERS.keys() - {name})
        assert data["base_model_relation"] == "quantized"
        assert data["quantized_by"] == "an-org"


def test_a_failed_variant_is_in_the_table_and_not_announced():
    record = record_of("gptq", variant("good", 4.0, 1.01), variant("bad", 2.0, 1.5, ("reference: perplexity_ratio",)))
    text = card(record)
    names = {found.metric_name.rsplit(", ")[-1] for found in ModelCard(text).data.eval_results}
    assert names == {"good"}
    assert "| gptq bad | 2.000 |" in text
    assert "**Did not pass the recipe's gates:**" in text


def test_the_snippet_names_a_variant_that_is_to_be_had():
    low, high = variant("3.0bpw", 3.0, 1.5, ("reference: perplexity_ratio",)), variant("4.0bpw", 4.0, 1.01)
    assert "--revision 4.0bpw" in card(record_of("exl2", low, high))
    assert "--revision 3.0bpw" in card(record_of("exl2", low)), "where none passed, what there is"
    assert "--revision 4.0bpw" in card(record_of("exl2", high, validation=None))
    bad, good = variant("Q4_K_M", 4.8, 1.5, ("reference: perplexity_ratio",)), variant("Q5_K_M", 5.7, 1.01)
    assert ":Q5_K_M" in card(record_of("gguf", bad, good))


def test_sizes_are_read_as_the_hub_shows_them_and_keys_not_asked_for_are_left_out():
    assert [size_text(num) for num in (313, 51_870, 999_990_000, 1_000_000_000, 4_250_000_000)] == [
        "0.31 kB",
        "51.87 kB",
        "999.99 MB",
        "1.00 GB",
        "4.25 GB",
    ]
    text = card(record_of("gguf"))
    assert "| 4.25 GB |" in text
    assert "`: None" not in text
    assert "`skip`" not in card(record_of("gptq"))
    assert "* `imatrix`: yes\n" in text
    assert "* `types`: Q2_K, Q3_K_S, " in text


def test_own_words_and_a_prompt_with_fences():
    record = record_of("gptq", chat="```\nŻółw\n```")
    record["recipe"]["release"]["notes"] = "Dla wszystkich."
    text = card(record)
    assert "\n\nDla wszystkich.\n\n## Quality" in text
    assert "````text\n```\nŻółw\n```\n````" in text


if __name__ == "__main__":
    for name in READERS:
        (CARDS / f"{name}.md").write_text(card(record_of(name)), encoding="utf-8")
