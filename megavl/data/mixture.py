"""Which source each sequence of a run comes from, and how often a run uses each source: closed forms of the step.

A step's modality comes from the modality plan, so `data.multimodal_fraction` alone decides how many steps are
multimodal. Under `data.grouping: sequence` the plan counts sequences instead, and a step's sequences are shuffled over
its slots. Weights divide the sequences of one modality among the sources that have it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megavl.config.data import DataConfig, Grouping, MixtureSource
from megavl.config.errors import DataError
from megavl.config.recipe import Recipe
from megavl.data.interleave import Interleave
from megavl.data.manifest import MODALITIES, DatasetManifest, Modality, read_manifest
from megavl.data.permutation import permutation
from megavl.data.plan import ModalityPlan, as_fraction, keyed_number

Counts = Mapping[Modality, int]
"""Packed sequences of a source, per modality."""


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """What a run takes from one source in one modality."""

    name: str
    modality: Modality
    share: float
    """Of the modality's sequences."""
    drawn: int
    """Sequences over the whole run."""
    sequences: int | None
    """Sequences that the source has; None: not known."""
    max_epochs: float | None

    @property
    def epochs(self) -> float | None:
        """How often the run goes through the source."""
        return self.drawn / self.sequences if self.sequences else None


class Mixture:
    """The source of every sequence of a run."""

    def __init__(
        self,
        weights: Sequence[Mapping[Modality, float]],
        *,
        plan: ModalityPlan,
        global_batch_size: int,
        grouping: Grouping = "step",
    ) -> None:
        """Compute how sources alternate.

        Args:
            weights: of each source in each modality; 0 where it is not drawn.
            plan: modality of each step; of each sequence where these are not grouped.
            global_batch_size: sequences per step.
            grouping: `step` for steps of one modality, `sequence` for mixed steps.

        Raises:
            UsageError: weights without a common step that is coarse enough.
        """
        self.plan, self.global_batch_size, self.grouping = plan, global_batch_size, grouping
        self.earlier: tuple[tuple[int, int], ...] = ()
        """(step, sequences): up to that step, steps had that many sequences; set by a run that was resumed so."""
        self.sources = len(weights)
        self._drawn = {m: [number for number, weight in enumerate(weights) if weight[m] > 0] for m in MODALITIES}
        self._orders = {
            m: Interleave([as_fraction(weights[number][m]) for number in numbers])
            for m, numbers in self._drawn.items()
            if numbers
        }

    def draw(self, *, step: int, slot: int) -> tuple[int, Modality, int]:
        """Source, modality and number of a draw, for slot 0 .. global_batch_size - 1 of a step.

        The draws of one modality from one source are numbered from 0 through the whole run.
        """
        assert 0 <= slot < self.global_batch_size
        modality, position = self._position(step, slot)
        number, draw = self._orders[modality].at(position)
        return self._drawn[modality][number], modality, draw

    def modality(self, step: int) -> Modality:
        """`text` where every sequence of the step is text."""
        return "multimodal" if self.multimodal_before(step + 1) > self.multimodal_before(step) else "text"

    def multimodal_before(self, steps: int) -> int:
        """Multimodal sequences of the first `steps` steps."""
        if self.grouping == "sequence":
            return self.plan.multimodal_before(self.sequences_before(steps))
        count = self.plan.multimodal_before
        parts = _parts(steps, size=self.global_batch_size, earlier=self.earlier)
        return sum((count(end) - count(start)) * size for start, end, size in parts)

    def sequences_before(self, steps: int) -> int:
        """Sequences of the first `steps` steps."""
        return sequences_before(steps, size=self.global_batch_size, earlier=self.earlier)

    def share(self, *, source: int, modality: Modality) -> float:
        """Share of the modality's sequences that come from a source."""
        if source not in self._drawn[modality]:
            return 0.0
        order = self._orders[modality]
        return order.counts[self._drawn[modality].index(source)] / order.period

    def drawn(self, steps: int, *, source: int, modality: Modality) -> int:
        """Sequences of a source in the first `steps` steps."""
        if source not in self._drawn[modality]:
            return 0
        multimodal = self.multimodal_before(steps)
        of_modality = multimodal if modality == "multimodal" else self.sequences_before(steps) - multimodal
        number = self._drawn[modality].index(source)
        return self._orders[modality].before(of_modality, source=number)

    def _position(self, step: int, slot: int) -> tuple[Modality, int]:
        """Modality of a slot, and how many sequences of that modality come before it."""
        size, multimodal = self.global_batch_size, self.multimodal_before(step)
        in_step = self.multimodal_before(step + 1) - multimodal
        number = slot
        if self.grouping == "sequence":
            number = permutation(size, keyed_number("slots", self.plan.seed, step))(slot)
        if number < in_step:
            return "multimodal", multimodal + number
        return "text", self.sequences_before(step) - multimodal + number - in_step


def sequences_before(steps: int, *, size: int, earlier: Sequence[tuple[int, int]]) -> int:
    """Sequences of the first `steps` steps, which have `size` sequences each, and before that `earlier` sizes."""
    return sum((end - start) * size for start, end, size in _parts(steps, size=size, earlier=earlier))


