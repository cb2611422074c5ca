"""Tables of what was measured, drawn from bench/results."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "bench" / "results"
# builds whose stages were held against their floor
FLOORS = {
    "GPTQ": "floor-gptq.json",
    "GPTQ, `asymmetric = 0`": "floor-gptq-plain.json",
    "GGUF": "floor-gguf.json",
    "HQQ": "floor-hqq.json",
}
STAGES = ("read", "forward", "statistics", "solve", "pack", "write")
# what was varied, in which unit the table has it, and where the figures are
GROWTHS = {
    "layers": ("growth-depth.json", "layers"),
    "width": ("growth-width.json", "hidden"),
    "windows of 512 tokens": ("growth-tokens.json", "windows"),
    "vocabulary, judged as well": ("growth-vocabulary.json", "vocabulary"),
}
# whole processes that took turns: what was built, and where the figures are
SPEEDS = (
    ("GPTQ 4 bits, random Mistral 1024 wide, 4 layers, 16,384 tokens", "speed-gptq-1024-3584-4-float32.json"),
    ("the same in bfloat16", "speed-gptq-1024-3584-4.json"),
    ("the same in float32 with `asymmetric = 0`", "speed-gptq-sweeps-1024-3584-4.json"),
    ("GPTQ 4 bits, 2048 wide, 20 layers (0.9 B parameters), 4,096 tokens", "speed-gptq-2048-5632-20-float32.json"),
    ("GPTQ 4 bits, 256 wide, 1 layer, 2,048 tokens", "speed-gptq-256-512-1.json"),
    ("GPTQ 4 bits, the 5 M parameter model, 32,768 tokens", "speed-gptq-auto-round-mistral-pl.json"),
    ("compressed-tensors 4 bits, the random Mistral of 4 layers", "speed-compressed-tensors-1024-3584-4.json"),
    ("AWQ, the 5 M parameter model, 32,768 tokens", "speed-awq-mistral-pl.json"),
    ("HQQ 3 bits without calibration, the 5 M parameter model", "speed-hqq-mistral-pl.json"),
    ("the same of a layer of Bielik-7B's shape", "speed-hqq-4096-14336-1.json"),
    ("the same of 32 such layers", "speed-hqq-4096-14336-32.json"),
    ("MLX 4 bits, rounded, the 5 M parameter model", "speed-mlx-mistral-pl.json"),
    ("the same of a layer of Bielik-7B's shape", "speed-mlx-4096-14336-1.json"),
    ("the same of 32 such layers, 14 GB of bfloat16", "speed-mlx-4096-14336-32.json"),
    ("ten GGUF types of a layer of Bielik-7B's shape, no importance", "speed-gguf-4096-14336-1.json"),
    ("the same of bielik-nano", "speed-gguf-nano.json"),
)


@dataclass(frozen=True)
class Compared:
    """Ways to quantize that were judged side by side.

    Attributes:
        what: in the table of the format's page.
        files: where the figures are, after `quality-`.
        in_readme: what the README calls it; "" where it is not there.
        beside: other ways of quantkit that the README has beside the first.
        at_bits: the targets of bits per weight that the README has, where there are several.
    """

    what: str
    files: tuple[str, ...]
    in_readme: str = ""
    beside: tuple[str, ...] = ()
    at_bits: tuple[float, ...] = ()


# by format's page, in the README's order
QUALITIES = {
    "gptq": (
        Compared(
            "mistral-pl, 4 bits, groups of 128",
            ("gptq-mistral-pl-4bit", "gptq-auto-round-mistral-pl-4bit"),
            "GPTQ 4 bits, groups of 128",
        ),
        Compared(
            "mistral-pl, 3 bits, groups of 128",
            ("gptq-mistral-pl-3bit", "gptq-auto-round-mistral-pl-3bit"),
            "GPTQ 3 bits, groups of 128",
        ),
        Compared(
            "mistral-pl, 2 bits, groups of 64",
            ("gptq-mistral-pl-2bit", "gptq-auto-round-mistral-pl-2bit"),
            "GPTQ 2 bits, groups of 64",
            ("three sweeps",),
        ),
        Compared("bielik-nano, 4 bits, groups of 128", ("gptq-nano-4bit",)),
        Compared("bielik-nano, 3 bits, groups of 128", ("gptq-nano-3bit",)),
        Compared("bielik-nano, 2 bits, groups of 64", ("gptq-nano-2bit",)),
    ),
    "awq": (
        Compared("mistral-pl, 4 bits, groups of 128", ("awq-mistral-pl-4bit",), "AWQ 4 bits, groups of 128"),
        Compared("bielik-nano, 4 bits, groups of 128", ("awq-nano-4bit",)),
    ),
    "compressed-tensors": (
        Compared(
            "mistral-pl, 4 bits, groups of 128",
            ("compressed-tensors-mistral-pl-4bit",),
            "compressed-tensors 4 bits, groups of 128",
        ),
        Compared("bielik-nano, 4 bits, groups of 128", ("compressed-tensors-nano-4bit",)),
    ),
    "hqq": (
        *(
            Compared(
                f"mistral-pl, {bits} bits",
                (f"hqq-mistral-pl-{bits}bit",),
                f'HQQ {bits} bits, groups of 64, `solver = "gptq"`',
                ("least-squares",),
            )
            for bits in (4, 3, 2)
        ),
        Compared("mistral-pl, 8 bits", ("hqq-mistral-pl-8bit",)),
        *(Compared(f"bielik-nano, {bits} bits", (f"hqq-nano-{bits}bit",)) for bits in (4, 3, 2)),
    ),
    "mlx": (
        *(
            Compared(f"mistral-pl, {bits} bits", (f"mlx-mistral-pl-{bits}bit",), f"MLX {bits} bits, groups of 64")
            for bits in (4, 3, 2)
        ),
        Compared("mistral-pl, 6 bits", ("mlx-mistral-pl-6bit",)),
        Compared("mistral-pl, 8 bits", ("mlx-mistral-pl-8bit",)),
        Compared("mistral-pl, mixed_3_6", ("mlx-mistral-pl-mixed_3_6",)),
        *(Compared(f"bielik-nano, {bits} bits", (f"mlx-nano-{bits}bit",)) for bits in (4, 3)),
    ),
    "gguf": (
        *(
            Compared(
                f"mistral-pl, {kind}", (f"gguf-mistral-pl-{kind}",), f'GGUF {kind}, `solver = "gptq"`', ("search",)
            )
            for kind in ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
        ),
        *(Compared(f"bielik-nano, {kind}", (f"gguf-nano-{kind}",)) for kind in ("Q4_K_M", "Q3_K_M", "Q2_K")),
    ),
    "exl2": (Compared("mistral-pl", ("exl2-mistral-pl",), "EXL2", at_bits=(3.0, 4.0)),),
}
# by format's page: quantkit's own way, with one thing changed at a time
PARTS = {
    "gptq": (Compared("mistral-pl, 3 bits, groups of 128", ("gptq-ways-mistral-pl-3bit",)),),
    "awq": (
        Compared("mistral-pl", ("awq-ways-mistral-pl-4bit",)),
        Compared("the loud one", ("awq-ways-mistral-pl-loud-4bit",)),
    ),
}
# what a way is in perplexity, and in divergence, beside the first; worse in both is what the README expects
SAID = {
    ("tie", "tie"): " (a tie)",
    ("tie", "worse"): " (a tie; divergence larger)",
    ("tie", "better"): " (a tie; divergence smaller)",
    ("worse", "worse"): "",
    ("worse", "tie"): " (divergence a tie)",
    ("worse", "better"): " (divergence smaller)",
    ("better", "worse"): " (better; divergence larger)",
    ("better", "tie"): " (better; divergence a tie)",
    ("better", "better"): " (better; divergence smaller)",
}


def markdown(rows: list[list[str]]) -> str:
    """Markdown of rows, of which the first is the heading."""
    heading, *others = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (heading, ["---"] * len(heading), *others))


def floor_table() -> str:
    """Seconds of every stage of a build, and its floor by arithmetic."""
    columns = []
    for file in FLOORS.values():
        found = {row["stage"]: row for row in json.loads((RESULTS / file).read_text(encoding="utf-8"))["stages"]}
        columns.append([_against_floor(found.get(stage)) for stage in STAGES])
    return markdown([["", *FLOORS], *([stage, *row] for stage, *row in zip(STAGES, *columns, strict=True))])


def _against_floor(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['seconds']:.2f}" + (f" of {row['floor']:.2f}" if row["floor"] else "")


def growth_table() -> str:
    """What a build takes where one thing grows, the last over the first."""
    heading = ["what grows", "from, to", "operations", "seconds quantizing", "peak memory", "the same by the plan"]
    rows = []
    for title, (file, key) in GROWTHS.items():
        found = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        first, last, times = found["rows"][0], found["rows"][-1], found["last_to_first"]
        peaks, plans = ([each[part] / 1e9 for each in (first, last)] for part in ("peak_host_bytes", "planned_bytes"))
        rows.append(
            [
                title,
                f"{first[key]}, {last[key]}",
                f"x {times['operations']:.2f}",
                f"x {times['quantize_s']:.2f}",
                f"{peaks[0]:.2f}, {peaks[1]:.2f} GB",
                f"{plans[0]:.2f}, {plans[1]:.2f} GB",
            ]
        )
    return markdown([heading, *rows])


def speed_table() -> str:
    """Whole processes, each beside the first of its run."""
    rows = [["what is built", "by", "seconds", "times", "peak GB", "times", "rounds, processor, commit"]]
    for title, file in SPEEDS:
        found = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        for place, way in enumerate(found["rows"]):
            over = way["over_first"]
            times = [_span(over[measure]) if place else "" for measure in ("wall_s", "peak_gb")]
            made = found["environment"]
            processor = re.sub(r"\(R\)| Processor", "", made["device_model"])
            told = f"{len(over['wall_s'])}, {processor}, {made['commit'][:7]}"
            name = " ".join(filter(None, (way["way"], way["version"])))
            first = ["", ""] if place else [title, told]
            rows.append([first[0], name, f"{way['wall_s']:.1f}", times[0], f"{way['peak_gb']:.2f}", times[1], first[1]])
    return markdown(rows)


def _span(ratios: list[float]) -> str:
    """A ratio of each round: the only one, or from which to which."""
    return " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios))))


def quality_table(judged: tuple[Compared, ...]) -> str:
    """Of a format's page: everything that was judged, with intervals."""
    heading = ["model", "by", "bits per weight", "perplexity", "nats/1000", "divergence", "nats/1000", "commit"]
    rows = [heading]
    for compared in judged:
        title = compared.what
        for commit, block in _blocks(compared):
            for way in block:
                told = "" if way["verdict"] != "first" else commit
                rows.append(
                    [
                        title,
                        way["way"],
                        f"{way['bits_per_weight']:.3f}",
                        f"{way['ratio']:.4f}",
                        _difference(way["against_first_nats_per_token"], way["verdict"]),
                        f"{way['mean_kld']:.4f}",
                        _difference(way["against_first_kld"], way["kld_verdict"]),
                        told,
                    ]
                )
                title = ""
    return markdown(rows)


