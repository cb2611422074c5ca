"""Perplexity of ways to quantize, on the same checkpoint, calibration tokens and evaluator, with paired intervals.

    python -m bench.quality --model DIR --calibration FILE --validation FILE \
        --way "quantkit:" --way "no search:scale_candidates=0" --way "gptqmodel:engine=gptqmodel" --set bits=3

A way is NAME:KEY=VALUE,... with keys of [quantize], `activations`, `engine`, `format` and
`compute_dtype`. An engine gets the same
calibration tokens, and what it leaves is judged by quantkit's reader and evaluator, like everything else. Every way
is built for each of several calibration draws (recipe seeds). Losses are compared with the first way document by
document; the interval is a 95 % bootstrap over documents of the mean difference in nats per token, draws averaged.
Inside it is a tie. The divergence from the source (mean_kld, nats per token) is compared in the same way; it has no
share in the luck of the words that the text goes on with, and so tells ways apart that perplexity does not.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.ways import Way, command_line, parse_pairs, parse_way, recipe_of
from quantkit.checkpoint.index import open_checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.source import WeightSource, head_tensors
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.formats import READERS
from quantkit.machine import environment
from quantkit.pipeline import build
from quantkit.recipe import Recipe
from quantkit.texts import load_text_set
from quantkit.validation.perplexity import compare, final_states
from quantkit.validation.text import EvaluationText, evaluation_text

RESAMPLES = 4000
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Outcome:
    """What came of a way, and what the last draw's record says of it.

    Attributes:
        nats: [draws, documents], what it spends on each document.
        divergence: [draws, documents], the sum of KL(source || way) over each document's tokens, in nats.
    """

    nats: torch.Tensor
    divergence: torch.Tensor
    bits_per_weight: float
    record: dict[str, Any]


class Judge:
    """Losses of any weights on one text, by document.

    Args:
        model: the source's folder.
        validation: text set or file.
        window_tokens: most tokens the model reads at once.
    """

    def __init__(self, model: Path, validation: str, window_tokens: int) -> None:
        self.source = open_checkpoint(model)
        tokenizer = load_tokenizer(model, vocab_size=self.source.config["vocab_size"])
        self.text: EvaluationText = evaluation_text(
            [(load_text_set(validation, "validation"), None)], tokenizer, window_tokens=window_tokens
        )
        self.decoder = Decoder(self.source.config, self.source.family, device=CPU, dtype=torch.float32)
        of_token = [window.document for window in self.text.windows for _ in window.targets]
        self.document_N = torch.tensor(of_token)
        self._expected = self._states(self.source)

    def by_document(self, weights: WeightSource) -> torch.Tensor:
        """Nats [documents] that the weights spend on each document."""
        return self.compared(weights)[0]

    def compared(self, weights: WeightSource) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats [documents] that the weights spend, and the divergence [documents] from the source."""
        found = compare(self._expected, self._states(weights), self.text.targets)
        return self._summed(found.loss), self._summed(found.divergence)

    def _states(self, weights: WeightSource) -> tuple[torch.Tensor, torch.Tensor]:
        states = final_states(weights, self.text, self.decoder, windows_per_batch=8)
        return states, self.decoder.head(head_tensors(weights))

    def _summed(self, found_N: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.text.documents, dtype=torch.float64).index_add_(0, self.document_N, found_N)


def run_way(way: Way, options: argparse.Namespace, judge: Judge, scratch: Path) -> Outcome:
    """One way, built and judged for every draw."""
    rows = []
    for seed in range(options.draws):
        recipe = Recipe.of(
            recipe_of(
                way,
                options.model,
                {options.calibration: options.windows},
                options.window_tokens,
                seed=seed,
                threads=options.threads,
            )
        )
        out = scratch / f"{way.name}-{seed}".replace(" ", "-")
        done = build(recipe, out=out, device=CPU, validated=False, fresh=True)
        (artifact,) = READERS[way.format].variants(out).values()
        rows.append(judge.compared(artifact))
    nats, divergence = map(torch.stack, zip(*rows, strict=True))
    return Outcome(nats, divergence, artifact.bits_per_weight, done.record)


def interval(difference_D: torch.Tensor, weight_D: torch.Tensor) -> tuple[float, float, float]:
    """Mean difference in nats per token and its 95 % bootstrap interval over documents.

    Args:
        difference_D: nats per document, draws averaged.
        weight_D: tokens per document.
    """
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(difference_D), (RESAMPLES, len(difference_D)), generator=generator)
    means = difference_D[picks].sum(1) / weight_D[picks].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(difference_D.sum() / weight_D.sum()), low, high


def verdict(difference: tuple[float, float, float]) -> str:
    """What an interval around a difference in nats says; less is better."""
    _, low, high = difference
    return "tie" if low <= 0 <= high else ("better" if high < 0 else "worse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="keys common to all ways, as KEY=VALUE,...")
    parser.add_argument("--way", action="append", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    judge = Judge(options.model, options.validation, options.window_tokens)
    tokens_D = torch.bincount(judge.document_N).double()
    reference_D = judge.by_document(judge.source)
    rows, first = [], None
    with tempfile.TemporaryDirectory() as scratch:
        for text in options.way:
            way = parse_way(text, parse_pairs(",".join(options.set)))
            outcome = run_way(way, options, judge, Path(scratch))
            nats, record = outcome.nats, outcome.record
            ratios = ((nats.sum(1) - reference_D.sum()) / tokens_D.sum()).exp()
            first = first or outcome
            against = interval((nats - first.nats).mean(0), tokens_D)
            kld_against = interval((outcome.divergence - first.divergence).mean(0), tokens_D)
            rows.append(
                {
                    "way": way.name,
                    "format": way.format,
                    "engine": record["engine_facts"] or "quantkit",
                    "settings": {
                        **record["recipe"]["quantize"],
                        "activations": way.activations,
                        "compute_dtype": way.compute_dtype,
                    },
                    "bits_per_weight": round(outcome.bits_per_weight, 4),
                    "ratio": round(float(ratios.mean()), 5),
                    "ratio_by_draw": [round(float(ratio), 5) for ratio in ratios],
                    "mean_kld": round(float(outcome.divergence.sum(1).mean() / tokens_D.sum()), 6),
                    "against_first_nats_per_token": [round(value, 6) for value in against],
                    "against_first_kld": [round(value, 6) for value in kld_against],
                    "verdict": "first" if outcome is first else verdict(against),
                    "kld_verdict": "first" if outcome is first else verdict(kld_against),
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    reference = float((reference_D.sum() / tokens_D.sum()).exp())
    facts = {
        "command": command_line("bench.quality"),
        "model": options.model.name,
        "calibration": Path(options.calibration).name,
        "validation": Path(options.validation).name,
        "windows": options.windows,
        "window_tokens": options.window_tokens,
        "reference_ppl_per_token": round(reference, 4),
        "environment": environment(CPU),
        "rows": rows,
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
