"""Channel scales against slow, obvious versions: folding changes nothing, and the search finds brute force's best."""

import errno
import signal
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit import keeping
from quantkit.calibration.statistics import Statistics
from quantkit.checkpoint.families import FAMILIES
from quantkit.checkpoint.index import open_checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.errors import RunFailedError
from quantkit.grids.affine import AffineRule
from quantkit.methods import awq
from quantkit.pipeline import build
from quantkit.progress import Progress
from quantkit.quantize import AwqSection
from quantkit.recipe import Recipe
from quantkit.solvers.awq import ChannelScaling, Feedback, folded, producer_channels
from quantkit.solvers.order import visiting_order
from quantkit.source_pass import Calibration, SourcePass
from quantkit.stream import stream
from tests.test_kill import Builds
from tests.test_pipeline import hashes
from tests.tiny import VARIANTS, make_text, make_tiny

CPU = torch.device("cpu")
# grouped-query attention with four query heads per value head; biases wherever a family may have them
SHAPES = VARIANTS | {
    "llama": VARIANTS["llama"] | {"attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 1},
}


def tokens(windows: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 384, (windows, length), generator=torch.Generator().manual_seed(0))


def opened(folder, model_type: str, dtype=torch.float64):
    """Checkpoint and decoder of a tiny model whose norms and biases are far from one and zero."""
    make_tiny(folder, model_type, dtype=torch.float32, **SHAPES[model_type])
    checkpoint = open_checkpoint(folder)
    return checkpoint, Decoder(checkpoint.config, checkpoint.family, device=CPU, dtype=dtype)


def uneven(checkpoint, decoder) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The first layer with a few loud channels, as large models have them, and its input."""
    tensors = checkpoint.read("layers.0")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if "layernorm" in name or name.endswith((".bias", "v_proj.weight", "up_proj.weight")):
            shape = (len(tensor), *(1,) * (tensor.dim() - 1))
            tensors[name] = tensor * (1 + 8 * torch.rand(shape, generator=generator) ** 6)
    return tensors, decoder.embed(checkpoint.read("embedding"), tokens()) * 30


ROUNDED, SOLVED = None, Feedback("group-aware", 0.01)


def scaling(feedback: Feedback | None = ROUNDED, **options) -> ChannelScaling:
    rule = AffineRule(4, symmetric=False)
    return ChannelScaling(rule, **({"group_size": 32, "steps": 8, "windows": 3} | options), feedback=feedback)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_folding_is_the_identity(model_type, tmp_path):
    checkpoint, decoder = opened(tmp_path, model_type)
    tensors, hidden = uneven(checkpoint, decoder)
    layer, rope = decoder.layer(0, tensors), decoder.rope(hidden.shape[1])
    generator = torch.Generator().manual_seed(5)
    scales = {
        fold: 0.1 + 3 * torch.rand(len(layer.producer(fold.producer).weight), generator=generator).double()
        for fold in layer.family.folds
    }
    changed = folded(layer, scales)
    weights = {name for name in tensors if name.endswith("_proj.weight") or "layernorm" in name}
    made = {f"model.layers.0.{linear}.bias" for linear in ("self_attn.v_proj", "mlp.up_proj")}
    assert changed.keys() == weights | (made & tensors.keys())
    assert all(not torch.equal(changed[name], tensors[name].double()) for name in changed)
    before = layer.forward(hidden, rope)
    after = decoder.layer(0, tensors | changed).forward(hidden, rope)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_query_heads_that_read_one_value_head_share_a_scale(tmp_path):
    checkpoint, decoder = opened(tmp_path, "qwen2")
    layer = decoder.layer(0, checkpoint.read("layers.0"))
    fold = next(fold for fold in layer.family.folds if fold.stage == "o")
    # four query heads of 16 channels, two value heads
    expected = [*range(16), *range(16), *range(16, 32), *range(16, 32)]
    assert producer_channels(layer, fold).tolist() == expected


def cost_of_errors(rows: torch.Tensor, search: ChannelScaling) -> list[float]:
    """What a channel's squared error costs: its mean square, or what later channels do not make up for."""
    hessian = rows.T @ rows / len(rows)
    if search.feedback is None:
        return hessian.diagonal().tolist()
    hessian += search.feedback.damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    order = visiting_order(hessian.diagonal(), search.feedback.order, search.group_size).tolist()
    found = [0.0] * len(order)
    for place, channel in enumerate(order):
        # the variance of a channel given all that come after it
        found[channel] = 1 / float(torch.linalg.inv(hessian[order[place:]][:, order[place:]])[0, 0])
    return found


def brute_force(layer, fold, inputs, search: ChannelScaling) -> tuple[torch.Tensor, list[float]]:
    """The best scales [P] and all losses: one candidate, one group of one row at a time, by the formulas."""
    stage = next(stage for stage in layer.family.stages if stage.name == fold.stage)
    weights = [layer.linears[name].weight for name in stage.linears]
    behind = producer_channels(layer, fold).tolist()
    size, num_made = search.group_size, max(behind) + 1
    x_sum, w_sum, count = [0.0] * num_made, [0.0] * num_made, [0] * num_made
    rows = inputs.flatten(0, -2)
    every_row = torch.cat(weights)
    for channel, made in enumerate(behind):
        group = every_row[:, channel // size * size : (channel // size + 1) * size].abs()
        x_sum[made] += float(rows[:, channel].abs().mean())
        w_sum[made] += float((every_row[:, channel].abs() / group.amax(1)).mean())
        count[made] += 1
    x = torch.tensor(x_sum, dtype=torch.float64) / torch.tensor(count)
    w = torch.tensor(w_sum, dtype=torch.float64) / torch.tensor(count)
    exponents = [step / search.steps for step in range(search.steps + 1)]
    tried = [x**a for a in exponents] + [x**a / w ** (1 - a) for a in exponents[:-1]]
    tried = [t / (t.max() * t.min()) ** 0.5 for t in tried]
    cost, losses = torch.tensor(cost_of_errors(rows, search), dtype=torch.float64), []
    for t in tried:
        loss = 0.0
        for weight in weights:
            scaled = weight * t[behind]
            for row in range(len(scaled)):
                for start in range(0, scaled.shape[1], size):
                    group = scaled[row, start : start + size]
                    low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
                    scale = float(torch.tensor((high - low) / 15).half())
                    zero = min(15, max(0, round(-low / scale)))
                    group.copy_(((group / scale).round() + zero).clamp(0, 15).sub(zero) * scale)
            loss += float(((scaled / t[behind] - weight).square() * cost).sum())
        losses.append(loss)
    return tried[losses.index(min(losses))], losses


@pytest.mark.parametrize("model_type", ["mistral", "qwen3"])
@pytest.mark.parametrize("feedback", [ROUNDED, SOLVED, Feedback("natural", 0.05)])
def test_the_search_finds_what_brute_force_finds(model_type, feedback, tmp_path):
    checkpoint, decoder = opened(tmp_path, model_type)
    tensors, hidden = uneven(checkpoint, decoder)
    # grids hold 0 even where every weight of a group is below it
    tensors["model.layers.0.self_attn.o_proj.weight"] = -0.3 - tensors["model.layers.0.self_attn.o_proj.weight"].abs()
    layer, rope = decoder.layer(0, tensors), decoder.rope(hidden.shape[1])
    search = scaling(feedback, steps=3)
    gains = {}
    for (stage, inputs), fold in zip(layer.walk(hidden, rope), layer.family.folds, strict=True):
        assert stage.name == fold.stage
        expected, losses = brute_force(layer, fold, inputs, search)
        torch.testing.assert_close(search.search(layer, fold, inputs), expected, rtol=1e-9, atol=0)
        weights = [layer.linears[name].weight for name in stage.linears]
        behind = producer_channels(layer, fold)
        scales = search.candidates(weights, inputs, behind)[:, behind]
        importance = search.importance(inputs, where=stage.name)
        found = sum(search.losses(weight, importance, scales) for weight in weights)
        torch.testing.assert_close(found, torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=0)
        gains[fold.stage] = min(losses) / losses[0]
    assert min(gains.values()) < 0.8, "scaling has something to gain here"


def test_channels_that_others_make_up_for_cost_less(tmp_path):
    """A channel that is a mixture of others is nothing to GPTQ, and as much as any to who rounds."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4000, 64, generator=generator, dtype=torch.float64)
    inputs[..., 0] = inputs[..., 40] - inputs[..., 50]
    rounded, solved = (
        scaling(feedback).importance(inputs, where="a linear") for feedback in (ROUNDED, Feedback("natural", 1e-6))
    )
    assert rounded[0] == pytest.approx(2, rel=0.1)
    assert solved[0] < 1e-3
    assert solved[1] == pytest.approx(1, rel=0.1)


def test_what_is_compared_with_the_unquantized_stream_was_divided_as_it_is(tmp_path):
    """With a solver that changes nothing the streams are the same, so nothing has moved, scaled or not."""
    checkpoint, decoder = opened(tmp_path, "qwen2")
    method = awq(AwqSection(group_size=32, scaling_steps=4, asymmetric_every=1), {})
    seen = []

    class Exact:
        needs = method.solvers.layers.needs

        def solve(self, weights, statistics):
            seen.append(float(statistics.deviation().abs().max() / statistics.hessian().abs().max()))
            return iter(())

    solvers = replace(method.solvers, layers=Exact())
    with SourcePass(checkpoint) as shared:
        calibration = Calibration(tokens(), 2, False)
        items = list(stream(shared, solvers, calibration, decoder=decoder, stored_dtype=torch.float64))
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(items[1].tensors[norm], checkpoint.read("layers.0")[norm].double()), "it was folded"
    assert len(seen) == 4 * checkpoint.num_layers
    assert max(seen) < 1e-12


def test_the_search_leaves_the_layer_as_it_was(tmp_path):
    checkpoint, decoder = opened(tmp_path, "qwen3")
    tensors, hidden = uneven(checkpoint, decoder)
    layer, rope = decoder.layer(0, tensors), decoder.rope(hidden.shape[1])
    before = layer.forward(hidden, rope)
    for feedback in (ROUNDED, SOLVED):
        scaling(feedback).prepare(layer, hidden, rope)
    assert torch.equal(layer.forward(hidden, rope), before)


def test_a_channel_that_is_never_active_and_numbers_that_overflow_do_no_harm(tmp_path):
    checkpoint, decoder = opened(tmp_path, "mistral", torch.float32)
    tensors, hidden = uneven(checkpoint, decoder)
    tensors["model.layers.0.input_layernorm.weight"][7] = 0
    tensors["model.layers.0.self_attn.v_proj.weight"][:, 3] = 0
    rope = decoder.rope(hidden.shape[1])
    for feedback in (ROUNDED, SOLVED):
        prepared = scaling(feedback).prepare(decoder.layer(0, tensors), hidden, rope)
        assert prepared.tensors
        assert all(torch.isfinite(tensor).all() for tensor in prepared.tensors.values())
    tensors["model.layers.0.post_attention_layernorm.weight"][:] = 1e30
    loud = decoder.layer(0, tensors)
    prepared = scaling().prepare(loud, hidden, rope)
    assert not [name for name in prepared.tensors if "mlp" in name or "post" in name], "what cannot be judged is not"
    with pytest.raises(RunFailedError, match=r"(?s)are not finite.*at: +model\.layers\.0\.mlp\.gate_proj"):
        scaling(SOLVED).prepare(loud, hidden, rope)


def test_linears_that_stay_dense_are_folded_but_not_rounded(tmp_path):
    checkpoint, decoder = opened(tmp_path, "mistral")
    tensors, hidden = uneven(checkpoint, decoder)
    rope = decoder.rope(hidden.shape[1])
    layer = decoder.layer(0, tensors)
    part = scaling(skip=("mlp.gate_proj", "self_attn.o_proj")).prepare(layer, hidden, rope).tensors
    assert "model.layers.0.self_attn.v_proj.weight" in part  # reads the norm, which is divided
    assert "model.layers.0.self_attn.o_proj.weight" not in part  # nobody gains
    after = decoder.layer(0, tensors | part).forward(hidden, rope)
    torch.testing.assert_close(after, layer.forward(hidden, rope), rtol=1e-12, atol=1e-12)


def test_a_linear_that_stays_dense_in_one_layer_is_rounded_in_the_others(tmp_path):
    checkpoint, decoder = opened(tmp_path, "mistral")
    tensors, hidden = uneven(checkpoint, decoder)
    rope = decoder.rope(hidden.shape[1])

    def prepared(*skip: str) -> dict[str, list]:
        found = scaling(skip=skip).prepare(decoder.layer(0, tensors), hidden, rope)
        return {name: tensor.tolist() for name, tensor in found.tensors.items()}

    everywhere, nowhere = prepared("self_attn.o_proj"), prepared()
    assert everywhere != nowhere
    assert prepared("layers.0.self_attn.o_proj") == everywhere
    assert prepared("layers.1.self_attn.o_proj") == nowhere


def layer_error(checkpoint, decoder, section: AwqSection) -> float:
    """Squared change of the first layer's output by building it, on tokens that calibrated nothing."""
    method = awq(section, {})
    tensors, hidden = uneven(checkpoint, decoder)
    rope = decoder.rope(hidden.shape[1])
    exact = decoder.layer(0, tensors)
    seen, unseen = hidden[:4], hidden[4:]
    prepared = tensors
    if method.solvers.preparation is not None:
        prepared = tensors | method.solvers.preparation.prepare(decoder.layer(0, tensors), seen, rope).tensors
    layer = decoder.layer(0, prepared)
    for stage, inputs in layer.walk(seen, rope):
        statistics = Statistics(method.solvers.layers.needs)
        statistics.add(inputs)
        statistics.complete()
        weights = {name: layer.linears[name].weight for name in stage.linears}
        for name, quantized, _ in method.solvers.layers.solve(weights, statistics):
            layer.linears[name].weight.data = quantized.dequantize().to(inputs.dtype)
    return float((layer.forward(unseen, rope) - exact.forward(unseen, rope)).square().mean())


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("solver", ["gptq", "round-to-nearest"])
def test_the_layers_output_is_nearer_with_scales_than_without(solver, model_type, tmp_path):
    checkpoint, decoder = opened(tmp_path, model_type)
    plain, scaled = (
        layer_error(checkpoint, decoder, AwqSection(group_size=32, scaling_steps=steps, solver=solver, asymmetric=0.0))
        for steps in (0, 20)
    )
    assert scaled < plain


def dense(model_folder, items) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    weights = {}
    for item in items:
        weights |= item.tensors
        weights |= {f"{name}.weight": linear.dequantize() for name, linear in item.linears.items()}
        weights |= {f"{n}.bias": linear.bias_O for n, linear in item.linears.items() if linear.bias_O is not None}
    missing = model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}, "only a tied head is left out"
    return model


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("from_float", [False, True])
def test_the_whole_models_logits_stay_near(model_type, from_float, tmp_path):
    """The folded, quantized model in transformers' own code is the source but for the rounding."""
    checkpoint, decoder = opened(tmp_path, model_type, torch.float32)
    method = awq(AwqSection(group_size=32, scaling_steps=6, asymmetric=0.0 if from_float else 0.5), {})
    with SourcePass(checkpoint) as shared:
        calibration = Calibration(tokens(), 2, from_float)
        items = list(stream(shared, method.solvers, calibration, decoder=decoder, stored_dtype=torch.float16))
    source = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = source(tokens()).logits, dense(tmp_path, items)(tokens()).logits
    assert (found - expected).norm() / expected.norm() < 0.2
    norm = items[1].tensors["model.layers.0.input_layernorm.weight"]
    assert not torch.equal(norm, checkpoint.read("layers.0")["model.layers.0.input_layernorm.weight"].half())


@pytest.mark.parametrize(
    ("activations", "asymmetric", "whole_process"), [("quantized", 0.5, False), ("float", 0.0, True)]
)
def test_a_killed_build_ends_in_the_same_bytes(
    activations, asymmetric, whole_process, tiny_mistral, tmp_path, monkeypatch
):
    text = make_text(tmp_path / "text.jsonl")
    recipe = Recipe.of(
        {
            "format": "awq",
            "model": {"id": str(tiny_mistral)},
            "quantize": {"group_size": 32, "scaling_steps": 4, "scale_candidates": 4, "asymmetric": asymmetric},
            "calibration": {"texts": {str(text): 8}, "window_tokens": 16, "activations": activations},
            "validation": {"texts": (str(text),), "window_tokens": 32, "generated_tokens": 4},
        }
    )
    whole = build(recipe, out=tmp_path / "whole", device=CPU)
    assert whole.record["validation"]["gate"]["passed"]
    assert "AutoModelForCausalLM" in (whole.out / "README.md").read_text()
    if whole_process:
        # the 7th rename is the second layer's file
        with closing(Builds()) as builds:
            assert builds.run(recipe, tmp_path / "out", renames=7)[0] == -signal.SIGKILL
    else:
        with monkeypatch.context() as patch:
            patch.setattr(keeping, "write_item", full_at_the_third())
            with pytest.raises(RunFailedError, match="the disk is full"):
                build(recipe, out=tmp_path / "out", device=CPU)
    solved = []
    build(recipe, out=tmp_path / "out", device=CPU, validated=False, progress=Progress(linear=solved.append))
    assert {facts.name.split(".")[2] for facts in solved} == {"1"}, "the first layer was kept"
    assert hashes(tmp_path / "out") == hashes(whole.out)


def full_at_the_third():
    calls, real = [], keeping.write_item

    def write(path, tensors):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors)

    return write
