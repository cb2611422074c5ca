"""All artifacts of a model side by side: report.json (the data), report.html (one file that needs nothing else), PNG.

Everything drawn comes from the records; nothing is measured here.
"""

import base64
import math
import os
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from quantkit.errors import RefusedError
from quantkit.files import disk_errors, finite, json_text, write_json, write_text
from quantkit.report.plots import COLOURS, MEASURES, SHAPES, beyond, chart, draw_png, outline, require_matplotlib
from quantkit.report.record import built_record
from quantkit.units import size_text
from quantkit.workdir import RECORD

PAGE, DATA = "report.html", "report.json"
REFERENCE = "reference"
SHADES = 8
WORST = 5
LAYER_LINEAR = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
FIGURES = ("ppl_per_token", "ppl_per_word", "bits_per_byte", "ratio", "mean_kld", "p99_kld", "top1_agreement")


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write the report of artifacts into a folder, which is made if it is not there.

    Args:
        folders: artifacts of one model, each with its record.
        out: where to.

    Returns:
        the files written.

    Raises:
        RefusedError: a folder without a record, artifacts of several models, or two of one name; an `out` that is
            an artifact, or in one.
        RunFailedError: it cannot be written there.
        UnavailableError: matplotlib is not installed; nothing is written.
    """
    _refuse_artifact(out)
    require_matplotlib()
    report = report_of(folders)
    pictures = []
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / DATA, report)
        write_text(out / PAGE, page(report))
        for measure in MEASURES:
            path = out / measure.file
            if draw_png(report["points"], measure, f"{report['model']['id']}: {measure.title.lower()}", path):
                pictures.append(path)
            else:
                path.unlink(missing_ok=True)  # of an earlier report
    return [out / DATA, out / PAGE, *pictures]


def _refuse_artifact(out: Path) -> None:
    """Stop where a report would add files to an artifact, which then is not what was built and cannot be published."""
    with disk_errors(out):
        place = Path(os.path.realpath(out))
        artifact = next((folder for folder in (place, *place.parents) if (folder / RECORD).exists()), None)
    if artifact is not None:
        raise RefusedError(
            "a report would be written into an artifact",
            where=str(artifact),
            fix="choose a folder outside of it with --out",
        )


def report_of(folders: Sequence[Path]) -> dict[str, Any]:
    """The content of report.json.

    Returns:
        {"model": {"id", "revision", "license"}, "texts": [name and hash of every text judged on], "reference",
        "points": [one per variant and runtime: {"artifact", "format", "series", "variant", "label", "short", "runtime",
        "status", "reason", "bits_per_weight", "size_bytes", "passed", "failures", "answer", and the figures}],
        "artifacts": [{"name", "label", "losses": [{"layer", "linear", "loss"}], "record"}]}; a figure that is not
        finite is null.
    """
    records = {}
    for folder in folders:
        record = built_record(folder)
        name = folder.resolve().name
        if name in records:
            raise RefusedError(f"two artifacts are called {name}", where=str(folder), fix="rename one of the folders")
        records[name] = record
    sources = {record["source"]["id"]: record["source"] for record in records.values()}
    if len(sources) > 1:
        raise RefusedError(
            "the artifacts are of several models: " + ", ".join(sorted(sources)), fix="write one report for each"
        )
    if len({fingerprint_of(record) for record in records.values()}) > 1:
        raise RefusedError(
            f"the artifacts are of different weights that are all called {next(iter(sources))}",
            fix="write one report for each",
        )
    labels = dict(zip(records, _short([*records], [record["format"] for record in records.values()]), strict=True))
    series = {name: index for index, name in enumerate(sorted({record["format"] for record in records.values()}))}
    judged = [record["validation"] for record in records.values() if record["validation"] is not None]
    source = next(iter(sources.values()))
    points = [
        point
        for name, record in records.items()
        for point in _points(name, labels[name], series[record["format"]], record)
    ]
    _shorten(points)
    report = {
        "model": {key: source[key] for key in ("id", "revision", "license")},
        "texts": list({text["sha256"]: text for text in (validation["text"] for validation in judged)}.values()),
        "reference": judged[0]["reference"] if judged else None,
        "points": points,
        "artifacts": [
            {"name": name, "label": labels[name], "losses": _losses(record), "record": record}
            for name, record in records.items()
        ],
    }
    return finite(report)


def fingerprint_of(record: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """What tells two sources of one name apart: the hashes of their files."""
    return tuple(sorted(record["source"]["sha256"].items()))


def _short(names: list[str], formats: list[str]) -> list[str]:
    """Names without the words that all of them begin with; the format where nothing else would be left."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    cut = "".join(letters[0] for letters in alike).rfind("-") + 1
    found = [name[cut:] for name in names]
    return formats if len(names) == 1 or not all(found) else found


def _shorten(points: list[dict[str, Any]]) -> None:
    """Give points the `short` name that plots use: the variant's own where only one artifact has such a variant."""
    owners: dict[str, set[str]] = {}
    for point in points:
        owners.setdefault(point["variant"], set()).add(point["artifact"])
    for point in points:
        alone = point["label"].endswith(f" {point['variant']}") and len(owners[point["variant"]]) == 1
        point["short"] = point["variant"] if alone else point["label"]


