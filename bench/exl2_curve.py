"""Quality against bits per weight for ways to allot EXL2's widths, on the same measured errors and the same solver.

    python -m bench.exl2_curve --model DIR --calibration FILE --validation FILE --targets 2.5,3,3.5,4,5,6 --out FILE
    python -m bench.exl2_curve --plot RESULT.json CURVE.svg

Ways, all with quantkit's own solver and grid, so that only the allotment differs:

* quantkit: all of its options, the exact knapsack over squared errors;
* exllamav2: the options of its converter and its published selection, errors to the power p, p searched in 1.5 .. 3.5
  for the smallest largest error and then around it for the smallest again; solved exactly, not annealed at random; what
  bits are left go to the sub-layers in turn, each to its next option, as there;
* uniform: every linear alike in groups of 128, at the bits per weight that this comes to.

Each is compared with quantkit's at the same bits per weight, document by document; see `bench.quality`. Two figures:
the loss on the text, as perplexity over the source's, and the KL divergence from the source. The first moves to either
side with every change of weights, whether it helps or not, as long as the change is small; the second cannot.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.quality import CPU, Judge, interval, verdict
from bench.ways import command_line
from quantkit.calibration.tokens import calibration_windows
from quantkit.checkpoint.families import Family
from quantkit.checkpoint.index import Checkpoint
from quantkit.checkpoint.source import WeightSource, head_tensors
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.formats.exl2 import Exl2Format, sublayers
from quantkit.grids.exl2 import WIDTHS, Mixture, Part
from quantkit.grids.exl2_options import HEADS, LINEARS, OPTIONS, PUBLISHED
from quantkit.machine import environment
from quantkit.quantize import Exl2Section
from quantkit.solvers.exl2 import Exl2Solver
from quantkit.solvers.exl2_measure import Allocation, Measured, OptionTrial, allocate, mixture_of
from quantkit.source_pass import Calibration, SourcePass
from quantkit.stream import Solvers, stream
from quantkit.survey import survey
from quantkit.texts import load_text_set
from quantkit.validation.perplexity import compare, final_states

WINDOWS_PER_BATCH = 8
SETTINGS = Exl2Section()
Shapes = dict[str, tuple[int, int]]
Point = tuple[str, float]
"""A way and its target."""


@dataclass(frozen=True)
class Dense:
    """Weights in memory, see `quantkit.checkpoint.source.WeightSource`."""

    config: dict
    family: Family
    num_layers: int
    items: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def read(self, item: str) -> dict[str, Tensor]:
        return self.items[item]


def exact(measured: Measured, shapes: Shapes, target: float) -> dict[str, Mixture]:
    return allocate(measured, _weights(shapes), target).mixtures


def published(measured: Measured, shapes: Shapes, target: float) -> dict[str, Mixture]:
    listed = {key: _published_rows(key, rows) for key, rows in measured.items()}

    def found(norm: float) -> tuple[float, Allocation]:
        allocation = allocate(listed, _weights(shapes), target, norm=norm)
        options = zip(listed.values(), allocation.choice.options, strict=True)
        return max(1 - rows[taken]["accuracy"] for rows, taken in options), allocation

    centre = min(np.linspace(1.5, 3.5, 80), key=lambda norm: found(norm)[0])
    near = min(np.linspace(centre - 0.075, centre + 0.075, 80), key=lambda norm: found(norm)[0])
    slots = list(listed.values())
    taken = filled(slots, list(found(near)[1].choice.options), int(target * _weights(shapes)))
    return {
        f"{key}.{linear}": mixture_of(rows[option][linear])
        for (key, rows), option in zip(listed.items(), taken, strict=True)
        for linear in LINEARS[key.rsplit(".", 1)[1]]
    }


def filled(slots: list[list[dict[str, Any]]], taken: list[int], budget: int) -> list[int]:
    """Options after exllamav2's last step: round and round, each slot to its next option while that fits."""
    spent = sum(rows[option]["total_bits"] for rows, option in zip(slots, taken, strict=True))
    raised = True
    while raised:
        raised = False
        for place, rows in enumerate(slots):
            if taken[place] + 1 == len(rows):
                continue
            more = rows[taken[place] + 1]["total_bits"] - rows[taken[place]]["total_bits"]
            if spent + more <= budget:
                spent, taken[place], raised = spent + more, taken[place] + 1, True
    return taken


