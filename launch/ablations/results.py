"""What an ablation found: values by arm and seed, curves, and verdicts; as JSON and as a page.

The JSON holds nothing that differs between two runs of the same code on the same processor. Times and commits stand on
the page alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.ablations.definition import Ablation, Measure
from launch.ablations.graph import Cell, Graph
from launch.ablations.intervals import UNDECIDED, estimate, has_effect, judge
from launch.ablations.records import EVALUATION, METRICS, read_done, read_rows
from launch.bench.report import machine, table, table_row, versions
from megavl.config.errors import DataError

WINDOWS = 10
"""Parts of a run whose training rows are averaged for a curve; the last is the value of the measure."""
_HOUR = 3600

Curve = list[tuple[int, float]]
"""Step and value."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Everything that the runs of an ablation gave."""

    ablation: Ablation
    size: str
    seeds: tuple[int, ...]
    curves: Mapping[str, Mapping[str, Mapping[int, Curve]]]
    """By measure, arm and seed."""
    tokens: Mapping[str, int]
    """Trained tokens of an arm with one seed, ancestors not counted."""
    steps: Mapping[str, int]
    step_seconds: Mapping[str, Mapping[int, float]]
    """Mean step of the last stage, by arm and seed; empty where nothing is said about speed."""
    conditions: Mapping[str, Mapping[int, Sequence[Any]]]
    """Under which those steps were timed: a machine with its runs at a time, or several of them."""

    def values(self, measure: str, arm: str) -> list[float]:
        """The value for each seed: the last of the run, or its worst."""
        of = self.ablation.measures[measure]
        curves = [[value for _, value in self.curves[measure][arm][seed]] for seed in self.seeds]
        if of.reduce == "last":
            return [curve[-1] for curve in curves]
        return [min(curve) if of.better == "higher" else max(curve) for curve in curves]

    def claims(self) -> list[dict[str, Any]]:
        """Each claim with its difference, interval and verdict, and whether one of both arms has an effect to lose."""
        rows = []
        for claim in self.ablation.claims:
            sign = self._sign(claim.measure)
            pairs = zip(self.values(claim.measure, claim.arm), self.values(claim.measure, claim.than))
            difference = estimate([sign * (one - other) for one, other in pairs])
            effect = any(self._has_effect(claim.measure, arm, margin=claim.margin) for arm in (claim.arm, claim.than))
            verdict = judge(difference, kind=claim.kind, margin=claim.margin, effect=effect)
            rows.append({**asdict(claim), "difference": asdict(difference), "effect": effect, "verdict": verdict})
        return rows

    def speeds(self) -> list[dict[str, Any]]:
        """Each claim on speed with its gain, interval and verdict; these are times, so no part of the JSON."""
        rows = []
        for speed in self.ablation.speeds:
            arm, than = self.step_seconds[speed.arm], self.step_seconds[speed.than]
            gain = estimate([than[seed] / arm[seed] - 1 for seed in self.seeds])
            # A step always takes its time: there is an effect to lose.
            verdict = judge(gain, kind="better", margin=speed.margin, effect=True)
            verdict = verdict if self.timed_alike(speed.arm, speed.than) else UNDECIDED
            rows.append({**asdict(speed), "difference": asdict(gain), "verdict": verdict})
        return rows

    def timed_alike(self, arm: str, than: str) -> bool:
        """Whether the cells of each pair ran on one machine, with the same number of runs at a time."""
        pairs = [(self.conditions[arm][seed], self.conditions[than][seed]) for seed in self.seeds]
        return all(len(one) == 1 and one == other for one, other in pairs)

    def _sign(self, measure: str) -> float:
        return 1.0 if self.ablation.measures[measure].better == "higher" else -1.0

    def _has_effect(self, name: str, arm: str, *, margin: float) -> bool:
        measure, sign, values = self.ablation.measures[name], self._sign(name), self.values(name, arm)
        starts = [
            self.curves[name][arm][seed][0][1] if measure.chance is None else measure.chance for seed in self.seeds
        ]
        gain = estimate([sign * (value - start) for value, start in zip(values, starts)])
        room = None if measure.limit is None else estimate([sign * (measure.limit - value) for value in values])
        return has_effect(gain, room=room, margin=margin, either_way=measure.chance is None)

    def to_dict(self, *, simulations: Mapping[str, float]) -> dict[str, Any]:
        """A mapping for JSON."""
        arms = {
            name: {
                "title": arm.title,
                "steps": self.steps[name],
                "tokens": self.tokens[name],
                "measures": {
                    measure: {"values": self.values(measure, name), **asdict(estimate(self.values(measure, name)))}
                    for measure in self.curves
                },
            }
            for name, arm in self.ablation.arms.items()
        }
        curves = {
            measure: {arm: {str(seed): curve for seed, curve in of_arm.items()} for arm, of_arm in of_measure.items()}
            for measure, of_measure in self.curves.items()
        }
        return {
            "title": self.ablation.title,
            "size": self.size,
            "seeds": list(self.seeds),
            "claims": self.claims(),
            "arms": arms,
            "simulations": dict(simulations),
            "curves": curves,
        }


