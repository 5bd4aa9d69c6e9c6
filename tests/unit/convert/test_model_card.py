"""`megavl convert to-hf --model-card`: a page of what the checkpoint, its runs and reports say."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megavl.checkpoint import commit
from megavl.checkpoint.manifest import MANIFEST, read_manifest
from megavl.config.load import load_model_config
from megavl.convert.model_card import model_card
from megavl.convert.run_facts import RunFacts, _shares, run_facts
from megavl.main.cli import main


def convert(*words):
    return main(["convert", *map(str, words)])


@pytest.fixture(scope="module")
def start(sources, tokenizer_dir, tmp_path_factory):
    """Start weights, of iteration 0."""
    base = tmp_path_factory.mktemp("card")
    folder = shutil.copytree(sources["tiny-siglip"], base / "native")
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, folder)
    assert convert("from-hf", folder, base / "start") == 0
    return base / "start"


def trained(
    start, run, *, step, init, sources, rows, evaluation=(), fraction=0.25, stage=2, directory=None, begun_with=()
):
    """A run's directory as training leaves it, with the start weights as its checkpoint.

    `begun_with` is a checkpoint that the manifest names, or None; an old one names none.
    """
    path = shutil.copytree(start / "iter_0000000", (directory or run / "checkpoints") / f"iter_{step:07d}")
    recipe = {
        "run": {"dir": str(run)},
        "training": {"stage": stage, "global_batch_size": 4, "precision": "fp32", "seed": 7},
        "data": {"seq_length": 512, "sources": sources},
        "optimizer": {"lr": 0.002},
        "checkpoint": {"init": init, "dir": directory and str(directory)},
    }
    run.mkdir(exist_ok=True)
    for folder in (run, path):
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (path / MANIFEST).unlink()
    files = [file for file in path.rglob("*") if file.is_file()]
    content = {
        "step": step,
        "consumed_samples": 4 * step,
        "multimodal_fraction": fraction,
        "trainable_parts": ["llm", "adaptor"],
    }
    if begun_with is None:
        content["start"] = None
    elif begun_with:
        content["start"] = {"checkpoint": str(begun_with), "step": 0, "digest": read_manifest(begun_with)["digest"]}
    records = commit.file_records(path, files)
    commit.write_manifest(path, iteration=step, world_size=1, content=content, records=records)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluation:
        (run / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluation))
    return path


def row(step, images=3):
    return {"step": step, "tokens": 2048, "images": images}


TEXT = {"name": "text", "weight": {"text": 3.0, "multimodal": 0.0}}
BOTH = {"name": "both|[odd](name)", "weight": {"text": 1.0, "multimodal": 5.0}}
OFF = {"name": "off", "weight": {"text": 0.0, "multimodal": 0.0}}


@pytest.fixture
def runs(start, tmp_path):
    first = trained(
        start, tmp_path / "one", step=2, init=str(start), sources=[BOTH], rows=[row(1), row(2), row(3)], stage=1
    )
    found = {"step": 3, "tasks": {"eval": {"accuracy": 0.5, "chance": 0.25, "n": 8}}, "held_out": {}}
    held_out = {"text": {"text": {"loss": 1.25, "bits_per_byte": 0.75, "tokens": 9}}}
    second = trained(
        start,
        tmp_path / "two",
        step=3,
        init=str(first.parent),
        sources=[TEXT, BOTH, OFF],
        rows=[row(1), row(2, images=10), row(3)],
        evaluation=[found, {**found, "step": 3, "held_out": held_out}, {**found, "step": 4}],
    )
    return first, second


def test_facts_follow_a_model_back_to_its_start(runs, start):
    facts = run_facts(runs[1])
    assert [stage.checkpoint for stage in facts.stages] == list(runs)
    assert [(stage.step, stage.sequences, stage.tokens, stage.images) for stage in facts.stages] == [
        (2, 8, 4096, 6),
        (3, 12, 6144, 16),
    ]
    assert "the checkpoint start/iter_0000000," in facts.origin
    assert [(share.name, share.text, share.multimodal) for share in facts.stages[1].shares] == [
        ("text", 0.75, 0.0),
        (BOTH["name"], 0.25, 1.0),
    ]
    assert facts.stages[1].evaluation["held_out"]["text"]["text"]["loss"] == 1.25


def test_the_card_states_them(runs):
    facts = run_facts(runs[1])
    report = {"accuracy": 0.9, "chance": 0.25, "n": 40, "benchmarks": {"pope": {"score": 0.7, "n": 10}}}
    card = model_card(
        load_model_config("tiny-siglip"), fmt="native", parameters=1234567, facts=facts, reports={"mine": report}
    )
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "image-text-to-text" and "megavl" in header["tags"]
    for line in (
        "|  | stage 1 | stage 2 |",
        "| tokens, padding included | 4,096 | 6,144 |",
        "| images | 6 | 16 |",
        "| stage 2 | text | 75.0% | 0.0% |",
        "| stage 2 | both\\|\\[odd](name) | 25.0% | 100.0% |",
        "| mine | questions | 90.0% | 25.0% | 40 |",
        "| mine | pope | 70.0% | - | 10 |",
        "| stage 2, 3 | accuracy on eval | 50.0% | 25.0% | 8 |",
        "| stage 2, 3 | loss of text, text | 1.25 | - | - |",
    ):
        assert line in card.splitlines(), line
    huge = model_card(
        load_model_config("tiny-siglip"), fmt="native", parameters=1, facts=facts, reports={"x": {"accuracy": 10**400}}
    )
    assert "| x | questions | - | - | - |" in huge.splitlines()
    assert "1,234,567 parameters" in card and "off" not in card


@pytest.mark.parametrize("damage", [b"", b"\xff\n[1]\n", b'{"step": true}\n', b'{"step": 1, "tokens": "9"}\n' * 3])
def test_a_damaged_log_makes_no_figures(damage, runs):
    (runs[1].parent.parent / "metrics.jsonl").write_bytes(damage)
    facts = run_facts(runs[1])
    assert facts.stages[1].tokens is None and facts.stages[1].images is None
    card = model_card(load_model_config("tiny-siglip"), fmt="native", parameters=1, facts=facts, reports={})
    assert "| images | 6 | ? |" in card.splitlines() and "lacks steps" in card


def test_a_start_that_is_gone_is_named(runs):
    shutil.rmtree(runs[0])
    facts = run_facts(runs[1])
    assert len(facts.stages) == 1 and facts.origin == "the checkpoint one, which is not found from here"


def test_a_start_from_another_directory_is_not_found(start, tmp_path, monkeypatch):
    trained(start, tmp_path / "one", step=2, init=None, sources=[TEXT], rows=[])
    two = trained(start, tmp_path / "two", step=3, init="one/checkpoints", sources=[TEXT], rows=[])
    monkeypatch.chdir(tmp_path)
    assert len(run_facts(two).stages) == 2
    monkeypatch.chdir("/")
    assert run_facts(two).origin == "the checkpoint one, which is not found from here"


def test_the_checkpoint_that_was_taken_counts(start, tmp_path):
    one = {step: trained(start, tmp_path / "one", step=step, init=None, sources=[TEXT], rows=[]) for step in (2, 5)}
    init = str(tmp_path / "one" / "checkpoints")
    two = trained(start, tmp_path / "two", step=3, init=init, sources=[TEXT], rows=[], begun_with=one[2])
    assert [stage.step for stage in run_facts(two).stages] == [2, 3]
    random = trained(start, tmp_path / "six", step=3, init=init, sources=[TEXT], rows=[], begun_with=None)
    assert run_facts(random).origin == "random weights" and len(run_facts(random).stages) == 1
    # It is found in the place that the recipe names too, and another one under its name is not it.
    moved = one[2].rename(tmp_path / "moved")
    assert len(run_facts(two).stages) == 1
    moved.rename(tmp_path / "one" / "checkpoints" / "iter_0000002")
    shutil.rmtree(one[2])
    shutil.copytree(one[5], one[2])
    assert run_facts(two).origin == "the checkpoint one/iter_0000002, which is not found from here"


def test_a_moved_start_is_found_by_its_digest(start, tmp_path, monkeypatch):
    one = trained(start, tmp_path / "one", step=2, init=None, sources=[TEXT], rows=[])
    two = trained(start, tmp_path / "two", step=3, init="one/checkpoints", sources=[TEXT], rows=[], begun_with=one)
    (tmp_path / "new").mkdir()
    (tmp_path / "one").rename(tmp_path / "new" / "one")
    assert len(run_facts(two).stages) == 1
    monkeypatch.chdir(tmp_path / "new")
    assert len(run_facts(two).stages) == 2


def test_logs_are_those_of_the_run(start, tmp_path):
    rows = [row(1), row(2), row(3)]
    path = trained(
        start, tmp_path / "run", step=3, init=None, sources=[TEXT], rows=rows, directory=tmp_path / "fast" / "ck"
    )
    trained(start, tmp_path / "fast", step=3, init=None, sources=[TEXT], rows=[row(n, images=99) for n in (1, 2, 3)])
    assert run_facts(path).stages[0].images == 9
    # The run is moved with all that is in it.
    inside = trained(start, tmp_path / "here", step=3, init=None, sources=[TEXT], rows=rows)
    (tmp_path / "here").rename(tmp_path / "there")
    assert run_facts(tmp_path / "there" / inside.relative_to(tmp_path / "here")).stages[0].images == 9
    shutil.rmtree(tmp_path / "run")
    assert run_facts(path).stages[0].images is None


def test_a_mean_has_the_facts_of_its_newest_model(start, tmp_path, capsys):
    run = tmp_path / "run"
    for step in (4, 8):
        trained(start, run, step=step, init=str(start), sources=[TEXT], rows=[row(n + 1) for n in range(8)])
    assert convert("average", run / "checkpoints", tmp_path / "mean", "--newest", 2) == 0
    facts = run_facts(tmp_path / "mean" / "iter_0000000")
    assert facts.mean == ("run/iter_0000004", "run/iter_0000008") and [stage.step for stage in facts.stages] == [8]
    assert convert("to-hf", tmp_path / "mean", tmp_path / "out", "--format", "llm", "--model-card") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the mean of 2 models: run/iter_0000004, run/iter_0000008." in card and "| steps | 8 |" in card
    later = trained(
        start, tmp_path / "later", step=2, init=str(tmp_path / "mean"), sources=[TEXT], rows=[row(1), row(2)]
    )
    assert run_facts(later).origin.endswith("the mean of run/iter_0000004, run/iter_0000008")
    shutil.rmtree(run)
    card = model_card(
        load_model_config("tiny-siglip"),
        fmt="native",
        parameters=1,
        facts=run_facts(tmp_path / "mean" / "iter_0000000"),
        reports={},
    )
    assert "the mean of 2 models" in card and "No run of MegaVL is recorded." in card


def test_two_runs_of_one_stage_differ_by_name(runs):
    stages = run_facts(runs[1]).stages
    facts = RunFacts(stages=(stages[0], stages[1], stages[1]), origin="random weights")
    card = model_card(load_model_config("tiny-siglip"), fmt="native", parameters=1, facts=facts, reports={})
    assert "|  | stage 1 | stage 2, run 1 | stage 2, run 2 |" in card.splitlines()
    assert "| stage 2, run 2 | text | 75.0% | 0.0% |" in card.splitlines()


def test_the_command_writes_it_into_the_export(start, runs, tmp_path, capsys):
    report = tmp_path / "mine" / "report.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"accuracy": 0.9, "n": 40}))
    out = tmp_path / "out"
    assert convert("to-hf", runs[1], out, "--format", "llm", "--model-card", "--report", report) == 0
    card = (out / "README.md").read_text()
    assert "the decoder alone" in card and "| mine | questions | 90.0% | - | 40 |" in card
    assert convert("to-hf", start, tmp_path / "plain", "--format", "native", "--model-card") == 0
    assert "No run of MegaVL is recorded. The weights come from" in (tmp_path / "plain" / "README.md").read_text()
    assert convert("to-hf", start, tmp_path / "none", "--format", "native") == 0
    assert not (tmp_path / "none" / "README.md").exists()
    capsys.readouterr()
    for words, expected in (
        (["--report", report], "needs --model-card"),
        (["--model-card", "--report", tmp_path / "missing.json"], "not readable"),
        (["--model-card", "--report", out / "config.json"], "not a report"),
        (["--model-card", "--report", report, "--report", report], "given twice"),
    ):
        code = convert("to-hf", start, tmp_path / "refused", "--format", "native", *words)
        assert code == 2
        assert expected in capsys.readouterr().err


def test_reports_of_the_harness_are_shown(start, tmp_path):
    report = tmp_path / "harness" / "report.json"
    report.parent.mkdir()
    results = {
        "arc": {
            "alias": "arc",
            "sample_len": 12,
            "acc,none": 0.25,
            "acc_stderr,none": 0.125,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {"exact_match,strict-match": 1},
        "pages": {"bits_per_byte,none": 1.5},
        "group": {"alias": "group", " ": " "},
    }
    counts = {"arc": {"original": 40, "effective": 12}}
    report.write_text(json.dumps({"results": results, "n-samples": counts}))
    out = tmp_path / "out"
    assert convert("to-hf", start, out, "--format", "llm", "--model-card", "--report", report) == 0
    lines = (out / "README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| harness |")] == [
        "| harness | arc, acc | 25.0% | - | 12 |",
        "| harness | arc, acc_norm | 50.0% | - | 12 |",
        "| harness | gsm8k, exact_match (strict-match) | 100.0% | - | - |",
        "| harness | pages, bits_per_byte | 1.5 | - | - |",
    ]


def test_reports_of_one_name_keep_apart(start, tmp_path):
    paths = [tmp_path / name / "eval" / "report.json" for name in ("a", "b")]
    paths.append(paths[0].with_name("other.json"))
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"accuracy": number / 4, "n": 4}))

    def card(*reports):
        out = tmp_path / f"out{len(reports)}"
        words = [word for report in reports for word in ("--report", report)]
        assert convert("to-hf", start, out, "--format", "llm", "--model-card", *words) == 0
        return (out / "README.md").read_text().splitlines()

    two, three = card(*paths[:2]), card(*paths)
    assert {"| a/eval | questions | 0.0% | - | 4 |", "| b/eval | questions | 25.0% | - | 4 |"} < set(two)
    assert "| a/eval/other.json | questions | 50.0% | - | 4 |" in three
    assert "| b/eval/report.json | questions | 25.0% | - | 4 |" in three


def test_addresses_and_formulas_of_others_stay_text(runs):
    odd = [
        {"name": name, "weight": {"text": 1.0, "multimodal": 1.0}}
        for name in ("https://a.example/b", "www.a.example", "$$x$$", "&lt;b", "me@a.example")
    ]
    stage = dataclasses.replace(run_facts(runs[1]).stages[1], shares=tuple(_shares({"data": {"sources": odd}})))
    facts = RunFacts(stages=(stage,), origin="random weights")
    card = model_card(load_model_config("tiny-siglip"), fmt="native", parameters=1, facts=facts, reports={})
    for name in ("https\\://a.example/b", "www\\.a.example", "\\$\\$x\\$\\$", "\\&lt;b", "me\\@a.example"):
        assert f"| stage 2 | {name} | 20.0% | 20.0% |" in card.splitlines(), name


def test_names_of_others_stay_text(runs):
    odd = {"path": "/home/me/secret/_a_ *b* ~~c~~ d_e __f__", "weight": {"text": 1.0, "multimodal": 1.0}}
    stage = dataclasses.replace(run_facts(runs[1]).stages[1], shares=tuple(_shares({"data": {"sources": [odd]}})))
    facts = RunFacts(stages=(stage,), origin="random weights")
    card = model_card(load_model_config("tiny-siglip"), fmt="native", parameters=1, facts=facts, reports={})
    assert "| stage 2 | \\_a\\_ \\*b\\* \\~\\~c\\~\\~ d_e \\_\\_f\\_\\_ | 100.0% | 100.0% |" in card.splitlines()


@pytest.mark.parametrize("fmt", ["native", "llm"])
def test_the_code_of_the_card_runs(fmt, start, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert convert("to-hf", start, tmp_path / "out", "--format", fmt, "--model-card") == 0
    Image.new("RGB", (64, 48), "red").save(tmp_path / "out" / "image.png")
    monkeypatch.chdir(tmp_path / "out")
    (code,) = re.findall(r"^```python\n(.*?)^```", Path("README.md").read_text(), re.MULTILINE | re.DOTALL)
    capsys.readouterr()
    names: dict[str, object] = {}
    exec(code, names)
    assert capsys.readouterr().out.endswith("\n") and len(names["answer"][0]) > names["inputs"]["input_ids"].shape[1]


@pytest.mark.parametrize("fmt", ["native", "original"])
def test_the_commands_of_the_card_run(fmt, start, tmp_path, monkeypatch, capsys):
    assert convert("to-hf", start, tmp_path / "out", "--format", fmt, "--model-card") == 0
    Image.new("RGB", (64, 48), "red").save(tmp_path / "out" / "image.png")
    monkeypatch.chdir(tmp_path / "out")
    (line,) = re.findall(r"^megavl (generate .*)", Path("README.md").read_text(), re.MULTILINE)
    capsys.readouterr()
    assert main([*shlex.split(line), "--max-new-tokens", "2"]) == 0 and capsys.readouterr().out
