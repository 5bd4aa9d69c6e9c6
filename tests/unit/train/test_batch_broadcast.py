"""The next step is put together while this one computes, and is the same as without."""

from __future__ import annotations

import dataclasses
import operator
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megavl.config.errors import DataError
from megavl.config.load import load_model_config
from megavl.config.recipe import ParallelConfig
from megavl.data.batch import Batch
from megavl.parallel import broadcast, groups
from megavl.train.batch_broadcast import StepPrefetcher, next_step
from tests.distributed.synthetic import SyntheticSteps

STEPS, BAD_STEP = 5, 3


class Watched:
    """Steps of uneven batches that say when they are asked for; one of them cannot be loaded."""

    def __init__(self) -> None:
        self.source = SyntheticSteps(
            load_model_config("tiny-siglip"),
            modality="multimodal",
            seq_length=128,
            global_batch_size=3,
            micro_batch_size=1,
            dp_rank=0,
            dp_size=1,
            image_counts=(2, 0, 1),
        )
        self.asked: list[int] = []
        self.threads: set[str] = set()
        self.waits_for: dict[int, threading.Event] = {}
        self.begun = {step: threading.Event() for step in range(STEPS + 1)}

    def get(self, step: int) -> list[Batch]:
        """The micro-batches."""
        self.asked.append(step)
        self.threads.add(threading.current_thread().name)
        self.begun[step].set()
        if step in self.waits_for:
            self.waits_for[step].wait(timeout=600)
        if step == BAD_STEP:
            raise DataError(f"step {step} is damaged")
        return self.source.get(step)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A world of one process."""
    groups.start(ParallelConfig(), seed=1)
    yield
    groups.stop()


def test_prefetched_steps_equal_loaded_steps() -> None:
    watched = Watched()
    ahead = StepPrefetcher(watched, steps=STEPS)
    for step in range(BAD_STEP):
        found, expected = next_step(ahead, step), next_step(watched.source, step)
        # Nobody has asked for it yet.
        assert watched.begun[step + 1].wait(timeout=600)
        loaded = watched.source.get(step)
        assert sum(batch.image_count for batch in found) == 3
        for one, other, batch in zip(found, expected, loaded, strict=True):
            for field in dataclasses.fields(batch):
                first, second, third = (getattr(item, field.name) for item in (one, other, batch))
                same = torch.equal if isinstance(third, torch.Tensor) else operator.eq
                assert same(first, third) and same(second, third), field.name
    # The step is damaged for whoever wants it, not for the one before.
    with pytest.raises(DataError, match="step 3 is damaged"):
        next_step(ahead, BAD_STEP)
    next_step(ahead, STEPS - 1)
    ahead.close()
    assert watched.asked == list(range(STEPS)), "each once, and none beyond the last"
    assert watched.threads == {"megavl-next-step_0"}


@pytest.mark.parametrize("modality", ["text", "multimodal"])
def test_one_small_message_carries_all_integers(modality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes less than int64 tokens and labels and an fp32 mask, from which ranks would have to find the rows."""
    sent: list[int] = []
    share = broadcast.share_tensor

    def counted(value: torch.Tensor, **settings: Any) -> torch.Tensor:
        sent.append(value.nbytes)
        return share(value, **settings)

    monkeypatch.setattr(broadcast, "share_tensor", counted)
    source = Watched().source
    source.modality = modality
    batches = next_step(source, 0)
    (message,) = sent
    assert message <= sum(len(batch.tokens) for batch in batches) * (8 + 8 + 4)


def test_closing_waits_for_the_source() -> None:
    watched, goes_on = Watched(), threading.Event()
    watched.waits_for = {1: goes_on}
    ahead = StepPrefetcher(watched, steps=STEPS)
    next_step(ahead, 0)
    assert watched.begun[1].wait(timeout=600)
    closing = threading.Thread(target=ahead.close)
    closing.start()
    closing.join(timeout=0.2)
    assert closing.is_alive(), "the source is at work"
    goes_on.set()
    closing.join(timeout=600)
    assert not closing.is_alive() and watched.asked == [0, 1]