def _points(artifact: str, label: str, series: int, record: dict[str, Any]) -> list[dict[str, Any]]:
    common = {"artifact": artifact, "format": record["format"], "series": series}
    validation = record["validation"]
    if validation is None:
        nothing = dict.fromkeys(FIGURES) | {"bits_per_weight": None, "answer": None, "failures": []}
        weights = {name for files in record["variants"].values() for name in files}
        size = sum(entry["size_bytes"] for entry in record["outputs"] if entry["name"] in weights)
        why = {"runtime": REFERENCE, "status": "not run", "reason": "not validated", "passed": False}
        return [common | nothing | why | {"variant": "", "label": label, "size_bytes": size}]
    several = len(validation["variants"]) > 1
    return [
        common
        | {
            "variant": variant["name"],
            "label": f"{label} {variant['name']}" if several else label,
            "bits_per_weight": variant["bits_per_weight"],
            "size_bytes": variant["size_bytes"],
            "passed": variant["gate"]["passed"],
            "failures": variant["gate"]["failures"],
            "runtime": result["runtime"],
            "status": result["status"],
            "reason": result["reason"],
            "answer": result.get("answer"),
        }
        | {key: result.get(key) for key in FIGURES}
        for variant in validation["variants"]
        for result in variant["results"]
    ]


def _losses(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Output error of every linear that has one; `layer` is None for embedding and head."""
    found = []
    for item in record["build"]["items"].values():
        for linear in item["linears"]:
            if linear["loss"] is None:
                continue
            place = LAYER_LINEAR.match(linear["name"])
            layer, name = (int(place[1]), place[2]) if place else (None, linear["name"])
            found.append({"layer": layer, "linear": name, "loss": linear["loss"]})
    return found


def page(report: dict[str, Any]) -> str:
    """The HTML of a report: no request leaves it, and without scripts it still shows everything.

    Args:
        report: as `report_of` makes it.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("quantkit.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size_text, "figure": _figure, "whole": _whole, "download": _download}
    points = [point for point in report["points"] if point["runtime"] == REFERENCE]
    return environment.get_template("report.html.jinja").render(
        report=report,
        rows=report["points"],
        plots=[
            {
                "measure": measure,
                "wide": chart(points, measure, width=620, height=400),
                "narrow": chart(points, measure, width=350, height=330),
                "beyond": beyond(points, measure),
            }
            for measure in MEASURES
        ],
        series=_series(report),
        heat=_heat(report),
        facts=_headlines(points),
        several_texts=len(report["texts"]) > 1,
        prompts=_prompts(report),
        outline=outline,
        record_name=RECORD,
        data_name=DATA,
    )


def _series(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Formats with the shape and colour that stand for them."""
    found = {point["series"]: point["format"] for point in report["points"]}
    return [
        {"index": index, "format": name, "shape": SHAPES[index % len(SHAPES)], "colour": index % COLOURS}
        for index, name in sorted(found.items())
    ]


def _headlines(points: list[dict[str, Any]]) -> dict[str, Any]:
    """What a reader asks first: how many passed, which is the smallest of them and which the closest to the source."""
    passed = [point for point in points if point["passed"]]
    measured = [point for point in passed if point["mean_kld"] is not None]
    return {
        "passed": len(passed),
        "all": len(points),
        "smallest": min(passed, key=lambda point: point["size_bytes"], default=None),
        "closest": min(measured, key=lambda point: point["mean_kld"], default=None),
    }


def _heat(report: dict[str, Any]) -> dict[str, Any]:
    """Per-layer error as shades 0 to 7 of one logarithmic scale over all artifacts."""
    values = [
        loss["loss"]
        for artifact in report["artifacts"]
        for loss in artifact["losses"]
        if loss["layer"] is not None and (loss["loss"] or 0) > 0
    ]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    span = math.log(high / low) or 1.0

    def shade(loss: float | None) -> int:
        return 0 if not loss or loss <= low else min(SHADES - 1, int(SHADES * math.log(loss / low) / span))

    panels = []
    for artifact in report["artifacts"]:
        losses = [loss for loss in artifact["losses"] if loss["loss"] is not None]
        inner = [loss for loss in losses if loss["layer"] is not None]
        by_place = {(loss["linear"], loss["layer"]): loss["loss"] for loss in inner}
        layers = sorted({loss["layer"] for loss in inner})
        every = max(1, math.ceil(len(layers) / 8))
        variants = artifact["record"]["variants"]
        panels.append(
            {
                "label": artifact["label"],
                "of": next(iter(variants)) if len(variants) > 1 else None,
                "layers": [{"number": layer, "shown": place % every == 0} for place, layer in enumerate(layers)],
                "rows": [
                    {
                        "linear": linear,
                        "cells": [
                            {"layer": layer, "loss": loss, "shade": shade(loss)}
                            for layer in layers
                            for loss in (by_place.get((linear, layer)),)
                        ],
                    }
                    for linear in dict.fromkeys(loss["linear"] for loss in inner)
                ],
                "worst": sorted(losses, key=lambda loss: -loss["loss"])[:WORST],
            }
        )
    return {"panels": panels, "low": low, "high": high, "shades": range(SHADES), "any": bool(values)}


def _prompts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to each prompt that was asked, under the prompt."""
    asked: dict[str, list[dict[str, Any]]] = {}
    prompt_of = {
        artifact["name"]: artifact["record"]["recipe"]["validation"]["prompt"] for artifact in report["artifacts"]
    }
    for point in report["points"]:
        if point["answer"] is not None:
            asked.setdefault(prompt_of[point["artifact"]], []).append(point)
    return [{"prompt": prompt, "points": points} for prompt, points in asked.items()]


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _whole(value: int) -> str:
    return f"{value:,}"


def _download(content: Any) -> str:
    """A link that holds a JSON document."""
    text = json_text(content) + "\n"
    return "data:application/json;base64," + base64.b64encode(text.encode()).decode()
