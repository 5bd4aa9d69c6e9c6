"""A plan, a ranking of layouts and a table of blocks as aligned text."""

from __future__ import annotations

from megavl.planner.layouts.search import Ranking
from megavl.planner.plan import Plan, RankPlan, StepPlan
from megavl.planner.scenario import Scenario
from megavl.planner.simulation.mixing import Mixing
from megavl.planner.units import format_bytes, format_flops

_RANK_HEADER = (
    *("rank", "layers", "parameters", "trained", "FLOPs text", "FLOPs multimodal", "busy text", "busy multimodal"),
    *("weights", "gradients", "optimizer", "activations", "total"),
)
_STEP_HEADER = ("step", "FLOPs", "seconds", "in pipeline", "bubble", "tokens/s", "tokens/s/device", "MFU")
_RANKING_HEADER = (
    *("", "tensor", "pipeline", "virtual", "micro-batch", "recompute", "vision", "layers", "seconds"),
    *("tokens/s/device", "MFU", "memory"),
)


def render(plan: Plan) -> str:
    """The plan, one row per pipeline rank and per kind of step."""
    ranks: list[tuple[str, ...]] = [_RANK_HEADER, *(_rank_row(rank) for rank in plan.ranks)]
    steps: list[tuple[str, ...]] = [_STEP_HEADER]
    if plan.multimodal_share < 1:
        steps.append(_step_row("text-only", plan.text, devices=plan.devices))
    if plan.multimodal_share > 0:
        name = f"multimodal, {plan.images_per_sequence:g} images a sequence"
        steps.append(_step_row(name, plan.multimodal, devices=plan.devices))
    steps.append(_step_row(f"mean, {plan.multimodal_share:.0%} multimodal", plan.expected, devices=plan.devices))
    virtual = f" x virtual {plan.virtual_pipeline}" if plan.virtual_pipeline > 1 else ""
    return "\n".join(
        [
            f"model {plan.model}, training stage {plan.training_stage}: trains {', '.join(plan.trained) or 'nothing'}",
            f"{plan.devices} x {plan.device}: tensor {plan.tensor} x pipeline {plan.pipeline}{virtual} x data "
            f"{plan.data_parallel}, {plan.micro_batches} micro-batches a step, layout {plan.layout or 'one stage'}, "
            f"vision {plan.vision}",
            "",
            "per rank; FLOPs of one micro-batch with backward and recompute; share of the schedule computing; memory",
            *_align(ranks),
            _memory_line(plan),
            "",
            *_align(steps),
            _outside_line(plan.expected),
            f"{_convention(plan)}",
            f"all steps of the recipe: {_days(plan.days)}",
            *_settings_lines(plan),
            f"times: {plan.times}; simulated in megatron-core's order",
            *(f"  {line}" for line in plan.assumptions),
        ]
    )


def render_ranking(ranking: Ranking, scenario: Scenario) -> str:
    """The best layouts, why others are rejected, and the lines to paste."""
    rows: list[tuple[str, ...]] = [_RANKING_HEADER]
    for number, found in enumerate(ranking.best, start=1):
        choice = found.choice
        recompute = choice.recompute.granularity + (", vision" if choice.recompute.vision else "")
        rows.append(
            (
                str(number),
                *(str(size) for size in (choice.tensor, choice.pipeline, choice.virtual, choice.micro_batch_size)),
                recompute,
                choice.vision,
                "+".join(str(layers) for layers in found.layout),
                f"{found.seconds:.4g}",
                f"{found.tokens_per_s / scenario.devices:,.0f}",
                "-" if found.mfu is None else f"{found.mfu:.1%}",
                format_bytes(found.memory),
            )
        )
    lines = [f"layouts for {scenario.devices} devices, best of each tensor x pipeline x virtual first"]
    lines += _align(rows) if ranking.best else ["none fits"]
    lines.append(f"{ranking.tried} candidates; {ranking.slower} have a lower bound above this list")
    lines += [f"  {count} cannot work: {reason}" for reason, count in sorted(ranking.rejected.items())]
    if ranking.best:
        lines += ["", "to paste into the recipe:", *ranking.best[0].yaml.splitlines()]
    return "\n".join(lines)


def render_mixing(mixing: Mixing) -> str:
    """Grouped against randomly mixed steps."""
    return (
        f"grouped steps take {mixing.grouped_s:.4g} s, randomly mixed ones {mixing.mixed_s:.4g} s: grouping does "
        f"{mixing.gain:.1%} more, {mixing.lockstep_gain:.1%} where replicas wait after every micro-batch "
        f"({mixing.steps} steps of {mixing.replicas} replicas simulated)"
    )


def _rank_row(rank: RankPlan) -> tuple[str, ...]:
    memory = rank.memory
    sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
    return (
        str(rank.rank),
        "+".join(str(layers) for layers in rank.layers),
        f"{rank.parameters:,}",
        f"{rank.trained_parameters:,}",
        format_flops(rank.text_flops),
        format_flops(rank.multimodal_flops),
        f"{rank.text_busy:.1%}",
        f"{rank.multimodal_busy:.1%}",
        *(format_bytes(size) for size in sizes),
    )


def _step_row(name: str, step: StepPlan, *, devices: int) -> tuple[str, ...]:
    return (
        name,
        format_flops(step.flops),
        f"{step.seconds:.4g}",
        f"{step.pipeline_s:.4g}",
        f"{step.bubble:.1%}",
        f"{step.tokens_per_s:,.0f}",
        f"{step.tokens_per_s / devices:,.0f}",
        "-" if step.mfu is None else f"{step.mfu:.1%}",
    )


def _settings_lines(plan: Plan) -> list[str]:
    lines = [f"gradient buckets of {plan.bucket_size:,} parameters (parallel.bucket_size)"]
    if plan.multimodal_share:
        found = plan.decoding
        lines.append(
            f"images: {found.images_per_second:.3g} a second and data-parallel rank; decoded in {found.workers} "
            f"process{'es' * (found.workers != 1)} (data.num_workers), up to {found.prefetched} ahead "
            "(data.prefetch_images)"
        )
    if plan.cpu_binding == "auto":
        lines.append(
            "each rank on the cores of its GPU's NUMA node, unless its launcher binds it (parallel.cpu_binding)"
        )
    if plan.environment:
        names = ", ".join(f"{name}={value}" for name, value in plan.environment.items())
        lines.append(f"environment of each rank, unless it is set: {names}")
    return lines


def _memory_line(plan: Plan) -> str:
    if plan.device_memory is None or plan.usable_memory is None:
        return "memory is an estimate; this device sets no limit"
    word, share = "within" if plan.fits else "ABOVE", plan.usable_memory / plan.device_memory
    whole = format_bytes(plan.device_memory)
    return (
        f"memory is an estimate, {word} {share:.0%} of the {whole} of one {plan.device}; the rest is for what it omits"
    )


def _outside_line(step: StepPlan) -> str:
    named = ((name.replace("anchor", "dummy image"), seconds) for name, seconds in step.outside_s.items())
    parts = [f"{name} {seconds:.3g} s" for name, seconds in named if seconds]
    return f"outside the pipeline, mean: {', '.join(parts) or 'nothing'}"


def _convention(plan: Plan) -> str:
    if plan.expected.mfu is None:
        return f"no MFU: no vendor's peak of {plan.device} at this precision is known"
    return plan.mfu_convention


def _days(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} hours"


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    """First column left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
