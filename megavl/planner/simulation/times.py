"""Seconds of every block: from a device's table, from a flat share of the peak, or from a calibrated run.

A table's times are sums: products with weights at the device's rate for large products, attention at its kernel's,
bytes moved at its bandwidth, exposed tensor-parallel communication. Fused attention runs 2.5 forward passes backward
(it makes the scores again), where the FLOPs formula counts 2. Exposed is: every collective of the forward pass; of the
backward pass, the gathers of output gradients under sequence parallelism (megatron-core hides the others behind
weight gradients). Per layer and pass that is two all-reduces, or two all-gathers and two reduce-scatters, which move
the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from megavl.config.errors import UsageError
from megavl.planner.cost.memory import tower_parameters
from megavl.planner.cost.work import ADAPTOR, Work, embedding_work, head_work, layer_work, vision_work
from megavl.planner.hardware.devices import Device, Link
from megavl.planner.scenario import Kind, Scenario

_ATTENTION_BACKWARD = 2.5 / 2
_OPTIMIZER_BYTES = 34.0
"""Bytes moved per trained parameter of a rank's shard by the gradient norm and torch's fused AdamW: the gradient read
twice, master weight and two moments read and written, the weight written."""


@dataclass(frozen=True)
class Pass:
    """Seconds of a forward and of a backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Pass:
        return Pass(self.forward * factor, self.backward * factor)


@dataclass(frozen=True, kw_only=True)
class BlockTimes:
    """One micro-batch of one kind on one rank."""

    vision: Pass
    """Encoders and adaptor within the pipeline, for the images that a rank of the first stage takes."""
    embedding: Pass
    layer: Pass
    head: Pass
    """Final norm, output layer and loss."""

    def stage(self, stage: int, *, layers: int, stages: int) -> Pass:
        """Passes of `stage` with `layers` decoder layers."""
        out = self.layer * layers
        if stage == 0:
            out += self.vision + self.embedding
        return out + self.head if stage == stages - 1 else out


@dataclass(frozen=True, kw_only=True)
class StepExtras:
    """Seconds of a step outside the pipeline schedule, on the slowest rank."""

    before: float = 0.0
    """Encoders ahead of the pipeline (`split_all`)."""
    after: float = 0.0
    """Their backward pass."""
    reduce: float = 0.0
    """Gradient reduction over data-parallel ranks that no backward pass hides."""
    update: float = 0.0
    """Optimizer, and the part of the weight gather that no forward pass hides."""
    anchor: float = 0.0
    """The blank image that a text-only step encodes for overlapped gradient reduction."""
    loading: float = 0.0
    """Waiting for data and fixed costs of a step."""

    @property
    def total(self) -> float:
        """Sum, seconds."""
        return self.before + self.after + self.reduce + self.update + self.anchor + self.loading


class TimeSource(Protocol):
    """Where seconds come from."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What it rests on, one line each."""

    def covers(self, scenario: Scenario) -> bool:
        """Whether it knows this cut."""

    def blocks(self, scenario: Scenario, kind: Kind) -> BlockTimes:
        """Seconds of one micro-batch."""

    def transfer(self, scenario: Scenario) -> float:
        """Seconds of one transfer between neighbouring pipeline ranks."""

    def extras(self, scenario: Scenario, kind: Kind, *, trained: int, last_backward: float) -> StepExtras:
        """Seconds outside the schedule.

        Args:
            scenario: recipe and sizes.
            kind: modality of the step.
            trained: trained parameters on the rank.
            last_backward: seconds of the rank's backward passes of its last micro-batch, behind which reduction hides.
        """

    def slowdown(self, scenario: Scenario) -> tuple[float, ...]:
        """How much longer a pass takes while 1, 2, ... pipeline ranks of this replica compute at once."""


@dataclass(frozen=True, kw_only=True)
class FlatTimes:
    """Time proportional to FLOPs: no communication, nothing bound by memory."""

    flops_per_s: float = 1.0
    """What a busy device does."""
    name: str = "FLOPs"
    assumptions: tuple[str, ...] = ("time is proportional to FLOPs; no communication, no memory bound",)

    def covers(self, scenario: Scenario) -> bool:
        """Any cut."""
        return True

    def blocks(self, scenario: Scenario, kind: Kind) -> BlockTimes:
        """Seconds of one micro-batch."""
        vision = Pass()
        for block in vision_work(scenario, kind):
            images = scenario.adaptor_images(kind) if block.name == ADAPTOR else scenario.tower_images(kind)
            vision += self._pass(block.forward, block.backward) * images
        layer, head = layer_work(scenario, kind), head_work(scenario, kind)
        return BlockTimes(
            vision=vision,
            embedding=Pass(),
            layer=self._pass(layer.forward, layer.backward),
            head=self._pass(head.forward, head.backward),
        )

    def transfer(self, scenario: Scenario) -> float:
        """None."""
        return 0.0

    def extras(self, scenario: Scenario, kind: Kind, *, trained: int, last_backward: float) -> StepExtras:
        """Encoders ahead of the pipeline only."""
        towers = Pass()
        for block in vision_work(scenario, kind):
            if block.name != ADAPTOR:
                towers += self._pass(block.forward, block.backward) * scenario.images_up_front(kind)
        return StepExtras(before=towers.forward, after=towers.backward)

    def slowdown(self, scenario: Scenario) -> tuple[float, ...]:
        """Every rank has a device of its own."""
        return (1.0,)

    def _pass(self, forward: Work, backward: Work) -> Pass:
        return Pass(forward.flops / self.flops_per_s, backward.flops / self.flops_per_s)


