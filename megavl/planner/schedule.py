"""Order of passes on every pipeline rank: megatron-core's 1F1B and interleaved schedules, without P2P overlap.

Source: megatron-core 0.16.1, `pipeline_parallel/schedules.py`. Under 1F1B, rank r warms up with p - r - 1 forward
passes. Under interleaving it warms up with 2(p - r - 1) + (v - 1)p, and micro-batches run in groups of p per virtual
stage. The sends and receives of a rank between two passes are one exchange: the rank waits for all of them.

Stage g of p x v runs on rank g % p, as its virtual stage g // p.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Compute(NamedTuple):
    """One pass of one stage over one micro-batch."""

    backward: bool
    micro_batch: int
    stage: int


class Transfer(NamedTuple):
    """One tensor sent from pipeline rank `source` to `target`."""

    backward: bool
    micro_batch: int
    stage: int
    """Stage that sends it."""
    source: int
    target: int


@dataclass(frozen=True)
class Exchange:
    """Transfers that a rank posts together and waits for."""

    transfers: tuple[Transfer, ...]


Program = tuple[Compute | Exchange, ...]
"""One rank's step."""


def warmup_passes(rank: int, *, pipeline: int, virtual: int, micro_batches: int) -> int:
    """Forward passes of `rank` before it begins to alternate forward and backward passes."""
    if virtual == 1:
        return min(pipeline - rank - 1, micro_batches)
    return min(2 * (pipeline - rank - 1) + (virtual - 1) * pipeline, micro_batches * virtual)


def program(rank: int, *, pipeline: int, virtual: int, micro_batches: int) -> Program:
    """Order of passes and exchanges of one pipeline rank.

    Args:
        virtual: stages per rank v; with v > 1 `micro_batches` is a multiple of p.
    """
    assert virtual == 1 or micro_batches % pipeline == 0, "interleaving runs micro-batches in groups of p"
    sizes = _Sizes(rank, pipeline, virtual, micro_batches)
    return tuple(_one_forward_one_backward(sizes) if virtual == 1 else _interleaved(sizes))


def passes(rank: int, *, pipeline: int, virtual: int, micro_batches: int) -> tuple[Compute, ...]:
    """The passes of `program` alone."""
    steps = program(rank, pipeline=pipeline, virtual=virtual, micro_batches=micro_batches)
    return tuple(step for step in steps if isinstance(step, Compute))


@dataclass(frozen=True)
class _Sizes:
    rank: int
    pipeline: int
    virtual: int
    micro_batches: int

    def forward(self, index: int) -> Compute:
        """The rank's `index`-th forward pass."""
        return self._pass(index, backward=False)

    def backward(self, index: int) -> Compute:
        """The rank's `index`-th backward pass; virtual stages in reverse."""
        return self._pass(index, backward=True)

    def _pass(self, index: int, *, backward: bool) -> Compute:
        group, inside = divmod(index, self.pipeline * self.virtual)
        chunk, position = divmod(inside, self.pipeline)
        if backward:
            chunk = self.virtual - 1 - chunk
        return Compute(backward, group * self.pipeline + position, chunk * self.pipeline + self.rank)

    def receive(self, step: Compute) -> tuple[Transfer, ...]:
        """The transfer that `step` needs; none at the ends of the pipeline."""
        source = step.stage + 1 if step.backward else step.stage - 1
        if not 0 <= source < self.pipeline * self.virtual:
            return ()
        return (Transfer(step.backward, step.micro_batch, source, source % self.pipeline, self.rank),)

    def send(self, step: Compute) -> tuple[Transfer, ...]:
        """The transfer of what `step` computed; none at the ends of the pipeline."""
        target = step.stage - 1 if step.backward else step.stage + 1
        if not 0 <= target < self.pipeline * self.virtual:
            return ()
        return (Transfer(step.backward, step.micro_batch, step.stage, self.rank, target % self.pipeline),)


def _exchange(*transfers: tuple[Transfer, ...]) -> Iterator[Exchange]:
    """What a rank posts at once; nothing if there is nothing to send or receive."""
    posted = tuple(transfer for part in transfers for transfer in part)
    if posted:
        yield Exchange(posted)


def _one_forward_one_backward(sizes: _Sizes) -> Iterator[Compute | Exchange]:
    count = sizes.micro_batches
    warm = warmup_passes(sizes.rank, pipeline=sizes.pipeline, virtual=1, micro_batches=count)
    steady = count - warm
    forward = [Compute(False, index, sizes.rank) for index in range(count)]
    backward = [Compute(True, index, sizes.rank) for index in range(count)]
    for step in forward[:warm]:
        yield from _alone(sizes, step)
    if steady:
        yield from _exchange(sizes.receive(forward[warm]))
    for index in range(steady):
        yield forward[warm + index]
        yield from _exchange(sizes.send(forward[warm + index]), sizes.receive(backward[index]))
        yield backward[index]
        last = index == steady - 1
        yield from _exchange(sizes.send(backward[index]), () if last else sizes.receive(forward[warm + index + 1]))
    for step in backward[steady:]:
        yield from _alone(sizes, step)


def _alone(sizes: _Sizes, step: Compute) -> Iterator[Compute | Exchange]:
    yield from _exchange(sizes.receive(step))
    yield step
    yield from _exchange(sizes.send(step))


def _interleaved(sizes: _Sizes) -> Iterator[Compute | Exchange]:
    total = sizes.micro_batches * sizes.virtual
    warm = warmup_passes(sizes.rank, pipeline=sizes.pipeline, virtual=sizes.virtual, micro_batches=sizes.micro_batches)
    steady = total - warm

    def next_forward(index: int) -> tuple[Transfer, ...]:
        return sizes.receive(sizes.forward(index + 1)) if index + 1 < total else ()

    def next_backward(index: int) -> tuple[Transfer, ...]:
        return sizes.receive(sizes.backward(index + 1)) if index + 1 < total else ()

    yield from _exchange(sizes.receive(sizes.forward(0)))
    for index in range(warm):
        yield sizes.forward(index)
        first_gradient = next_backward(-1) if index == warm - 1 and steady else ()
        yield from _exchange(sizes.send(sizes.forward(index)), next_forward(index), first_gradient)
    for index in range(steady):
        forward, backward = sizes.forward(index + warm), sizes.backward(index)
        yield from (forward, backward)
        received = () if index == steady - 1 else next_forward(index + warm)
        yield from _exchange(sizes.send(forward), sizes.send(backward), received, next_backward(index))
    if not steady:
        yield from _exchange(next_backward(-1))
    for index in range(steady, total):
        yield sizes.backward(index)
        yield from _exchange(sizes.send(sizes.backward(index)), next_backward(index))