def _parts(steps: int, *, size: int, earlier: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """First step, end and sequences per step of each part of the first `steps` steps."""
    start = 0
    for limit, count in (*earlier, (steps, size)):
        end = min(limit, steps)
        yield start, end, count
        start = end


def recipe_mixture(recipe: Recipe, counts: Sequence[Counts | None]) -> Mixture:
    """The mixture of a run.

    Args:
        recipe: of the run.
        counts: sequences of each source of `recipe.data.mixture`; None where they are not known.

    Raises:
        DataError: a source, or all of them together, lack a modality that is asked of them.
        UsageError: weights without a common step that is coarse enough.
    """
    data, training = recipe.data, recipe.training
    unit = training.global_batch_size if data.grouping == "sequence" else 1
    plan = ModalityPlan(
        seed=training.seed, fraction=data.multimodal_fraction, warmup_steps=data.modality_warmup_steps * unit
    )
    weights = [_weights(source, count) for source, count in zip(data.mixture, counts, strict=True)]
    _check_modalities(data, weights)
    return Mixture(weights, plan=plan, global_batch_size=training.global_batch_size, grouping=data.grouping)


def source_plans(
    mixture: Mixture, *, data: DataConfig, counts: Sequence[Counts | None], steps: int
) -> list[SourcePlan]:
    """What a run of `steps` steps takes from each source: a row for every modality that it has or gives."""
    return [
        SourcePlan(
            name=config.name,
            modality=modality,
            share=mixture.share(source=number, modality=modality),
            drawn=mixture.drawn(steps, source=number, modality=modality),
            sequences=None if count is None else count[modality],
            max_epochs=config.max_epochs,
        )
        for number, (config, count) in enumerate(zip(data.mixture, counts, strict=True))
        for modality in MODALITIES
        if mixture.drawn(steps, source=number, modality=modality) or (count and count[modality])
    ]


def check_epochs(mixture: Mixture, *, data: DataConfig, counts: Sequence[Counts], steps: int) -> None:
    """Refuse a run that would use a source more often than its `max_epochs`.

    Raises:
        DataError: naming the source, what the run would draw, and the longest run that fits.
    """
    for number, (config, count) in enumerate(zip(data.mixture, counts, strict=True)):
        for modality in MODALITIES if config.max_epochs is not None else ():
            assert config.max_epochs is not None
            limit = int(as_fraction(config.max_epochs) * count[modality])

            def drawn(steps: int, number: int = number, modality: Modality = modality) -> int:
                return mixture.drawn(steps, source=number, modality=modality)

            if drawn(steps) > limit:
                longest = bisect_right(range(steps + 1), limit, key=drawn) - 1
                raise DataError(
                    f"data.sources.{config.name}: {steps} steps draw {drawn(steps):,} of its {count[modality]:,} "
                    f"{modality} sequences, {drawn(steps) / count[modality]:.2f} epochs, above max_epochs "
                    f"{config.max_epochs:g}; raise it, lower the weight, or train at most {longest} steps"
                )


def preview(recipe: Recipe) -> list[str]:
    """What `render` shows, before the data are opened; epochs only of datasets that exist already.

    Raises:
        DataError: a manifest that exists is damaged, or a source lacks what is asked of it.
        UsageError: weights without a common step that is coarse enough.
    """
    counts: list[Counts | None] = []
    for source in recipe.data.mixture:
        where = Path(source.path, "manifest.json")
        manifest = read_manifest(where, kind=DatasetManifest) if where.is_file() else None
        counts.append(
            None if manifest is None else {"text": manifest.text_packs, "multimodal": manifest.multimodal_packs}
        )
    mixture, steps = recipe_mixture(recipe, counts), recipe.training.steps
    rows = source_plans(mixture, data=recipe.data, counts=counts, steps=steps)
    return render(rows, mixture=mixture, steps=steps)


def render(rows: Sequence[SourcePlan], *, mixture: Mixture, steps: int) -> list[str]:
    """The plan as aligned lines of text."""
    size, sequences = mixture.global_batch_size, mixture.multimodal_before(steps)
    share = f"({sequences / (steps * size):.2%})"
    kinds = f"{steps - sequences // size:,} text steps, {sequences // size:,} multimodal ones {share}"
    if mixture.grouping == "sequence":
        kinds = (
            f"{steps * size - sequences:,} text sequences, {sequences:,} multimodal ones {share}, mixed in every step"
        )
    table = [
        (row.name, row.modality, f"{row.share:.2%}", f"{row.drawn:,} sequences", _epochs(row))
        if row.drawn
        else (row.name, row.modality, "not drawn", f"0 of {row.sequences or 0:,} sequences", "")
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table)]
    return [
        f"data: {steps:,} steps of {size:,} sequences; {kinds}",
        *("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in table),
    ]


def _epochs(row: SourcePlan) -> str:
    if row.sequences is None:
        return "epochs not known: no dataset there yet"
    return "" if row.epochs is None else f"{row.epochs:.2f} epochs of {row.sequences:,}"


def _weights(source: MixtureSource, count: Counts | None) -> dict[Modality, float]:
    asked: dict[Modality, float] = {"text": source.weight.text, "multimodal": source.weight.multimodal}
    if count is None:
        return asked
    found = {modality: weight if count[modality] else 0.0 for modality, weight in asked.items()}
    if not any(found.values()):
        wanted = " or ".join(modality for modality, weight in asked.items() if weight)
        raise DataError(
            f"data.sources.{source.name}: {source.path} holds no {wanted} sequence, for which alone it has a weight; "
            "correct the path or the weight"
        )
    return found


def _check_modalities(data: DataConfig, weights: Sequence[Mapping[Modality, float]]) -> None:
    fraction = data.multimodal_fraction
    needed: dict[Modality, bool] = {
        "text": fraction < 1 or data.modality_warmup_steps > 0,
        "multimodal": fraction > 0,
    }
    for modality in MODALITIES:
        if needed[modality] and not any(weight[modality] for weight in weights):
            raise DataError(
                f"data.sources: no source holds {modality} sequences, which data.multimodal_fraction {fraction} asks "
                f"for; add such a source or set the fraction to {int(modality == 'text')}"
            )
