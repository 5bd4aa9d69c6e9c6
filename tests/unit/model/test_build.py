"""Stages that a checkpoint will fill draw no random weights, and are the same in all else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megavl.config.load import load_model_config
from megavl.config.recipe import ParallelConfig
from megavl.model.build import BuildSpec, build_stages, build_towers
from megavl.parallel import groups

CONFIG = load_model_config("tiny-hybrid", llm={"hidden_size": 64, "ffn_hidden_size": 96, "vocab_size": 256})
TRAIN = ("llm", "adaptor", "sam_downsamples", "sam_hd")


class NoDraws(TorchDispatchMode):
    """Fails where random numbers are drawn; on the meta device none are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        random = func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_)
        assert not random or args[0].is_meta, f"{func} on {args[0].device}"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A world of one process."""
    groups.start(ParallelConfig(), seed=1)
    yield
    groups.stop()


def test_drawing_is_noticed() -> None:
    with pytest.raises(AssertionError, match="normal_|uniform_"), NoDraws():
        build_stages(BuildSpec(model=CONFIG, train=TRAIN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stage_to_be_filled_equals_a_drawn_one(dtype: torch.dtype) -> None:
    (drawn,) = build_stages(BuildSpec(model=CONFIG, train=TRAIN, seed=1, dtype=dtype))
    with NoDraws():
        (blank,) = build_stages(BuildSpec(model=CONFIG, train=TRAIN, seed=1, dtype=dtype, drawn=False))
    pairs = list(zip(drawn.named_parameters(), blank.named_parameters(), strict=True))
    for (name, one), (other_name, other) in pairs:
        assert (name, vars(one), one.requires_grad) == (other_name, vars(other), other.requires_grad)
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        assert other.isnan().all()
    for (name, one), (_, other) in zip(drawn.named_buffers(), blank.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    blank.load_state_dict(drawn.state_dict())
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)


def test_towers_beside_the_first_stage_draw_nothing() -> None:
    with NoDraws():
        towers = build_towers(BuildSpec(model=CONFIG, train=TRAIN))
    assert all(weight.isnan().all() for weight in towers.parameters())
