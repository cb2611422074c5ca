"""The streamed pass against the whole model with hooks: the slow, obvious way to collect a layer's inputs."""

import gc
import json
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.families import FAMILIES
from quantkit.checkpoint.index import open_checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.source import head_tensors
from quantkit.checkpoint.spill import STAY, Kept, Spill
from quantkit.errors import RefusedError
from quantkit.grids.affine import AffineRule
from quantkit.methods import awq
from quantkit.quantize import AwqSection
from quantkit.solvers.gptq import GptqSolver, factorize, in_file_order, solve_gptq
from quantkit.source_pass import Calibration, FloatStream, SourcePass, Taken
from quantkit.stream import Solvers, stream
from tests.tiny import VARIANTS, make_tiny

CPU = torch.device("cpu")


def tokens(windows: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 384, (windows, length), generator=torch.Generator().manual_seed(0))


def decoder_of(checkpoint, dtype=torch.float32, spill=STAY) -> Decoder:
    return Decoder(checkpoint.config, checkpoint.family, device=CPU, dtype=dtype, spill=spill)


def run_stream(checkpoint, solver, calibration, *, dtype=torch.float32, spill=STAY, **options):
    solvers = solver if isinstance(solver, Solvers) else Solvers(solver)
    decoder = decoder_of(checkpoint, dtype, spill)
    with SourcePass(checkpoint) as shared:
        found = stream(shared, solvers, calibration, decoder=decoder, stored_dtype=torch.float16, **options)
        return [item for item in found if item is not None]


def test_every_family_has_a_variant():
    assert VARIANTS.keys() == FAMILIES.keys()


