"""What a record says of the machine, as far as it decides bytes; and work on its cores."""

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from quantkit import machine

CPU = torch.device("cpu")


def test_a_processor_without_vector_instructions_is_another_model():
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
    ("facts", "expected"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 f16c\n",
            ("AMD EPYC", ["amx_bf16", "avx512_bf16"]),
        ),
        (
            "processor\t: 0\nFeatures\t: fp asimdhp svebf16 bf16\n",
            (platform.machine(), ["asimdhp", "bf16", "svebf16"]),
        ),
    ],
    ids=["x86", "arm"],
)
def test_instructions_for_16_bits_are_told(facts, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr(machine, "CPU_FACTS", tmp_path / "cpuinfo")
    assert machine._processor() == expected


def test_a_system_that_tells_nothing_of_its_processor_has_a_name_all_the_same(monkeypatch):
    monkeypatch.setattr(machine, "CPU_FACTS", Path("/nowhere"))
    assert machine.device_model(CPU).endswith(f"({torch.backends.cpu.get_cpu_capability()})")


def test_no_container_cuts_products_to_tf32_and_attention_is_not_cudnns():
    switches = """
    matmul.fp32_precision, matmul.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled(),
    os.environ.get("NVIDIA_TF32_OVERRIDE"), torch.backends.cuda.preferred_blas_library().name,
    torch.backends.cuda.preferred_linalg_library().name
    """
    code = f"""
import os
import torch
from quantkit.machine import fix_arithmetic
matmul = torch.backends.cuda.matmul
print({switches})
fix_arithmetic(1)
print({switches})
"""
    cut = os.environ | dict.fromkeys(
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT"), "1"
    )
    cut["TORCH_LINALG_PREFER_CUSOLVER"] = "1"
    done = subprocess.run([sys.executable, "-c", code], env=cut, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "tf32 True True 1 Cublaslt Cusolver",
        "ieee False False None Cublas Default",
    ]


@pytest.mark.parametrize(("given", "expected"), [({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "x"}, "x")])
def test_a_gpus_segments_may_grow_unless_the_user_says_otherwise(given, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert machine.choose_device("cpu").type == "cpu"
    assert os.environ.get("PYTORCH_ALLOC_CONF") == given.get("PYTORCH_ALLOC_CONF")
    assert machine.choose_device("auto").type == "cuda"
    assert os.environ["PYTORCH_ALLOC_CONF"] == expected
    # the older name is the user's, too
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "y")
    machine.choose_device("auto")
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize(
    ("membership", "root", "limit", "use", "gives_way"),
    [
        ("0::/jobs/mine", "", "memory.max", "memory.current", "inactive_file"),
        ("4:cpu,memory:/jobs/mine", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_free_memory_is_what_the_narrowest_group_leaves(membership, root, limit, use, gives_way, tmp_path):
    group = tmp_path / "sys/fs/cgroup" / root / "jobs/mine"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:pids:/\n{membership}\n")
    plenty = machine.host_free_bytes(tmp_path)
    assert plenty > 5000
    for folder, allowed in ((group, "max"), (group.parent, "9000")) if not root else ((group.parent, "9000"),):
        (folder / limit).write_text(f"{allowed}\n")
        (folder / use).write_text("5000\n")
        (folder / "memory.stat").write_text(f"anon 17\n{gives_way} 700\n")
    assert machine.host_free_bytes(tmp_path) == 4700
    (group.parent / limit).write_text("4000")
    assert machine.host_free_bytes(tmp_path) == 0


def test_pieces_are_worked_on_side_by_side_each_on_one_thread(monkeypatch):
    """Two that wait for each other: one after the other they would wait for ever."""
    monkeypatch.setattr("quantkit.machine.os.cpu_count", lambda: 2)
    torch.set_num_threads(2)
    both = threading.Barrier(2, timeout=60)

    def work(piece: int) -> tuple[int, int]:
        both.wait()
        return piece, torch.get_num_threads()

    found = machine.side_by_side(work, ((piece,) for piece in range(8)), CPU)
    assert found == [(piece, 1) for piece in range(8)]
    assert torch.get_num_threads() == 2


def test_on_one_core_they_are_on_one_thread_too(monkeypatch):
    """So that products do not sum otherwise than where there are as many cores as threads."""
    monkeypatch.setattr("quantkit.machine.os.cpu_count", lambda: 1)
    torch.set_num_threads(2)
    assert machine.side_by_side(lambda piece: torch.get_num_threads(), ((1,), (2,)), CPU) == [1, 1]


@pytest.mark.parametrize(
    ("rows", "threads", "expected"),
    [
        (4096, 16, 256),
        (4096, 2, 1024),
        (14336, 2, 1024),
        (14336, 16, 896),
        (3584, 2, 896),
        (3584, 1, 896),
        (100, 2, 128),
    ],
)
def test_threads_get_as_many_rows_each(rows, threads, expected, monkeypatch):
    torch.set_num_threads(threads)
    for cores in (1, 64):
        monkeypatch.setattr("quantkit.machine.os.cpu_count", lambda cores=cores: cores)
        assert machine.rows_of_a_thread(torch.empty(rows, 4)) == expected
    assert machine.rows_of_a_thread(torch.empty(rows, 4, device="meta")) == rows


def test_an_error_in_a_piece_is_raised_and_the_threads_are_as_they_were():
    torch.set_num_threads(2)

    def work(piece: int) -> None:
        if piece == 1:
            raise ValueError(f"piece {piece}")

    with pytest.raises(ValueError, match="piece 1"):
        machine.side_by_side(work, ((piece,) for piece in range(3)), CPU)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("threads", "device"), [(1, "cpu"), (2, "meta")])
def test_on_one_thread_or_another_device_pieces_come_one_after_another(threads, device):
    torch.set_num_threads(threads)
    own = threading.get_ident()
    found = machine.side_by_side(lambda piece: threading.get_ident(), ((1,), (2,)), torch.device(device))
    assert found == [own, own]
    assert torch.get_num_threads() == threads
