"""`megavl judge` against endpoints on this machine: fair, biased, noisy, rate-limited and broken ones."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from megavl.evaluate.judge.compare import Judged, figures
from megavl.evaluate.judge.verdict import combine, read_verdict
from megavl.main.cli import main
from tests.unit.evaluate.fake_endpoint import FakeEndpoint, FakeReply, fake_endpoint

COUNT = 24
Body = dict[str, Any]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Answers of two models; every third pair is equally good, of the others A is better twice as often."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    paths = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    for model, path in enumerate(paths):
        lines = []
        for number in range(COUNT):
            better = None if number % 3 == 0 else int(number % 9 == 1)
            answer = "good" if better in (model, None) else "bad"
            line = {"id": f"q{number}", "question": f"What is {number}?", "answer": f"{answer} answer"}
            lines.append({**line, "images": ["red.png"], "category": ("colour", "number")[number % 2]})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def shown(body: Body) -> tuple[str, str]:
    text = body["messages"][-1]["content"]
    text = text if isinstance(text, str) else text[-1]["text"]
    found = re.findall(r"Begin of answer . ---\n(.*?)\n--- End", text, re.DOTALL)
    return found[0], found[1]


def fair(body: Body, number: int) -> FakeReply:
    first, second = ("good" in answer for answer in shown(body))
    mark = "C" if first == second else "A" if first else "B"
    return FakeReply(f"A quotes [[A]] and B quotes [[B]]. My verdict:\n[[{mark}]]")


def always_first(body: Body, number: int) -> FakeReply:
    return FakeReply("The first one. [[A]]")


def judge(files: tuple[Path, Path], fake: FakeEndpoint, out: Path, *more: object) -> int:
    words = ["judge", *files, "--endpoint", fake.url, "--judge", "j-1", "--out", out, "--attempts", 3, *more]
    return main(list(map(str, words)))


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megavl.evaluate.endpoint.LONGEST_PAUSE_S", 0.001)


def test_fair_judge_gives_the_true_counts(files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    with fake_endpoint(fair) as fake:
        assert judge(files, fake, tmp_path / "out") == 0
    found = report(tmp_path / "out")
    wins = sum(number % 3 != 0 and number % 9 != 1 for number in range(COUNT))
    losses = sum(number % 3 != 0 and number % 9 == 1 for number in range(COUNT))
    assert [found["all"][name] for name in ("A", "tie", "B")] == [wins, 8, losses]
    assert (found["all"]["consistent"], found["all"]["errors"], found["errors"]) == (1.0, 0, [])
    assert found["all"]["score"] == pytest.approx((wins + 4) / COUNT)
    assert found["all"]["interval"][0] < found["all"]["score"] < found["all"]["interval"][1]
    assert sum(one["n"] for one in found["by_category"].values()) == COUNT
    assert list(found["by_category"]) == ["colour", "number"]
    assert "| all |" in capsys.readouterr().out
    ElementTree.fromstring((tmp_path / "out" / "report.svg").read_text())
    assert "ours better" in (tmp_path / "out" / "report.md").read_text()


def test_each_pair_is_asked_in_both_orders(files: tuple[Path, Path], tmp_path: Path) -> None:
    with fake_endpoint(fair) as fake:
        judge(files, fake, tmp_path / "out", "--limit", 2)
    assert len(fake.requests) == 4
    assert {shown(body) for body in fake.requests} == {
        ("good answer", "good answer"),
        ("bad answer", "good answer"),
        ("good answer", "bad answer"),
    }
    assert all(body["temperature"] == 0 for body in fake.requests)
    assert all(body["messages"][1]["content"][0]["type"] == "image_url" for body in fake.requests)
    assert all("What is" in body["messages"][1]["content"][1]["text"] for body in fake.requests)


def test_judge_that_prefers_the_first_gives_ties(files: tuple[Path, Path], tmp_path: Path) -> None:
    with fake_endpoint(always_first) as fake:
        assert judge(files, fake, tmp_path / "out") == 0
    found = report(tmp_path / "out")["all"]
    assert (found["A"], found["tie"], found["B"]) == (0, COUNT, 0)
    assert (found["consistent"], found["score"], found["interval"]) == (0.0, 0.5, [0.5, 0.5])


def noisy(body: Body, number: int) -> FakeReply:
    """Fair, but half of the requests fail in one way or another."""
    bad = [
        FakeReply(status=429, headers={"Retry-After": "0"}),
        FakeReply(status=500),
        FakeReply(body=b"{"),
        FakeReply(hang_up=True),
    ]
    return random.Random(number).choice([*bad, *[fair(body, number)] * 4])


def test_noisy_endpoint_changes_no_verdict(files: tuple[Path, Path], tmp_path: Path) -> None:
    with fake_endpoint(fair) as fake:
        judge(files, fake, tmp_path / "quiet")
    with fake_endpoint(noisy) as fake:
        assert judge(files, fake, tmp_path / "noisy", "--attempts", 20) == 0
    quiet, loud = (report(tmp_path / name) for name in ("quiet", "noisy"))
    assert quiet["all"] == loud["all"]
    assert quiet["questions"] == loud["questions"]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (FakeReply(status=400, body=b'{"error": {"message": "content filter"}}'), "HTTP 400: content filter"),
        (FakeReply("I cannot decide."), "no verdict in the reply"),
        (FakeReply(""), "the reply has no text"),
    ],
    ids=["refused", "no mark", "empty"],
)
def test_questions_without_verdict_are_counted(
    reply: FakeReply, error: str, files: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    def partly(body: Body, number: int) -> FakeReply:
        return reply if "What is 4?" in str(body["messages"]) else fair(body, number)

    with fake_endpoint(partly) as fake:
        assert judge(files, fake, tmp_path / "out") == 0
    found = report(tmp_path / "out")
    assert (found["all"]["n"], found["all"]["errors"]) == (COUNT - 1, 1)
    assert [one["first"] for one in found["errors"]] == [0, 1]
    assert all(one["id"] == "q4" and error in one["error"] for one in found["errors"])
    assert "2 of 48 verdicts are missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "reply", [FakeReply(status=500), FakeReply(status=401), FakeReply(status=429), FakeReply(hang_up=True)]
)
def test_broken_endpoint_is_reported(reply: FakeReply, files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    with fake_endpoint(lambda body, number: reply) as fake:
        assert judge(files, fake, tmp_path / "out") == 7
    found = report(tmp_path / "out")
    assert (found["all"]["n"], found["all"]["errors"], len(found["errors"])) == (0, COUNT, 2 * COUNT)
    assert "no question got a verdict" in capsys.readouterr().err
    ElementTree.fromstring((tmp_path / "out" / "report.svg").read_text())


def test_interrupted_run_asks_only_for_the_rest(files: tuple[Path, Path], tmp_path: Path) -> None:
    def dies(body: Body, number: int) -> FakeReply:
        return fair(body, number) if number < 20 else FakeReply(status=503)

    with fake_endpoint(dies) as fake:
        assert judge(files, fake, tmp_path / "out", "--attempts", 1) == 0
        assert report(tmp_path / "out")["all"]["errors"] > 0
    # The endpoint's address belongs to what verdicts are about.
    port = int(fake.url.rsplit(":", 1)[1].split("/")[0])
    with fake_endpoint(fair, port=port) as again:
        assert judge(files, again, tmp_path / "out") == 0
    assert len(again.requests) == 2 * COUNT - 20
    with fake_endpoint(fair) as fresh:
        assert judge(files, fresh, tmp_path / "fresh") == 0
    assert report(tmp_path / "out")["all"] == report(tmp_path / "fresh")["all"]


def test_verdicts_about_other_answers_are_refused(files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    with fake_endpoint(fair) as fake:
        assert judge(files, fake, tmp_path / "out") == 0
        files[0].write_text(files[0].read_text().replace("bad answer", "other answer"))
        assert judge(files, fake, tmp_path / "out") == 2
    assert "give another --out" in capsys.readouterr().err


def test_answers_of_generate_take_questions_by_id(files: tuple[Path, Path], tmp_path: Path) -> None:
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    asked = [{"id": one["id"], "prompt": one["question"], "images": one["images"]} for one in lines]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    for path in files:
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        said = [{"id": one["id"], "prompt_tokens": 9, "token_ids": [1], "text": one["answer"]} for one in kept]
        path.write_text("".join(json.dumps(line) + "\n" for line in said))
    with fake_endpoint(fair) as fake:
        assert judge(files, fake, tmp_path / "out", "--questions", tmp_path / "asked.jsonl") == 0
    assert report(tmp_path / "out")["all"]["consistent"] == 1.0
    assert fake.requests[0]["messages"][1]["content"][0]["type"] == "image_url"


def test_images_outside_of_the_folders_are_refused(files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "red.png")
    for name in ("../red.png", str(tmp_path / "red.png"), "link.png"):
        moved = [path.rename(folder / path.name) if path.exists() else folder / path.name for path in files]
        line = {"id": "q", "question": "?", "answer": "good answer", "images": [name]}
        for path in moved:
            path.write_text(json.dumps(line))
        with fake_endpoint(fair) as fake:
            assert judge((moved[0], moved[1]), fake, tmp_path / "out") == 3
            assert not fake.requests
            assert f"--image-root {tmp_path}" in capsys.readouterr().err
            assert judge((moved[0], moved[1]), fake, tmp_path / f"out-{len(name)}", "--image-root", tmp_path) == 0
            assert len(fake.requests) == 2


def test_absolute_images_of_the_working_folder_are_shown(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `megavl evaluate --out` writes them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in files:
        line = {"id": "q", "question": "?", "answer": "good answer", "images": [str(tmp_path / "red.png")]}
        (tmp_path / "runs" / path.name).write_text(json.dumps(line))
    with fake_endpoint(fair) as fake:
        assert judge((Path("runs/ours.jsonl"), Path("runs/theirs.jsonl")), fake, tmp_path / "out") == 0


def test_verdicts_about_other_images_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with fake_endpoint(fair) as fake:
        assert judge(files, fake, tmp_path / "out", "--limit", 1) == 0
        Image.new("RGB", (8, 8), "blue").save(tmp_path / "red.png")
        assert judge(files, fake, tmp_path / "out", "--limit", 1) == 2


def changed(line: dict[str, Any], **fields: Any) -> str:
    return json.dumps({name: value for name, value in {**line, **fields}.items() if value is not None})


WRONG: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "no json": (lambda line: "{", "no JSON object"),
    "list": (lambda line: "[1]", "a JSON object is expected"),
    "no id": (lambda line: changed(line, id=None), "id: a text or a whole number"),
    "other id": (lambda line: changed(line, id="x"), "id 'q2' is not in"),
    "twice": (lambda line: changed(line, id="q1"), "id 'q1' was at"),
    "choice": (lambda line: changed(line, answer=2), "answer: a text is expected, found '2'"),
    "no answer": (lambda line: changed(line, answer=None), "answer: is missing"),
    "other question": (lambda line: changed(line, question="Why?"), "is another one than"),
    "no image": (lambda line: changed(line, images=["none.png"]), "images: "),
    "image number": (lambda line: changed(line, images=[7]), "a list of files is expected"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_line_is_named_before_asking(kind: str, files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    change, said = WRONG[kind]
    path = files[1] if kind != "no image" else files[0]
    lines = path.read_text().splitlines()
    lines[2] = change(json.loads(lines[2]))
    path.write_text("\n".join(lines))
    with fake_endpoint(fair) as fake:
        assert judge(files, fake, tmp_path / "out") == 3
    error = capsys.readouterr().err
    assert said in error
    assert f"{path}:3" in error or kind == "other id"
    assert not fake.requests


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--endpoint", "localhost:1"), "is no URL"),
        (("--workers", "0"), "--workers: 0"),
        (("--timeout", "nan"), "--timeout: nan"),
        (("--names", "a"), "give 2 different names"),
        (("--names", "a,a"), "give 2 different names"),
    ],
)
def test_wrong_options_are_refused(more: tuple[str, ...], said: str, files: tuple[Path, Path], capsys: Any) -> None:
    words = ["judge", *map(str, files), "--endpoint", "http://127.0.0.1:1", "--judge", "j", *more]
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reply", "first", "verdict"),
    [
        ("[[A]]", 0, "A"),
        ("[[A]]", 1, "B"),
        ("[[B]]", 0, "B"),
        ("[[B]]", 1, "A"),
        ("x [[C]] y", 0, "tie"),
        ("[[a]]", 0, "A"),
        ("[[ B ]]", 0, "B"),
        ("Answer A says [[B]]. Verdict: [[A]]", 0, "A"),
        ("[A]", 0, None),
        ("A is better", 0, None),
        ("[[D]]", 0, None),
    ],
)
def test_verdict_is_the_last_mark(reply: str, first: int, verdict: str | None) -> None:
    assert read_verdict(reply, first=first) == verdict


def test_disagreement_and_ties_are_ties() -> None:
    assert combine(["A", "A"]) == "A"
    assert combine(["B", "B"]) == "B"
    assert {combine(list(pair)) for pair in (("A", "B"), ("A", "tie"), ("tie", "B"), ("tie", "tie"))} == {"tie"}


def test_bootstrap_has_the_known_spread() -> None:
    judged = [
        Judged(id=str(n), category="", verdicts=(v, v), errors=("", "")) for n, v in enumerate("A" * 60 + "B" * 40)
    ]
    found = figures(judged, seed=3)
    # 1.96 standard errors of a share of 0.6 among 100.
    assert found["interval"] == pytest.approx([0.504, 0.696], abs=0.015)
    assert figures(judged, seed=3) == found
