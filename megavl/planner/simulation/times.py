"""Seconds of every block from a device's table; `measured.py` reads a calibration.

A table's time is a sum of four terms: products with weights, attention, bytes moved, and exposed tensor-parallel
communication. Each has its own rate. Fused attention computes the scores again, so its backward pass costs 2.5 forward
passes; the FLOPs formula counts 2.

All collectives of the forward pass are exposed. In the backward pass only the gathers of output gradients under
sequence parallelism are: megatron-core overlaps the others with weight gradients. Per layer and pass these are two
all-reduces, or two all-gathers and two reduce-scatters, which move the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megavl.planner.cost.memory import tower_parameters
from megavl.planner.cost.work import ADAPTOR, Work, embedding_work, head_work, layer_work, vision_work
from megavl.planner.hardware.devices import Device, Link
from megavl.planner.scenario import Kind, Scenario

_ATTENTION_BACKWARD = 2.5 / 2
_OPTIMIZER_BYTES = 34.0
"""Bytes per trained parameter of a rank's shard that the gradient norm and torch's fused AdamW move.

The gradient is read twice, master weight and two moments are read and written, the weight is written."""


@dataclass(frozen=True)
class Pass:
    """Seconds of a forward and of a backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Pass:
        return Pass(self.forward * factor, self.backward * factor)


@dataclass(frozen=True, kw_only=True)
class BlockTimes:
    """One micro-batch of one kind on one rank."""

    vision: Pass
    """Encoders and adaptor within the pipeline, for the images of one rank of the first stage."""
    embedding: Pass
    layer: Pass
    head: Pass
    """Final norm, output layer and loss."""

    def stage(self, stage: int, *, layers: int, stages: int) -> Pass:
        """Passes of stage number `stage` with `layers` decoder layers."""
        out = self.layer * layers
        if stage == 0:
            out += self.vision + self.embedding
        return out + self.head if stage == stages - 1 else out


@dataclass(frozen=True, kw_only=True)
class StepExtras:
    """Seconds of a step outside the pipeline schedule, on the slowest rank."""

    before: float = 0.0
    """Encoders before the pipeline starts (`split_all`)."""
    after: float = 0.0
    """Their backward pass, after the pipeline."""
    reduce: float = 0.0
    """Gradient reduction over data-parallel ranks that does not overlap a backward pass."""
    update: float = 0.0
    """Optimizer, and the part of the weight gather that does not overlap a forward pass."""
    dummy_image: float = 0.0
    """The dummy image that a text-only step encodes for overlapped gradient reduction."""
    loading: float = 0.0
    """Waiting for data, and fixed costs of a step."""

    @property
    def total(self) -> float:
        """Sum, seconds."""
        return self.before + self.after + self.reduce + self.update + self.dummy_image + self.loading


