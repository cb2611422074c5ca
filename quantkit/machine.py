"""The machine a build runs on: device, versions, memory. What decides bytes is part of a build's identity."""

import ctypes
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from itertools import starmap
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from quantkit import __version__
from quantkit.errors import RefusedError, UnavailableError

DECIDING_PACKAGES = ("torch", "numba", "transformers", "tokenizers", "safetensors")
ON_A_GPU = ("triton",)
DRIVER_VERSION = Path("/sys/module/nvidia/version")
# of either version of Linux's control groups: what /proc/self/cgroup calls the controller, its folder, the files with
# limit and use, and what of the use gives way
CONTROL_GROUPS = (
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ("", "", "memory.max", "memory.current", "inactive_file"),
)
# by which a GPU's libraries are told to multiply otherwise; they look when the first product is asked for
OTHER_PRODUCTS = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_TUNABLEOP_ENABLED",
)
# weights worked on together: 2 MB of float32, which stay in a CPU's cache; on a GPU enough for a launch to be worth it
TOGETHER, TOGETHER_ON_GPU = 1 << 19, 1 << 21
# rows that a thread takes for itself: fewer are not worth its way through the channels, more of them leave its cache
FEWEST_ROWS, MOST_ROWS = 128, 1024
Result = TypeVar("Result")
CPU_FACTS = Path("/proc/cpuinfo")
SIXTEEN_BIT = re.compile("bf16|fp16|asimdhp")  # in the names of x86's and Arm's instructions


def choose_device(name: str) -> torch.device:
    """The device that `--device` means.

    Args:
        name: "auto" (CUDA if there is one), "cuda" or "cpu".

    Raises:
        UnavailableError: CUDA is asked for and not there.
        RefusedError: another name.
    """
    if name not in ("auto", "cuda", "cpu"):
        raise RefusedError(f"unknown device {name!r}", where="--device", fix="use auto, cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            "no CUDA device is there",
            where="--device cuda",
            fix="use --device cpu, or install a CUDA build of torch and a driver (`quantkit doctor` says more)",
        )
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if cuda and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # read when the first tensor comes there: what was freed between tensors that stay is there for larger ones, too
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return torch.device("cuda" if cuda else "cpu")


def device_model(device: torch.device) -> str:
    """The GPU's or CPU's model name, a CPU's with its vector instructions.

    The same recipe gives the same bytes on the same model only; and by its name alone a rented CPU often says no more
    than "AMD EPYC", with instructions that differ from one host to the next, and with them the order of sums.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, sixteen_bit = _processor()
    return f"{name} ({', '.join((torch.backends.cpu.get_cpu_capability(), *sixteen_bit))})"


def _processor() -> tuple[str, list[str]]:
    """The CPU's model name, and those of its instructions that multiply bfloat16 or float16."""
    facts = _cpu_facts(CPU_FACTS)
    if not facts:
        return platform.processor() or platform.machine(), []
    flags = facts.get("flags") or facts.get("Features") or ""
    return facts.get("model name") or platform.machine(), sorted(filter(SIXTEEN_BIT.search, flags.split()))


@cache
def _cpu_facts(path: Path) -> dict[str, str]:
    """What Linux tells of the last processor; nothing on other systems."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def needs_widening(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies the dtype there no faster than float32; see `quantkit.checkpoint.widened`."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not _multiplies_bfloat16_fast()


def _multiplies_bfloat16_fast() -> bool:
    """Whether torch's products of bfloat16 are taken to be faster than those of float32 on the CPU.

    Not without instructions for them. On Intel's processors not by those for vectors (AVX512_BF16), where they take 1.4
    times as long, but by those for tiles (AMX), which virtual machines may lack. The engine gptqmodel goes by the same.
    """
    facts = _cpu_facts(CPU_FACTS)
    only_vectors = facts.get("vendor_id") == "GenuineIntel" and "amx_bf16" not in facts.get("flags", "").split()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not only_vectors


def needs_expanding(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's fused attention there wants a key for every query; see `quantkit.checkpoint.expanded`."""
    return device.type == "cuda" and dtype == torch.float32


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What tensors of a dtype are multiplied in there."""
    return torch.float32 if needs_widening(device, dtype) else dtype


def deciding_versions() -> dict[str, str]:
    """Versions of everything whose change may change bytes."""
    packages = [*DECIDING_PACKAGES, *(name for name in ON_A_GPU if torch.version.cuda and find_spec(name))]
    return {"quantkit": __version__} | {package: metadata.version(package) for package in packages}


def environment(device: torch.device) -> dict[str, Any]:
    """What the record says of the machine; nothing that tells whose it is."""
    on_gpu = device.type == "cuda"
    return {
        "versions": deciding_versions(),
        "commit": source_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "device_model": device_model(device),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": _driver() if on_gpu else None,
    }


def _driver() -> str | None:
    """Version of the GPU's driver; None where the system does not tell."""
    try:
        return DRIVER_VERSION.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def source_commit() -> str | None:
    """The commit of the checkout quantkit runs from, "-dirty" when it was changed; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def peak_memory_bytes(device: torch.device, *, engine: bool = False) -> dict[str, int]:
    """Largest resident memory of this process so far, and of the GPU's tensors.

    Args:
        device: where was computed.
        engine: also of the largest process that this one has started and waited for.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    facts = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if engine:
        facts["engine"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    if device.type == "cuda":
        facts["device"] = torch.cuda.max_memory_allocated(device)
    return facts


def host_free_bytes(system: Path = Path("/")) -> int:
    """Memory that is free for new tensors: of the machine, or of what a container or a Slurm job leaves this process.

    Args:
        system: root of the file system.
    """
    return min([int(psutil.virtual_memory().available), *_left_by_groups(system)])


def _left_by_groups(system: Path) -> Iterator[int]:
    """What each control group that this process is in, or that one is in, still allows."""
    try:
        memberships = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in memberships):
        for controller, root, limit, use, gives_way in CONTROL_GROUPS:
            if controller not in controllers.split(","):
                continue
            top = system / "sys/fs/cgroup" / root
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(top) and (folder / limit).is_file():
                    yield from _left_by_group(folder / limit, folder / use, folder / "memory.stat", gives_way)


