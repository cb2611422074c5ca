"""One artifact on its way from recipe to record: checked, planned, made item by item, put together, judged.

What is the same for several of them is made once. `quantkit.pipeline` decides whose turn it is.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.tokens import calibration_windows
from quantkit.checkpoint.index import Checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.tokenizer import Tokenizer
from quantkit.engines.env import REFERENCE_RUNTIME
from quantkit.errors import QuantkitError
from quantkit.footprint import judging_bytes
from quantkit.formats import open_variants
from quantkit.formats.contract import Format, InPlace, LaidOut, TellsCalibration
from quantkit.home import require_home
from quantkit.job import Build, Job, Once, Outcome
from quantkit.judgement import (
    check_validation,
    check_window,
    decoder_of,
    judge,
    judged_as_stated,
    judged_by,
    text_to_judge_on,
)
from quantkit.keeping import Behind, Keeping
from quantkit.machine import fix_arithmetic, peak_memory_bytes
from quantkit.methods import METHODS, Method
from quantkit.plan import Plan, make_plan, reads_text, require_here, require_memory_to_judge
from quantkit.progress import Progress, timed
from quantkit.provenance import (
    finished_record,
    identity_of,
    new_record,
    record_at,
    refuse_other_licence,
    refuse_other_recipe,
)
from quantkit.ranks import ALONE, Ranks
from quantkit.recipe import Recipe, public_name
from quantkit.report.card import keep
from quantkit.report.record import output_entries
from quantkit.solvers.dealt import Dealt
from quantkit.source_pass import Calibration, SourcePass
from quantkit.sources import Source, describe_checkpoint, open_source, tokenizer_of
from quantkit.stream import Sinks, Solvers, goes_on_quantized, stream
from quantkit.survey import survey
from quantkit.texts import TextSet, at_hand, load_text_set, require_known
from quantkit.upstream import adopt, adopt_files, prepare, prepared_items, quantize_upstream, settled
from quantkit.validation.text import EvaluationText
from quantkit.workdir import Workdir, open_workdir


class Making:
    """One artifact in the making, from recipe to record.

    Args:
        job: what to build.
        device: where to compute.
        progress: told what is going on.
        ranks: who make it together.
    """

    # known step by step
    method: Method
    needed: Plan
    source: Source
    _texts: dict[str, TextSet]
    _identity: Callable[[], dict[str, Any]]
    _decoder: Decoder
    _calibration: Calibration | None
    _work: Workdir
    _places: LaidOut | None

    def __init__(self, job: Job, device: torch.device, progress: Progress, ranks: Ranks = ALONE) -> None:
        self.job, self.device, self.progress, self.ranks = job, device, progress, ranks
        self.recipe = job.recipe
        self.error: QuantkitError | None = None
        self.record: dict[str, Any] | None = None
        self.passes: list[tuple[str, Callable[[SourcePass], Iterator[None]]]] = []
        self._reused = False
        self._text: EvaluationText | None = None  # to be judged on
        self._seconds = 0.0
        self._stages: dict[str, float] = {}
        self._engine_facts: dict[str, Any] | None = None

    @property
    def outcome(self) -> Outcome:
        """What became of it."""
        build = None
        if self.record is not None:
            unpinned = self.source.revision if self.recipe.model.revision is None else None
            build = Build(self.job.out, self.record, self._reused, unpinned, self._seconds)
        return Outcome(self.job.name, build, self.error)

    @contextmanager
    def turn(self, stage: str | None = None) -> Iterator[None]:
        """Work for this artifact: with its threads, timed, and an error is kept with it.

        Args:
            stage: of the record's seconds.
        """
        fix_arithmetic(self.recipe.compute.threads)
        spent: dict[str, float] = {}
        try:
            with timed(spent, "turn"):
                yield
        except QuantkitError as error:
            self.error = error
        self._seconds += spent.get("turn", 0.0)
        if stage is not None:
            self._stages[stage] = self._stages.get(stage, 0.0) + spent.get("turn", 0.0)

    def plan(self, once: Once, *, here: bool = True, reserved_bytes: int = 0) -> None:
        """Find out what it will need.

        Args:
            once: what others have opened already.
            here: on this machine, so refuse what it cannot run or fetch.
            reserved_bytes: of the disk, for others.
        """
        self.recipe = settled(self.recipe)
        # more threads than cores, and a trial tells nothing
        fix_arithmetic(min(self.recipe.compute.threads, os.cpu_count() or 1))
        recipe, model = self.recipe, self.recipe.model
        checkpoint = once(("described", model), partial(describe_checkpoint, model.id, model.revision, self.progress))
        self.method = _method(recipe, checkpoint, self.progress)
        # a model that is only described has no tokenizer, and is not to be built on this machine
        here = here and not checkpoint.described
        if here:
            refuse_other_recipe(self.job.out, recipe)
        tokenizer = None if checkpoint.described else once(("tokenizer", model), partial(tokenizer_of, checkpoint))
        self._check(checkpoint, tokenizer, once, validated=True)
        self._find_needs(checkpoint, here=here, reserved_bytes=reserved_bytes, timed=True)
        if tokenizer is not None and (here or all(at_hand(name) for name in recipe.validation.texts)):
            self._text = self._held_out(tokenizer, once)
            self._find_needs_of_judging(checkpoint, self._text, here=here)
        if here and tokenizer is not None:
            texts = self._calibration_texts(once, fetched=False)
            _tokens(recipe, texts, checkpoint.folder, tokenizer, once)

    def open(self, once: Once, *, fresh: bool, validated: bool, reserved_bytes: int) -> None:
        """Find the artifact complete, or find out what it will need. Hold its lock from here on.

        Args:
            once: what others have opened already.
            fresh: throw away what an earlier run left.
            validated: refuse what could not be validated.
            reserved_bytes: of the disk, for others.
        """
        self.recipe = settled(self.recipe)
        fix_arithmetic(self.recipe.compute.threads)
        recipe, model = self.recipe, self.recipe.model
        # of a large model hashing takes a while
        record_at(self.job.out)
        with timed(self._stages, "source"), self.ranks.first_goes_first():
            self.source = once(("source", model), partial(open_source, model.id, model.revision, self.progress))
        refuse_other_licence(recipe, self.source)
        self.method = _method(recipe, self.source.checkpoint, self.progress)
        with self.ranks.first_goes_first():
            self._texts = self._calibration_texts(once, fetched=True)
        engine = recipe.engine if self.method.engine is None else self.method.engine
        decided = cache(partial(identity_of, recipe, self.source, self._texts, self.device, engine, self.method.read))

        def identity() -> dict[str, Any]:
            # asked when it is needed: it waits for the hashes of the source; and whenever something is kept under them
            found = decided()
            self.source.require_unchanged()
            return found

        self._identity = identity
        if self.ranks.size > 1:
            self.ranks.require_alike(self._identity())
        self.record = self.ranks.from_first(partial(finished_record, self.job.out, self._identity, fresh=fresh))
        self._reused = self.record is not None
        judging = validated and not self._is_judged
        if self.record is None or judging:
            # checked now, used later
            tokenizer = once(("tokenizer", model), lambda: self.source.tokenizer)
            self._check(self.source.checkpoint, tokenizer, once, validated=judging)
        if self.record is None:
            self._find_needs(self.source.checkpoint, here=True, reserved_bytes=reserved_bytes)
        if judging:
            self._text = self._held_out(self.source.tokenizer, once)
            if self.record is None:
                self._find_needs_of_judging(self.source.checkpoint, self._text, here=True)

    @property
    def _reads_text(self) -> bool:
        """Whether calibration text is used."""
        return reads_text(self.recipe, self.method)

    @property
    def _is_judged(self) -> bool:
        """Whether the artifact is there and was judged as the recipe says."""
        if self.record is None or self.record["recipe"] != self.recipe.resolved():
            return False
        return judged_as_stated(self.record, self.recipe.validation.texts)

    def _check(self, checkpoint: Checkpoint, tokenizer: Tokenizer | None, once: Once, *, validated: bool) -> None:
        """Stop at what the model or the names of text sets do not allow.

        Args:
            validated: refuse what could not be validated.
        """
        recipe = self.recipe
        self._decoder = once(
            ("decoder", checkpoint.folder, recipe.compute.dtype), partial(decoder_of, recipe, checkpoint, self.device)
        )
        if self._reads_text:
            check_window(recipe.calibration.window_tokens, self._decoder, "calibration.window_tokens")
            for name in recipe.calibration.texts:
                require_known(name, "calibration")
        if validated:
            require_home()
            check_validation(recipe.validation, recipe.format, self._decoder, tokenizer)

    def _calibration_texts(self, once: Once, *, fetched: bool) -> dict[str, TextSet]:
        """The text sets that windows are taken from, with those that would be fetched or without."""
        texts = self.recipe.calibration.texts if self._reads_text else {}
        wanted = [name for name, windows in texts.items() if windows and (fetched or at_hand(name))]
        return {name: once(("text", name), partial(load_text_set, name, "calibration")) for name in wanted}

    def _held_out(self, tokenizer: Tokenizer, once: Once) -> EvaluationText:
        """The text to judge on: what is wrong with it is found before the work, and what was read is used after it."""
        section = self.recipe.validation

        def load(name: str) -> TextSet:
            return once(("held-out text", name), partial(load_text_set, name, "validation"))

        key = ("held-out windows", self.recipe.model, *section.texts.items(), section.window_tokens, section.seed)
        return once(key, partial(text_to_judge_on, section, tokenizer, self.progress, load))

    def _find_needs(self, checkpoint: Checkpoint, *, here: bool, reserved_bytes: int, timed: bool = False) -> None:
        """The plan of what was checked."""
        recipe, method, out, device = self.recipe, self.method, self.job.out, self.device
        self.needed = make_plan(recipe, checkpoint, method, out=out, device=device, ranks=self.ranks.size, timed=timed)
        if here:
            require_here(self.needed, recipe, method, out=out, device=device, reserved_bytes=reserved_bytes)

    def _find_needs_of_judging(self, checkpoint: Checkpoint, text: EvaluationText, *, here: bool) -> None:
        """What judging takes, which the text decides."""
        self.needed = replace(self.needed, judging_bytes=judging_bytes(self.recipe, checkpoint, text))
        if here:
            require_memory_to_judge(self.needed, self.device)

    def begin(self, once: Once, *, fresh: bool) -> None:
        """Open the work folder and make ready for the passes."""
        recipe, source = self.recipe, self.source
        self._calibration = _calibration(recipe, self._texts, source, once, self.ranks)
        self._decoder.reserve(self.needed.reserve_bytes)
        # a recipe that is refused leaves no work that the mended one would be held against
        self._work = self.ranks.from_first(partial(open_workdir, self.job.out, self._identity, fresh=fresh))
        if recipe.upstream is not None:
            prepares = [] if recipe.upstream.takes_checkpoint else [("prepare", self._prepare)]
            self.passes = [*prepares, ("quantize", self._upstream)]
        else:
            measures = [("measure", self._survey)] if self.method.survey is not None else []
            self.passes = [*measures, ("quantize", self._quantize)]

    def _survey(self, shared: SourcePass) -> Iterator[None]:
        """Measure every layer that was not measured before an interruption, then settle the method."""
        assert self._calibration is not None, "a survey needs text"
        assert self.method.survey is not None, "nothing is to be measured"
        checkpoint, wanted, work = self.source.checkpoint, self.method.survey, self._work
        names = checkpoint.items[1:-1]

        def told(name: str) -> None:
            self.progress.steps("measure", checkpoint.items.index(name), len(names) + 1)

        found: Iterator[tuple[str, dict[str, Any]] | None] = iter(())
        if any(work.noted(name) is None for name in names):
            found = survey(
                shared,
                self._calibration,
                wanted.measuring,
                decoder=self._decoder,
                known=lambda name: work.noted(name) is not None,
                told=told,
            )

        def go_through() -> Iterator[None]:
            for each in found:
                if each is not None and self.ranks.is_first:
                    work.note(*each)
                yield
            self.method = wanted.settle(self.ranks.from_first(lambda: [work.noted(name) for name in names]))

        return go_through()

    def _quantize(self, shared: SourcePass) -> Iterator[None]:
        """Stream the checkpoint and keep every item; those that are kept already are only walked through."""
        checkpoint, form, work = self.source.checkpoint, self.method.format, self._work
        if self._calibration is not None and isinstance(form, TellsCalibration):
            texts = [public_name(name) for name in self._texts]
            form = form.calibrated(texts, *self._calibration.tokens_WT.shape)
            self.method = replace(self.method, format=form)
        self._places = places = self.ranks.from_first(partial(_lay_out, checkpoint, form, work))
        if places is not None and places.fresh:
            work.forget_items()

        names, behind = checkpoint.items, Behind()
        keeping = Keeping(form, work, places, behind if self.ranks.is_first else None)
        at_once = places is not None and not goes_on_quantized(self._calibration)
        sinks = Sinks(
            item=lambda name: self.progress.steps("quantize", names.index(name), len(names)),
            linear=self.progress.linear,
            taken=keeping.keep_linear if at_once else None,
        )
        solved = stream(
            shared,
            _dealt(self.method.solvers, self.ranks),
            self._calibration,
            decoder=self._decoder,
            stored_dtype=form.stored_dtype,
            skip=form.skip,
            finished=keeping.finished,
            sinks=sinks,
        )

        def go_through() -> Iterator[None]:
            with behind:
                # mapped, for a loop would hold on to an item while others take their turns
                yield from map(keeping.keep, solved)
            self.progress.steps("quantize", len(names), len(names))

        return go_through()

    @property
    def _prepared(self) -> Path:
        """Folder of what an engine starts from that is not given the checkpoint."""
        return self._work.folder / "prepared"

    def _prepare(self, shared: SourcePass) -> Iterator[None]:
        """Write what the engine starts from."""
        checkpoint = self.source.checkpoint
        names = checkpoint.items
        return prepare(
            checkpoint,
            self.recipe,
            self._calibration,
            self._prepared,
            decoder=self._decoder,
            sinks=Sinks(item=lambda name: self.progress.steps("prepare", names.index(name), len(names))),
            shared=shared,
        )

    def _upstream(self, shared: SourcePass) -> Iterator[None]:
        """Let an engine do it, in one step."""
        engine, calibration = self.recipe.upstream, self._calibration
        assert engine is not None, "an engine was asked for"
        assert calibration is not None or not engine.takes_checkpoint, "it is not known what an engine needs"
        self.progress.stage(f"{engine.name} is quantizing")
        self._engine_facts = quantize_upstream(
            engine,
            self.source.checkpoint.folder if engine.takes_checkpoint else self._prepared,
            torch.zeros(0, 0, dtype=torch.int64) if calibration is None else calibration.tokens_WT,
            self.recipe,
            self._work.folder / "engine",
            device=self.device,
        )
        yield

    def assemble(self) -> None:
        """Put the artifact together from its items, then in place, with record and card."""
        source, work, form = self.source, self._work, self.method.format
        self.progress.stage("writing the artifact")
        with timed(self._stages, "write"):
            if self.recipe.upstream is None:
                items = [work.path(name) for name in source.checkpoint.items]
                variants = work.assemble(
                    lambda folder: form.assemble(source.checkpoint, items, folder),
                    kept=frozenset() if self._places is None else self._places.files,
                )
            else:
                left = work.folder / "engine"
                if self.recipe.upstream.takes_checkpoint:
                    work.assemble(lambda folder: adopt(left, source.checkpoint, folder))
                else:
                    items = prepared_items(source.checkpoint, self._prepared)
                    work.assemble(lambda folder: adopt_files(left, form, source.checkpoint, items, folder))
                opened = open_variants(self.recipe.format, work.artifact)
                variants = {name: artifact.tensors.files for name, artifact in opened.items()}
        record = new_record(self.recipe, source, self._texts, self._identity(), self.device, self._calibration)
        record["environment"]["ranks"] = self.ranks.size
        record["engine_facts"] = self._engine_facts
        record["reproducible"] = self._engine_facts is None
        record["variants"] = variants
        with timed(self._stages, "hash"):
            record["outputs"] = output_entries(work.artifact)
        stages = {stage: round(seconds, 3) for stage, seconds in self._stages.items()}
        if work.earlier_seconds:
            stages["earlier runs"] = round(work.earlier_seconds, 3)
        record["build"] = {
            "items": work.facts,
            "seconds": stages,
            "wall_seconds": round(sum(stages.values()), 3),
            "operations": self.needed.operations if self._engine_facts is None else {},
            "bytes": {
                "read": self.needed.source_bytes,
                "written": sum(entry["size_bytes"] for entry in record["outputs"]),
            },
            "peak_memory_bytes": peak_memory_bytes(self.device, engine=self._engine_facts is not None),
        }
        if self.method.allotments:
            record["build"]["allotments"] = dict(self.method.allotments)
        record = keep(work.artifact, record)
        work.publish()
        self.record = record

    def judge(self) -> None:
        """Judge it against its source, unless that was done by the same recipe before."""
        assert self.record is not None, "only what is there can be judged"
        if self._text is None:
            return
        recipe = self.recipe
        record = self.record | {"recipe": recipe.resolved()}
        variants = open_variants(recipe.format, self.job.out)
        runtimes = tuple(dict.fromkeys((REFERENCE_RUNTIME, *recipe.validation.require)))
        result = judge(
            variants, self.source, recipe, self._text, device=self.device, runtimes=runtimes, progress=self.progress
        )
        self.record = keep(self.job.out, record | judged_by(self._text, result))


def _method(recipe: Recipe, checkpoint: Checkpoint, progress: Progress) -> Method:
    """The recipe's method; one whose survey was made before is settled by it at once."""
    method = METHODS[recipe.format](recipe.quantize, checkpoint.config)
    if method.survey is None or method.survey.earlier is None:
        return method
    findings, word = method.survey.earlier(list(checkpoint.linear_shapes()))
    progress.stage(word)
    return method.survey.settle([findings])


