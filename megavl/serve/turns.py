"""The loop that runs the model: on rank 0 it serves jobs from other threads, on the other ranks it follows."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megavl.config.errors import NumericsError, PeerError, UsageError
from megavl.foreign.printing import say
from megavl.generate.decode import AnswerBatch, Chosen, Request
from megavl.generate.pretrained import Model, Processor
from megavl.parallel import groups
from megavl.serve.limits import MAX_ALTERNATIVES
from megavl.serve.plan import Plan, PlanChannel

HEARTBEAT_S = 5.0
"""Time between empty turns of an idle server, by which ranks notice that another one is gone."""


@dataclass(eq=False, kw_only=True)
class Job:
    """Prompts of one client."""

    requests: Sequence[Request]
    waiting: deque[int] = field(default_factory=deque)
    """Indices of the prompts that have not started; the loop's own."""
    running: set[int] = field(default_factory=set)
    """Numbers of the answers in progress; the loop's own."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What became of a prompt of a job."""

    job: Job
    index: int
    """Of the prompt among those of the job."""
    chosen: Chosen | None
    """The next token; None where the model failed."""
    problem: str = ""


class NoMemoryError(Exception):
    """The answers in progress are gone, because the device had no memory for one of them."""


class Turns:
    """The model with the answers in progress; every rank runs the same plans."""

    def __init__(self, model: Model, *, rows: int, length: int, images: int = 0) -> None:
        """Take memory for `rows` answers of `length` tokens, their prompts included, and try the model out.

        On CUDA the trial is the largest prompt that may come, with up to `images` images. On the CPU, where that
        could take minutes, it is a single token.

        Raises:
            NumericsError: the model's logits are not finite.
            UsageError: there is not enough memory.
        """
        self._model, self._rows, self._length, self._images = model, rows, length, images
        self._batch = self._new_batch()
        on_cuda = next(model.stage.parameters()).device.type == "cuda"
        trial = largest_request(model.processor, length=length, images=images) if on_cuda else None
        try:
            self._batch.start([(0, trial or Request(ids=[model.processor.tokenizer.eos_id], max_new_tokens=1))])
        except (RuntimeError, MemoryError) as error:
            if not _is_memory(error):
                raise
            raise self._too_large() from error

    @property
    def free(self) -> int:
        """Prompts that can start now."""
        return self._batch.free

    @property
    def idle(self) -> bool:
        """Whether no answer is in progress."""
        return not self._batch

    def run(self, plan: Plan) -> list[Chosen]:
        """One turn.

        Raises:
            NumericsError: logits are not finite; all answers in progress are gone then.
            NoMemoryError: there is no memory for this turn; the answers are gone too.
            UsageError: the same where other ranks wait for this one, so that no turn can follow.
        """
        try:
            self._batch.drop(plan.drop)
            chosen = self._batch.start(plan.start) if plan.start else []
            return chosen + self._batch.step()
        except NumericsError as error:
            failure: Exception = error
        except (RuntimeError, MemoryError) as error:
            if not _is_memory(error):
                raise
            if dist.get_world_size() > 1:
                raise self._too_large() from error
            failure = NoMemoryError("no memory is left for the answers; ask for less, or lower --batch-size")
        # Keys that are not finite would spoil whoever gets their row next, and half a turn leaves rows half filled. The
        # old batch goes first, and with it the frames that hold its tensors.
        failure = failure.with_traceback(None)
        del self._batch
        self._batch = self._new_batch()
        raise failure

    def _too_large(self) -> UsageError:
        problem = (
            f"no memory for the keys and values of {self._rows} answers with {self._length} tokens each; lower "
            f"--batch-size or --max-tokens, or --max-images from {self._images}"
        )
        if rank := dist.get_rank():
            # Of errors of usage only rank 0 tells, and it has none.
            say(f"error: rank {rank}: {problem}", to_errors=True)
        return UsageError(problem)

    def _new_batch(self) -> AnswerBatch:
        ends = self._model.processor.end_ids
        return AnswerBatch(self._model.stage, eos_id=ends, rows=self._rows, length=self._length)


