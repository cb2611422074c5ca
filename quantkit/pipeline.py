"""The one place that joins the stages: recipe, checkpoint, calibration, stream, format, validation, record, card."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.tokens import calibration_windows
from quantkit.checkpoint.index import Checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.tokenizer import Tokenizer
from quantkit.engines.env import find_engine
from quantkit.errors import RefusedError
from quantkit.formats import open_variants
from quantkit.formats.contract import Format, InPlace, LaidOut, TellsCalibration
from quantkit.formats.shards import read_item, write_item
from quantkit.judgement import check_window, judge, judged_as_stated, judged_by, stated_texts
from quantkit.machine import deciding_versions, device_model, environment, peak_memory_bytes, use_threads
from quantkit.methods import METHODS, Method, Survey
from quantkit.plan import Plan, make_plan, require_here
from quantkit.progress import Progress, timed
from quantkit.recipe import OWN_ENGINE, Recipe, fingerprint, public_name
from quantkit.report.card import keep
from quantkit.report.record import CARD, SCHEMA, output_entries, read_record, require_unchanged
from quantkit.source_pass import Calibration
from quantkit.sources import Source, describe_checkpoint, open_source, tokenizer_of
from quantkit.stream import Sinks, stream, survey
from quantkit.texts import TextSet, load_text_set
from quantkit.upstream import adopt, quantize_upstream, settled
from quantkit.validation.compare import REFERENCE_RUNTIME
from quantkit.workdir import Workdir, discard_work, locked, open_workdir, refuse_other


@dataclass(frozen=True)
class Build:
    """What `build` did.

    Attributes:
        out: the artifact's folder.
        record: its record.
        reused: it was there already, complete and unchanged.
        unpinned: commit that the recipe's model was resolved to, if the recipe names none.
    """

    out: Path
    record: dict[str, Any]
    reused: bool
    unpinned: str | None = None


@dataclass
class Stopwatch:
    """Wall seconds by stage."""

    started: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        spent, self.started = now - self.started, now
        return round(spent, 3)


def default_out(recipe: Recipe, name: str) -> Path:
    """`artifacts/<model>-<FORMAT>`, or with the recipe's own name where a model has several of a format.

    Args:
        name: the recipe file's stem.
    """
    model = public_name(recipe.model.id).rsplit("/")[-1]
    return Path("artifacts") / f"{model}-{name.upper()}"


def plan(recipe: Recipe, *, out: Path, device: torch.device, progress: Progress, here: bool = True) -> Plan:
    """What building a recipe will need; see `quantkit.plan`.

    Args:
        recipe: what would be built.
        out: where.
        device: what would compute it.
        progress: told what is going on.
        here: on this machine, so refuse what it cannot run.
    """
    recipe = settled(recipe)
    use_threads(recipe.compute.threads)
    checkpoint = describe_checkpoint(recipe.model.id, recipe.model.revision, progress)
    return _planned(recipe, checkpoint, _method(recipe, checkpoint, progress), out, device, here=here)


def build(
    recipe: Recipe,
    *,
    out: Path,
    device: torch.device,
    fresh: bool = False,
    validated: bool = True,
    progress: Progress | None = None,
) -> Build:
    """Take a checkpoint to an artifact with its record and card; finished layers survive an interruption.

    Args:
        recipe: what to build.
        out: the artifact's folder; appears whole or not at all.
        device: where to compute.
        fresh: throw away what an earlier run left.
        validated: judge the artifact against its source afterwards.
        progress: told what is going on.

    Raises:
        QuantkitError: whatever is wrong; nothing is left half-written.
    """
    progress = progress or Progress()
    recipe = settled(recipe)
    use_threads(recipe.compute.threads)
    with locked(out):
        watch = Stopwatch()
        source = open_source(recipe.model.id, recipe.model.revision, progress)
        stages = {"source": watch.lap()}
        _refuse_other_licence(recipe, source)
        unpinned = source.revision if recipe.model.revision is None else None
        method = _method(recipe, source.checkpoint, progress)
        texts = {}
        if _reads_text(recipe, method):
            texts = {
                name: load_text_set(name, "calibration") for name, wanted in recipe.calibration.texts.items() if wanted
            }
        engine = recipe.engine if method.engine is None else method.engine
        identity = _identity(recipe, source, texts, device, engine, method.read)
        record = _finished(out, identity, fresh=fresh)
        reused = record is not None
        if record is None:
            needed = _planned(recipe, source.checkpoint, method, out, device, validated=validated)
            record = _make(recipe, source, method, texts, identity, out, device, fresh, progress, needed, watch, stages)
        if validated and not (
            record["recipe"] == recipe.resolved() and judged_as_stated(record, recipe.validation.texts)
        ):
            record = record | {"recipe": recipe.resolved()}
            variants = open_variants(recipe.format, out)
            runtimes = tuple(dict.fromkeys((REFERENCE_RUNTIME, *recipe.validation.require)))
            sets = [load_text_set(name, "validation") for name in recipe.validation.texts]
            result = judge(variants, source, recipe, sets, device=device, runtimes=runtimes, progress=progress)
            record = keep(out, record | judged_by(sets, result))
    return Build(out, record, reused, unpinned)


def _method(recipe: Recipe, checkpoint: Checkpoint, progress: Progress) -> Method:
    """The recipe's method; one whose survey was made before is settled by it at once."""
    method = METHODS[recipe.format](recipe.quantize, checkpoint.config)
    if method.survey is None or method.survey.earlier is None:
        return method
    findings, word = method.survey.earlier(list(checkpoint.linear_shapes()))
    progress.stage(word)
    return method.survey.settle([findings])


