"""`megavl evaluate` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megavl.main.cli import main
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
