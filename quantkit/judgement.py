"""An artifact judged against its source, for `build` and for `validate`."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.index import Checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.tokenizer import Tokenizer
from quantkit.engines.env import REFERENCE_RUNTIME, find_engine, installed_facts, require_readers, why_not
from quantkit.engines.runtime import evaluate
from quantkit.errors import RefusedError, RunFailedError
from quantkit.formats import READERS, detect, open_variants, require_same_model
from quantkit.formats.contract import Artifact
from quantkit.home import require_home
from quantkit.lock import alone
from quantkit.machine import deciding_versions, device_model, fix_arithmetic, release_freed_memory
from quantkit.nano import NAME as NANO
from quantkit.progress import Progress
from quantkit.recipe import WHOLE, Recipe, ValidationSection, checked, fingerprint, public_name
from quantkit.report.card import keep
from quantkit.report.record import CARD, read_record, recorded_recipe, require_unchanged, require_weights_here
from quantkit.report.verdict import gates_of, judged_on_own_texts, told
from quantkit.sources import Source, open_source
from quantkit.texts import TextSet, known_sha256, load_text_set, own_text, require_known
from quantkit.validation.compare import (
    failed,
    gated,
    logits_result,
    no_numbers,
    not_run,
    reference_figures,
    reference_result,
)
from quantkit.validation.reference import Judged, Settings, run_reference
from quantkit.validation.text import EvaluationText, evaluation_text

# a record is published: folders of this machine are nobody's business
DIRECTORIES = re.compile(r"(?<![\w.:/])(?:/[^\s/'\"]+)*/(?=[^\s/'\"])")


@alone(writes=True)
def validate(
    folder: Path,
    *,
    model: str | None,
    texts: tuple[str, ...],
    runtime: str,
    device: torch.device,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Judge an artifact of any known format, ours or not; the result goes into its record where there is one.

    The record keeps verdicts on the recipe's own texts alone: what other texts give is returned and not kept.

    Args:
        folder: the artifact.
        model: the reference; None takes the record's source.
        texts: text sets to judge by; empty takes the record's, or polish-core.
        runtime: "reference", "native", "both", or an engine's name.
        device: where to compute.
        progress: told what is going on.
        say: told when the result is not kept.

    Returns:
        the document of `validate --json`.
    """
    progress = progress or Progress()
    require_home()
    for text_set in texts:
        require_known(text_set, "validation", where="--text")
    record = read_record(folder)
    if record is not None:
        require_weights_here(folder, record)
        progress.stage("checking the artifact's hashes")
        require_unchanged(folder, record, but=(CARD,))  # the card is written anew
    name = detect(folder)
    runtimes = _runtimes(runtime, READERS[name].native_engine)
    require_readers(runtimes, name, where="--runtime")
    variants = open_variants(name, folder)
    model = model or _recorded_source(record, folder)
    recipe = _recipe_of(record, name, model)
    fix_arithmetic(recipe.compute.threads)
    source = open_source(model, _recorded_revision(record, model), progress)
    changes: dict[str, Any] = {"texts": dict.fromkeys(texts, WHOLE)} if texts else {}
    if record is None:
        # nobody chose these settings, so they give way to what the model can do
        context = int(source.checkpoint.config["max_position_embeddings"])
        changes["window_tokens"] = min(recipe.validation.window_tokens, context)
        changes["generated_tokens"] = recipe.validation.generated_tokens if source.tokenizer.has_template else 0
    recipe = recipe.model_copy(update={"validation": recipe.validation.model_copy(update=changes)})
    if record is not None and source.sha256 != record["source"]["sha256"]:
        raise RefusedError(
            f"{source.id} is not the model this artifact was made from",
            where=str(folder),
            fix="give the source with --model; its files must hash as the record says",
        )
    earlier = record["validation"] if record is not None else None
    section = recipe.validation
    check_validation(section, name, decoder_of(recipe, source.checkpoint, device), source.tokenizer)
    text = text_to_judge_on(section, source.tokenizer, progress)
    result = judge(variants, source, recipe, text, device=device, runtimes=runtimes, progress=progress, earlier=earlier)
    if record is not None and _are_own_texts(section, text, record):
        keep(folder, record | judged_by(text, result))
    elif record is not None:
        say("judged on other texts than the recipe's: the verdict in the record stays as it was")
    return result


def judged_by(text: EvaluationText, result: dict[str, Any]) -> dict[str, Any]:
    """What a record holds of a judgement by the recipe's own texts."""
    sets = [{"name": part.name, "sha256": part.sha256} for part in text.parts]
    return {"validation_texts": sets, "validation": result}


def stated_texts(names: Iterable[str]) -> list[dict[str, Any]]:
    """Text sets that a recipe names, as a record holds them, without fetching any."""
    return [{"name": public_name(name), "sha256": known_sha256(name, "validation")} for name in names]


