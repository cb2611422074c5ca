"""The model card, README.md of an artifact: a view of its record."""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.files import disk_errors, write_text
from quantkit.formats import READERS
from quantkit.report.plots import MEASURES
from quantkit.report.record import CARD, write_record
from quantkit.report.table import COLUMNS, rows

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# plots of the report, by their names in a published folder
PICTURES = {f"plots/{measure.file}": measure.title for measure in MEASURES}
# for who never saw the columns of the table
COLUMNS_TOLD = (
    "*reference*: the source itself, on the same text by the same code. *ratio*: perplexity over the reference's. "
    "*KLD*: mean KL divergence of the next token's probabilities from the reference's, in nats. *top-1*: how often "
    "both find the same token most likely. *seconds*: what the judging took.\n"
)
BACKTICKS = re.compile("`+")
METRICS = (
    ("ppl_per_word", "word_perplexity", "Perplexity per word"),
    ("bits_per_byte", "bits_per_byte", "Bits per byte"),
    ("mean_kld", "kl_divergence", "Mean KL divergence from the source, nats per token"),
    ("top1_agreement", "top1_agreement", "Same most likely token as the source"),
)


def card(record: dict[str, Any]) -> str:
    """The text of README.md.

    Args:
        record: the artifact's record, with or without a validation.
    """
    from huggingface_hub import ModelCardData

    reading = READERS[record["format"]]
    recipe = record["recipe"]
    release = recipe["release"]
    source = record["source"]
    published = record.get("published")
    name = (
        published["repo"] if published else release["repo"]
    ) or f"{source['id'].rsplit('/')[-1]}-{record['format'].upper()}"
    results = _results(record)
    data = ModelCardData(
        model_name=name.rsplit("/")[-1] if results else None,
        eval_results=results or None,
        language=release["languages"],
        license=source["license"] or release["license"],
        license_name=source["license_name"],
        license_link=source["license_link"],
        library_name=reading.library,
        base_model=source["id"] if source["on_hub"] else None,
        pipeline_tag="text-generation",
        tags=[*reading.tags, "quantized"],
        base_model_relation="quantized" if source["on_hub"] else None,
        quantized_by=release["quantized_by"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name.rsplit('/')[-1]}\n",
        f"{record['format'].upper()} version of {_linked(source)}"
        + (f" (revision `{source['revision']}`)" if source["revision"] else "")
        + f", made with {_maker(record)}.\n",
        *([release["notes"].strip() + "\n"] if release["notes"] else []),
        "## Quality on Polish text\n",
        _quality(record),
        "## Use\n",
        reading.use(name, recipe["quantize"], _offered(record)),
        *_branch_note(record),
        "## Chat format\n",
        _chat(record),
        "## How it was made\n",
        _making(record),
        "## Limits\n",
        _limits(record),
        "## Provenance\n",
        _provenance(record),
    ]
    return "\n".join(parts)


def _linked(source: dict[str, Any]) -> str:
    return f"[{source['id']}](https://huggingface.co/{source['id']})" if source["on_hub"] else str(source["id"])


def keep(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Card first, then the record: whoever sees the record sees the card that belongs to it. Returns it as written."""
    text = card(record)
    with disk_errors(folder, "make the folder writable, or copy it to where you may write"):
        write_text(folder / CARD, text)
        return write_record(folder, record | {"card_sha256": hashlib.sha256(text.encode()).hexdigest()})


def _offered(record: dict[str, Any]) -> list[str]:
    """Variants that may be named as to be had: those that passed; all where none did or none was judged yet."""
    judged = (record["validation"] or {"variants": []})["variants"]
    # the main branch of an artifact with a branch for each has the figures of all and the files of none
    return [variant["name"] for variant in judged if variant["gate"]["passed"]] or list(record["variants"])


def _branch_note(record: dict[str, Any]) -> list[str]:
    """Which branch to ask for, where the files are not on main and not under a variant's name either."""
    published = record.get("published")
    if published is None or published["revision"] in ("main", *_offered(record)):
        return []
    return [f"These files are on the branch `{published['revision']}`: ask for that revision.\n"]


def _results(record: dict[str, Any]) -> "list[EvalResult]":
    """The figures of the reference runtime as entries of model-index; variants that did not pass are not announced."""
    from huggingface_hub import EvalResult

    validation = record["validation"]
    if validation is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=validation["text"]["name"],
            dataset_name=f"{validation['text']['name']} (Polish)",
            metric_type=metric,
            metric_name=f"{title}, {variant['name']}",
            metric_value=round(result[key], 6),
        )
        for variant in validation["variants"]
        if variant["gate"]["passed"]
        for result in variant["results"]
        if result["runtime"] == "reference" and result["status"] == "ok"
        for key, metric, title in METRICS
    ]


