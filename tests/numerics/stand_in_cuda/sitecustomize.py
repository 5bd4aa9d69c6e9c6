"""A stand-in for CUDA devices: programs take their code paths for CUDA where there is no GPU.

    PYTHONPATH=tests/numerics/stand_in_cuda:. python -m launch.bench.engines.step_speed --model tiny

Python imports this file at its start, in child processes too. Then torch has eight devices. Their memory is the host's
and their kernels are the CPU's (`device.cpp`), but every caller sees CUDA tensors. An operator with tensors of two
devices is refused. Where torch is asked to warn of waits, a wait of the host for the device gives a warning. Flash
attention is computed densely, NCCL is gloo, streams and events are the host's, torch.compile is off.
`CUDA_VISIBLE_DEVICES=` hides the devices.

This shows that a program takes the right paths with tensors on the right devices. Only a GPU shows whether CUDA's
kernels agree, whether streams order them, and how long they take.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.abc
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
NAME = "NVIDIA H200 (stand-in on the host)"
MEMORY_BYTES = 141 * 10**9
_KEPT: list[Any] = []
"""Registered kernels; they would be removed with their library."""


class Finder(importlib.abc.MetaPathFinder):
    """Adds the devices at torch's first import, before torch looks for CUDA."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """torch's own module spec, whose loader then repositions the names of CUDA."""
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        assert spec is not None and spec.loader is not None and spec.submodule_search_locations is not None
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        device, run = load(Path(spec.submodule_search_locations[0])), spec.loader.exec_module

        def run_and_replace(torch: ModuleType) -> None:
            run(torch)
            _replace_names(torch, device)
            _replace_attention(torch)
            _replace_products(torch)

        spec.loader.exec_module = run_and_replace  # type: ignore[method-assign]
        return spec


def load(torch_folder: Path) -> ctypes.CDLL:
    """Load the library of the devices on top of torch's own."""
    if (torch_folder / "lib/libtorch_cuda.so").exists():
        raise ImportError("this torch was built with CUDA; the stand-in needs a CPU build")
    for name in ("libtorch_global_deps.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), ctypes.RTLD_GLOBAL)
    device = ctypes.CDLL(str(build(torch_folder)))
    for name in ("memory", "peak"):
        getattr(device, f"stand_in_{name}").restype = ctypes.c_int64
    return device


def build(torch_folder: Path) -> Path:
    """The shared library, compiled once for each source and version of torch."""
    version = importlib.metadata.version("torch")
    mark = hashlib.sha256(SOURCE.read_bytes() + version.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"megavl_stand_in_cuda_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{mark}.so"
    if not library.exists():
        include, scratch = torch_folder / "include", folder / f"{mark}.{os.getpid()}"
        command = [
            os.environ.get("CXX", "g++"),
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            str(SOURCE),
            "-o",
            str(scratch),
        ]
        command += [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
        command += [f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True)
        scratch.replace(library)
    return library


class _Stream:
    """The only queue: the host itself."""

    cuda_stream = 0
    device_index = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        found = event or _Event()
        found.record()
        return found

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Event:
    """A moment of the host's clock."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.moment: float | None = None

    def record(self, stream: object = None) -> None:
        self.moment = time.perf_counter()

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        assert self.moment is not None and other.moment is not None, "both events must have been recorded"
        return 1e3 * (other.moment - self.moment)


@contextlib.contextmanager
def _on_stream(stream: object) -> Iterator[None]:
    yield


def _replace_names(torch: Any, library: Any) -> None:
    cuda, stream = torch.cuda, _Stream()
    properties = SimpleNamespace(name=NAME, total_memory=MEMORY_BYTES, major=9, minor=0, multi_processor_count=132)
    properties.pci_domain_id = properties.pci_bus_id = properties.pci_device_id = 0
    visible = 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else 8

    def exchange(index: int) -> int:
        before = library.stand_in_device()
        if index >= 0:
            library.stand_in_set_device(index)
        return before

    def set_device(index: Any) -> None:
        exchange(torch.device(index).index or 0 if not isinstance(index, int) else index)

    # torch.compile hashes some of these, and functions of ctypes cannot be hashed: hence the lambdas.
    names = {
        "is_available": lambda: visible > 0,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: visible,
        "current_device": lambda: library.stand_in_device(),
        "set_device": set_device,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: library.stand_in_memory(),
        "memory_reserved": lambda device=None: library.stand_in_memory(),
        "max_memory_allocated": lambda device=None: library.stand_in_peak(),
        "max_memory_reserved": lambda device=None: library.stand_in_peak(),
        "reset_peak_memory_stats": lambda device=None: library.stand_in_reset_peak(),
        "mem_get_info": lambda device=None: (MEMORY_BYTES - library.stand_in_memory(), MEMORY_BYTES),
        "memory_stats": lambda device=None: {"allocated_bytes.all.current": library.stand_in_memory()},
        "set_sync_debug_mode": lambda mode: library.stand_in_warn_of_waits(mode not in (0, "default")),
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "default_generators": (torch.default_generator,) * 8,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": _on_stream,
        "Stream": _Stream,
        "Event": _Event,
    }
    for name, value in names.items():
        setattr(cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(cuda.random, name, names[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *args: None)
    torch.version.cuda = "13.0"
    distributed = torch.distributed
    start = distributed.init_process_group

    def init_process_group(backend: str, *args: Any, **kwargs: Any) -> None:
        start("gloo" if backend == "nccl" else backend, *args, **kwargs)

    distributed.init_process_group = init_process_group


def _replace_attention(torch: Any) -> None:
    """torch's flash attention over packed segments, densely and in fp32."""
    kernels = torch.library.Library("aten", "IMPL", "CUDA")

    def probabilities(q: Any, k: Any, cu: Any, causal: bool, scale: float | None) -> tuple[Any, Any, float]:
        assert q.is_cuda and cu.is_cuda and cu.dtype == torch.int32, "flash attention needs int32 borders on the device"
        assert q.dtype in (torch.float16, torch.bfloat16), f"flash attention does not support {q.dtype}"
        assert q.stride(-1) == 1 and k.stride(-1) == 1, "flash attention needs channels next to each other"
        assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, f"flash attention refuses head dimension {q.shape[-1]}"
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        positions = torch.arange(q.shape[0], device=q.device)
        segment = torch.searchsorted(cu, positions, right=True)
        allowed = segment[:, None] == segment[None]
        if causal:
            allowed &= positions[:, None] >= positions[None]
        scores = factor * torch.einsum("qhd,khd->hqk", q.float(), k.float())
        scores = scores.masked_fill(~allowed, float("-inf"))
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp(), lse, factor

    def forward(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, dropout: float, causal: bool,
        debug: bool, *, scale: Any = None, window_size_left: Any = None, window_size_right: Any = None, **rest: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert dropout == 0.0 and not any(value is not None for value in rest.values())
        assert (window_size_left, window_size_right) == ((-1, 0) if causal else (-1, -1))
        weights, lse, _ = probabilities(q, k, cu_q, causal, scale)
        out = torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)
        none = torch.empty(0, device=q.device)
        return out, lse, torch.zeros(2, dtype=torch.uint64, device=q.device), none, none

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int,
        dropout: float, causal: bool, state: Any, unused: Any, *, scale: Any = None, **rest: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        weights, _, factor = probabilities(q, k, cu_q, causal, scale)
        grad = grad.float()
        to_v = torch.einsum("hqk,qhd->khd", weights, grad)
        toward = torch.einsum("qhd,khd->hqk", grad, v.float())
        inner = (grad * out.float()).sum(-1).T[..., None]  # (H, T, 1)
        scores = factor * weights * (toward - inner)
        to_q = torch.einsum("hqk,khd->qhd", scores, k.float())
        to_k = torch.einsum("hqk,qhd->khd", scores, q.float())
        return to_q.to(q.dtype), to_k.to(q.dtype), to_v.to(q.dtype)

    kernels.impl("_flash_attention_forward", forward)
    kernels.impl("_flash_attention_backward", backward)
    _KEPT.append(kernels)


def _replace_products(torch: Any) -> None:
    """torch's product of half-precision matrices that is added to an fp32 one, which CPUs lack."""
    kernels = torch.library.Library("aten", "IMPL", "CUDA")

    def addmm(total: Any, one: Any, other: Any, out_dtype: Any, *, beta: float = 1, alpha: float = 1, out: Any) -> Any:
        assert one.dtype == other.dtype and out_dtype == out.dtype == total.dtype == torch.float32
        assert one.dtype in (torch.float16, torch.bfloat16), f"no product of {one.dtype} has another type"
        return torch.addmm(total, one.float(), other.float(), beta=beta, alpha=alpha, out=out)

    kernels.impl("addmm.dtype_out", addmm)
    _KEPT.append(kernels)


sys.meta_path.insert(0, Finder())
