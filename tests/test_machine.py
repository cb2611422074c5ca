"""What a record says of the machine, as far as it decides bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit import machine

CPU = torch.device("cpu")


def test_that_a_processor_without_vector_instructions_is_another_model():
    told = [
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import torch; from quantkit.machine import device_model as d; print(d(torch.device('cpu')))",
            ],
            env=os.environ | wanted,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for wanted in ({}, {"ATEN_CPU_CAPABILITY": "default"})
    ]
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has none that torch uses")
    assert told[0] == machine.device_model(CPU)
    assert told[1] != told[0]
    assert "DEFAULT" in told[1]


@pytest.mark.parametrize(
    ("facts", "model"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 f16c\n", "AMD EPYC"),
        ("processor\t: 0\nFeatures\t: fp asimdhp svebf16 bf16\n", None),
    ],
    ids=["x86", "arm"],
)
def test_that_instructions_for_16_bits_are_told(facts, model, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr(machine, "CPU_FACTS", tmp_path / "cpuinfo")
    named, sixteen_bit = machine._processor()
    assert model is None or named == model
    assert sixteen_bit == (["amx_bf16", "avx512_bf16"] if model else ["asimdhp", "bf16", "svebf16"])


def test_that_a_system_that_tells_nothing_of_its_processor_has_a_name_all_the_same(monkeypatch):
    monkeypatch.setattr(machine, "CPU_FACTS", Path("/nowhere"))
    assert machine.device_model(CPU).endswith(f"({torch.backends.cpu.get_cpu_capability()})")
