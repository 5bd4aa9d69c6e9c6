"""What this rank does from when to when in one real step.

megatron-core starts and stops named timers around passes, exchanges and gradient reduction where its configuration has
some; a `StepProfiler` poses as these for one step and notes the time. Hooks in the stages say which micro-batch a pass
is of, and where its encoders and its head end. On a GPU a time is that of an event on its stream and is read after the
step, so that nothing waits for the device meanwhile.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from megavl.model.vl_model import DeepseekVL
from megavl.parallel.groups import Position
from megavl.planner.report.svg import Segment
from megavl.train.model_chunks import ModelChunks
from megavl.train.profile.block_hooks import mark_blocks

_PASSES = {"forward-compute": "forward", "backward-compute": "backward"}
"""megatron-core's timers of passes."""
_PARTS = {
    "all-grads-sync": "gradient reduction",
    "conditional-embedder-grads-all-reduce": "gradient reduction",
    "non-tensor-parallel-grads-all-reduce": "gradient reduction",
    "embedding-grads-all-reduce": "gradient reduction",
    "forward-backward": None,
}
"""Its other timers, and what a timeline calls them; None is left out, because it encloses the rest."""
_EXCHANGES = ("-send", "-recv")
"""Endings in the names of its timers of exchanges, e.g. `forward-send-backward-recv`."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A rank's step."""

    position: Position
    host: str
    zero: float
    """When the step began, seconds on the monotonic clock of the host."""
    segments: tuple[Segment, ...]
    """In order of their ends; `rank` is the global rank, times are seconds since `zero`."""


@dataclass
class _Span:
    """One run of a timer; of a pass also what it is of, and the borders inside it."""

    name: str
    start: Any
    end: Any = None
    place: tuple[int, int] | None = None
    """Micro-batch and stage."""
    marks: dict[str, Any] = field(default_factory=dict)


class StepProfiler:
    """Notes one step from its making to `stop`; all ranks record the same steps."""

    def __init__(self, model: ModelChunks, *, position: Position) -> None:
        """Begin, on all ranks at once. Collective."""
        self._config, self._position = model.chunks[0].config, position
        self._running: dict[str, _Span] = {}
        self._pass: _Span | None = None
        self._spans: list[_Span] = []
        self._seen: Counter[int] = Counter()
        self._encoded: set[tuple[int, int]] = set()
        """Passes with images, or with the blank one of a text step."""
        self._handles: list[RemovableHandle] = []
        for index, chunk in enumerate(model.chunks):
            self._watch(chunk.module, number=index * position.pp_size + position.pp_rank)
        # The first barrier opens connections and waits for the last rank; ranks leave the second one together.
        dist.barrier()
        dist.barrier()
        self._clock: _HostClock | _DeviceClock = _DeviceClock() if torch.cuda.is_available() else _HostClock()
        assert self._config.timers is None, "a step is recorded already"
        self._config.timers = self

    def stop(self) -> Record:
        """End, and say what was noted."""
        self._config.timers = None
        for handle in self._handles:
            handle.remove()
        torch.cuda.synchronize()
        return Record(
            position=self._position,
            host=socket.gethostname(),
            zero=self._clock.zero,
            segments=tuple(box for span in self._spans for box in self._boxes(span) if box.end > box.start),
        )

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        """The timer of that name."""
        return _Timer(self, name)

    def start_timer(self, name: str) -> None:
        """A part of the step begins."""
        span = self._running[name] = _Span(name, self._clock.now())
        if name in _PASSES:
            self._pass = span

    def stop_timer(self, name: str) -> None:
        """It ends."""
        span = self._running.pop(name)
        span.end = self._clock.now()
        self._spans.append(span)
        if name in _PASSES:
            self._pass = None

    def _watch(self, stage: DeepseekVL, *, number: int) -> None:
        """Hooks that name the passes of a stage and mark their borders."""
        here: tuple[int, int] | None = None

        def mark(name: str) -> None:
            nonlocal here
            assert self._pass is not None, f"stage {number} came to {name!r} outside a pass"
            if name == "begin":
                here = self._pass.place = (self._seen[number], number)
                self._seen[number] += 1
            self._pass.marks[name] = self._clock.now()

        def going_back(place: tuple[int, int]) -> None:
            assert self._pass is not None, f"the gradient of {place} arrived outside a pass"
            self._pass.place = place

        def leave(module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            assert here is not None
            if out.requires_grad:
                out.register_hook(lambda _, place=here: going_back(place))

        def encode(*_: Any) -> None:
            assert here is not None
            self._encoded.add(here)

        self._handles += [*mark_blocks(stage, mark), stage.register_forward_hook(leave)]
        if stage.vision is not None:
            self._handles.append(stage.vision.adaptor.register_forward_hook(encode))

    def _boxes(self, span: _Span) -> Iterator[Segment]:
        """What a timeline shows of a timer's run."""
        start = self._clock.seconds(span.start)
        for name, stamp in self._cuts(span):
            end = self._clock.seconds(stamp)
            micro_batch, stage = span.place or (None, None)
            yield Segment(
                rank=self._position.rank, start=start, end=end, what=name, micro_batch=micro_batch, stage=stage
            )
            start = end

    def _cuts(self, span: _Span) -> Iterator[tuple[str, Any]]:
        """Parts of a run and their ends."""
        way = _PASSES.get(span.name)
        if way is None:
            what = "waiting" if span.name.endswith(_EXCHANGES) else _PARTS.get(span.name, span.name)
            if what is not None:
                yield what, span.end
            return
        # Where nothing trains that the loss reaches, a backward pass is called but does not run.
        if span.place is None:
            return
        images, marks = span.place in self._encoded, span.marks
        if way == "forward":
            borders = [("encoders", marks["embedded"] if images else None), ("decoder", marks.get("layers"))]
            last = "head" if "layers" in marks else "decoder"
        else:
            borders = [("head", marks.get("head back")), ("decoder", marks.get("layers back") if images else None)]
            last = "encoders" if images and "layers back" in marks else "decoder"
        yield from ((f"{block} {way}", stamp) for block, stamp in borders if stamp is not None)
        yield f"{last} {way}", span.end


class _Timer:
    """As megatron-core uses it."""

    def __init__(self, recorder: StepProfiler, name: str) -> None:
        self._recorder, self._name = recorder, name

    def start(self, barrier: bool = False) -> None:
        """Never with a barrier: it would change what is measured."""
        self._recorder.start_timer(self._name)

    def stop(self, barrier: bool = False) -> None:
        self._recorder.stop_timer(self._name)


class _HostClock:
    """Seconds of the monotonic clock, which all processes of a host share."""

    def __init__(self) -> None:
        self.zero = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, stamp: float) -> float:
        return stamp - self.zero


class _DeviceClock:
    """CUDA events: a stamp is the moment at which the device comes to that place of its stream."""

    def __init__(self) -> None:
        self._first = self.now()
        torch.cuda.synchronize()
        self.zero = time.perf_counter()

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, stamp: Any) -> float:
        return float(self._first.elapsed_time(stamp)) / 1e3