def _lay_out(checkpoint: Checkpoint, form: Format, work: Workdir) -> LaidOut | None:
    """The files that solved items go straight into, for a format that has such."""
    if not isinstance(form, InPlace):
        return None
    return work.lay_out(lambda folder: form.lay_out(checkpoint, folder))


def _dealt(solvers: Solvers, ranks: Ranks) -> Solvers:
    """The same, with the linears of each stage dealt to all."""
    if ranks.size == 1:
        return solvers
    ends = None if solvers.ends is None else Dealt(solvers.ends, ranks)
    return replace(solvers, layers=Dealt(solvers.layers, ranks), ends=ends)


def _calibration(
    recipe: Recipe, texts: dict[str, TextSet], source: Source, once: Once, ranks: Ranks
) -> Calibration | None:
    tokens_WT = _tokens(recipe, texts, source.checkpoint.folder, source.tokenizer, once)
    if tokens_WT is None:
        return None
    from_float = recipe.calibration.activations == "float"
    return Calibration(tokens_WT, recipe.compute.windows_per_batch, from_float, ranks)


def _tokens(
    recipe: Recipe, texts: dict[str, TextSet], folder: Path, tokenizer: Tokenizer, once: Once
) -> torch.Tensor | None:
    """The calibration windows int64 [W, T] of these texts; None of none."""
    if not texts:
        return None
    section = recipe.calibration
    parts = [(text_set, section.texts[name]) for name, text_set in texts.items()]
    key = ("windows", folder, *((name, section.texts[name]) for name in texts))
    return once(
        (*key, section.window_tokens, section.seed),
        lambda: calibration_windows(parts, tokenizer, window_tokens=section.window_tokens, seed=section.seed),
    )
