"""The model card, README.md of an artifact: a view of its record."""

from typing import Any

from quantkit.report.table import COLUMNS, rows

TAGS = {"gptq": ["gptq", "quantized"]}
LIBRARY = {"gptq": "transformers"}
USE = {
    "gptq": """```python
# pip install transformers optimum gptqmodel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
messages = [{{"role": "user", "content": "Jakie mamy pory roku w Polsce?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs.to(model.device), max_new_tokens=200)[0]))
```
""",
}


def card(record: dict[str, Any]) -> str:
    """The text of README.md.

    Args:
        record: the artifact's record, with or without a validation.
    """
    from huggingface_hub import ModelCardData

    recipe = record["recipe"]
    release = recipe["release"]
    source = record["source"]
    data = ModelCardData(
        language=release["languages"],
        license=release["license"],
        library_name=LIBRARY[record["format"]],
        base_model=source["id"] if source["on_hub"] else None,
        pipeline_tag="text-generation",
        tags=TAGS[record["format"]],
        base_model_relation="quantized" if source["on_hub"] else None,
        quantized_by=release["quantized_by"],
    )
    name = release["repo"] or f"{source['id'].rsplit('/')[-1]}-{record['format'].upper()}"
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name.rsplit('/')[-1]}\n",
        f"{record['format'].upper()} version of {source['id']}"
        + (f" (revision `{source['revision']}`)" if source["revision"] else "")
        + f", made with quantkit {record['environment']['versions']['quantkit']}.\n",
        "## Quality on Polish text\n",
        _quality(record),
        "## Use\n",
        USE[record["format"]].format(repo=name),
        "## How it was made\n",
        _making(record),
    ]
    return "\n".join(parts)


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
    ]
    gate = validation["gate"]
    verdict = "Passed the recipe's gates." if gate["passed"] else "**Did not pass the recipe's gates:**"
    return "\n".join([*lines, verdict, *(f"* {failure}" for failure in gate["failures"]), ""])


def _making(record: dict[str, Any]) -> str:
    quantize = "\n".join(f"* `{key}`: {value}" for key, value in record["recipe"]["quantize"].items())
    calibration = record["calibration"]
    if calibration is None:
        text = "No calibration text was used."
    else:
        sets = ", ".join(f"{part['name']} ({part['windows']} windows)" for part in calibration["texts"])
        text = f"Calibration: {sets} of {calibration['window_tokens']} tokens; seed {calibration['seed']}."
    return (
        f"{quantize}\n\n{text}\n\nThe whole record, with the SHA-256 of every file that went in and came out, is in "
        "`quantkit.json`. Quantized models answer less well than their source; check what matters to you.\n"
    )
