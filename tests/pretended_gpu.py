"""A GPU that is none: its tensors say that they lie on one, hold their values in the host's memory, and meet no others.

What a build does on a GPU can so be run where there is none: which tensors are put there, that none of the CPU's gets
among them, and that nothing reads one without copying it. What a GPU would compute, the CPU computes: of a GPU's speed,
its rounding and its kernels nothing is learnt (for those see `tests.kernels`).
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantkit import kernels
from quantkit.kernels import compiled, compiled_search, reference
from quantkit.kernels.levels import BlockSearch

aten = torch.ops.aten
COMPILER = shutil.which("g++")
NAME = "Pretended GPU"
MEMORY = 140 << 30
# a build of torch without CUDA has nobody who would switch between GPUs; there is one, so nobody has to
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct OneGpu final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, ::OneGpu); }
"""
FACTS = {
    "_lazy_init": None,
    "is_available": True,
    "device_count": 1,
    "get_device_name": NAME,
    "mem_get_info": (MEMORY, MEMORY),
    "memory_stats_as_nested_dict": {f"{kind}_bytes": {"all": {"current": 0}} for kind in ("reserved", "allocated")},
    "max_memory_allocated": 0,
}
# interpreted Triton takes minutes for a build; the others are plain torch on the GPU's tensors
COMPILED = ("solve_panel", "rounding_errors", "best_scales", "code_moments", "fit_ranges", "fit_offset")
COPIES = {aten.copy_.default, aten._to_copy.default}
UNORDERED = {"index_add", "scatter_add", "cumsum", "histc", "kthvalue", "median", "nanmedian", "nll_loss2d_forward"}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class GpuTensor(torch.Tensor):
    """A tensor of the pretended GPU.

    Args:
        held: its values, in the host's memory.
    """

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "GpuTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("cuda", 0),
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"GpuTensor({self.held!r})"

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "GpuTensor") -> None:
        self.held = other.held
        torch.Tensor.data.__set__(self, other)

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operation gives of which at least one tensor is the GPU's, as a GPU would.

    Raises:
        RuntimeError: another is the CPU's, and neither a copy, nor a number, nor an index; or a GPU would add in the
            order in which its threads come to it, so that the same bytes would be luck.
    """
    if adds_as_it_comes(function, args, kwargs):
        raise RuntimeError(f"{function}: a GPU does this in another order every time")
    strangers = [each for each in tensors((args, kwargs)) if not isinstance(each, GpuTensor)]
    # a number may come from anywhere, and so may places
    strangers = [each for each in strangers if each.dim() or each.is_meta]
    if function in INDEXED and isinstance(args[0], GpuTensor):
        strangers = [each for each in strangers if each.is_floating_point()]
    if strangers and function not in COPIES:
        raise RuntimeError(f"{function}: {described(strangers[0])} meets a GPU's")
    held_args, held_kwargs = mapped(held, args), mapped(held, kwargs)
    goes_to = torch.device(kwargs.get("device") or "cuda")
    # the host's memory is what the values are in, page-locked or not
    held_kwargs |= {key: value for key, value in (("device", "cpu"), ("pin_memory", False)) if key in kwargs}
    if function is aten.mm.dtype:
        left, right, dtype = held_args
        found = left.to(dtype) @ right.to(dtype)
    else:
        found = function(*held_args, **held_kwargs)
    if function._schema.is_mutable:
        changed = kwargs["out"] if "out" in kwargs else args[0]
        if isinstance(changed, GpuTensor) and changed.shape != changed.held.shape:
            changed.data = GpuTensor(changed.held)
        return changed
    return mapped(on_gpu, found) if goes_to.type == "cuda" else found


def adds_as_it_comes(function: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether CUDA does it in no order; after what torch.use_deterministic_algorithms says of forward operations.

    Of those that write each to its place only sums are here: the same place twice is not looked for.
    """
    name = function.overloadpacket.__name__
    if name in ("index_put_", "index_put", "put_", "put"):
        return bool(kwargs.get("accumulate") or (len(args) > 3 and args[3]))
    if name in ("scatter", "scatter_"):
        return kwargs.get("reduce") is not None
    if name in ("scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_"):
        return args[0].is_floating_point() and args[4] not in ("amin", "amax")
    if name == "bincount":
        return len(args) > 1 and args[1] is not None
    return name.rstrip("_") in UNORDERED and args[0].is_floating_point()