def judged_as_stated(record: dict[str, Any], names: Iterable[str]) -> bool:
    """Whether a record's verdict is on the texts that a recipe names, as they are now; the Hub's go by their names."""
    stated, recorded = stated_texts(names), record.get("validation_texts") or []
    return (
        judged_on_own_texts(record)
        and [
            {"name": now["name"], "sha256": now["sha256"] or then["sha256"]}
            for now, then in zip(stated, recorded, strict=False)
        ]
        == recorded
    )


def _are_own_texts(section: ValidationSection, text: EvaluationText, record: dict[str, Any]) -> bool:
    """Whether text is that of a record's recipe; a file of one's own is known by its content alone."""
    taken = {part.name: windows for part, windows in zip(text.parts, section.texts.values(), strict=True)}
    if list(taken.items()) != list(record["recipe"]["validation"]["texts"].items()):
        return False
    recorded = {known["name"]: known["sha256"] for known in record.get("validation_texts") or []}
    return all(
        not own_text(name) or recorded.get(part.name) == part.sha256
        for name, part in zip(section.texts, text.parts, strict=True)
    )


def check_window(num_tokens: int, decoder: Decoder, key: str) -> None:
    """Refuse windows that are longer than the model can read in one piece."""
    if num_tokens > decoder.window_limit:
        raise RefusedError(
            f"{num_tokens} tokens per window are more than the model's {decoder.window_limit}",
            where=key,
            fix=f"set {key} to {decoder.window_limit} or less",
        )


def check_validation(section: ValidationSection, form: str, decoder: Decoder, tokenizer: Tokenizer | None) -> None:
    """Stop at a [validation] that the model, the format or the names of text sets do not allow; nothing is fetched.

    Args:
        section: to be checked.
        form: the artifact's format.
        decoder: the model's.
        tokenizer: the model's; None where no more than its config.json is known.

    Raises:
        RefusedError: naming the key.
    """
    check_window(section.window_tokens, decoder, "validation.window_tokens")
    if section.generated_tokens and tokenizer is not None:
        if not tokenizer.has_template:
            raise RefusedError(
                "the model has no chat template, so it cannot be asked validation.prompt",
                where="validation.generated_tokens",
                fix="leave the question out with --set validation.generated_tokens=0 and take text without chats, "
                "such as polish-core-documents; or add the chat template to the model's tokenizer files",
            )
        asked = len(tokenizer.encode(tokenizer.render([("user", section.prompt)], answer=True)))
        if asked + section.generated_tokens >= decoder.window_limit:
            raise RefusedError(
                f"the prompt's {asked} tokens and {section.generated_tokens} of an answer are more than the model's "
                f"{decoder.window_limit}",
                where="validation.generated_tokens",
                fix="ask for fewer, or a shorter validation.prompt",
            )
    for name in section.texts:
        require_known(name, "validation")
    require_readers(section.require, form)


def text_to_judge_on(
    section: ValidationSection,
    tokenizer: Tokenizer,
    progress: Progress,
    load: Callable[[str], TextSet] = lambda name: load_text_set(name, "validation"),
) -> EvaluationText:
    """The text of a [validation] that was checked.

    Args:
        section: names the text sets, and how much of each.
        tokenizer: the model's.
        progress: told what is going on.
        load: gives a text set by its name.

    Raises:
        RefusedError: a text set cannot be read or is too short.
        UnavailableError: a text set must be fetched and cannot be.
    """
    progress.stage("reading the validation text")
    parts = [(load(name), None if windows == WHOLE else int(windows)) for name, windows in section.texts.items()]
    return evaluation_text(parts, tokenizer, window_tokens=section.window_tokens, seed=section.seed)


def decoder_of(recipe: Recipe, checkpoint: Checkpoint, device: torch.device) -> Decoder:
    """The code of a recipe's model, without weights."""
    return Decoder(checkpoint.config, checkpoint.family, device=device, dtype=getattr(torch, recipe.compute.dtype))


