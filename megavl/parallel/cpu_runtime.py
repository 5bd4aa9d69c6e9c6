"""Lets stock megatron-core run without CUDA, under gloo: CUDA names are redirected to the CPU.

megatron-core 0.16.1 names CUDA devices in RNG seeding, RoPE, schedules, point-to-point transfers, gradient buffers and
optimizers. `install()` redirects them where CUDA is absent and does nothing where it is present. It must run before
process groups and models are created. Only this module patches torch; other code asks `device()`.
"""

from __future__ import annotations

import contextlib
import datetime
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_installed = False


def device() -> torch.device:
    """Device of this process: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


class _CudaNamesOnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None and str(kwargs["device"]).startswith("cuda"):
            kwargs = {**kwargs, "device": _CPU}
        # megatron-core's optimizers sort parameters by the text "torch.cuda.FloatTensor".
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + func(*args).split(".", 1)[1]
        return func(*args, **kwargs)


def without_redirection() -> contextlib.AbstractContextManager[None]:
    """Torch calls skip the redirection, which takes 1 us each; nothing inside may name a CUDA device."""
    return torch._C.DisableTorchFunction() if _installed else contextlib.nullcontext()


def prepare_products(dtype: torch.dtype) -> None:
    """Before a model of a type is built: let this process multiply its matrices at the speed of fp32.

    A CPU without instructions for bf16 takes 20 times as long for a product of bf16 as for one of fp32. There the
    factors are widened and the result is rounded once. Products of fp32 then take 7 us more each, so this waits for the
    first model in bf16.
    """
    if dtype == torch.bfloat16 and not torch.cuda.is_available() and not _has_bf16_instructions():
        _widen_products()


def _has_bf16_instructions() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def _widen_products() -> torch.library.Library:
    # The kernels go with the library, which the cache keeps.
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        for name in _PRODUCTS:
            _widen(library, name)
    return library


def _widen(library: torch.library.Library, name: str) -> None:
    stock = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args[0].dtype != torch.bfloat16:
            return stock.call_boxed(keys, *args, **kwargs)
        wide = (value.float() if isinstance(value, torch.Tensor) else value for value in args)
        return stock.call_boxed(keys, *wide, **kwargs).bfloat16()

    library.impl(name, product, "CPU", with_keyset=True)


class _Inert:
    """Stands for a CUDA stream or event; every method returns at once."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def record(self, *args: object) -> None: ...

    def wait(self, *args: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, *args: object) -> None: ...

    def wait_event(self, *args: object) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


def install() -> None:
    """Redirect CUDA names to the CPU; inert where CUDA is available, and after the first call.

    Raises:
        RuntimeError: this torch no longer offers the hook that backward passes need.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _redirect_attributes()
    mode = _CudaNamesOnCpu()
    mode.__enter__()
    # `backward` is itself an overridable function: the mode handles it and is therefore off while the engine runs, so
    # recomputed forwards would see real CUDA names. Entering the mode again below that check restores it.
    engine = torch.autograd._engine_run_backward

    def run_with_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = run_with_mode
    _check_backward_hook()
    _share_gloo_devices()
    _installed = True


def _redirect_attributes() -> None:
    from megatron.core.tensor_parallel import random as tensor_parallel_random

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.Stream = cuda.Event = _Inert
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Inert()
    cuda.stream = _no_stream
    cuda.is_current_stream_capturing = lambda: False
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self
    rng: Any = tensor_parallel_random
    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _share_gloo_devices() -> None:
    """Let all gloo groups of this process use the network devices of the first one.

    Each device has a thread that wakes up 100 times a second. With a device for each of megatron-core's groups, every
    rank of the CPU took 3% of a core while it waited.
    """
    groups: Any = torch.distributed.ProcessGroupGloo
    stock = groups.__init__
    devices: list[Any] = []

    def make(self: Any, store: Any, rank: int, size: int, *rest: Any, **named: Any) -> None:
        timeout = rest[0] if len(rest) == 1 and not named else named.get("timeout")
        if not devices or not isinstance(timeout, datetime.timedelta):
            stock(self, store, rank, size, *rest, **named)
            devices[:] = devices or self.options._devices
            return
        options = groups._Options()
        # As many threads as torch takes.
        options._devices, options._threads, options._timeout = devices, 2 * len(devices), timeout
        stock(self, store, rank, size, options)

    groups.__init__ = make


@contextlib.contextmanager
def _no_stream(stream: object) -> Iterator[None]:
    yield


class _CreatesOnCudaInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> torch.Tensor:
        return grad[0] + torch.zeros(1, device="cuda")


def _check_backward_hook() -> None:
    probe = torch.zeros(1, requires_grad=True)
    try:
        with torch.enable_grad():
            _CreatesOnCudaInBackward.apply(probe).sum().backward()
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(
            f"torch {torch.__version__} no longer runs backward passes through torch.autograd._engine_run_backward, "
            "which the CPU runtime hooks; use the torch version pinned by `make setup`"
        ) from error