def tensors(values: Any) -> Iterator[torch.Tensor]:
    """Those in lists, tuples and dictionaries. (torch.utils._pytree, private too, takes twice as long.)"""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors(value)


def described(tensor: torch.Tensor) -> str:
    return f"a tensor of the {tensor.device} {tuple(tensor.shape)}"


def mapped(function: Callable[[Any], Any], values: Any) -> Any:
    """The same lists, tuples and dictionaries with what the function makes of what is in them."""
    if isinstance(values, (list, tuple)):
        return type(values)(mapped(function, value) for value in values)
    if isinstance(values, dict):
        return {key: mapped(function, value) for key, value in values.items()}
    return function(values)


def held(value: Any) -> Any:
    return value.held if isinstance(value, GpuTensor) else value


def on_gpu(value: Any) -> Any:
    return GpuTensor(value) if isinstance(value, torch.Tensor) else value


def why_not() -> str | None:
    """Why there can be no pretended GPU here; None if there can."""
    if torch.version.cuda:
        return "torch has a CUDA of its own"
    return None if COMPILER else "no g++ to compile a part of it"


@contextmanager
def pretended_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """torch and quantkit find a GPU inside.

    Args:
        folder: for what is compiled; once for a folder.
        monkeypatch: takes back afterwards what is not a context of its own.
    """
    ctypes.CDLL(str(_guard(folder)))
    for name, fact in FACTS.items():
        monkeypatch.setattr(torch.cuda, name, _always(fact))
    monkeypatch.setattr(compiled, "over_rows", partial(_launched, compiled.over_rows))
    own = vars(reference) | {name: getattr(compiled, name) for name in COMPILED}
    plain = kernels._implementation
    monkeypatch.setattr(
        kernels, "_implementation", lambda device: SimpleNamespace(**own) if device == "cuda" else plain(device)
    )
    plain_search, own_search = kernels._searching, SimpleNamespace(search_blocks=_searched)
    monkeypatch.setattr(kernels, "_searching", lambda device: own_search if device == "cuda" else plain_search(device))
    library = torch.library.Library("aten", "IMPL", "CUDA")
    for name, function in OPERATIONS.items():
        library.impl(name, function)
    try:
        # fused attention is CUDA's own
        with sdpa_kernel(SDPBackend.MATH):
            yield torch.device("cuda")
    finally:
        library._destroy()


def _guard(folder: Path) -> Path:
    built = folder / "guard.so"
    if not built.exists():
        root = Path(torch.__file__).parent
        source = folder / "guard.cpp"
        source.write_text(GUARD, encoding="utf-8")
        options = ["-std=c++20", "-shared", "-fPIC", "-I", str(root / "include"), "-L", str(root / "lib"), "-lc10"]
        subprocess.run([str(COMPILER), str(source), "-o", str(built), *options], check=True)
    return built


def _launched(launch: Callable[..., None], kernel: Any, *arguments: Any) -> None:
    """Launch a kernel on tensors of the CPU alone or of the GPU alone; it takes what it finds at any address."""
    launch(kernel, *_of_one_device(kernel.__name__, arguments))


def _searched(x_NSL: GpuTensor, w_NSL: GpuTensor, search: BlockSearch) -> tuple:
    """The search of K-quants, which makes what it fills."""
    return mapped(on_gpu, compiled_search.search_blocks(*_of_one_device("search_blocks", (x_NSL, w_NSL)), search))


def _of_one_device(name: str, arguments: tuple) -> tuple:
    """What tensors of the CPU alone or of the GPU alone hold."""
    given = list(tensors(arguments))
    strangers = [each for each in given if not isinstance(each, GpuTensor)]
    if strangers and len(strangers) < len(given):
        raise RuntimeError(f"{name}: {described(strangers[0])} meets a GPU's")
    return mapped(held, arguments)


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    own = {} if memory_format is None else {"memory_format": memory_format}
    return GpuTensor(torch.empty(size, dtype=dtype, device="cpu", **own))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return GpuTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy(to, values, non_blocking=False):
    to.held.copy_(held(values))
    return to


# what torch makes a GPU's tensors of, where none is an argument or none is asked
OPERATIONS = {"empty.memory_format": _empty, "empty_strided": _empty_strided, "copy_": _copy}


def _always(fact: Any) -> Callable[..., Any]:
    return lambda *_: fact
