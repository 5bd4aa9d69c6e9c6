"""Draw the modality schedule of a recipe: `python data_tools/draw_schedule.py RECIPE --output FILE.svg`.

The upper part compares the wanted share of language with the realised one. The lower part shows how far the number of
multimodal steps is from the wanted number, always by less than one. Needs matplotlib (`pip install matplotlib`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megavl.config.errors import MegaVLError, StorageError, UsageError
from megavl.config.load import load_recipe
from megavl.data.plan import ModalityPlan
from megavl.foreign.printing import VisibleParser, say, say_error

_POINTS = 400
"""Number of drawn steps, evenly spaced."""


def describe(plan: ModalityPlan, *, steps: int) -> str:
    """The drawn numbers in one line, which the file also contains as its description."""
    return (
        f"seed {plan.seed}, target {plan.fraction:g} multimodal, warm-up {plan.warmup_steps} steps: "
        f"{plan.multimodal_before(steps)} of the first {steps} steps are multimodal, wanted "
        f"{float(plan.wanted_before(steps)):.1f}"
    )


def draw(plan: ModalityPlan, *, steps: int, window: int, title: str, output: Path) -> None:
    """Write the figure. Its lower part covers every step: it shows the range within each interval.

    Args:
        plan: the schedule.
        steps: number of steps, from the first on.
        window: number of steps around each point that the realised share is taken over.
        title: title of the figure.
        output: SVG or PNG file.

    Raises:
        UsageError: matplotlib is missing, or cannot write this kind of file.
        StorageError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("draw_schedule.py: needs matplotlib; install it with pip install matplotlib") from error
    matplotlib.use("Agg")
    # Without a salt, names inside the file would be random.
    matplotlib.rcParams.update({"svg.hashsalt": "megavl", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    points = [steps * number // _POINTS for number in range(_POINTS + 1)]
    wanted = [1 - float(plan.wanted_before(step + 1) - plan.wanted_before(step)) for step in points]
    centres = [step for step in points if window // 2 <= step <= steps - window // 2]
    realised = [_language(plan, centre - window // 2, window) for centre in centres]
    errors = [float(plan.multimodal_before(step) - plan.wanted_before(step)) for step in range(steps + 1)]
    spans = [errors[first : last + 1] for first, last in zip(points, points[1:])]
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7.5, 4.2), height_ratios=(3, 1))
    above.plot(centres, realised, ".", markersize=3, color="#d95f02", label=f"realised, {window} steps around")
    above.plot(points, wanted, linewidth=1.2, color="#1b5e9e", label="wanted")
    above.set(ylabel="share of language steps", ylim=(min(wanted) - 0.08, 1.04), title=title)
    above.legend(frameon=False)
    low, high = [min(span) for span in spans], [max(span) for span in spans]
    below.fill_between(points[1:], low, high, color="#1b5e9e", linewidth=0)
    below.set(xlabel="step", ylabel="multimodal steps\nso far − wanted", ylim=(-1, 1), xlim=(0, steps))
    for axes in (above, below):
        axes.grid(alpha=0.3, linewidth=0.5)
    figure.align_ylabels()
    figure.tight_layout()
    metadata = {"Date": None, "Description": describe(plan, steps=steps)} if output.suffix == ".svg" else {}
    try:
        figure.savefig(output, metadata=metadata)
    except ValueError as error:
        raise UsageError(f"--output {output}: {error}; give a name that ends in .svg or .png") from error
    except OSError as error:
        raise StorageError(f"--output {output}: cannot write ({error.strerror}); choose another place") from error
    finally:
        pyplot.close(figure)


def _language(plan: ModalityPlan, first: int, count: int) -> float:
    return 1 - (plan.multimodal_before(first + count) - plan.multimodal_before(first)) / count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = VisibleParser(prog="draw_schedule.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file, YAML")
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", default=[], help="values that override the recipe"
    )
    parser.add_argument("--output", type=Path, required=True, help="SVG or PNG file")
    parser.add_argument("--steps", type=int, help="number of steps (default: the whole run)")
    parser.add_argument("--window", type=int, default=100, help="steps of the realised share (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, overrides=options.overrides)
        steps = recipe.training.steps if options.steps is None else options.steps
        if not 0 < options.window < steps:
            raise UsageError(f"--window {options.window}: must be above 0 and below the {steps} steps that are drawn")
        plan = ModalityPlan(
            seed=recipe.training.seed,
            fraction=recipe.data.multimodal_fraction,
            warmup_steps=recipe.data.modality_warmup_steps,
        )
        draw(plan, steps=steps, window=options.window, title=Path(options.recipe).as_posix(), output=options.output)
    except MegaVLError as error:
        say_error(error)
        return error.exit_code
    say(f"{options.output}: {describe(plan, steps=steps)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
