"""Deliberate faults of a layout, to show that a comparison finds them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megavl.parallel import images
from megavl.train import model_chunks

Fault = contextlib.AbstractContextManager[Any]


def _norms_not_summed() -> Fault:
    """Ranks of sequence parallelism keep the gradients of the norms over their own share of the sequence."""
    name = "megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads"
    return mock.patch(name, lambda *args, **kwargs: None)


def _tokens_not_summed() -> Fault:
    """Each replica divides by its own number of loss tokens."""
    alone = SimpleNamespace(broadcast=dist.broadcast, all_reduce=lambda *args, **kwargs: None)
    return mock.patch.object(model_chunks, "dist", alone)


def _shares_not_scaled() -> Fault:
    """Gradients of images that tensor ranks share are averaged over them instead of summed."""
    gather = images._GatherImages
    backward = gather.backward

    def wrong(ctx: Any, *gradients: Any) -> Any:
        ctx.ranks = 1
        return backward(ctx, *gradients)

    return mock.patch.object(gather, "backward", staticmethod(wrong))


def _a_millionth_more() -> Fault:
    """Gradients are too large by one part in a million, which a bound of fp32 lets pass."""
    scale = DistributedDataParallel.scale_gradients

    def wrong(stage: Any, factor: Any) -> None:
        scale(stage, factor.double() * (1 + 1e-6))

    return mock.patch.object(DistributedDataParallel, "scale_gradients", wrong)


FAULTS: Mapping[str, Callable[[], Fault]] = {
    "norms-not-summed": _norms_not_summed,
    "tokens-not-summed": _tokens_not_summed,
    "shares-not-scaled": _shares_not_scaled,
    "a-millionth-more": _a_millionth_more,
}


@contextlib.contextmanager
def fault(name: str | None) -> Iterator[None]:
    """Inside, the layout is wrong in one way, or right."""
    with FAULTS[name]() if name else contextlib.nullcontext():
        yield