def _maker(record: dict[str, Any]) -> str:
    own = f"quantkit {record['environment']['versions']['quantkit']}"
    upstream = record["engine_facts"]
    return f"{upstream['package']} {upstream['version']} through {own}" if upstream else own


def _quality(record: dict[str, Any]) -> str:
    validation = record["validation"]
    if validation is None:
        return "Not validated. Do not publish this artifact.\n"
    text = validation["text"]
    lines = [
        f"Text: {text['name']}, {text['documents']} documents, {text['tokens']} tokens, SHA-256 `{text['sha256']}`.\n",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows(record["format"], validation)),
        "",
        COLUMNS_TOLD,
    ]
    gate = validation["gate"]
    verdict = "Passed the recipe's gates." if gate["passed"] else "**Did not pass the recipe's gates:**"
    published = record.get("published") or {"left_out": {}, "pictures": []}
    missing = [f"* {name}: {'; '.join(why)}" for name, why in published["left_out"].items()]
    if missing:
        missing = ["", "Not here, for they did not pass the recipe's gates:", "", *missing]
    pictures = [f"![{PICTURES[picture]}]({picture})\n" for picture in published["pictures"]]
    return "\n".join([*lines, *pictures, verdict, *(f"* {failure}" for failure in gate["failures"]), *missing, ""])


def _making(record: dict[str, Any]) -> str:
    asked = {key: value for key, value in record["recipe"]["quantize"].items() if value not in (None, [])}
    quantize = "\n".join(f"* `{key}`: {_shown(value)}" for key, value in asked.items())
    calibration = record["calibration"]
    if calibration is None:
        text = "No calibration text was used."
    else:
        sets = ", ".join(f"{part['name']} ({part['windows']} windows)" for part in calibration["texts"])
        text = f"Calibration: {sets} of {calibration['window_tokens']} tokens; seed {calibration['seed']}."
    return f"Settings of the recipe:\n\n{quantize}\n\n{text}\n"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _chat(record: dict[str, Any]) -> str:
    example = record["chat"]
    if example is None:
        return "The source has no chat template: give it text to continue.\n"
    fence = "`" * max(3, 1 + max((len(run) for run in BACKTICKS.findall(example)), default=0))
    return (
        "The source's own template, with the special tokens that the tokenizer puts in front of it; a question comes "
        f"to the model as\n\n{fence}text\n{example}\n{fence}\n"
    )


def _limits(record: dict[str, Any]) -> str:
    lines = [
        "Whatever the source gets wrong, this model gets wrong too, and some more: it is measured against the source "
        "on running text, not on tasks.",
    ]
    if record["validation"] is not None:
        text = record["validation"]["text"]
        lines.append(
            f"The figures above are of {text['tokens']} tokens of Polish; other languages, code and long contexts were "
            "not measured."
        )
    licence = record["source"]["license"] or record["recipe"]["release"]["license"]
    if licence is not None:
        lines.append(f"The source's licence, {licence}, holds for this model too.")
    return "\n".join(f"* {line}" for line in lines) + "\n"


def _provenance(record: dict[str, Any]) -> str:
    surroundings = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in surroundings["versions"].items())
    lines = [
        f"* source: {record['source']['id']}, revision {record['source']['revision'] or 'not on the Hub'}",
        f"* made with {versions}, on {surroundings['device_model']}",
        f"* the same recipe gives {'the same' if record['reproducible'] else 'not always the same'} bytes; fingerprint "
        f"`{record['fingerprint']}`",
        "* `quantkit.json` is the record: every file that went in and came out with its SHA-256, the loss of every "
        "linear, the whole validation; `quantkit inspect FOLDER --verify` holds the files against it",
    ]
    return "\n".join(lines) + "\n"