def flat_times(device: Device, *, precision: str, efficiency: float) -> FlatTimes:
    """Time at a given share of the device's peak.

    Raises:
        UsageError: the share is out of range, or no peak is known.
    """
    if not 0 < efficiency <= 1:
        raise UsageError(f"--efficiency: {efficiency} is no share of the peak; give a number above 0, at most 1")
    peak = device.peak_flops.get(precision)
    if peak is None:
        raise UsageError(f"--efficiency: no peak of {device.name} in {precision} is known; leave --efficiency out")
    return FlatTimes(
        flops_per_s=peak * efficiency,
        name=f"{efficiency:.0%} of the peak of {device.name} (--efficiency)",
        assumptions=(
            f"a busy device reaches {efficiency:.0%} of its peak, communication and optimizer included (--efficiency)",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class DeviceTimes:
    """Seconds from a row of `devices.py`."""

    device: Device
    name: str = field(init=False)
    assumptions: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"table of {self.device.name}")
        object.__setattr__(self, "assumptions", self.device.sources)

    def covers(self, scenario: Scenario) -> bool:
        """Any cut."""
        return True

    def blocks(self, scenario: Scenario, kind: Kind) -> BlockTimes:
        """Seconds of one micro-batch."""
        embedding, layer, head = embedding_work(scenario, kind), layer_work(scenario, kind), head_work(scenario, kind)
        link, tensor = tensor_link(scenario, self.device), scenario.tensor
        hidden = scenario.hidden_bytes
        forward = 2 * all_reduce(hidden, ranks=tensor, link=link)
        gathers = 2 * all_gather(hidden, ranks=tensor, link=link) if scenario.sequence_ranks > 1 else 0.0
        # The vocabulary-parallel loss reduces one number per token three times; the embedding its whole output.
        loss = 3 * all_reduce(4.0 * scenario.loss_tokens(kind), ranks=tensor, link=link)
        looked_up = all_reduce(hidden, ranks=tensor, link=link)
        again = forward if scenario.recipe.recompute.granularity == "full" and layer.backward.flops else 0.0
        recipe, exposed = scenario.recipe, gathers + again if layer.backward.flops else 0.0
        layer_pass = self._pass(layer.forward, layer.backward, scenario) + Pass(forward, exposed)
        floor = self.device.host_s
        return BlockTimes(
            vision=self._vision(scenario, kind),
            embedding=self._pass(embedding.forward, embedding.backward, scenario)
            + Pass(looked_up, looked_up / 2 if "llm" in recipe.trainable_parts else 0.0),
            layer=Pass(
                max(layer_pass.forward, floor), max(layer_pass.backward, floor if layer.backward.flops else 0.0)
            ),
            head=self._pass(head.forward, head.backward, scenario) + Pass(loss + gathers / 2, gathers / 2),
        )

    def transfer(self, scenario: Scenario) -> float:
        """Seconds of one hidden state, or of a rank's share of it under sequence parallelism."""
        if scenario.pipeline == 1:
            return 0.0
        # Pipeline neighbours are tensor x data ranks apart: on another node as soon as two such blocks exceed one.
        near = 2 * scenario.tensor * scenario.data_parallel <= self.device.per_node
        link = self.device.local if near else self.device.network
        return link.seconds(scenario.hidden_bytes / scenario.sequence_ranks)

    def extras(self, scenario: Scenario, kind: Kind, *, trained: int, last_backward: float) -> StepExtras:
        """Seconds outside the schedule."""
        up_front, anchor = self._up_front(scenario, kind), 0.0
        parallel = scenario.recipe.parallel
        if kind == "text" and has_anchor(scenario):
            anchor = self._images(scenario, "multimodal", towers=scenario.vision != "split_all", adaptor=1.0).total
        ranks, buckets = scenario.data_parallel, max(1.0, trained / parallel.bucket_size)
        gradients, weights = 4.0 * trained, float(scenario.element * trained)
        link = self._data_link(scenario)
        scatter, gather = (all_gather(size, ranks=ranks, link=link) for size in (gradients, weights))
        if not parallel.distributed_optimizer:
            scatter, gather = all_reduce(gradients, ranks=ranks, link=link), 0.0
        reduce = max(scatter / buckets, scatter - last_backward) if parallel.overlap_grad_reduce else scatter
        exposed = gather / buckets if parallel.overlap_param_gather else gather
        update = _OPTIMIZER_BYTES * trained / scenario.optimizer_ranks / self.device.memory_bandwidth
        return StepExtras(
            before=up_front.forward, after=up_front.backward, reduce=reduce, update=update + exposed, anchor=anchor
        )

    def slowdown(self, scenario: Scenario) -> tuple[float, ...]:
        """Every rank has a device of its own."""
        return (1.0,)

    def _vision(self, scenario: Scenario, kind: Kind) -> Pass:
        """Within the pipeline, on one rank of the first stage, for one micro-batch."""
        towers, adaptor = scenario.tower_images(kind), scenario.adaptor_images(kind)
        return self._images(scenario, kind, towers=towers, adaptor=adaptor) + gather_time(scenario, kind, self.device)

    def _up_front(self, scenario: Scenario, kind: Kind) -> Pass:
        """Towers ahead of the pipeline, with the way of features, gradients and weights from rank to rank."""
        towers = self._images(scenario, kind, towers=scenario.images_up_front(kind), adaptor=0.0)
        return towers + exchange_time(scenario, kind, self.device)

    def _images(self, scenario: Scenario, kind: Kind, *, towers: float, adaptor: float) -> Pass:
        out = Pass()
        for block in vision_work(scenario, kind) if towers or adaptor else ():
            images = adaptor if block.name == ADAPTOR else towers
            out += self._pass(block.forward, block.backward, scenario) * images
        return out

    def _pass(self, forward: Work, backward: Work, scenario: Scenario) -> Pass:
        return Pass(self._seconds(forward, scenario, 1.0), self._seconds(backward, scenario, _ATTENTION_BACKWARD))

    def _seconds(self, work: Work, scenario: Scenario, attention: float) -> float:
        device, precision = self.device, scenario.recipe.training.precision
        return (
            work.matrix / device.matrix_flops[precision]
            + attention * work.attention / device.attention_flops[precision]
            + work.moved / device.memory_bandwidth
        )

    def _data_link(self, scenario: Scenario) -> Link:
        """A ring over data-parallel ranks leaves a node over the adapters of all its members there."""
        device = self.device
        if scenario.devices <= device.per_node:
            return device.local
        members = max(1, min(device.per_node // scenario.tensor, scenario.data_parallel))
        bandwidth = min(device.local.bandwidth, members * device.network.bandwidth)
        return Link(bandwidth=bandwidth, latency=device.network.latency)


def tensor_link(scenario: Scenario, device: Device) -> Link:
    """Between tensor-parallel ranks, which are neighbours: on one node as long as they fit there."""
    return device.local if scenario.tensor <= device.per_node else device.network


def gather_time(scenario: Scenario, kind: Kind, device: Device) -> Pass:
    """Under `split_tp`, gathering a micro-batch's embeddings; their gradients need no exchange."""
    ranks = scenario.tensor
    if scenario.vision != "split_tp" or ranks == 1:
        return Pass()
    model = scenario.recipe.model
    each = float(model.image_tokens * model.llm.hidden_size * scenario.element)
    # Shares are padded to the largest.
    return Pass(
        all_gather(each * scenario.adaptor_images(kind) * ranks, ranks=ranks, link=tensor_link(scenario, device))
    )


def exchange_time(scenario: Scenario, kind: Kind, device: Device) -> Pass:
    """Under `split_all`, features to the first stage, and for trained towers gradients back and weights around."""
    images, ranks = scenario.images_up_front(kind), scenario.tensor * scenario.pipeline
    if not images or ranks == 1:
        return Pass()
    link = device.local if scenario.devices <= device.per_node else device.network
    # Every rank of the first stage receives the features of all images that others encoded.
    features = link.seconds(scenario.feature_bytes * images * (ranks - 1))
    trained = float(tower_parameters(scenario)[1])
    if not trained:
        return Pass(features)
    summed = all_reduce(4 * trained, ranks=ranks, link=link)
    copied = link.seconds(scenario.element * trained) if scenario.pipeline > 1 else 0.0
    # Each gradient is sent once: the ranks of the first stage take turns.
    return Pass(features + copied, features / scenario.tensor + summed)


def has_anchor(scenario: Scenario) -> bool:
    """Whether text-only steps encode a blank image, so that overlapped reduction finds every gradient."""
    recipe = scenario.recipe
    return recipe.parallel.overlap_grad_reduce and bool(set(recipe.trainable_parts) - {"llm"})


def all_gather(data: float, *, ranks: int, link: Link) -> float:
    """Seconds of an all-gather or reduce-scatter whose whole result is `data` bytes (ring)."""
    return link.seconds(data * (ranks - 1) / ranks)


def all_reduce(data: float, *, ranks: int, link: Link) -> float:
    """Seconds of an all-reduce of `data` bytes (ring)."""
    return link.seconds(2 * data * (ranks - 1) / ranks)