def _planned(
    recipe: Recipe,
    checkpoint: Checkpoint,
    method: Method,
    out: Path,
    device: torch.device,
    *,
    here: bool = True,
    validated: bool = True,
) -> Plan:
    """The plan of a build, once everything that can be known before it is known to be right.

    Args:
        here: refuse what this machine cannot run.
        validated: refuse what could not be validated.
    """
    tokenizer_of(checkpoint)
    decoder = _decoder(recipe, checkpoint, device)
    if _reads_text(recipe, method):
        check_window(recipe.calibration.window_tokens, decoder, "calibration.window_tokens")
    if validated:
        check_window(recipe.validation.window_tokens, decoder, "validation.window_tokens")
    found = make_plan(recipe, checkpoint, method, out=out, device=device)
    if here:
        require_here(found, recipe, method, out=out, device=device)
    return found


def _refuse_other_licence(recipe: Recipe, source: Source) -> None:
    """Stop where the recipe announces another licence than the source's own repository.

    Raises:
        RefusedError: naming both.
    """
    sections = {"release": recipe.release, "quantize": recipe.quantize}
    stated = {f"{name}.license": getattr(section, "license", None) for name, section in sections.items()}
    own = source.license.get("license")
    for key, licence in stated.items():
        if None not in (licence, own) and licence != own:
            raise RefusedError(
                f"the recipe says {licence}, the model's own card {own}",
                where=key,
                fix="leave the key out, or state the source's licence: a quantized model keeps it",
            )


def _reads_text(recipe: Recipe, method: Method) -> bool:
    """Whether calibration text is used: by an engine always, for it is not known what it does with it."""
    return recipe.engine != OWN_ENGINE or bool(method.solvers.needs)


