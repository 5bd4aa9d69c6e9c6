"""Files of ablations: what ships, and mistakes in them."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.ablations.definition import read_ablation
from megavl.config.errors import UsageError

FOLDER = Path(__file__).resolve().parents[4] / "launch/ablations"
SHIPPED = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "base.yaml")
MEASURE = {"title": "t", "source": "evaluation", "key": "a", "better": "lower", "modality": "text"}
SIMULATION = {"title": "gain", "recipe": "launch/recipes/7b/stage2.yaml", "set": {}, "key": "mixing.gain"}
CLAIM = {"text": "t", "measure": "easy", "arm": "mixed", "than": "grouped", "margin": 0}


def write(folder: Path, **changes: Any) -> Path:
    """A file on the shipped base with changed keys; None leaves a key out."""
    raw = {**yaml.safe_load((FOLDER / "figure8.yaml").read_text()), "base": str(FOLDER / "base.yaml"), **changes}
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in raw.items() if value is not None}))
    return path


def arms_with(**keys: Any) -> dict[str, Any]:
    """Change of a file: its second arm has further keys."""
    return {"arms": {"grouped": {"title": "g"}, "mixed": {"title": "m", **keys}}}


def test_seven_ablations_ship() -> None:
    assert [path.stem for path in SHIPPED] == [
        *("figure10", "figure4", "figure8", "figure9", "table10", "table11", "table9")
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_file_says_what_it_claims(path: Path) -> None:
    ablation = read_ablation(path)
    assert ablation.claims and ablation.paper and ablation.confounded
    assert {"tiny", "smoke", "1b"} <= set(ablation.sizes)
    assert ablation.seeds >= 5
    titled = ablation.title.lower().replace(" ", "")
    assert titled.startswith(path.stem + ":")


def test_smoke_inherits_from_tiny(tmp_path: Path) -> None:
    sizes = read_ablation(write(tmp_path)).sizes
    assert sizes["smoke"].datasets == sizes["tiny"].datasets
    assert sizes["smoke"].stages["stage2"]["training.steps"] == 2
    assert sizes["smoke"].stages["stage2"]["data.sources"] == sizes["tiny"].stages["stage2"]["data.sources"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tittle": "x"}, "tittle: unknown key"),
        ({"title": None}, "title: this key is required"),
        ({"seeds": 0}, "seeds: found 0"),
        ({"seeds": "many"}, "seeds: found 'many'"),
        ({"chain": ["stage4"]}, "there is no 'stage4'; did you mean 'stage"),
        ({"arms": {"a": {"title": "a", "set": {"stage9.training.steps": 1}}}}, "claims.0.arm: there is no 'grouped'"),
        ({"arms": {"a b": {"title": "a"}}}, "arms.a b"),
        ({"start": {"llm": "decodr", "siglip": "siglip"}}, "there is no 'decodr'; did you mean 'decoder'?"),
        ({"figure": {"kind": "curves", "measures": ["esy"]}}, "measures.0: there is no 'esy'; did you mean 'easy'?"),
        ({"figure": {"kind": "pie", "measures": []}}, "figure.kind: found 'pie'"),
        ({"sizes": {"tiny": {"like": "smoke"}}}, "sizes.tiny.like: found 'smoke'"),
        ({"sizes": {"tiny": {"seq_length": None}}}, "is needed to make the data set"),
        ({"sizes": {"tiny": {"ancestors": {"sam": {"path": "x"}}}}}, "an ancestor has either"),
        ({"sizes": {"tiny": {"datasets": {"text": {"inputs": ["ful/text.jsonl"]}}}}}, "there is no 'ful'"),
        ({"claims": [{**CLAIM, "than": "mixed"}]}, "is the arm itself"),
        ({"claims": [{**CLAIM, "margin": -1}]}, "margin: found -1"),
        ({"base": 7}, "base: found 7"),
        ({"chain": []}, "chain: found []"),
        ({"arms": {}}, "arms: found {}"),
        ({"arms": {"mixed": {"title": "m", "chain": []}}}, "arms.mixed.chain"),
        ({"figure": {"kind": "curves", "measures": []}}, "figure.measures: found []"),
        ({"sizes": {"tiny": {"stages": {"stage4": {}}}}}, "sizes.tiny.stages: there is no 'stage4'"),
        (arms_with(by_size={"tinny": {}}), "arms.mixed.by_size: there is no 'tinny'; did you mean 'tiny'?"),
        (arms_with(by_size={"tiny": {"stag2.x": 1}}), "arms.mixed.by_size.tiny.stag2.x: there is no 'stag2'"),
        (arms_with(set={"stage2": 1}), "arms.mixed.set.stage2: names a stage alone"),
        ({"title": "two\nlines"}, "title: found 'two"),
        (arms_with(title="_m"), "arms.mixed.title: found '_m'"),
        (arms_with(set={"stage2.data.grouping": date(2024, 1, 1)}), "stage2.data.grouping: found datetime"),
        (arms_with(set={"stage2.data.grouping": b"step"}), "arms.mixed.set.stage2.data.grouping: found b'step'"),
        ({"arms": {8: {"title": "x"}}}, "arms.key 8 is a int; keys are text, quote it"),
        ({"measures": {"easy": MEASURE}}, "measures.easy: `modality` is of the rows of training"),
        ({"simulations": [SIMULATION, SIMULATION]}, "simulations.1.title: 'gain' stands there twice"),
        (arms_with(set={"stage3.training.steps": 1}), "arms.mixed.set.stage3.training.steps: there is no 'stage3'"),
    ],
)  # fmt: skip
def test_mistake_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(UsageError, match="changed.yaml: ") as found:
        read_ablation(path)
    assert message in str(found.value)


def test_setting_of_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    arms = {name: {"title": name, "set": {"stage9.training.steps": 1}} for name in ("grouped", "mixed")}
    with pytest.raises(UsageError, match=r"stage9\.training\.steps: there is no 'stage9'"):
        read_ablation(write(tmp_path, arms=arms))


def test_file_that_is_no_ablation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text in ("- 1", "a: [", "7: a", "title: a\nseeds: 1\nseeds: 2"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"x\.yaml"):
            read_ablation(path)
    with pytest.raises(UsageError, match="cannot read the ablation"):
        read_ablation(tmp_path / "absent.yaml")
