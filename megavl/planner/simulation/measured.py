"""Seconds from a calibration, instead of a device's table or a share of its peak."""

from __future__ import annotations

from dataclasses import dataclass

from megavl.config.errors import UsageError
from megavl.planner.cost.memory import rerun_towers
from megavl.planner.hardware.calibration import Calibration, Entry, KindEntry, Seconds, recompute_key
from megavl.planner.scenario import Kind, Scenario
from megavl.planner.simulation.times import (
    BlockTimes,
    DeviceTimes,
    Pass,
    StepExtras,
    encodes_dummy_image,
    exchange_time,
    gather_time,
)


@dataclass(frozen=True, kw_only=True)
class MeasuredTimes(DeviceTimes):
    """Measured seconds of blocks; transfers are measured too or come from the device's table.

    Vision time is a line through two measurements: one image, and the recipe's number of images. If ranks share cores,
    a pass slows down as the measured micro-batch did when more processes computed at once.
    """

    calibration: Calibration
    path: str

    @property
    def name(self) -> str:
        """Path of the file."""
        return f"measurements in {self.path}"

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What was measured, and what comes from the device's table."""
        found = self.calibration
        versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
        lines = [f"measured on {found.device}, {found.data} data, {versions} ({self.path})"]
        if any(entry.transfer_s is None for entry in found.entries):
            lines.append(f"transfers where none were measured: links of {self.device.name}'s table")
        lines.append(f"gradient reduction and exchange of image features: links of {self.device.name}'s table")
        return tuple(lines)

    def covers(self, scenario: Scenario) -> bool:
        """Whether everything that this layout needs was measured."""
        try:
            for ranks in range(1, scenario.pipeline + 1):
                self._entry(scenario, ranks=ranks)
        except UsageError:
            return False
        return True

    def blocks(self, scenario: Scenario, kind: Kind) -> BlockTimes:
        """Seconds of one micro-batch."""
        entry = self._entry(scenario, ranks=1)
        part = self._part(entry, kind)
        return BlockTimes(
            vision=self._measured(entry, towers=scenario.tower_images(kind), adaptor=scenario.adaptor_images(kind))
            + gather_time(scenario, kind, self.device),
            embedding=_pass(part.embedding),
            layer=_pass(part.layer),
            head=_pass(part.head),
        )

    def transfer(self, scenario: Scenario) -> float:
        """Seconds of one micro-batch's hidden states from rank to rank."""
        if scenario.pipeline == 1:
            return 0.0
        found = self._entry(scenario, ranks=scenario.pipeline).transfer_s
        if found is None:
            return super().transfer(scenario)
        return found / scenario.sequence_ranks

    def extras(self, scenario: Scenario, kind: Kind, *, trained: int, last_backward: float) -> StepExtras:
        """Seconds outside the schedule, measured while all ranks compute."""
        entry = self._entry(scenario, ranks=scenario.pipeline)
        reduce = super().extras(scenario, kind, trained=trained, last_backward=last_backward).reduce
        dummy = 0.0
        if kind == "text" and encodes_dummy_image(scenario):
            dummy = self._measured(entry, towers=scenario.vision != "split_all", adaptor=1.0).total
        up_front = self._measured(entry, towers=scenario.images_up_front(kind), adaptor=0.0)
        if kind == "multimodal":
            up_front += Pass(0.0, up_front.forward * _rerun_share(entry, scenario))
        up_front += exchange_time(scenario, kind, self.device)
        return StepExtras(
            before=up_front.forward,
            after=up_front.backward,
            reduce=reduce,
            update=entry.update_s_per_parameter * trained / scenario.optimizer_ranks,
            dummy_image=dummy,
            loading=entry.step_s + self._part(entry, kind).loading * scenario.micro_batches,
        )

    def slowdown(self, scenario: Scenario) -> tuple[float, ...]:
        """Measured slowdown if ranks share cores."""
        if not self.calibration.shared_cores:
            return (1.0,)
        alone = _whole(self._entry(scenario, ranks=1), scenario)
        return tuple(
            _whole(self._entry(scenario, ranks=ranks), scenario) / alone for ranks in range(1, scenario.pipeline + 1)
        )

    def _entry(self, scenario: Scenario, *, ranks: int) -> Entry:
        """The entry for `ranks` pipeline ranks of every replica computing at once."""
        recipe = scenario.recipe
        wanted = {
            "tensor": scenario.tensor,
            "sequence_parallel": scenario.sequence_ranks > 1,
            "micro_batch_size": recipe.training.micro_batch_size,
            "recompute": recompute_key(recipe),
        }
        found = [
            entry
            for entry in self.calibration.entries
            if all(getattr(entry, name) == value for name, value in wanted.items())
        ]
        processes = scenario.tensor * ranks * scenario.data_parallel
        if self.calibration.shared_cores:
            found = [entry for entry in found if entry.processes == processes]
        if not found:
            sizes = ", ".join(f"{name} {value}" for name, value in wanted.items())
            many = f" with {processes} processes" if self.calibration.shared_cores else ""
            raise UsageError(
                f"--calibration: {self.path} has no measurement of {sizes}{many}; add it with `torchrun "
                f"--nproc-per-node {processes} -m megavl plan RECIPE ... --calibrate {self.path}`"
            )
        return max(found, key=lambda entry: entry.processes)

    def _part(self, entry: Entry, kind: Kind) -> KindEntry:
        found = entry.text if kind == "text" else entry.multimodal
        if found is None:
            raise UsageError(f"--calibration: {self.path} has no multimodal measurement; measure the recipe anew")
        return found

    def _measured(self, entry: Entry, *, towers: float, adaptor: float) -> Pass:
        """Passes of towers and adaptor over numbers of images on one rank."""
        if not towers and not adaptor:
            return Pass()
        if entry.vision is None or entry.one_image is None:
            raise UsageError(f"--calibration: {self.path} has no measurement of images; measure the recipe anew")
        many, one = entry.vision, entry.one_image
        out = _line(one.towers, many.towers, at=towers, measured=entry.images)
        return out + _line(one.adaptor, many.adaptor, at=adaptor, measured=entry.images)


def _line(one: Seconds, many: Seconds, *, at: float, measured: float) -> Pass:
    """Interpolate between (1, one) and (measured, many); proportional if only one image was measured."""
    if not at:
        return Pass()
    if measured <= 1:
        return _pass(one) * at
    share = (at - 1) / (measured - 1)
    return _pass(one) * (1 - share) + _pass(many) * share


def _pass(seconds: Seconds) -> Pass:
    return Pass(seconds.forward, seconds.backward)


def _rerun_share(entry: Entry, scenario: Scenario) -> float:
    """Share of the towers' forward pass that `split_all` runs again for its gradient."""
    again = rerun_towers(scenario)
    if not again:
        return 0.0
    return sum(seconds for name, seconds in entry.towers.items() if name in again) / sum(entry.towers.values())


def _whole(entry: Entry, scenario: Scenario) -> float:
    """Seconds of the text blocks of one micro-batch through the whole model."""
    layers = scenario.recipe.model.llm.num_layers
    return (_pass(entry.text.embedding) + _pass(entry.text.layer) * layers + _pass(entry.text.head)).total
