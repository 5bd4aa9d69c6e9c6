"""Records start and end of everything that this rank does in one training step.

megatron-core starts and stops named timers around passes, exchanges and gradient reduction, if its configuration has
timers. For one step a `StepProfiler` takes their role. Hooks in the stages add which micro-batch a pass belongs to, and
where its encoders and head end. On a GPU a time is an event on the stream. It is read after the step, so recording
never waits for the device.
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
from megavl.train.profile.block_hooks import add_block_hooks

_PASSES = {"forward-compute": "forward", "backward-compute": "backward"}
"""megatron-core's timers of passes, and their direction."""
_PARTS = {
    "all-grads-sync": "gradient reduction",
    "conditional-embedder-grads-all-reduce": "gradient reduction",
    "non-tensor-parallel-grads-all-reduce": "gradient reduction",
    "embedding-grads-all-reduce": "gradient reduction",
    "forward-backward": None,
}
"""Its other timers, and their names in a timeline; the one with None encloses the others and is left out."""
_EXCHANGES = ("-send", "-recv")
"""Suffixes of its timers of exchanges, e.g. `forward-send-backward-recv`."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One recorded step of a rank."""

    position: Position
    host: str
    zero: float
    """Start of the step, seconds on the monotonic clock of the host."""
    segments: tuple[Segment, ...]
    """Sorted by end; `rank` is the global rank, times are seconds since `zero`."""


@dataclass
class _Span:
    """One run of a timer; a pass also has a micro-batch, a stage and borders."""

    name: str
    start: Any
    end: Any = None
    work: tuple[int, int] | None = None
    """Micro-batch and stage of a pass."""
    borders: dict[str, Any] = field(default_factory=dict)
    """When the pass reached each border of `block_hooks.py`."""


class StepProfiler:
    """Records one step, from its construction to `stop`; all ranks record the same steps."""

    def __init__(self, model: ModelChunks, *, position: Position) -> None:
        """Start recording on all ranks. Collective."""
        self._config, self._position = model.chunks[0].config, position
        self._running: dict[str, _Span] = {}
        self._pass: _Span | None = None
        self._spans: list[_Span] = []
        self._seen: Counter[int] = Counter()
        self._encoded: set[tuple[int, int]] = set()
        """Micro-batch and stage of passes that encode images, or the dummy image of a text step."""
        self._handles: list[RemovableHandle] = []
        for index, chunk in enumerate(model.chunks):
            self._add_hooks(chunk.module, number=index * position.pp_size + position.pp_rank)
        # The first barrier opens connections and waits for the last rank; ranks leave the second one together.
        dist.barrier()
        dist.barrier()
        self._clock: _HostClock | _DeviceClock = _DeviceClock() if torch.cuda.is_available() else _HostClock()
        assert self._config.timers is None, "a step is recorded already"
        self._config.timers = self

    def stop(self) -> Record:
        """Stop recording and return what was recorded."""
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
        """The timer of that name, for megatron-core."""
        return _Timer(self, name)

    def start_timer(self, name: str) -> None:
        """A part of the step starts."""
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

    def _add_hooks(self, stage: DeepseekVL, *, number: int) -> None:
        """Add hooks that tell the micro-batch of each pass of a stage, and its borders."""
        here: tuple[int, int] | None = None

        def reach(name: str) -> None:
            nonlocal here
            assert self._pass is not None, f"stage {number} came to {name!r} outside a pass"
            if name == "begin":
                here = self._pass.work = (self._seen[number], number)
                self._seen[number] += 1
            self._pass.borders[name] = self._clock.now()

        def going_back(work: tuple[int, int]) -> None:
            assert self._pass is not None, f"the gradient of {work} arrived outside a pass"
            self._pass.work = work

        def leave(module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            assert here is not None
            if out.requires_grad:
                out.register_hook(lambda _, work=here: going_back(work))

        def encode(*_: Any) -> None:
            assert here is not None
            self._encoded.add(here)

        self._handles += [*add_block_hooks(stage, reach), stage.register_forward_hook(leave)]
        if stage.vision is not None:
            self._handles.append(stage.vision.adaptor.register_forward_hook(encode))

    def _boxes(self, span: _Span) -> Iterator[Segment]:
        """Boxes of a timeline for one run of a timer."""
        start = self._clock.seconds(span.start)
        for name, stamp in self._parts(span):
            end = self._clock.seconds(stamp)
            micro_batch, stage = span.work or (None, None)
            yield Segment(
                rank=self._position.rank, start=start, end=end, what=name, micro_batch=micro_batch, stage=stage
            )
            start = end

    def _parts(self, span: _Span) -> Iterator[tuple[str, Any]]:
        """Parts of one run of a timer, each with its end."""
        way = _PASSES.get(span.name)
        if way is None:
            what = "waiting" if span.name.endswith(_EXCHANGES) else _PARTS.get(span.name, span.name)
            if what is not None:
                yield what, span.end
            return
        # If nothing trains, a backward pass is called but does not run.
        if span.work is None:
            return
        images, reached = span.work in self._encoded, span.borders
        if way == "forward":
            borders = [("encoders", reached["embedded"] if images else None), ("decoder", reached.get("layers"))]
            last = "head" if "layers" in reached else "decoder"
        else:
            borders = [("head", reached.get("head back")), ("decoder", reached.get("layers back") if images else None)]
            last = "encoders" if images and "layers back" in reached else "decoder"
        yield from ((f"{block} {way}", stamp) for block, stamp in borders if stamp is not None)
        yield f"{last} {way}", span.end


class _Timer:
    """A timer with the methods that megatron-core calls."""

    def __init__(self, profiler: StepProfiler, name: str) -> None:
        self._profiler, self._name = profiler, name

    def start(self, barrier: bool = False) -> None:
        """Start; the barrier is ignored, because it would change what is measured."""
        self._profiler.start_timer(self._name)

    def stop(self, barrier: bool = False) -> None:
        self._profiler.stop_timer(self._name)


class _HostClock:
    """The monotonic clock, which all processes of a host share."""

    def __init__(self) -> None:
        self.zero = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, stamp: float) -> float:
        return stamp - self.zero


class _DeviceClock:
    """CUDA events: a stamp is the time at which the device reaches that point of its stream."""

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