def judge(
    variants: Mapping[str, Artifact],
    source: Source,
    recipe: Recipe,
    text: EvaluationText,
    *,
    device: torch.device,
    runtimes: Sequence[str],
    progress: Progress,
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The document of `validate --json` for one artifact.

    Args:
        variants: the artifact's variants by name, opened for reading.
        source: what it is held against.
        recipe: its validation and compute sections say how.
        text: to judge by.
        device: where to compute.
        runtimes: who runs the artifact: "reference", or names of engines; each once.
        progress: told what is going on.
        earlier: a validation of the same bytes; on the same text its results of other runtimes are kept.
    """
    for artifact in variants.values():
        require_same_model(recipe.format, artifact, source.checkpoint)
    release_freed_memory()  # of the build
    tokenizer = source.tokenizer
    section = recipe.validation
    decoder = decoder_of(recipe, source.checkpoint, device)
    settings = Settings(recipe.compute.windows_per_batch, section.prompt, section.generated_tokens)
    progress.stage("running the reference model")
    key = fingerprint(
        [
            source.sha256,
            text.fingerprint,
            asdict(settings),
            recipe.compute.model_dump(),
            deciding_versions(),
            device_model(device),
        ]
    )
    reference = run_reference(
        source.checkpoint, text, decoder, tokenizer, settings, fingerprint=key, still_so=source.require_unchanged
    )
    expected = reference_figures(reference, text)
    if odd := no_numbers(expected):
        raise RunFailedError(
            f"the source model's own {odd[0]} on the text that is judged by is {expected[odd[0]]}",
            where=source.id,
            fix="look at its config.json and weights with the model's authors; no artifact of it can be judged",
        )
    judged = []
    for name, artifact in variants.items():
        results = []
        for wanted in runtimes:
            progress.stage(f"judging the artifact ({', '.join((*((name,) if len(variants) > 1 else ()), wanted))})")
            if wanted == REFERENCE_RUNTIME:
                results.append(reference_result(artifact, reference, text, decoder, tokenizer, settings))
            else:
                results.append(_engine_result(wanted, artifact, reference, text, device, recipe.compute.threads))
        judged.append((name, artifact, _kept(earlier, name, text, results) + results))
    return _document(judged, recipe, text, expected)


def _kept(
    earlier: dict[str, Any] | None, name: str, text: EvaluationText, results: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What other runtimes made of a variant before, on the same text."""
    if earlier is None or earlier["text"] != text.facts():
        return []
    asked = {result["runtime"] for result in results}
    before = [variant for variant in earlier["variants"] if variant["name"] == name]
    return [result for variant in before for result in variant["results"] if result["runtime"] not in asked]


def _engine_result(
    name: str, artifact: Artifact, reference: Judged, text: EvaluationText, device: torch.device, threads: int
) -> dict[str, Any]:
    """What an upstream package makes of the artifact, why it could not be asked, or what it said when it broke."""
    engine = find_engine(name)
    if reason := why_not(engine, device.type):
        return not_run(name, reason)
    tensors = artifact.tensors
    try:
        logits = evaluate(
            engine, tensors.folder, text.windows, files=tensors.files, device=device.type, threads=threads
        )
        result = logits_result(name, logits, reference, text)
    except RunFailedError as error:
        return failed(name, _in_one_line(error.what))
    facts = installed_facts(engine)
    return result | {"package": facts["package"], "version": facts["version"]}


def _in_one_line(what: str) -> str:
    """The first line of what went wrong and the last that the engine printed, paths cut to their last part."""
    lines = [line.strip() for line in what.splitlines()]
    said = " ".join(dict.fromkeys((lines[0], lines[-1])))
    return DIRECTORIES.sub("", said)


def _runtimes(wanted: str, native: str) -> list[str]:
    """Names of the runtimes that a word of the command line means."""
    return {"native": [native], "both": [REFERENCE_RUNTIME, native]}.get(wanted, [wanted])


def _document(
    judged: Sequence[tuple[str, Artifact, list[dict[str, Any]]]],
    recipe: Recipe,
    text: EvaluationText,
    expected: dict[str, Any],
) -> dict[str, Any]:
    variants = [_variant(name, artifact, recipe, expected, results) for name, artifact, results in judged]
    failures = told({variant["name"]: variant["gate"]["failures"] for variant in variants})
    return {
        "artifact": judged[0][1].tensors.folder.resolve().name,
        "format": recipe.format,
        "engine": recipe.engine,
        "text": text.facts(),
        "reference": expected,
        "variants": variants,
        "gate": {"passed": not failures, "failures": failures},
    }


def _variant(
    name: str, artifact: Artifact, recipe: Recipe, expected: dict[str, Any], results: list[dict[str, Any]]
) -> dict[str, Any]:
    files = artifact.tensors.files
    variant = {
        "name": name,
        "files": files,
        "bits_per_weight": artifact.bits_per_weight,
        "size_bytes": sum((artifact.tensors.folder / file).stat().st_size for file in files),
        "results": results,
    }
    section = recipe.validation
    return gated(variant, expected, gates_of(section, name), section.require)


def _recorded_source(record: dict[str, Any] | None, folder: Path) -> str:
    if record is None:
        raise RefusedError(
            "the artifact has no record that names its source",
            where=str(folder),
            fix="give the reference model with --model",
        )
    source = record["source"]
    if source["id"] != NANO and not source["on_hub"]:
        raise RefusedError(
            f"the artifact was made from a local folder, {source['id']}",
            where=str(folder),
            fix="give that folder with --model",
        )
    return str(source["id"])


def _recorded_revision(record: dict[str, Any] | None, model: str) -> str | None:
    """The commit that an artifact was made from, if `model` is what it was made from."""
    return record["source"]["revision"] if record is not None and model == record["source"]["id"] else None


def _recipe_of(record: dict[str, Any] | None, name: str, model: str) -> Recipe:
    """The recipe an artifact is judged by: its own, or the defaults for somebody else's."""
    if record is None:
        return checked({"format": name, "model": {"id": model}}, where="--model")
    return recorded_recipe(record)
