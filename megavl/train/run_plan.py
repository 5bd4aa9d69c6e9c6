"""What a run decides before its first step, once; the parts of the loop take slices of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megavl.config.identity import model_name
from megavl.config.recipe import Recipe
from megavl.foreign.printing import say
from megavl.model.build import BuildSpec
from megavl.parallel import cpu_runtime
from megavl.parallel.groups import Position
from megavl.planner.decoding import Decoding, decoding
from megavl.planner.hardware.devices import DEVICES, Device, known_device
from megavl.planner.layouts.layout import layout_string
from megavl.planner.scenario import Scenario
from megavl.planner.simulation.times import DeviceTimes
from megavl.weights.dtypes import DTYPE_OF_PRECISION


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A recipe on the devices that were started, checked and resolved."""

    scenario: Scenario
    """The recipe, the number of devices, and the sizes that follow from both."""
    device: Device | None
    """This device's row in the planner's table; None where it has no row."""
    layers: tuple[int, ...]
    """Decoder layers per stage; `megavl plan` shows the same for the same `--devices` and `--device`."""
    position: Position
    """This rank's coordinates."""

    @property
    def recipe(self) -> Recipe:
        """The checked recipe."""
        return self.scenario.recipe

    @property
    def build(self) -> BuildSpec:
        """What this rank's stages are built from."""
        return BuildSpec.of(
            self.recipe, layout=layout_string(self.layers), dtype=DTYPE_OF_PRECISION[self.recipe.training.precision]
        )

    @property
    def decoding(self) -> Decoding:
        """How this data-parallel rank decodes; a device without a row is taken for a fast one."""
        fast = DEVICES["h200"] if torch.cuda.is_available() else DEVICES["cpu"]
        return decoding(self.scenario, self.layers, DeviceTimes(device=self.device or fast))

    @property
    def peak_flops(self) -> float | None:
        """Dense peak of this device; None where the planner knows none, so that MFU is left out."""
        return self.device.peak_flops.get(self.recipe.training.precision) if self.device else None

    @property
    def summary(self) -> str:
        """Model, stage, layout and trained parts in one line."""
        recipe, parallel = self.recipe, self.recipe.parallel
        return (
            f"{model_name(recipe.model)}, stage {recipe.training.stage}, tp {parallel.tensor} x pp {parallel.pipeline} "
            f"(layers {'+'.join(map(str, self.layers))}) x dp {self.position.dp_size}, {recipe.training.precision}, "
            f"training {', '.join(recipe.trainable_parts)}"
        )

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.position.rank == 0:
            say(text)


def this_device() -> Device | None:
    """This device's row in the planner's table, with the memory that it really has; None where it has no row."""
    if not torch.cuda.is_available():
        return DEVICES["cpu"]
    row = known_device(torch.cuda.get_device_name())
    if row is None:
        return None
    return dataclasses.replace(row, memory_bytes=torch.cuda.get_device_properties().total_memory)


def of_rank_zero(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Rank 0's layers. Collective.

    Memory of equal devices differs by a few MiB, so other ranks may have found another split.
    """
    found = [layers]
    dist.broadcast_object_list(found, src=0, device=cpu_runtime.device())
    return found[0]