class TimeSource(Protocol):
    """Where seconds come from."""

    @property
    def name(self) -> str:
        """Printed with the plan."""

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Printed with the plan, one line each."""

    def covers(self, scenario: Scenario) -> bool:
        """Whether it knows this layout."""
        return True

    def blocks(self, scenario: Scenario, kind: Kind) -> BlockTimes:
        """Seconds of one micro-batch."""

    def transfer(self, scenario: Scenario) -> float:
        """Seconds of one transfer between neighbouring pipeline ranks."""

    def extras(self, scenario: Scenario, kind: Kind, *, trained: int, last_backward: float) -> StepExtras:
        """Seconds outside the schedule.

        Args:
            trained: trained parameters on the rank.
            last_backward: seconds of the rank's backward passes of its last micro-batch; reduction overlaps them.
        """

    def slowdown(self, scenario: Scenario) -> tuple[float, ...]:
        """Factor on a pass while 1, 2, ... pipeline ranks of this replica compute at once; 1 on own devices."""
        return (1.0,)


@dataclass(frozen=True, kw_only=True)
class FlatTimes(TimeSource):
    """Time proportional to FLOPs, without communication or memory bounds."""

    flops_per_s: float = 1.0
    """Rate of a busy device."""
    name: str = "FLOPs"
    assumptions: tuple[str, ...] = ("time is proportional to FLOPs; no communication, no memory bound",)

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
        """No time."""
        return 0.0

    def extras(self, scenario: Scenario, kind: Kind, *, trained: int, last_backward: float) -> StepExtras:
        """Only the encoders before the pipeline."""
        towers = Pass()
        for block in vision_work(scenario, kind):
            if block.name != ADAPTOR:
                towers += self._pass(block.forward, block.backward) * scenario.images_up_front(kind)
        return StepExtras(before=towers.forward, after=towers.backward)

    def _pass(self, forward: Work, backward: Work) -> Pass:
        return Pass(forward.flops / self.flops_per_s, backward.flops / self.flops_per_s)


@dataclass(frozen=True, kw_only=True)
class DeviceTimes(TimeSource):
    """Seconds from a row of `devices.py`."""

    device: Device

    @property
    def name(self) -> str:
        """Name of the table."""
        return f"table of {self.device.name}"

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Sources of the table."""
        return self.device.sources

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
        """Seconds of one micro-batch's hidden states, or of a rank's share of them under sequence parallelism."""
        if scenario.pipeline == 1:
            return 0.0
        # Pipeline neighbours are tensor x data ranks apart: on another node as soon as two such blocks exceed one.
        near = 2 * scenario.tensor * scenario.data_parallel <= self.device.per_node
        link = self.device.local if near else self.device.network
        return link.seconds(scenario.hidden_bytes / scenario.sequence_ranks)

    def extras(self, scenario: Scenario, kind: Kind, *, trained: int, last_backward: float) -> StepExtras:
        """Seconds outside the schedule."""
        up_front, dummy = self._up_front(scenario, kind), 0.0
        parallel = scenario.recipe.parallel
        if kind == "text" and encodes_dummy_image(scenario):
            dummy = self._images(scenario, "multimodal", towers=scenario.vision != "split_all", adaptor=1.0).total
        ranks = scenario.data_parallel
        buckets = max(1.0, trained / parallel.bucket(ranks=ranks))
        gradients, weights = 4.0 * trained, float(scenario.element * trained)
        link = self._data_link(scenario)
        scatter, gather = (all_gather(size, ranks=ranks, link=link) for size in (gradients, weights))
        if not parallel.distributed_optimizer:
            scatter, gather = all_reduce(gradients, ranks=ranks, link=link), 0.0
        reduce = max(scatter / buckets, scatter - last_backward) if parallel.overlap_grad_reduce else scatter
        exposed = gather / buckets if parallel.overlap_param_gather else gather
        update = _OPTIMIZER_BYTES * trained / scenario.optimizer_ranks / self.device.memory_bandwidth
        return StepExtras(
            before=up_front.forward, after=up_front.backward, reduce=reduce, update=update + exposed, dummy_image=dummy
        )

    def _vision(self, scenario: Scenario, kind: Kind) -> Pass:
        """Encoders and adaptor within the pipeline, for one micro-batch on one rank of the first stage."""
        towers, adaptor = scenario.tower_images(kind), scenario.adaptor_images(kind)
        return self._images(scenario, kind, towers=towers, adaptor=adaptor) + gather_time(scenario, kind, self.device)

    def _up_front(self, scenario: Scenario, kind: Kind) -> Pass:
        """Towers before the pipeline, with the exchange of features, gradients and weights between ranks."""
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
        """Link of a ring over data-parallel ranks; it uses the network adapters of all its members on a node."""
        device = self.device
        if scenario.devices <= device.per_node:
            return device.local
        members = max(1, min(device.per_node // scenario.tensor, scenario.data_parallel))
        bandwidth = min(device.local.bandwidth, members * device.network.bandwidth)
        return Link(bandwidth=bandwidth, latency=device.network.latency)


def tensor_link(scenario: Scenario, device: Device) -> Link:
    """Link between tensor-parallel ranks, which share a node if they fit on it."""
    return device.local if scenario.tensor <= device.per_node else device.network


def gather_time(scenario: Scenario, kind: Kind, device: Device) -> Pass:
    """Seconds that `split_tp` takes to gather a micro-batch's image embeddings; their gradients need no exchange."""
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
    """Seconds that `split_all` takes to send features to the first stage, and gradients and weights if towers train."""
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


def encodes_dummy_image(scenario: Scenario) -> bool:
    """Whether text-only steps encode a dummy image, so that replicas can overlap the reduction of every gradient."""
    recipe = scenario.recipe
    overlaps = recipe.parallel.overlap_grad_reduce and scenario.data_parallel > 1
    return overlaps and bool(set(recipe.trainable_parts) - {"llm"})


def all_gather(data: float, *, ranks: int, link: Link) -> float:
    """Seconds of an all-gather or reduce-scatter whose whole result is `data` bytes (ring)."""
    return link.seconds(data * (ranks - 1) / ranks)


def all_reduce(data: float, *, ranks: int, link: Link) -> float:
    """Seconds of an all-reduce of `data` bytes (ring)."""
    return link.seconds(2 * data * (ranks - 1) / ranks)
