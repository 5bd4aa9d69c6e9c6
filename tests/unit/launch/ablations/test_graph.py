"""Tasks of the shipped ablations: what they share, and what makes two of them differ."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.ablations.definition import read_ablation
from launch.ablations.graph import Graph, build_graph, files, program
from megavl.config.errors import UsageError
from megavl.config.load import load_recipe
from tests.unit.launch.ablations.test_definition import FOLDER, SHIPPED, arms_with, write

STAGES = ("stage1", "stage2", "stage3")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])


@functools.cache
def graph_of(name: str, *, size: str = "tiny", seeds: int | None = 2) -> Graph:
    return build_graph(read_ablation(FOLDER / f"{name}.yaml"), size=size, seeds=seeds)


@pytest.mark.parametrize("size", ["tiny", "smoke", "1b"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_recipe_is_right(path: Path, size: str) -> None:
    graph = graph_of(path.stem, size=size, seeds=1)
    arms = read_ablation(path).arms
    assert [cell.arm for cell in graph.cells] == list(arms)
    runs = [cell.runs[-1] for cell in graph.cells]
    assert len({run.address for run in runs}) == len(arms), "two arms are one"
    for run in runs:
        assert run.recipe is not None and run.recipe.evaluation.interval > 0


FRACTIONS = {
    "figure4": {"m100": 1.0, "m90": 0.9, "m60": 0.6, "m30": 0.3, "m0": 0.0},
    "figure8": {"grouped": 0.6, "mixed": 0.6},
    "figure9": {"at_once": 0.6, "warm_up": 0.6},
    "figure10": {"siglip": 0.3, "both": 0.3, "control": 0.3},
    "table9": {},
    "table10": {"s23": 0.3, "s123": 0.3},
    "table11": dict.fromkeys(("hybrid", "shared", "separate", "pool_w", "pool_h"), 0.3),
}
"""Of stage 2 by ablation and arm: what the paper has in each, and 30% where it says nothing else."""


@pytest.mark.parametrize("size", ["tiny", "1b"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_stage_two_has_the_paper_s_mixture(path: Path, size: str) -> None:
    found = {
        cell.arm: run.recipe.data.multimodal_fraction
        for cell in graph_of(path.stem, size=size, seeds=1).cells
        for run in cell.runs
        if run.recipe is not None and run.recipe.training.stage == 2
    }
    assert found == FRACTIONS[path.stem]


def test_settings_of_an_ablation_hold_at_every_size() -> None:
    for size in ("figure8", "figure9"):
        for cell in graph_of(size, size="smoke", seeds=1).cells:
            assert cell.runs[-1].recipe is not None
            assert cell.runs[-1].recipe.data.multimodal_fraction == 0.6


def test_early_drop_is_read_often() -> None:
    for cell in graph_of("figure9", seeds=1).cells:
        recipe = cell.runs[-1].recipe
        assert recipe is not None and recipe.evaluation.at_start
        assert 4 * recipe.evaluation.interval <= 100, "a hundred steps of warm-up"


def test_control_has_the_same_records() -> None:
    sizes = read_ablation(FOLDER / "figure10.yaml").sizes
    for name in ("tiny", "smoke"):
        corpora = sizes[name].corpora
        assert corpora["low"] == (*corpora["full"], "--side", "48")


def test_towers_have_no_part_in_an_arm_s_adaptor() -> None:
    tasks = {task.name: task for name in ("figure10", "table11") for task in graph_of(name, seeds=1).tasks}
    for name in ("ancestor siglip", "ancestor siglip_even"):
        recipe = tasks[name].recipe
        assert recipe is not None and recipe.model.sam is None


def test_warm_up_is_the_same_part_of_each_length() -> None:
    for cell in graph_of("table9", seeds=1).cells:
        recipe = cell.runs[0].recipe
        assert recipe is not None and recipe.optimizer.warmup_steps == recipe.training.steps // 8


def test_inputs_stand_before_their_users() -> None:
    seen: set[str] = set()
    tasks = graph_of("table10").tasks
    for task in tasks:
        assert {one.address for one in task.inputs} <= seen
        seen.add(task.address)
    assert [task.level for task in tasks] == sorted(task.level for task in tasks)
    assert len(seen) == len(tasks)


def test_ablations_share_what_is_equal() -> None:
    eight, nine, ten = (
        {task.address: task for task in graph_of(name).tasks} for name in ("figure8", "figure9", "table11")
    )
    shared = [eight[address].name for address in eight.keys() & nine.keys()]
    assert (
        "ancestor decoder" in shared and "grouped, seed 1, stage2" in shared and "mixed, seed 1, stage2" not in shared
    )
    assert "ancestor decoder" in [eight[address].name for address in eight.keys() & ten.keys()]


def test_a_seed_changes_all_but_ancestors() -> None:
    graph = graph_of("figure8")
    first, second = (next(c for c in graph.cells if c.arm == "mixed" and c.seed == seed) for seed in (1, 2))
    for one, other in zip(first.runs, second.runs, strict=True):
        assert one.address != other.address
    common = {t.address for t in first.runs[-1].with_inputs()} & {t.address for t in second.runs[-1].with_inputs()}
    kinds = {task.kind for task in graph.tasks if task.address in common}
    assert kinds == {"corpus", "dataset", "train"}


def test_one_setting_changes_the_address(tmp_path: Path) -> None:
    before = {task.name: task.address for task in graph_of("figure8").tasks}
    sizes = {"tiny": {"ancestors": {"decoder": {"set": {"optimizer.lr": 0.001}}}}}
    changed = build_graph(read_ablation(write(tmp_path, sizes=sizes)), size="tiny", seeds=2).tasks
    differ = {task.name for task in changed if before[task.name] != task.address}
    assert "ancestor decoder" in differ and "mixed, seed 2, stage2" in differ
    assert not differ & {"ancestor siglip", "ancestor sam", "corpus full", "data set text"}


def test_prepared_recipe_is_the_addressed_one(tmp_path: Path) -> None:
    cache = tmp_path / "a cache: with 'odd' # words"
    run = graph_of("figure8").cells[0].runs[-1]
    (name, content), *_ = files(run, cache=cache).items()
    path = tmp_path / name
    path.write_bytes(content)
    loaded = load_recipe(path)
    assert loaded.run.dir == f"{cache}/{run.address}/run"
    assert run.recipe is not None
    plain = dataclasses.replace(loaded, run=run.recipe.run, data=run.recipe.data, evaluation=run.recipe.evaluation)
    plain = dataclasses.replace(plain, checkpoint=run.recipe.checkpoint)
    assert plain == run.recipe
    assert "{" not in yaml.safe_load(content)["checkpoint"]["init"]
    assert program(run, cache=cache) == ("megavl", ["train", f"{cache}/{run.address}/recipe.yaml"])


def test_stage_starts_from_the_one_before() -> None:
    cell = next(cell for cell in graph_of("table10").cells if cell.arm == "s123")
    assert [run.recipe.training.stage for run in cell.runs if run.recipe] == [1, 2, 3]
    for earlier, later in zip(cell.runs, cell.runs[1:]):
        assert later.recipe is not None and earlier in later.inputs
        assert later.recipe.checkpoint.init == f"{{{earlier.address}}}/run/checkpoints"


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    ablation = read_ablation(FOLDER / "figure8.yaml")
    with pytest.raises(UsageError, match="--size huge: the ablation has the sizes"):
        build_graph(ablation, size="huge")
    for sources, message in (
        ([{"path": "dataset:nothing"}], "has no such data set"),
        ([{"path": "corpus:nothing/x"}], "has no such corpus"),
        ([{"path": "corpus:full"}], "corpus:full: is written corpus:NAME/FILE"),
        ([{"path": "dataset:text/x"}], "dataset:text/x: is written dataset:NAME"),
    ):
        sizes = {"tiny": {"stages": {"stage2": {"data.sources": sources}}}}
        with pytest.raises(UsageError, match=message):
            build_graph(read_ablation(write(tmp_path, sizes=sizes)), size="tiny", seeds=1)
    wrong = {"tiny": {"stages": {"stage2": {"optimizer.rate": 1}}}}
    with pytest.raises(UsageError, match=r"sizes\.tiny\.stages\.stage2\.optimizer\.rate: .*\(in grouped, seed 1"):
        build_graph(read_ablation(write(tmp_path, sizes=wrong)), size="tiny", seeds=1)


def test_equal_arms_are_refused(tmp_path: Path) -> None:
    arms = {"grouped": {"title": "g"}, "mixed": {"title": "m", "by_size": {"tiny": {"stage2.data.grouping": "step"}}}}
    ablation = read_ablation(write(tmp_path, arms=arms))
    with pytest.raises(UsageError, match=r"arms\.mixed: is the same as grouped at size tiny"):
        build_graph(ablation, size="tiny", seeds=1)


def test_content_from_outside_changes_the_address(tmp_path: Path) -> None:
    ancestor, data, tokenizer = (tmp_path / name for name in ("ancestor", "data", "tokenizer"))
    task_file = tmp_path / "eval.jsonl"
    size = {
        "tokenizer": str(tokenizer),
        "ancestors": {"decoder": {"recipe": None, "path": str(ancestor)}},
        "datasets": {"captions": {"inputs": [], "path": str(data)}},
        "set": {"evaluation.tasks": [f"mmbench={task_file}"]},
    }
    shipped = yaml.safe_load((FOLDER / "base.yaml").read_text())["measures"]
    measures = {name: {"key": one["key"].replace("tasks.eval", "tasks.mmbench")} for name, one in shipped.items()}
    measures["hard"]["key"] = "tasks.mmbench.accuracy"
    ablation = read_ablation(write(tmp_path, sizes={"tiny": size}, measures=measures))

    def addresses() -> dict[str, str]:
        return {task.name: task.address for task in build_graph(ablation, size="tiny", seeds=1).tasks}

    before = addresses()
    assert addresses() == before
    for path, changed, kept in (
        (ancestor / "iter_0000010/manifest.json", {"start, seed 1", "grouped, seed 1, stage1"}, {"ancestor sam"}),
        (data / "manifest.json", {"grouped, seed 1, stage1", "mixed, seed 1, stage2"}, {"ancestor siglip"}),
        (tokenizer / "tokenizer.json", {"data set text", "ancestor siglip"}, {"corpus full"}),
        (task_file, {"mixed, seed 1, stage2"}, {"data set text", "corpus full"}),
    ):
        for text in ("1", "2"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            after = addresses()
            assert not [name for name in changed if after[name] == before[name]], (path, text)
            assert not [name for name in kept if after[name] != before[name]], (path, text)
            before = after


def test_arms_with_one_seed_stand_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    cells = build_graph(read_ablation(FOLDER / "figure8.yaml"), size="tiny", seeds=2).cells
    assert [(cell.arm, cell.seed) for cell in cells] == [("grouped", 1), ("mixed", 1), ("grouped", 2), ("mixed", 2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"all.training.seed": 7}, r"arms\.mixed\.set\.all\.training\.seed: .*use seeds and first_seed"),
        (
            {"stage2.training": {"seed": 7}},
            r"arms\.mixed\.set\.stage2\.training: training\.seed is set by",
        ),
        ({"all.checkpoint.init": "x"}, r"all\.checkpoint\.init: checkpoint\.init is set by this program"),
        ({"stage2.data.seq_length": 9}, "use seq_length of the size"),
        ({"all.run": {"dir": "x"}}, r"run\.dir is set by this program in each run; remove it"),
    ],
)
def test_setting_that_would_be_lost_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_graph(read_ablation(write(tmp_path, **arms_with(set=settings))), size="tiny", seeds=1)


def test_seed_of_an_ancestor_may_be_set(tmp_path: Path) -> None:
    sizes = {"tiny": {"ancestors": {"decoder": {"set": {"training.seed": 7}}}}}
    tasks = build_graph(read_ablation(write(tmp_path, sizes=sizes)), size="tiny", seeds=1).tasks
    seeds = {task.name: task.recipe.training.seed for task in tasks if task.recipe}
    assert seeds["ancestor decoder"] == 7 and seeds["mixed, seed 1, stage2"] == 1


def test_later_and_narrower_settings_count(tmp_path: Path) -> None:
    """Whatever comes first, a stage's own key comes after one of all stages."""
    arms = arms_with(
        set={"all.optimizer": {"lr": 2e-4}, "stage2.optimizer.lr": 3e-4, "all.training": {"micro_batch_size": 1}}
    )
    stages = {
        name: {"recipe": name, "set": {"optimizer.lr": 1e-4, "optimizer.min_lr": 0.0, "evaluation.interval": 9}}
        for name in STAGES
    }
    cells = build_graph(read_ablation(write(tmp_path, **arms, stages=stages)), size="tiny", seeds=2).cells
    found = [(run.recipe.optimizer.lr, run.recipe.training.seed) for run in cells[3].runs if run.recipe]
    assert cells[3].arm == "mixed" and found == [(2e-4, 2), (3e-4, 2)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chain": ["stage1"]}, "the last stage of arm grouped is not evaluated; set its evaluation.interval"),
        (
            {"measures": {"easy": {"key": "tasks.evl.accuracy"}}},
            "evaluates no such tasks; it has eval, eval_hard, eval_d",
        ),
        ({"measures": {"easy": {"key": "held_out.texts.x"}}}, "evaluates no such held_out; it has text_heldout"),
    ],
)
def test_measure_that_no_run_logs_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arms = {"arms": {"grouped": {"title": "g"}, "mixed": {"title": "m", "set": {"all.optimizer.lr": 1e-3}}}}
    with pytest.raises(UsageError, match="measures") as found:
        build_graph(read_ablation(write(tmp_path, **arms, **changes)), size="tiny", seeds=1)
    assert message in str(found.value)
