"""`megavl evaluate` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megavl.files.owner import Owner
from megavl.files.ownership import take
from megavl.main.cli import main
from tests.unit.evaluate.benchmarks import published
from tests.unit.generate import models


@pytest.fixture(scope="module")
def folder(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_folder(
        "tiny-hybrid", tmp_path_factory.mktemp("model") / "native", tokenizer=tokenizer_dir, fmt="native"
    )


def ask(model: Path, *words: str | Path) -> int:
    return main(["evaluate", str(model), "--device", "cpu", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return line


def test_table_and_report(folder, task, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert ask(folder, task, "--json", out, "--blind") == 0
    table = capsys.readouterr().out.splitlines()
    report = json.loads(out.read_text())
    assert table[0].split() == ["kind", "n", "accuracy", "blind", "chance"]
    assert table[-1].split() == ["all", "9", *(f"{report[key]:.3f}" for key in ("accuracy", "blind", "chance"))]
    assert len(report["questions"]) == 9 and [path.name for path in tmp_path.iterdir()] == ["report.json"]
    again = tmp_path / "again.json"
    assert ask(folder, task, "--json", again, "--blind", "--seed", "0") == 0
    assert again.read_text() == out.read_text()


def test_folder_of_another_evaluation_is_left_alone(folder, task, tmp_path, capsys):
    with take(tmp_path, Owner.this_process(), name="--out"):
        assert ask(folder, task, "--out", tmp_path) == 2
        assert f"--out: {tmp_path} is in use by another process (host" in refused(capsys)
        assert [path.name for path in tmp_path.iterdir()] == ["owner-1.json"]
    assert ask(folder, task, "--out", tmp_path, "--limit", "1") == 0
    assert "owner-1.json" not in {path.name for path in tmp_path.iterdir()}


def test_three_kinds_of_entries_share_a_report(folder, task, tmp_path, capsys):
    more, out = tmp_path / "more.jsonl", tmp_path / "report.json"
    lines = [
        {"id": "o", "prompt": "which colour is it?", "answers": ["red"]},
        {"id": "t", "text": "it is green", "images": [str(task.parent / "images/0-0.png")]},
    ]
    more.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ask(folder, task, more, "--json", out, "--max-new-tokens", "3", "--blind") == 0
    tables = [table.splitlines() for table in capsys.readouterr().out.split("\n\n")]
    report = json.loads(out.read_text())
    assert [table[0].split()[2] for table in tables] == ["accuracy", "exact", "bits_per_byte"]
    assert list(report)[-2:] == ["written", "text"] and report["n"] == 9
    assert tables[1][-1].split() == ["all", "1", f"{report['written']['exact']:.3f}", "0.000"]
    assert tables[2][-1].split()[2:4] == [f"{report['text']['bits_per_byte']:.3f}", str(len("it is green"))]


def test_limit_applies_and_blind_is_optional(folder, task, tmp_path):
    out = tmp_path / "report.json"
    assert ask(folder, task, task, "--json", out, "--limit", "2", "--template", "plain") == 0
    report = json.loads(out.read_text())
    assert (report["n"], report["blind"]) == (4, None)


def test_wrong_options_and_files_are_named(folder, task, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(task.read_text().splitlines()[2] + "\n{}\n")
    assert ask(folder, bad) == 3
    assert f"{bad}:2: " in refused(capsys)
    assert ask(tmp_path / "gone", task) == 4
    assert "gone" in refused(capsys)
    assert ask(folder, task, "--limit", "0") == 2
    assert "--limit: 0" in refused(capsys)
    assert ask(folder, task, "--max-new-tokens", "0") == 2
    assert "--max-new-tokens: 0" in refused(capsys)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"id": "t", "text": "it is green"}))
    assert ask(folder, texts, "--blind") == 3
    assert "--blind: no question has an image" in refused(capsys)
    assert ask(folder, task, "--json", tmp_path / "no" / "report.json") == 2
    assert "create it first" in refused(capsys)


def test_corrupt_image_is_named(folder, task, tmp_path, capsys):
    line = json.loads(task.read_text().splitlines()[0])
    (tmp_path / "images").mkdir()
    (tmp_path / line["images"][0]).write_bytes((task.parent / line["images"][0]).read_bytes()[:300])
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(line))
    out = tmp_path / "report.json"
    assert ask(folder, broken, "--json", out) == 3
    assert line["images"][0] in refused(capsys) and not out.exists()


def test_benchmarks_are_asked_and_go_on(folder, task, tmp_path, capsys):
    """All ten, beside a task file; a second start asks only what the first one's end has lost."""
    out = tmp_path / "out"
    for name in published.WRITERS:
        (tmp_path / name).mkdir()
    entries = [f"{name}={write(tmp_path / name)}" for name, write in published.WRITERS.items()]
    words = (task, "--benchmark", *entries, "--max-new-tokens", "4", "--out", out, "--blind")
    assert ask(folder, *words) == 0
    table = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert list(report["benchmarks"]) == list(published.WRITERS)
    for name, found in report["benchmarks"].items():
        assert found["n"] == (2 if name.startswith("mmbench") else len(found["questions"])), name
        assert found["interval"] is None or 0 <= found["interval"][0] <= found["score"] <= found["interval"][1] <= 1
    assert report["benchmarks"]["mm-vet"]["score"] is None and "only a judge can grade these answers" in table
    assert report["benchmarks"]["mmbench"]["paper"] == {"7B": 73.2, "1.3B": 64.6}
    page, picture = (out / "report.md").read_text(), (out / "report.svg").read_text()
    assert "| MMBench | circular accuracy |" in page and "<script" not in picture
    answers = (out / "answers.jsonl").read_bytes()
    (out / "answers.jsonl").write_bytes(answers[: len(answers) // 2])
    assert all(Path(image).is_absolute() for line in answers.splitlines() for image in json.loads(line)["images"])
    (out / "report.json").unlink()
    assert ask(folder, *words) == 0
    again = json.loads((out / "report.json").read_text())
    assert (
        again["benchmarks"] == report["benchmarks"] and again["written" if "written" in again else "n"] == report["n"]
    )
    assert sorted(
        json.loads(line).get("key", "") for line in (out / "answers.jsonl").read_text().splitlines()
    ) == sorted(json.loads(line).get("key", "") for line in answers.splitlines())
    assert {"id", "question", "answer", "category"} <= set(json.loads(answers.splitlines()[0]))
    capsys.readouterr()
    assert ask(folder, *words, "--limit", "2") == 2
    assert "give another --out" in refused(capsys)


def test_benchmarks_by_perplexity(folder, tmp_path, capsys):
    where = published.cmmmu(tmp_path)
    out = tmp_path / "report.json"
    assert ask(folder, "--benchmark", f"cmmmu={where}", "--mode", "perplexity", "--json", out) == 0
    found = json.loads(out.read_text())["benchmarks"]["cmmmu"]
    assert found["n"] == 2 and found["failed_parses"] == 0 and found["chance"] == (1 / 4 + 1 / 2) / 2
    assert "2 questions without choices are left out" in capsys.readouterr().out
    for normalize in ("sum", "byte"):
        words = ("--benchmark", f"cmmmu={where}", "--mode", "perplexity", "--normalize", normalize)
        assert ask(folder, *words) == 0
    (tmp_path / "ocr").mkdir()
    assert ask(folder, "--benchmark", f"ocrbench={published.ocrbench(tmp_path / 'ocr')}", "--mode", "perplexity") == 3
    assert "cannot be scored by perplexity" in refused_last(capsys)


def refused_last(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_bad_benchmarks_end_before_the_model(folder, tmp_path, capsys):
    rows = published.mmbench_rows()
    rows[2]["image"] = "12345"
    path = published.write_tsv(tmp_path / "dev.tsv", rows)
    # There is no model, yet the row is what is named.
    assert ask(tmp_path / "no model", f"mmbench={path}") == 3
    assert f"{path}:6 (index 2000007): image: is that of row '12345'" in refused(capsys)
    assert ask(folder, "--benchmark", str(path)) == 2
    assert "write NAME=FILE" in refused(capsys)
    assert ask(folder) == 2
    assert "nothing to evaluate" in refused(capsys)
    assert ask(folder, f"mmbench={path}", "--judge", "gpt") == 2
    assert "--endpoint and --judge belong together" in refused(capsys)
    assert ask(folder, f"mmbench={path}", "--out", tmp_path / "a" / "b") == 2
    assert "create it first" in refused(capsys)
