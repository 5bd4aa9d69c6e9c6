"""The figure of an ablation: a panel for each measure, arms in colours, and bands of 95% over seeds."""

from __future__ import annotations

import io
from typing import Any

from launch.ablations.intervals import Estimate, estimate
from launch.ablations.results import Found
from megavl.config.errors import UsageError

COLOURS = (
    *("#1b5e9e", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#666666"),
    *("#a6761d", "#66a61e", "#17becf", "#000000"),
)
_BESIDE = 0.15
"""Of the values of seeds beside their mean, in arms."""
_WIDTH, _HEIGHT = 3.6, 3.0
"""Of a panel, inches."""


def require_matplotlib() -> None:
    """Refuse to begin without the library that draws.

    Raises:
        UsageError: it is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("ablate.py: needs matplotlib; install it with pip install 'megavl[corpus]'") from error


def draw(found: Found) -> bytes:
    """The figure as SVG; equal results give equal bytes with one release of matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    # Without a salt, names inside the file would be random.
    # Titles are plain text: a dollar sign begins no formula.
    settings = {"svg.hashsalt": "megavl", "svg.fonttype": "none", "font.size": 9, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        return _draw(found)


def _draw(found: Found) -> bytes:
    from matplotlib import pyplot

    figure_of = found.ablation.figure
    panels = figure_of.measures
    size = (_WIDTH * len(panels), _HEIGHT + 0.24 * len(found.ablation.arms))
    figure, grid = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    for axes, name in zip(grid[0], panels):
        measure = found.ablation.measures[name]
        (_draw_curves if figure_of.kind == "curves" else _draw_points)(axes, found, name)
        axes.set_title(measure.title, fontsize=9)
        axes.set_ylabel(f"{measure.better} is better")
        axes.grid(alpha=0.3, linewidth=0.5)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", frameon=False, ncols=2)
    rows = (len(labels) + 1) // 2
    figure.suptitle(f"{found.ablation.title}: size {found.size}, {len(found.seeds)} seeds", fontsize=10)
    figure.tight_layout(rect=(0, 0.03 + 0.24 * rows / size[1], 1, 1))
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return out.getvalue()


def _draw_curves(axes: Any, found: Found, name: str) -> None:
    """Means over steps, with a band where there are several seeds."""
    for colour, (arm, by_seed) in zip(_colours(found), found.curves[name].items()):
        curves = list(by_seed.values())
        steps = [step for step, _ in curves[0]]
        points = [estimate([curve[number][1] for curve in curves]) for number in range(len(steps))]
        axes.plot(steps, [one.mean for one in points], color=colour, linewidth=1.3, label=_label(found, arm))
        axes.fill_between(steps, *_band(points), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("step of the last stage")


def _draw_points(axes: Any, found: Found, name: str) -> None:
    """One point for each arm, with its interval and the values of the seeds."""
    for number, (colour, arm) in enumerate(zip(_colours(found), found.curves[name])):
        values = found.values(name, arm)
        one = estimate(values)
        (low,), (high,) = _band([one])
        axes.plot([number - _BESIDE] * len(values), values, ".", color=colour, alpha=0.5, markersize=4)
        error = [[one.mean - low], [high - one.mean]]
        axes.errorbar([number], [one.mean], yerr=error, fmt="o", color=colour, capsize=3, label=_label(found, arm))
    axes.set_xticks([])


def _band(points: list[Estimate]) -> tuple[list[float], list[float]]:
    low = [one.mean if one.low is None else one.low for one in points]
    high = [one.mean if one.high is None else one.high for one in points]
    return low, high


def _label(found: Found, arm: str) -> str:
    return found.ablation.arms[arm].title


def _colours(found: Found) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(found.ablation.arms))]