def _left_by_group(limit: Path, use: Path, stat: Path, gives_way: str) -> Iterator[int]:
    try:
        allowed, used = limit.read_text(encoding="utf-8").strip(), int(use.read_text(encoding="utf-8"))
        held = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
    except OSError:
        return
    if allowed != "max":
        yield max(int(allowed) - used + int(held[gives_way]), 0)


def release_freed_memory() -> None:
    """Give freed memory back to the system, where the C library can: glibc keeps up to a third of a build's peak."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def fix_arithmetic(threads: int) -> None:
    """Fix how this process computes: on so many threads of the CPU, and on a GPU the same each time.

    There float32 factors stay whole, where the environment may have them cut to TF32's 10 bits
    (`TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`, as some containers do), products and factorizations are those that torch takes
    by itself, and attention is not cuDNN's, which torch itself takes for not deterministic, and which plans anew for
    every length.
    """
    for name in OTHER_PRODUCTS:
        os.environ.pop(name, None)
    torch.backends.cuda.preferred_blas_library("default")
    torch.backends.cuda.preferred_linalg_library("default")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)
    # the older of torch's two switches: it moves the newer one along, and torch refuses to multiply where they differ
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def pieces_at_a_time() -> int:
    """How many pieces are worked on side by side on a CPU: for as many threads as torch has, and as there are cores."""
    return min(torch.get_num_threads(), os.cpu_count() or 1)


def rows_together(matrix_OI: torch.Tensor) -> int:
    """How many rows of a matrix [O, I] are worked on together, where no byte depends on it."""
    weights = TOGETHER if matrix_OI.device.type == "cpu" else TOGETHER_ON_GPU
    return max(weights // matrix_OI.shape[1], 1)


def rows_of_a_thread(matrix_OI: torch.Tensor) -> int:
    """How many rows of a matrix [O, I] a thread of the CPU takes for itself at a time; all of them on a GPU.

    All threads that there are to be get as many, whatever cores there are: products of other shapes may sum otherwise.
    """
    rows, threads = len(matrix_OI), torch.get_num_threads()
    if matrix_OI.device.type != "cpu":
        return rows
    times = -(-rows // (threads * MOST_ROWS))
    return max(-(-rows // (threads * times)), FEWEST_ROWS)


def share_rows(work: Callable[[torch.Tensor], Result], matrix_OI: torch.Tensor) -> list[Result]:
    """What `work` makes of a matrix's rows, in order: of some on each thread of a CPU, of all at once on a GPU.

    Args:
        work: of rows that have nothing to do with any other.
        matrix_OI: [O, I].
    """
    return side_by_side(work, ((part,) for part in matrix_OI.split(rows_of_a_thread(matrix_OI))), matrix_OI.device)


def side_by_side(work: Callable[..., Result], pieces: Iterable[tuple[Any, ...]], device: torch.device) -> list[Result]:
    """What `work` makes of each piece, in order: on a CPU `pieces_at_a_time`, each of several on one thread.

    For many small steps on what fits a cache: handing every step to all threads takes longer than the step.

    Args:
        work: of one piece, with nothing to do with any other.
        pieces: its arguments.
        device: where they are; elsewhere than on a CPU they are worked on one after another.
    """
    threads, every = torch.get_num_threads(), list(pieces)
    if min(threads, len(every)) < 2 or device.type != "cpu":
        return list(starmap(work, every))
    at_a_time = min(pieces_at_a_time(), len(every))
    # counts for the threads of the pool, which begin after it
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(at_a_time, thread_name_prefix="side-by-side") as pool:
            return list(pool.map(lambda piece: work(*piece), every))
    finally:
        torch.set_num_threads(threads)