def read_results(ablation: Ablation, graph: Graph, *, size: str, cache: Path) -> Found:
    """Read the logs of all cells, which must be done.

    Raises:
        DataError: a run lacks a measure, or its value is not finite.
    """
    curves: dict[str, dict[str, dict[int, Curve]]] = {
        name: {arm: {} for arm in ablation.arms} for name in ablation.measures
    }
    tokens: dict[str, int] = {}
    steps: dict[str, int] = {}
    seconds: dict[str, dict[int, float]] = {arm: {} for arm in ablation.arms}
    conditions: dict[str, dict[int, Sequence[Any]]] = {arm: {} for arm in ablation.arms}
    for cell in graph.cells:
        for name, measure in ablation.measures.items():
            curves[name][cell.arm][cell.seed] = _points(name, measure, cell, cache=cache)
        done = [read_done(run, cache=cache) for run in cell.runs]
        tokens[cell.arm] = sum(row["tokens"] for row in done)
        steps[cell.arm] = sum(row["steps"] for row in done)
        if ablation.speeds:
            seconds[cell.arm][cell.seed] = _step_seconds(cell, cache=cache)
            conditions[cell.arm][cell.seed] = done[-1].get("conditions", [])
    for name, measure in ablation.measures.items():
        if measure.source == "training":
            curves[name] = _in_windows(curves[name], graph)
    _check_steps(curves)
    seeds = tuple(dict.fromkeys(cell.seed for cell in graph.cells))
    return Found(
        ablation=ablation,
        size=size,
        seeds=seeds,
        curves=curves,
        tokens=tokens,
        steps=steps,
        step_seconds=seconds,
        conditions=conditions,
    )


def _check_steps(curves: Mapping[str, Mapping[str, Mapping[int, Curve]]]) -> None:
    """Seeds are averaged step by step, so the runs of an arm need the same steps."""
    for name, of_measure in curves.items():
        for arm, of_arm in of_measure.items():
            steps = {seed: [step for step, _ in curve] for seed, curve in of_arm.items()}
            first, *others = steps
            for seed in others:
                if steps[seed] != steps[first]:
                    raise DataError(
                        f"measures.{name}: arm {arm} has it at the steps {steps[first]} with seed {first}, and at "
                        f"{steps[seed]} with seed {seed}; remove the folders of these runs from the cache"
                    )


def _points(name: str, measure: Measure, cell: Cell, *, cache: Path) -> Curve:
    log = _run(cell, cache=cache) / {"evaluation": EVALUATION, "training": METRICS}[measure.source]
    found, steps = read_rows(log), cell.runs[-1].steps
    last = found[-1]["step"] if found else 0
    if last != steps:
        raise DataError(
            f"{log}: ends at step {last} of {steps} (arm {cell.arm}, seed {cell.seed}); remove the folder of this run "
            "from the cache, so that it runs again"
        )
    rows = [row for row in found if measure.modality in (None, row.get("modality"))]
    points = [(row["step"], _at(row, measure.key)) for row in rows]
    wrong = [step for step, value in points if not isinstance(value, int | float) or not math.isfinite(value)]
    if wrong or not points:
        where = f"step {wrong[0]}" if wrong else "any step"
        raise DataError(
            f"measures.{name}.key: {measure.key} has no finite number at {where} of {log} (arm {cell.arm}, seed "
            f"{cell.seed}); where the run diverged, change its settings, else correct the key"
        )
    return points


def _run(cell: Cell, *, cache: Path) -> Path:
    """Folder of the last run."""
    return cache / cell.runs[-1].address / "run"


def _step_seconds(cell: Cell, *, cache: Path) -> float:
    """Mean step: medians of both kinds, in the share of the run, because other runs disturb single steps."""
    times: dict[str, list[float]] = {}
    for row in read_rows(_run(cell, cache=cache) / METRICS):
        times.setdefault(row["modality"], []).append(row["step_time_s"])
    return sum(len(kind) * statistics.median(kind) for kind in times.values()) / sum(map(len, times.values()))