def largest_request(processor: Processor, *, length: int, images: int) -> Request:
    """The prompt that takes most memory: `length` tokens with its answer of one, with as many images as fit in it."""
    config = processor.config
    count = min(images, (length - 1) // config.image_tokens)
    ids = [config.image_token_id] * (count * config.image_tokens)
    ids += [processor.tokenizer.eos_id] * (max(2, length) - 1 - len(ids))
    side = config.canvas_size
    return Request(
        ids=ids,
        images=torch.zeros(count, 3, side, side, dtype=torch.uint8) if count else None,
        max_new_tokens=1,
        alternatives=MAX_ALTERNATIVES,
        score_prompt=True,
    )


def _is_memory(error: Exception) -> bool:
    """Whether there was not enough of it; only torch's own allocator for CUDA has a class for that."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))


def follow(turns: Turns, channel: PlanChannel) -> int:
    """Run the plans of rank 0 until it ends the server; returns the exit code."""
    while (plan := channel.receive()).end is None:
        try:
            turns.run(plan)
        except NumericsError:
            # Rank 0 tells the clients.
            continue
    return plan.end


class Leader:
    """Rank 0's loop. `submit`, `cancel` and `end` may be called from any thread, and from signal handlers."""

    def __init__(
        self,
        turns: Turns,
        channel: PlanChannel,
        *,
        deliver: Callable[[list[Event]], None],
        healthy: Callable[[], bool] = lambda: True,
    ) -> None:
        """Serve jobs.

        Args:
            deliver: takes the events of a turn, from the thread of the loop.
            healthy: asked now and then whether anybody still serves clients.
        """
        self._turns, self._channel, self._deliver, self._healthy = turns, channel, deliver, healthy
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._order: deque[Job] = deque()
        """Jobs with prompts that wait; each gets its turn, so that a large job holds nobody up."""
        self._owners: dict[int, tuple[Job, int]] = {}
        self._drop: set[int] = set()
        self._next = 0
        self._end: int | None = None

    @property
    def in_progress(self) -> int:
        """Answers of which tokens are computed."""
        return len(self._owners)

    def submit(self, job: Job) -> None:
        """Answer the prompts of a job."""
        self._inbox.put(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """Forget a job; what is left of it is not computed."""
        self._inbox.put(lambda: self._remove(job))

    def end(self, code: int) -> None:
        """Leave the loop after the turn that runs now."""
        self._inbox.put(lambda: self._stop(code))

    def run(self) -> int:
        """Serve until `end`; returns its code.

        Raises:
            PeerError: the thread that serves clients has ended.
            UsageError: there is no memory, and other ranks wait.
        """
        while True:
            self._read_inbox()
            plan = self._plan()
            self._channel.send(plan)
            if plan.end is not None:
                return plan.end
            try:
                chosen = self._turns.run(plan)
            except (NumericsError, NoMemoryError) as error:
                self._fail(str(error))
                continue
            self._tell(chosen)

    def _read_inbox(self) -> None:
        """Everything that has arrived; waits where there is nothing else to do."""
        idle = self._turns.idle and not self._order and not self._drop and self._end is None
        try:
            self._inbox.get(timeout=HEARTBEAT_S if idle else None, block=idle)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            if not self._healthy():
                raise PeerError("the thread that serves clients has ended; see the messages above") from None

    def _plan(self) -> Plan:
        if self._end is not None:
            return Plan(end=self._end)
        # While answers are in progress, prompts join a few at a time, so that nobody's answer halts for long.
        most = self._turns.free + len(self._drop)
        if not self._turns.idle:
            most = min(most, groups.position().pp_size)
        start: list[tuple[int, Request]] = []
        while self._order and len(start) < most:
            job = self._order.popleft()
            index = job.waiting.popleft()
            if job.waiting:
                self._order.append(job)
            self._owners[self._next] = (job, index)
            job.running.add(self._next)
            start.append((self._next, job.requests[index]))
            self._next += 1
        plan = Plan(start=start, drop=frozenset(self._drop))
        self._drop.clear()
        return plan

    def _tell(self, chosen: Sequence[Chosen]) -> None:
        events = []
        for one in chosen:
            if one.number in self._owners:
                job, index = self._owners[one.number]
                events.append(Event(job=job, index=index, chosen=one))
                if one.last:
                    del self._owners[one.number]
                    job.running.discard(one.number)
        if events:
            self._deliver(events)

    def _fail(self, problem: str) -> None:
        say(f"error: {problem}; the answers in progress are refused", to_errors=True)
        lost = list(self._owners.values())
        self._owners.clear()
        for job, _ in lost:
            self._remove(job)
        self._drop.clear()
        self._deliver(
            [Event(job=job, index=index, chosen=None, problem=f"the model failed: {problem}") for job, index in lost]
        )

    def _add(self, job: Job) -> None:
        job.waiting.extend(range(len(job.requests)))
        self._order.append(job)

    def _remove(self, job: Job) -> None:
        if job.waiting:
            self._order.remove(job)
            job.waiting.clear()
        self._drop |= job.running
        for number in job.running:
            self._owners.pop(number, None)
        job.running.clear()

    def _stop(self, code: int) -> None:
        self._end = code if self._end is None else self._end