def uniform(measured: Measured, shapes: Shapes, target: float) -> dict[str, Mixture]:
    def everywhere(mixture: Mixture) -> dict[str, Mixture]:
        return dict.fromkeys(shapes, mixture)

    return min(map(everywhere, UNIFORM), key=lambda mixtures: abs(stored(mixtures, shapes) - target))


def _published_rows(key: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    block = key.rsplit(".", 1)[1]
    return [row for option, row in zip(OPTIONS[block], rows, strict=True) if option in PUBLISHED[block]]


def stored(mixtures: Mapping[str, Mixture], shapes: Shapes) -> float:
    """Bits per weight that mixtures take."""
    return sum(mixtures[name].stored_bits(*shape) for name, shape in shapes.items()) / _weights(shapes)


UNIFORM = tuple(Mixture((Part(bits, 1.0, 128),)) for bits in WIDTHS if bits > 2)
WAYS: dict[str, Callable[[Measured, Shapes, float], dict[str, Mixture]]] = {
    "quantkit": exact,
    "exllamav2's selection": published,
    "uniform": uniform,
}


def _weights(shapes: Shapes) -> int:
    return sum(rows * columns for rows, columns in shapes.values())


def shapes_of(checkpoint: Checkpoint) -> Shapes:
    """(out, in) of the decoder layers' linears by name."""
    linears = {name: (rows, columns) for name, rows, columns in checkpoint.linear_shapes(ends=False)}
    return {f"{key}.{name}": shape for key, parts in sublayers(linears).items() for name, shape in parts.items()}


def measure(judge: Judge, calibration: Calibration) -> Measured:
    """Errors of every option of every sub-layer."""
    trial = OptionTrial(SETTINGS.damping, SETTINGS.scale_candidates, SETTINGS.measure_tokens)
    with SourcePass(judge.source) as shared:
        layers = survey(shared, calibration, trial, decoder=judge.decoder)
        return {key: rows for _, found in filter(None, layers) for key, rows in found["measured"].items()}


def solved(judge: Judge, calibration: Calibration, chosen: list[dict[str, Mixture]]) -> list[Dense]:
    """The model with each choice of mixtures, all from one pass."""
    head = HEADS[SETTINGS.head_bits]
    solver = Exl2Solver(
        lambda name: tuple(each.get(name, head) for each in chosen),
        SETTINGS.damping,
        SETTINGS.scale_candidates,
        SETTINGS.refine_sweeps,
    )
    source = judge.source
    made = [Dense(source.config, source.family, source.num_layers) for _ in chosen]
    solvers = Solvers(solver, ends=solver, unties_head=True)
    stored, skip = Exl2Format.stored_dtype, Exl2Format.skip
    with SourcePass(source) as shared:
        items = stream(shared, solvers, calibration, decoder=judge.decoder, stored_dtype=stored, skip=skip)
        for item in filter(None, items):
            for place, dense in enumerate(made):
                alternatives = {name: (linear, *linear.others) for name, linear in item.linears.items()}
                weights = {
                    f"{name}.weight": each[place if len(each) > 1 else 0].dequantize()
                    for name, each in alternatives.items()
                }
                dense.items[item.name] = item.tensors | weights
    return made


def _read(judge: Judge, weights: WeightSource) -> tuple[Tensor, Tensor]:
    """Final states and head, which `compare` takes."""
    states_ND = final_states(weights, judge.text, judge.decoder, windows_per_batch=WINDOWS_PER_BATCH)
    return states_ND, judge.decoder.head(head_tensors(weights))


def _judged(judge: Judge, reference: tuple[Tensor, Tensor], weights: WeightSource) -> tuple[Tensor, Tensor]:
    """Nats lost and divergence from the reference, summed by document."""
    compared = compare(reference, _read(judge, weights), judge.text.targets)
    empty_D = torch.zeros(judge.text.documents, dtype=torch.float64)
    loss_D, divergence_D = (
        empty_D.index_add(0, judge.document_N, found_N) for found_N in (compared.loss, compared.divergence)
    )
    return loss_D, divergence_D


def _row(
    key: Point, found: dict[Point, list[tuple[Tensor, Tensor]]], bits: float, reference_D: Tensor, tokens_D: Tensor
) -> dict[str, Any]:
    """One way at one target, over all draws."""
    way, target = key
    losses, divergences = (torch.stack(each) for each in zip(*found[key], strict=True))
    first = [torch.stack(each) for each in zip(*found["quantkit", target], strict=True)]
    worse = interval((losses - first[0]).mean(0), tokens_D)
    farther = interval((divergences - first[1]).mean(0), tokens_D)
    ratios = ((losses.sum(1) - reference_D.sum()) / tokens_D.sum()).exp()
    return {
        "way": way,
        "target": round(target, 4),
        "bits_per_weight": round(bits, 4),
        "ratio": round(float(ratios.mean()), 5),
        "ratio_by_draw": [round(float(ratio), 5) for ratio in ratios],
        "against_first_nats_per_token": [round(value, 6) for value in worse],
        "verdict": "first" if way == "quantkit" else verdict(worse),
        "mean_kld": round(float(divergences.mean(0).sum() / tokens_D.sum()), 7),
        "against_first_kld": [round(value, 7) for value in farther],
        "kld_verdict": "first" if way == "quantkit" else verdict(farther),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Divergence over bits per weight, a line for each way."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quantkit"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for way, marker in zip(WAYS, "os^", strict=True):
        points = sorted((row["bits_per_weight"], row["mean_kld"]) for row in result["rows"] if row["way"] == way)
        axes.plot(*zip(*points, strict=True), marker=marker, label=way)
    axes.set(yscale="log", xlabel="bits per weight", ylabel="mean KL divergence from the source, nats per token")
    axes.set_title(f"EXL2, ways to allot the widths ({result['model']})")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULT", "PICTURE"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration")
    parser.add_argument("--validation")
    parser.add_argument("--targets", default="2.5,3,3.5,4,5,6")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.plot:
        result, picture = options.plot
        draw(json.loads(result.read_text(encoding="utf-8")), picture)
        return
    if not all((options.model, options.calibration, options.validation, options.out)):
        parser.error("--model, --calibration, --validation and --out are needed, or --plot")
    torch.set_num_threads(options.threads)
    targets = [float(text) for text in options.targets.split(",")]
    judge = Judge(options.model, options.validation, options.window_tokens)
    tokens_D = torch.bincount(judge.document_N).double()
    reference = _read(judge, judge.source)
    reference_D = judge.by_document(judge.source)
    shapes = shapes_of(judge.source)
    tokenizer = load_tokenizer(options.model, vocab_size=judge.source.config["vocab_size"])
    text = load_text_set(options.calibration, "calibration")
    alike = [stored(dict.fromkeys(shapes, mixture), shapes) for mixture in UNIFORM]
    wanted = [(way, target) for target in targets for way in ("quantkit", "exllamav2's selection")]
    wanted += [(way, bits) for bits in alike for way in ("quantkit", "uniform")]
    found: dict[Point, list[tuple[Tensor, Tensor]]] = {key: [] for key in wanted}
    spent: dict[Point, float] = {}
    facts = {
        "command": command_line("bench.exl2_curve"),
        "model": options.model.name,
        "calibration": Path(options.calibration).name,
        "validation": Path(options.validation).name,
        "windows": options.windows,
        "window_tokens": options.window_tokens,
        "reference_ppl_per_token": round(float((reference_D.sum() / tokens_D.sum()).exp()), 4),
        "environment": environment(CPU),
    }
    for seed in range(options.draws):
        tokens_WT = calibration_windows(
            [(text, options.windows)], tokenizer, window_tokens=options.window_tokens, seed=seed
        )
        calibration = Calibration(tokens_WT, WINDOWS_PER_BATCH, from_float=True)
        started = time.perf_counter()
        measured = measure(judge, calibration)
        print(f"draw {seed}: measured in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        chosen = {(way, target): WAYS[way](measured, shapes, target) for way, target in found}
        different = {tuple(mixtures.items()): mixtures for mixtures in chosen.values()}
        models = zip(different, solved(judge, calibration, list(different.values())), strict=True)
        results = {mixtures: _judged(judge, reference, dense) for mixtures, dense in models}
        for key, mixtures in chosen.items():
            found[key].append(results[tuple(mixtures.items())])
            spent[key] = stored(mixtures, shapes)
        # a run that is stopped leaves the draws that it has
        rows = [_row(key, found, spent[key], reference_D, tokens_D) for key in found]
        options.out.write_text(json.dumps(facts | {"draws": seed + 1, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