def _at(row: Any, key: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for part in key.split("."):
        row = row.get(part) if isinstance(row, Mapping) else None
    return row


def _in_windows(of_measure: Mapping[str, Mapping[int, Curve]], graph: Graph) -> dict[str, dict[int, Curve]]:
    """Curves of training rows as means over parts of the run, as many for all seeds of an arm."""
    steps = {cell.arm: cell.runs[-1].steps for cell in graph.cells}
    found: dict[str, dict[int, Curve]] = {}
    for arm, of_arm in of_measure.items():
        count = min(WINDOWS, *map(len, of_arm.values()))
        found[arm] = {seed: _windows(points, steps=steps[arm], count=count) for seed, points in of_arm.items()}
    return found


def _windows(points: Curve, *, steps: int, count: int) -> Curve:
    """Means over equal parts of the rows, at equal parts of the run: steps of one kind differ from seed to seed."""
    borders = [len(points) * number // count for number in range(count + 1)]
    parts = [points[first:last] for first, last in zip(borders, borders[1:])]
    means = [math.fsum(value for _, value in part) / len(part) for part in parts]
    return [(steps * number // count, mean) for number, mean in enumerate(means, start=1)]


def page(
    found: Found, *, name: str, command: str, cost: Mapping[str, Any], simulations: Mapping[str, float]
) -> list[str]:
    """Lines of the page: verdicts, table, figure, and how it was made.

    Args:
        name: of the file, without .yaml.
        cost: `hours` of one rank, `commits`.
    """
    ablation = found.ablation
    lines = [f"# {ablation.title}", "", f"![{ablation.title}]({name}.svg)", "", f"The paper: {ablation.paper}"]
    lines += ["", f"What else differs: {ablation.confounded}"] if ablation.confounded else []
    if ablation.claims:
        lines += table(
            "| claim | measure | margin | difference | 95% interval | effect | verdict |", _claim_rows(found)
        )
    head = " | ".join(measure.title.replace("|", "\\|") for measure in ablation.measures.values())
    lines += table(f"| arm | steps | tokens a seed | {head} |", _arm_rows(found))
    if ablation.speeds:
        lines += table("| speed, measured | margin | gain | 95% interval | verdict |", _speed_rows(found))
        means = [(ablation.arms[arm].title, estimate(list(of.values())).mean) for arm, of in found.step_seconds.items()]
        shown = ", ".join(f"{title} {mean:.3f}" for title, mean in means)
        lines += ["", f"Seconds of a step of the last stage, one process a run, other runs beside it: {shown}."]
        if not all(found.timed_alike(speed.arm, speed.than) for speed in ablation.speeds):
            lines[-1] += " Some were timed on other machines, or with another number of runs at a time: no verdict."
    if simulations:
        lines += table("| the planner's simulation | |", _simulation_rows(found, simulations))
    seeds = ", ".join(map(str, found.seeds))
    return [
        *lines,
        "",
        f"Means with 95% intervals over {len(found.seeds)} seeds ({seeds}); `{name}.json` has every value. A "
        "difference is positive where it goes the claimed way. Effect: whether one of both arms is further than the "
        "margin from chance or its start, and below the limit. Verdicts: the rule in `launch/ablations/intervals.py`, "
        "not corrected for the number of claims.",
        "",
        "All seeds start from the same trained decoder and towers, so the intervals say nothing about others.",
        "",
        f"    {command}",
        "",
        f"Size {found.size}; {cost['hours']:.2f} hours of one rank, with ancestors; code {', '.join(cost['commits'])}; "
        f"{machine()}; {versions('torch', 'megatron-core')}.",
    ]


def cost_of(graph: Graph, *, cache: Path) -> dict[str, Any]:
    """Hours of all ranks that the tasks took in all their starts, and the commits that ran them."""
    done = [read_done(task, cache=cache) for task in graph.tasks]
    commits = list(dict.fromkeys(name for row in done for name in row["commits"]))
    return {"hours": sum(row["seconds"] * row.get("ranks", 1) for row in done) / _HOUR, "commits": commits}


def _claim_rows(found: Found) -> Iterator[str]:
    for row in found.claims():
        difference = row["difference"]
        measure = found.ablation.measures[row["measure"]]
        interval = _interval(difference["low"], difference["high"])
        yield _row(
            *(row["text"], measure.title, f"{row['margin']:g}", f"{difference['mean']:+.4f}", interval),
            "yes" if row["effect"] else "no",
            f"**{row['verdict']}**",
        )


def _speed_rows(found: Found) -> Iterator[str]:
    for row in found.speeds():
        gain = row["difference"]
        low, high = ("-" if end is None else f"{end:+.1%}" for end in (gain["low"], gain["high"]))
        shown = (f"{row['margin']:.0%}", f"{gain['mean']:+.1%}", f"[{low}, {high}]", f"**{row['verdict']}**")
        yield _row(row["text"], *shown)


def _arm_rows(found: Found) -> Iterator[str]:
    for name, arm in found.ablation.arms.items():
        cells = []
        for measure in found.ablation.measures:
            one = estimate(found.values(measure, name))
            cells.append(f"{one.mean:.4f} {_interval(one.low, one.high)}")
        yield _row(arm.title, f"{found.steps[name]:,}", f"{found.tokens[name]:,}", *cells)


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"


def _simulation_rows(found: Found, simulations: Mapping[str, float]) -> Iterator[str]:
    for one in found.ablation.simulations:
        if one.title in simulations:
            value = simulations[one.title]
            yield _row(one.title, f"{value:+.1%}" if one.unit == "share" else f"{value:g}")


def _row(*cells: str) -> str:
    """A line of a table; titles may have a bar."""
    return table_row(*(cell.replace("|", "\\|") for cell in cells))