def readme_quality_table() -> str:
    """The same in short: perplexity over the source's, quantkit's and that of the packages."""
    rows = [["format, at equal size", "quantkit", "the packages"]]
    for compared in (each for page in QUALITIES.values() for each in page if each.in_readme):
        blocks = [block for _, block in _blocks(compared)]
        if not compared.at_bits:
            rows.append([compared.in_readme, *_in_short([way for block in blocks for way in block], compared.beside)])
            continue
        for block in blocks:
            if block[0]["target"] in compared.at_bits:
                rows.append([f"{compared.in_readme} {block[0]['target']} bits per weight", *_in_short(block)])
    return markdown(rows)


def _blocks(compared: Compared) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What was held against the same first way, with the commit that it was measured on."""
    for file in compared.files:
        found = json.loads((RESULTS / f"quality-{file}.json").read_text(encoding="utf-8"))
        block: list[dict[str, Any]] = []
        for way in found["rows"]:
            if way["verdict"] == "first" and block:
                yield found["environment"]["commit"][:7], block
                block = []
            block.append(way)
        yield found["environment"]["commit"][:7], block


def _in_short(ways: list[dict[str, Any]], beside: tuple[str, ...] = ()) -> list[str]:
    """Perplexity of the first way, with those of quantkit's others that are to stand beside it; and of the packages."""
    first, *others = ways
    ours: dict[str, str] = {}
    theirs = []
    for way in others:
        if way.get("engine") == "quantkit":
            name = re.sub("^quantkit,? ?", "", way["way"])
            if name in beside:
                ours.setdefault(name, f"{name} {way['ratio']:.4f}")
        else:
            theirs.append(f"{way['way']} {way['ratio']:.4f}{SAID[way['verdict'], way['kld_verdict']]}")
    others_of_ours = f" ({'; '.join(ours.values())})" if ours else ""
    return [f"{first['ratio']:.4f}{others_of_ours}", "; ".join(theirs)]


def _difference(interval: list[float], verdict: str) -> str:
    """A 95 % interval in thousandths of a nat per token; nothing of what it is held against."""
    if verdict == "first":
        return ""
    _, low, high = (1000 * value for value in interval)
    return f"{low:+.1f} .. {high:+.1f}" + (", a tie" if verdict == "tie" else "")