def test_what_is_moved_is_moved_as_it_is_stored_and_of_an_embedding_its_rows_alone(tmp_path):
    """To another device in one step torch would cast first, on this one, and move what became wide."""
    checkpoint = open_checkpoint(make_tiny(tmp_path / "m", "mistral"))
    decoder = Decoder(checkpoint.config, checkpoint.family, device=torch.device("meta"), dtype=torch.float32)
    moved = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), named=None):
            found = operation(*arguments, **(named or {}))
            if arguments and isinstance(arguments[0], torch.Tensor) and arguments[0].device != found.device:
                moved.append((tuple(found.shape), arguments[0].dtype, found.dtype))
            return found

    source, stored = checkpoint.read("embedding"), (torch.bfloat16, torch.bfloat16)
    with Watch():
        assert decoder.embed(source, tokens()).dtype == torch.float32
        decoder.place(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert moved == [((6, 24, 64), *stored), ((3, 5), *stored)]


def streamed_logits(folder, ids: torch.Tensor) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    decoder = decoder_of(checkpoint)
    hidden = decoder.embed(checkpoint.read("embedding"), ids)
    for index in range(checkpoint.num_layers):
        layer = decoder.layer(index, checkpoint.read(f"layers.{index}"))
        hidden = layer.forward(hidden, decoder.rope(ids.shape[1]))
    head = head_tensors(checkpoint)
    return decoder.normed(head, hidden) @ decoder.head(head).T


def whole_logits(folder, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


@pytest.mark.parametrize("model_type", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streamed_logits_are_the_models(model_type, dtype, tmp_path):
    folder = make_tiny(tmp_path / "m", model_type, dtype=dtype, sharded=dtype == torch.bfloat16, **VARIANTS[model_type])
    torch.testing.assert_close(streamed_logits(folder, tokens()), whole_logits(folder, tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", VARIANTS)
def test_a_config_in_the_words_of_transformers_4_is_the_same_model(model_type, tmp_path):
    """As nearly all that is published has it: `rope_theta`, `rope_scaling` and `torch_dtype`."""
    rope = {"rope_type": "default"} | VARIANTS[model_type].get("rope_parameters", {}) | {"rope_theta": 500.0}
    folder = make_tiny(tmp_path / "m", model_type, **VARIANTS[model_type] | {"rope_parameters": rope})
    expected, path = whole_logits(folder, tokens()), folder / "config.json"
    content = json.loads(path.read_text())
    scaling = content.pop("rope_parameters")
    content |= {"rope_theta": scaling.pop("rope_theta"), "torch_dtype": content.pop("dtype")}
    content["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    path.write_text(json.dumps(content))
    torch.testing.assert_close(streamed_logits(folder, tokens()), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole_logits(folder, tokens()), expected, rtol=0, atol=0)


def captured_inputs(model, name: str, ids: torch.Tensor) -> torch.Tensor:
    """What a linear of the whole model reads, [tokens, features]."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return torch.cat(seen).flatten(0, -2)


def obvious_gptq(
    folder, ids, solver: GptqSolver, *, from_float: bool, per_batch: int = 1, every: int = 1
) -> dict[str, torch.Tensor]:
    """Decoded weights by linear: the whole model is run again before every stage, with what was solved so far."""
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    source = exact if from_float else model
    decoded = {}
    for index in range(model.config.num_hidden_layers):
        for stage in FAMILIES[model.config.model_type].stages:
            names = [f"model.layers.{index}.{linear}" for linear in stage.linears]
            x = captured_inputs(source, names[0], ids)
            factor = factorize(x.T @ x, order=solver.order, group_size=solver.group_size, damping=solver.damping)
            for name in names:
                weight = exact.get_submodule(name).weight.detach()
                if solver.asymmetric:
                    compared = torch.cat([each[::every] for each in torch.arange(len(ids)).split(per_batch)])
                    both = [captured_inputs(each, names[0], ids[compared]) for each in (exact, model)]
                    damped = x.T @ x
                    damped.diagonal().add_(factor.damping * damped.diagonal().mean())
                    deviation = both[1].T @ (both[0] - both[1]) * (len(ids) / len(compared))
                    moved = torch.linalg.solve(damped, deviation)
                    weight = weight + solver.asymmetric * weight @ moved.T
                solution = in_file_order(solve_gptq(weight, factor, solver.rule, group_size=solver.group_size))
                decoded[name] = solution.grid.decode(solution.codes_OI)
            for name in names:
                model.get_submodule(name).weight.data = decoded[name].double()
    return decoded


@pytest.mark.parametrize("model_type", VARIANTS)
@pytest.mark.parametrize(
    ("from_float", "asymmetric", "every"), [(False, 0.0, 1), (True, 0.0, 1), (False, 0.5, 1), (False, 0.5, 2)]
)
def test_solved_weights_equal_those_of_the_whole_model(model_type, from_float, asymmetric, every, tmp_path):
    folder = make_tiny(tmp_path / "m", model_type, **VARIANTS[model_type])
    # models have float32 norms, so that inputs are 1e-8 apart here and there; no scale may lie half-way of two float16
    solver = GptqSolver(AffineRule(4, candidates=3), 32, "group-aware", 0.01, asymmetric)
    # a batch of five and one of one: what is compared of them is three and one, not the half
    calibration = Calibration(tokens(), 5, from_float)
    solvers = Solvers(solver, compared_every=every)
    found = run_stream(open_checkpoint(folder), solvers, calibration, dtype=torch.float64)
    expected = obvious_gptq(folder, tokens(), solver, from_float=from_float, per_batch=5, every=every)
    solved = {name: linear for item in found for name, linear in item.linears.items()}
    assert solved.keys() == expected.keys()
    for name, linear in solved.items():
        assert torch.equal(linear.dequantize(), expected[name]), name


@dataclass(frozen=True)
class Watched(Spill):
    """Counts what of the tensors that were to wait is still held by somebody, each time one more comes."""

    seen: list[weakref.ref] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def keep(self, tensor):
        self.held.append(sum(each() is not None for each in self.seen))
        self.seen.append(weakref.ref(tensor))
        kept = super().keep(tensor)
        return kept if kept.held is tensor else Away(kept.held, kept.device)


class Away(Kept):
    """Gives another tensor than the one that waited, as from another device."""

    def tensor(self):
        return super().tensor().clone()


GPTQ = {
    "quantized": (GptqSolver(AffineRule(4), 32, "group-aware", 0.01), False),
    "asymmetric": (GptqSolver(AffineRule(4), 32, "group-aware", 0.01, 0.5), False),
    "float": (GptqSolver(AffineRule(4), 32, "group-aware", 0.01), True),
    "awq": (awq(AwqSection(group_size=32), {}).solvers, False),
    "awq float": (awq(AwqSection(group_size=32, asymmetric=0.0), {}).solvers, True),
}


@pytest.mark.parametrize("way", GPTQ)
def test_activations_that_wait_elsewhere_leave_the_device_and_change_nothing(way, tiny_mistral, monkeypatch):
    solver, from_float = GPTQ[way]
    checkpoint, calibration = open_checkpoint(tiny_mistral), Calibration(tokens(12), 1, from_float)
    expected = run_stream(checkpoint, solver, calibration)
    away, there = Watched(2), Watched(1)
    monkeypatch.setattr("quantkit.checkpoint.spill.free_bytes", lambda device: 1)
    for spill in (away, there):
        found = run_stream(checkpoint, solver, calibration, spill=spill)
        for item, like in zip(found, expected, strict=True):
            assert item.tensors.keys() == like.tensors.keys()
            assert all(torch.equal(item.tensors[name], like.tensors[name]) for name in like.tensors)
            assert item.linears.keys() == like.linears.keys()
            for name, linear in item.linears.items():
                assert torch.equal(linear.dequantize(), like.linears[name].dequantize()), name
    # twelve batches wait; what is held is what is at work
    assert max(away.held) <= 4
    assert max(there.held) >= 12


def test_what_waits_for_two_waits_in_one_place(monkeypatch):
    monkeypatch.setattr("quantkit.checkpoint.spill.free_bytes", lambda device: 0)
    spill, one, other = Spill(1), torch.ones(3), torch.ones(3)
    first, second, third = (spill.keep(tensor) for tensor in (one, one, other))
    assert first.held is second.held is not one
    assert third.held is not first.held
    waiting = weakref.ref(first.held)
    del one, first, second
    assert waiting() is None


def test_sampled_windows_are_evenly_spaced_over_all_batches():
    batches = [torch.arange(5.0).view(5, 1, 1), torch.arange(5.0, 8.0).view(3, 1, 1)]
    calibration = Calibration(tokens(8), 5)
    assert calibration.sampled(iter(batches), 4).flatten().tolist() == [0, 2, 4, 6]
    assert calibration.sampled(iter(batches), 20).flatten().tolist() == list(range(8))


def test_items_hold_every_tensor_once(tmp_path):
    folder = make_tiny(tmp_path / "m", "qwen2")
    checkpoint = open_checkpoint(folder)
    solver = GptqSolver(AffineRule(4), 32, "group-aware", 0.01)
    found = run_stream(checkpoint, solver, Calibration(tokens(), 2), skip=("mlp.down_proj",))
    assert [item.name for item in found] == ["embedding", "layers.0", "layers.1", "head"]
    dense = [name for item in found for name in item.tensors]
    solved = [name for item in found for name in item.linears]
    biases = [f"{name}.bias" for item in found for name, linear in item.linears.items() if linear.bias_O is not None]
    assert sorted(dense + [f"{name}.weight" for name in solved] + biases) == sorted(checkpoint.tensors.tensors)
    assert "model.layers.1.mlp.down_proj.weight" in dense
    assert len(biases) == 6
    assert all(tensor.dtype == torch.float16 for item in found for tensor in item.tensors.values())
    assert [fact.name for fact in found[1].facts] == list(found[1].linears)


def test_finished_items_are_only_walked_through(tiny_mistral):
    checkpoint = open_checkpoint(tiny_mistral)
    solver = GptqSolver(AffineRule(4), 32, "group-aware", 0.01)
    calibration = Calibration(tokens(), 4)
    whole = run_stream(checkpoint, solver, calibration)
    done = {
        item.name: item.tensors | {f"{name}.weight": linear.dequantize() for name, linear in item.linears.items()}
        for item in whole[:2]
    }
    rest = run_stream(checkpoint, solver, calibration, finished=done.get)
    assert [item.name for item in rest] == ["layers.1", "head"]
    for name, linear in rest[0].linears.items():
        assert torch.equal(linear.codes_OI, whole[2].linears[name].codes_OI)
        assert torch.equal(linear.grid.scale_OG, whole[2].linears[name].grid.scale_OG)


@pytest.mark.parametrize(("others", "held"), [([], 1), ([Taken(inputs=True)], 6), ([Taken(frozenset({"squares"}))], 6)])
def test_inputs_of_the_unquantized_stream_are_kept_for_others_alone(others, held, tiny_mistral):
    checkpoint = open_checkpoint(tiny_mistral)
    exact = FloatStream(decoder_of(checkpoint), Calibration(tokens(), 1))
    for who, wanted in enumerate([Taken(inputs=True), *others]):
        exact.join(who, wanted)
    for name in ("embedding", "layers.0"):
        exact.at(name, checkpoint.read(name), {})
    stages = checkpoint.family.stages
    for stage in stages[:-1]:
        assert len(list(exact.inputs(stage, {}))) == 6
    alive, seen = 0, weakref.WeakSet()
    for inputs in exact.inputs(stages[-1], {}):
        seen.add(inputs[0])
        del inputs
        gc.collect()
        alive = max(alive, len(seen))
    assert alive == held
    exact.at("layers.1", checkpoint.read("layers.1"), {})
    assert len(exact.hidden()) == 6


@dataclass(frozen=True)
class Overheard(GptqSolver):
    """Keeps what it was given for each stage, by the names of its linears."""

    given: dict = field(default_factory=dict)

    def solve(self, weights, statistics):
        self.given[tuple(weights)] = (statistics, {name: weight.clone() for name, weight in weights.items()})
        return super().solve(weights, statistics)


def test_a_narrow_linear_is_solved_from_its_product_with_the_deviation(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(make_tiny(tmp_path / "m", "mistral", intermediate_size=160))
    calibration = Calibration(tokens(), 4)
    narrow, wide = (Overheard(AffineRule(4), 32, "group-aware", 0.01, 0.5) for _ in range(2))
    of_narrow = run_stream(checkpoint, narrow, calibration)
    monkeypatch.setattr("quantkit.calibration.statistics.narrow", lambda shapes: False)
    of_wide = run_stream(checkpoint, wide, calibration)
    down = ("model.layers.0.mlp.down_proj",)
    (found, _), (expected, weights) = narrow.given[down], wide.given[down]
    assert (found.deviation().shape, expected.deviation().shape) == ((64, 160), (160, 160))
    assert expected.deviation().norm() > 1e-3 * expected.hessian().norm()
    torch.testing.assert_close(found.deviation(), weights[down[0]] @ expected.deviation(), rtol=1e-4, atol=1e-4)
    same = [of[1].linears[down[0]].dequantize() for of in (of_narrow, of_wide)]
    assert (same[0] == same[1]).float().mean() > 0.99


def test_nothing_is_summed_for_a_stage_that_stays_dense(tiny_mistral):
    solver = Overheard(AffineRule(4), 32, "group-aware", 0.01)
    run_stream(open_checkpoint(tiny_mistral), solver, Calibration(tokens(), 2), skip=("mlp.down_proj", "k_proj"))
    needs = {names: statistics.needs for names, (statistics, _) in solver.given.items()}
    assert needs.pop(()) == frozenset()
    assert ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj") in needs
    assert set(needs.values()) == {frozenset({"hessian"})}


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.q_proj"])
def test_weights_too_large_for_the_format_are_refused(name, tmp_path):
    folder = make_tiny(tmp_path / "m", "mistral", sharded=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.model.layers[1].get_submodule(name).weight.data[3] = 1e6
    model.save_pretrained(folder)
    solver = GptqSolver(AffineRule(4), 32, "group-aware", 0.01)
    with pytest.raises(RefusedError, match=rf"layers\.1\.{name}\.weight holds values beyond float16"):
        run_stream(open_checkpoint(folder), solver, Calibration(tokens(), 4))


def test_a_solver_without_needs_asks_for_no_model_and_no_forward_pass(tiny_mistral, monkeypatch):
    class Nothing:
        needs = frozenset()

        def solve(self, weights, statistics):
            assert statistics.num_tokens == 0
            return iter(())

    def refuse(*_):
        raise AssertionError("the model's code, which takes seconds to import, is not needed")

    monkeypatch.setattr(Decoder, "_model", property(refuse))
    monkeypatch.setattr("quantkit.checkpoint.layer.DecoderLayer.walk", refuse)
    found = run_stream(open_checkpoint(tiny_mistral), Nothing(), None)
    assert len(found) == 4