def _identity(
    recipe: Recipe,
    source: Source,
    texts: dict[str, TextSet],
    device: torch.device,
    engine: str,
    read: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that decides the artifact's bytes; the same identity gives the same files."""
    deciding = recipe.deciding()
    # what it was resolved to: a recipe that is pinned to it afterwards means the same build
    deciding["model"] = deciding["model"] | {"revision": source.revision}
    identity = {
        "recipe": deciding,
        "source": source.sha256,
        "texts": {public_name(name): text_set.sha256 for name, text_set in texts.items()},
        "versions": deciding_versions(),
        "device": device_model(device),
    }
    if engine != OWN_ENGINE:
        identity["engine"] = find_engine(engine).pins
    return identity | ({"read": dict(read)} if read else {})


def _finished(out: Path, identity: dict[str, Any], *, fresh: bool) -> dict[str, Any] | None:
    """The record of an artifact that is there already and is this one; None if it is to be made.

    Raises:
        RefusedError: the folder holds something else (`fresh` allows another build of quantkit, nothing more).
        RunFailedError: it is this one, but its files were changed.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    record = read_record(out) if out.is_dir() else None
    if record is None:
        raise RefusedError(
            f"{out} exists and is no artifact of quantkit", where=str(out), fix="choose another folder with --out"
        )
    if fresh:
        return None
    refuse_other(record["identity"], identity, where=out)
    # a kill may have come between card and record; publishing looks at both
    require_unchanged(out, record, but=(CARD,))
    discard_work(out)
    return record


def _make(
    recipe: Recipe,
    source: Source,
    method: Method,
    texts: dict[str, TextSet],
    identity: dict[str, Any],
    out: Path,
    device: torch.device,
    fresh: bool,
    progress: Progress,
    needed: Plan,
    watch: Stopwatch,
    stages: dict[str, float],
) -> dict[str, Any]:
    """Quantize, assemble and put the artifact in place; returns its record."""
    calibration = _calibration(recipe, texts, source.tokenizer())
    decoder = _decoder(recipe, source.checkpoint, device)
    # a recipe that is refused leaves no work that the mended one would be held against
    work = open_workdir(out, identity, fresh=fresh)
    stages["prepare"] = watch.lap()
    if work.earlier_seconds:
        stages["earlier runs"] = round(work.earlier_seconds, 3)

    if recipe.engine == OWN_ENGINE:
        if method.survey is not None:
            assert calibration is not None, "a survey needs text"
            method = _surveyed(source.checkpoint, method.survey, calibration, decoder, work, progress)
            stages["measure"] = watch.lap()
        if calibration is not None and isinstance(method.format, TellsCalibration):
            texts_named = [public_name(name) for name in texts]
            method = replace(method, format=method.format.calibrated(texts_named, *calibration.tokens_WT.shape))
        places = _lay_out(source.checkpoint, method.format, work)
        _quantize(source.checkpoint, method, calibration, decoder, work, places, progress)
        stages["quantize"] = watch.lap()
        progress.stage("writing the artifact")
        items = [work.path(name) for name in source.checkpoint.items]
        variants = work.assemble(
            lambda folder: method.format.assemble(source.checkpoint, items, folder),
            kept=frozenset() if places is None else places.files,
        )
        engine = None
    else:
        assert calibration is not None, "an engine is always given text"
        progress.stage(f"{recipe.engine} is quantizing")
        scratch = work.folder / "engine"
        engine = quantize_upstream(
            find_engine(recipe.engine), source.checkpoint.folder, calibration.tokens_WT, recipe, scratch, device=device
        )
        stages["quantize"] = watch.lap()
        progress.stage("writing the artifact")
        work.assemble(lambda folder: adopt(scratch, source.checkpoint, folder))
        opened = open_variants(recipe.format, work.artifact)
        variants = {name: artifact.tensors.files for name, artifact in opened.items()}
    stages["write"] = watch.lap()
    record = _record(recipe, source, texts, identity, device, calibration)
    record["chat"] = _chat_example(source.tokenizer(), recipe.validation.prompt)
    record["engine_facts"] = engine
    record["reproducible"] = engine is None
    record["variants"] = variants
    record["outputs"] = output_entries(work.artifact)
    stages["hash"] = watch.lap()
    record["build"] = {
        "items": work.facts,
        "seconds": stages,
        "wall_seconds": round(sum(stages.values()), 3),
        "operations": needed.operations if engine is None else {},
        "bytes": {
            "read": needed.source_bytes,
            "written": sum(entry["size_bytes"] for entry in record["outputs"]),
        },
        "peak_memory_bytes": peak_memory_bytes(device, engine=engine is not None),
    }
    if method.allotments:
        record["build"]["allotments"] = dict(method.allotments)
    record = keep(work.artifact, record)
    work.publish()
    return record


def _lay_out(checkpoint: Checkpoint, form: Format, work: Workdir) -> LaidOut | None:
    """The files that solved items go straight into, for a format that has such."""
    if not isinstance(form, InPlace):
        return None
    places = work.lay_out(lambda folder: form.lay_out(checkpoint, folder))
    if places.fresh:
        work.forget_items()
    return places


def _quantize(
    checkpoint: Checkpoint,
    method: Method,
    calibration: Calibration | None,
    decoder: Decoder,
    work: Workdir,
    places: LaidOut | None,
    progress: Progress,
) -> None:
    """Stream the checkpoint and keep every item; those that are kept already are only walked through."""

    def finished(name: str) -> dict[str, torch.Tensor] | None:
        if not work.is_finished(name):
            return None
        placed = {} if places is None else places.read(name)
        return method.format.decode_item(read_item(work.path(name)) | placed)

    def write(tensors: dict[str, torch.Tensor], seconds: dict[str, float], path: Path) -> None:
        with timed(seconds, "write"):
            write_item(path, tensors if places is None else places.write(tensors))

    names = checkpoint.items
    sinks = Sinks(
        linear=progress.linear,
        item=lambda name: progress.steps("quantize", names.index(name), len(names)),
    )
    for item in stream(
        checkpoint,
        method.solvers,
        calibration,
        decoder=decoder,
        stored_dtype=method.format.stored_dtype,
        skip=method.format.skip,
        finished=finished,
        sinks=sinks,
    ):
        if item is None:
            continue
        with timed(item.seconds, "pack"):
            tensors = method.format.encode_item(item)
        facts = {"linears": [asdict(fact) for fact in item.facts], "seconds": item.seconds}
        work.finish(item.name, partial(write, tensors, item.seconds), facts)
    progress.steps("quantize", len(names), len(names))


def _surveyed(
    checkpoint: Checkpoint,
    wanted: Survey,
    calibration: Calibration,
    decoder: Decoder,
    work: Workdir,
    progress: Progress,
) -> Method:
    """The method as it is after its survey; layers that were measured before an interruption are not measured again."""
    names = checkpoint.items[1:-1]
    sinks = Sinks(item=lambda name: progress.steps("measure", checkpoint.items.index(name), len(names) + 1))
    if any(work.noted(name) is None for name in names):
        for found in survey(
            checkpoint,
            calibration,
            wanted.measuring,
            decoder=decoder,
            known=lambda name: work.noted(name) is not None,
            sinks=sinks,
        ):
            if found is not None:
                work.note(*found)
    return wanted.settle([work.noted(name) for name in names])


def _decoder(recipe: Recipe, checkpoint: Checkpoint, device: torch.device) -> Decoder:
    return Decoder(checkpoint.config, checkpoint.family, device=device, dtype=getattr(torch, recipe.compute.dtype))


def _record(
    recipe: Recipe,
    source: Source,
    texts: dict[str, TextSet],
    identity: dict[str, Any],
    device: torch.device,
    calibration: Calibration | None,
) -> dict[str, Any]:
    facts = None
    if calibration is not None:
        section = recipe.calibration
        facts = {
            "texts": [
                {
                    "name": public_name(name),
                    "sha256": text_set.sha256,
                    "revision": text_set.revision,
                    "windows": section.texts[name],
                }
                for name, text_set in texts.items()
            ],
            "window_tokens": section.window_tokens,
            "seed": section.seed,
            "tokens_sha256": fingerprint(calibration.tokens_WT.tolist()),
        }
    return {
        "schema": SCHEMA,
        "format": recipe.format,
        "engine": recipe.engine,
        "recipe": recipe.resolved(),
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "source": source.facts(),
        "calibration": facts,
        "environment": environment(device),
        "validation_texts": stated_texts(recipe.validation.texts),
        "validation": None,
    }


def _chat_example(tokenizer: Tokenizer, prompt: str) -> str | None:
    """A question as the model reads it; None for a model without a chat template."""
    return tokenizer.render([("user", prompt)], answer=True) if tokenizer.has_template else None


def _calibration(recipe: Recipe, texts: dict[str, TextSet], tokenizer: Tokenizer) -> Calibration | None:
    if not texts:
        return None
    section = recipe.calibration
    parts = [(text_set, section.texts[name]) for name, text_set in texts.items()]
    tokens = calibration_windows(parts, tokenizer, window_tokens=section.window_tokens, seed=section.seed)
    return Calibration(tokens, recipe.compute.windows_per_batch, section.activations == "float")
