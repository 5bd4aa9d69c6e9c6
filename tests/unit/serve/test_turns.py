"""The loop of rank 0 in this process: who gets a row, who is forgotten, and what a failing model does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megavl.config.errors import NumericsError, PeerError, UsageError
from megavl.generate.decode import AnswerBatch, Request
from megavl.generate.open_model import find_model, loaded
from megavl.generate.pretrained import Model, Processor
from megavl.serve import turns as turns_module
from megavl.serve.plan import Plan, PlanChannel
from megavl.serve.turns import Event, Job, Leader, Turns, largest_request
from tests.unit.generate import models

ROWS = 3


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = models.write_folder(
        "tiny-siglip", tmp_path_factory.mktemp("model") / "tiny", tokenizer=tokenizer_dir, fmt="native"
    )
    source = find_model(folder)
    with loaded(source) as stage:
        yield Model(stage, Processor(source.config, source.tokenizer))


class Recorder:
    """Delivered events, and what to do at each turn."""

    def __init__(self, model: Model) -> None:
        self.events: list[Event] = []
        self.turns = Turns(model, rows=ROWS, length=64)
        self.leader = Leader(self.turns, PlanChannel(model.processor.tokenizer), deliver=self.take)
        self.after = {}
        """By number of events, what then happens."""

    def take(self, events: list[Event]) -> None:
        for event in events:
            self.events.append(event)
            if action := self.after.get(len(self.events)):
                action()

    def order(self, *jobs: Job) -> list[tuple[int, int]]:
        """Job and prompt in the order of their first tokens."""
        return list(dict.fromkeys((jobs.index(event.job), event.index) for event in self.events))


def asked(*lengths: int) -> Job:
    return Job(requests=[Request(ids=[5, 6, 7], max_new_tokens=length) for length in lengths])


def test_large_jobs_hold_nobody_up(model: Model) -> None:
    recorder = Recorder(model)
    large, small = asked(*[2] * 8), asked(2)
    recorder.leader.submit(large)
    recorder.leader.submit(small)
    recorder.after[18] = lambda: recorder.leader.end(0)
    assert recorder.leader.run() == 0
    assert recorder.order(large, small).index((1, 0)) == 1 and len(recorder.order(large, small)) == 9
    assert sum(event.chosen.last for event in recorder.events) == 9


def test_cancelled_jobs_are_not_computed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three long answers hold every row until their client goes; then the next one starts at once."""
    recorder = Recorder(model)
    gone, next_one = asked(50, 50, 50, 50), asked(1)
    recorder.leader.submit(gone)

    def leave() -> None:
        recorder.leader.cancel(gone)
        recorder.leader.submit(next_one)

    recorder.after[6] = leave
    recorder.after[7] = lambda: recorder.leader.end(130)
    assert recorder.leader.run() == 130
    assert [event.job for event in recorder.events] == [gone] * 6 + [next_one]
    assert recorder.leader.in_progress == 0 and recorder.turns.free == ROWS


def test_a_failing_model_fails_its_answers_only(model: Model) -> None:
    recorder = Recorder(model)
    lost, later = asked(50, 50), asked(2)
    weight = model.stage.language_model.output_layer.weight
    kept = weight[7].clone()
    recorder.leader.submit(lost)
    recorder.after[4] = lambda: weight.data[7].fill_(float("nan"))

    def repair() -> None:
        weight.data[7] = kept
        recorder.leader.submit(later)

    recorder.after[6] = repair
    recorder.after[8] = lambda: recorder.leader.end(0)
    assert recorder.leader.run() == 0
    failed = [event for event in recorder.events if event.chosen is None]
    assert [(event.job, event.index) for event in failed] == [(lost, 0), (lost, 1)]
    assert all("not finite" in event.problem for event in failed)
    assert [event.job for event in recorder.events[6:]] == [later] * 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_answers_without_memory_fail_alone(model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    recorder = Recorder(model)
    lost, later = asked(50, 50), asked(2)
    recorder.leader.submit(lost)

    def exhaust() -> None:
        monkeypatch.setattr(turns_module.AnswerBatch, "step", lambda batch: raised(error))

    def recover() -> None:
        monkeypatch.undo()
        recorder.leader.submit(later)

    recorder.after[4] = exhaust
    recorder.after[6] = recover
    recorder.after[8] = lambda: recorder.leader.end(0)
    assert recorder.leader.run() == 0
    failed = [event for event in recorder.events if event.chosen is None]
    assert [(event.job, event.index) for event in failed] == [(lost, 0), (lost, 1)]
    assert all("no memory is left" in event.problem for event in failed)
    assert [event.job for event in recorder.events[6:]] == [later] * 2 and recorder.turns.free == ROWS


def test_no_memory_on_one_of_several_ranks_ends_all(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = Turns(model, rows=1, length=8, images=2)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(turns_module.AnswerBatch, "step", lambda batch: raised(error))
    monkeypatch.setattr(turns_module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(turns_module.dist, "get_rank", lambda: 1)
    with pytest.raises(UsageError, match="lower --batch-size or --max-tokens, or --max-images from 2"):
        turns.run(Plan())
    assert capsys.readouterr().err.startswith("error: rank 1: no memory for")


def test_other_failures_of_a_turn_are_not_hidden(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(model, rows=1, length=8)
    monkeypatch.setattr(turns_module.AnswerBatch, "step", lambda batch: raised(RuntimeError("sizes do not match")))
    with pytest.raises(RuntimeError, match="sizes do not match"):
        turns.run(Plan())


def raised(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("images", [0, 1, 50])
def test_the_largest_prompt_fills_its_length(model: Model, images: int) -> None:
    config, length = model.processor.config, 64
    request = largest_request(model.processor, length=length, images=images)
    count = list(request.ids).count(config.image_token_id)
    fit = min(images, (length - 1) // config.image_tokens)
    assert len(request.ids) == length - 1 and count == config.image_tokens * fit
    batch = AnswerBatch(model.stage, eos_id=model.processor.end_ids, rows=1, length=length)
    (chosen,) = batch.start([(0, request)])
    assert chosen.last and len(chosen.prompt) == length - 2


def test_a_damaged_model_is_not_served(model: Model) -> None:
    weight = model.stage.language_model.output_layer.weight
    kept = weight[7].clone()
    with torch.no_grad():
        weight[7] = float("nan")
    try:
        with pytest.raises(NumericsError, match="not finite"):
            Turns(model, rows=1, length=8)
    finally:
        with torch.no_grad():
            weight[7] = kept


def test_too_little_memory_is_named(model: Model) -> None:
    with pytest.raises(UsageError, match="keys and values of 10000000 answers with 100000 tokens each; lower --batch"):
        Turns(model, rows=10**7, length=10**5)


def test_the_loop_ends_when_nobody_serves(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "HEARTBEAT_S", 0.01)
    channel = PlanChannel(model.processor.tokenizer)
    leader = Leader(Turns(model, rows=1, length=8), channel, deliver=lambda events: None, healthy=lambda: False)
    with pytest.raises(PeerError, match="thread that serves clients has ended"):
        leader.run()
