"""The loop that runs the model: on rank 0 it serves jobs from other threads, on the other ranks it follows."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megavl.config.errors import NumericsError, PeerError, UsageError
from megavl.foreign.printing import say
from megavl.generate.decode import AnswerBatch, Chosen, Request
from megavl.generate.pretrained import Model
from megavl.parallel import groups
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


class Turns:
    """The model with the answers in progress; every rank runs the same plans."""

    def __init__(self, model: Model, *, rows: int, length: int) -> None:
        """Take memory for `rows` answers of `length` tokens, their prompts included, and try the model out.

        Raises:
            NumericsError: the model's logits are not finite.
            UsageError: there is not enough memory.
        """
        self._model, self._rows, self._length = model, rows, length
        self._batch = self._new_batch()
        try:
            self._batch.start([(0, Request(ids=[model.processor.tokenizer.eos_id], max_new_tokens=1))])
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise UsageError(
                f"no memory for the keys and values of {rows} answers with {length} tokens each; lower --batch-size or "
                "--max-tokens"
            ) from error

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
        """
        try:
            self._batch.drop(plan.drop)
            chosen = self._batch.start(plan.start) if plan.start else []
            return chosen + self._batch.step()
        except NumericsError:
            # Keys that are not finite would spoil whoever gets their row next.
            self._batch = self._new_batch()
            raise

    def _new_batch(self) -> AnswerBatch:
        ends = self._model.processor.end_ids
        return AnswerBatch(self._model.stage, eos_id=ends, rows=self._rows, length=self._length)


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
        """
        while True:
            self._read_inbox()
            plan = self._plan()
            self._channel.send(plan)
            if plan.end is not None:
                return plan.end
            try:
                chosen = self._turns.run(plan)
            except NumericsError as error:
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
