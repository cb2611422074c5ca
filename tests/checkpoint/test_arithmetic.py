from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import quantkit
from quantkit.calibration.statistics import HESSIAN, Statistics
from quantkit.checkpoint.index import open_checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.machine import needs_expanding, needs_widening
from tests.tiny import VARIANTS, make_tiny

CPU = torch.device("cpu")
RUNNERS = Path(quantkit.__file__).parent / "engines" / "runners"


def through_layers(checkpoint, dtype, device=CPU) -> torch.Tensor:
    """Hidden states of 3 windows of 40 tokens behind the last layer."""
    decoder = Decoder(checkpoint.config, checkpoint.family, device=device, dtype=dtype)
    ids = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(5)).to(device)
    hidden = decoder.embed(checkpoint.read("embedding"), ids)
    for index in range(checkpoint.num_layers):
        hidden = decoder.layer(index, checkpoint.read(f"layers.{index}")).forward(hidden, decoder.rope(ids.shape[1]))
    return hidden


@pytest.mark.parametrize("model_type", VARIANTS)
def test_widened_products_are_as_near_to_float32_as_bfloat16s_own(model_type, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(make_tiny(tmp_path / "m", model_type, dtype=torch.bfloat16, **VARIANTS[model_type]))
    exact = through_layers(checkpoint, torch.float32)
    errors = []
    for widens in (False, True):
        monkeypatch.setattr("quantkit.checkpoint.layer.needs_widening", lambda *_, widens=widens: widens)
        found = through_layers(checkpoint, torch.bfloat16)
        assert found.dtype == torch.bfloat16
        errors.append((found.float() - exact).square().mean().sqrt())
    own, widened = errors
    assert 0 < widened <= 1.05 * own
    assert widened < 0.02 * exact.square().mean().sqrt()


@pytest.mark.parametrize(("widens", "multiplied"), [(False, torch.bfloat16), (True, torch.float32)])
def test_everything_that_a_layer_multiplies_is_widened_where_the_processor_needs_it(
    widens, multiplied, tiny_mistral, monkeypatch
):
    seen = []
    for name in ("linear", "scaled_dot_product_attention"):
        plain = getattr(torch.nn.functional, name)

        def product(*tensors, name=name, plain=plain, **others):
            seen.append((name, {tensor.dtype for tensor in tensors if tensor is not None}))
            return plain(*tensors, **others)

        monkeypatch.setattr(torch.nn.functional, name, product)
    monkeypatch.setattr("quantkit.checkpoint.layer.needs_widening", lambda *_: widens)
    checkpoint = open_checkpoint(tiny_mistral)
    through_layers(checkpoint, torch.bfloat16)
    assert [name for name, _ in seen].count("linear") == 7 * checkpoint.num_layers
    assert len(seen) == 8 * checkpoint.num_layers
    assert all(dtypes == {multiplied} for _, dtypes in seen)


def test_only_bfloat16_on_a_cpu_may_need_it(monkeypatch):
    assert not needs_widening(CPU, torch.float32)
    assert not needs_widening(torch.device("meta"), torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert needs_widening(CPU, torch.bfloat16)


def gptqmodels_dtype(facts, monkeypatch):
    """What the engine's script, which imports nothing of quantkit, builds GPTQ in on such a processor."""
    monkeypatch.syspath_prepend(RUNNERS)
    spec = spec_from_file_location("gptqmodel_runner", RUNNERS / "gptqmodel.py")
    runner = module_from_spec(spec)
    spec.loader.exec_module(runner)
    monkeypatch.setattr(runner, "CPU_FACTS", str(facts))
    return runner.build_dtype("gptq", "cpu")


@pytest.mark.parametrize(
    ("facts", "widens"),
    [
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16\n", False),
        ("Features\t: fp asimdhp bf16\n", False),
        (None, False),
    ],
    ids=["Intel", "Intel without tiles", "AMD", "Arm", "not Linux"],
)
def test_instructions_that_are_no_faster_than_float32s_are_not_used(facts, widens, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr("quantkit.machine.CPU_FACTS", tmp_path / "cpuinfo")
    if facts is not None:
        (tmp_path / "cpuinfo").write_text(facts)
    assert needs_widening(CPU, torch.bfloat16) is widens
    assert (gptqmodels_dtype(tmp_path / "cpuinfo", monkeypatch) == torch.float32) is widens
    seen = []
    monkeypatch.setattr(
        "quantkit.calibration.statistics._add_product",
        lambda *_: seen.append(torch.backends.mkldnn.matmul.fp32_precision),
    )
    before = torch.backends.mkldnn.matmul.fp32_precision
    for dtype in (torch.bfloat16, torch.float32):
        Statistics(frozenset({HESSIAN})).add(torch.ones(2, 3, 4, dtype=dtype))
    assert seen == [before if widens else "bf16", before]
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("model_type", VARIANTS)
def test_attention_with_keys_repeated_for_every_query_gives_what_transformers_own_gives(
    model_type, tmp_path, monkeypatch
):
    checkpoint = open_checkpoint(make_tiny(tmp_path / "m", model_type, **VARIANTS[model_type]))
    expected = through_layers(checkpoint, torch.float64)
    heads = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def attended(query, key, value, **others):
        assert others.keys() == {"is_causal", "scale"}
        heads.append([each.shape[1] for each in (query, key, value)])
        return plain(query, key, value, **others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attended)
    monkeypatch.setattr("quantkit.checkpoint.layer.needs_expanding", lambda *_: True)
    found = through_layers(checkpoint, torch.float64)
    assert heads == [[checkpoint.config["num_attention_heads"]] * 3] * checkpoint.num_layers
    assert checkpoint.config["num_key_value_heads"] < checkpoint.config["num_attention_heads"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's choice of attention")
def test_in_float32_a_gpu_holds_no_scores(tiny_mistral):
    checkpoint = open_checkpoint(tiny_mistral)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        found = through_layers(checkpoint, torch.float32, torch.device("cuda"))
    torch.testing.assert_close(found.cpu(), through_layers(checkpoint, torch.float32), rtol=1e-4, atol=1e-4)


def test_only_float32_on_a_gpu_repeats_keys():
    gpu = torch.device("cuda")
    assert needs_expanding(gpu, torch.float32)
    assert not needs_expanding(gpu, torch.bfloat16)
    assert not needs_expanding(CPU, torch.float32)
