"""`megavl rate`: a blind page that people use in a browser, and the report on what they saved."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from megavl.config.errors import DataError
from megavl.evaluate.people.ratings import read_key
from megavl.main.cli import main

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u2028 & 你好"
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
MODELS = ("first-model", "second-model", "third-model")
COUNT = 14
CATEGORIES = ("recognition/ocr/printed", "analysis/data-chart/chart", "evaluation/reality")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about the answers of three models, one of them hostile."""
    root = tmp_path_factory.mktemp("rate")
    Image.new("RGB", (40, 30), "red").save(root / "red.png")
    for name in MODELS:
        lines = []
        for number in range(COUNT):
            answer = HOSTILE if (name, number) == (MODELS[1], 0) else f"answer {MODELS.index(name)} to {number}"
            line = {"id": f"q{number}", "question": f"Question {number}?", "answer": answer}
            lines.append({**line, "images": ["red.png"], "category": CATEGORIES[number % 3]})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert page(root, root / "page.html", "--seed", "5") == 0
    return root


def page(root: Path, out: Path, *more: str) -> int:
    return main(["rate", "page", *(str(root / f"{name}.jsonl") for name in MODELS), "--out", str(out), *more])


def data_of(path: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def key_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "page.key.json").read_text())
    return found


def test_page_is_blind_and_key_restores_models(folder: Path) -> None:
    text = (folder / "page.html").read_text()
    assert not any(name in text for name in MODELS)
    asked, key = data_of(folder / "page.html"), key_of(folder)
    assert (key["page"], key["models"]) == (asked["page"], list(MODELS))
    assert len({tuple(one["order"]) for one in key["questions"]}) > 2
    assert [one["id"] for one in asked["questions"]] != [f"q{number}" for number in range(COUNT)]
    for one, known in zip(asked["questions"], key["questions"], strict=True):
        number = one["id"][1:]
        answers = [
            HOSTILE if (model, number) == (1, "0") else f"answer {model} to {number}" for model in known["order"]
        ]
        assert one["answers"] == [answer.strip() for answer in answers]
    assert len(asked["images"]) == 1


def test_seed_alone_sets_the_order(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("same", "5"), ("other", "6")):
        assert page(folder, tmp_path / f"{name}.html", "--seed", seed) == 0
    text = (folder / "page.html").read_text()
    assert (tmp_path / "same.html").read_text() == text
    assert (tmp_path / "other.html").read_text() != text


def test_page_reaches_for_nothing_outside(folder: Path) -> None:
    text = (folder / "page.html").read_text()
    template = text.replace(json.dumps(data_of(folder / "page.html")), "")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", re.sub(r'id="data">.*?</script>', "", template, flags=re.DOTALL))
    assert "default-src 'none'" in text
    assert text.count("</script>") == 2


def test_existing_page_is_not_replaced(folder: Path, capsys: Any) -> None:
    before = (folder / "page.html").read_bytes()
    assert page(folder, folder / "page.html", "--seed", "9") == 2
    assert "page.key.json exists" in capsys.readouterr().err
    assert (folder / "page.html").read_bytes() == before


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=120_000)
        except playwright.Error as error:
            pytest.skip(f"{program} does not start here: {str(error)[:200]}")
        yield opened
        opened.close()


def test_people_rate_by_key_and_save(folder: Path, browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(offline=True, viewport={"width": 390, "height": 800}, accept_downloads=True)
    shown = context.new_page()
    shown.set_default_timeout(120_000)
    problems: list[str] = []
    shown.on("console", lambda message: problems.append(message.text))
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.goto((folder / "page.html").as_uri())
    key = key_of(folder)
    for one in key["questions"]:
        for model in one["order"]:
            shown.keyboard.press(str(5 - 2 * model))
        if one is not key["questions"][-1]:
            shown.keyboard.press("ArrowRight")
    # The last question: take a rating back, and give it by touch.
    shown.keyboard.press("ArrowUp")
    assert shown.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert f"{COUNT} rated" in shown.inner_text("#count")
    assert shown.evaluate("document.querySelector('#pictures img').naturalWidth") == 40
    assert shown.title() == "Rate the answers"
    shown.fill("#rater", "Ada L.")
    shown.reload()
    assert f"{COUNT} rated" in shown.inner_text("#count")
    with shown.expect_download() as waiting:
        shown.click("#save")
    assert waiting.value.suggested_filename == "ratings-Ada-L-.json"
    waiting.value.save_as(tmp_path / "ada.json")
    context.close()
    assert problems == []
    saved = json.loads((tmp_path / "ada.json").read_text())
    assert (saved["page"], saved["rater"], len(saved["ratings"])) == (key["page"], "Ada L.", COUNT)
    assert main(["rate", "report", str(folder / "page.key.json"), str(tmp_path / "ada.json")]) == 0


def ratings(folder: Path, path: Path, values: dict[int, int], *, leave: int = 0) -> Path:
    """What a person saves who rates each model alike, but leaves some questions unfinished."""
    key = key_of(folder)
    given: dict[str, list[int | None]] = {}
    for number, one in enumerate(key["questions"]):
        given[one["id"]] = [values[model] for model in one["order"]]
        if number < leave:
            given[one["id"]][0] = None
    path.write_text(json.dumps({"page": key["page"], "rater": path.stem, "ratings": given}))
    return path


def test_report_averages_people_by_model(folder: Path, tmp_path: Path, capsys: Any) -> None:
    one = ratings(folder, tmp_path / "one.json", {0: 5, 1: 2, 2: 3})
    other = ratings(folder, tmp_path / "other.json", {0: 4, 1: 1, 2: 4}, leave=2)
    words = ["rate", "report", folder / "page.key.json", one, other, "--out", tmp_path / "out"]
    assert main(list(map(str, words))) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    # Two questions have the ratings of one person alone.
    mean = found["all"]["ratings"]
    assert mean["first-model"] == pytest.approx((12 * 4.5 + 2 * 5) / 14)
    assert mean["second-model"] == pytest.approx((12 * 1.5 + 2 * 2) / 14)
    low, high = found["all"]["intervals"]["first-model"]
    assert low <= mean["first-model"] <= high
    assert sorted(found["by_category"]) == ["analysis", "evaluation", "recognition"]
    assert sum(row["n"] for row in found["by_category"].values()) == COUNT
    assert [person["incomplete"] for person in found["people"]] == [0, 2]
    printed = capsys.readouterr().out
    assert "first-model" in printed
    assert "left out: 2 incomplete" in printed
    drawn = ElementTree.fromstring((tmp_path / "out" / "report.svg").read_text())
    outlines = [part for part in drawn.iter("{http://www.w3.org/2000/svg}polygon") if part.get("fill-opacity")]
    assert len(outlines) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"page": "other"}, "is about page 'other'"),
        ({"ratings": [1]}, "an object is expected"),
        ({"ratings": {"q99": [1, 2, 3]}}, "'q99' is not on the page"),
        ({"ratings": {"q1": [1, 2]}}, "3 ratings from 1 to 5"),
        ({"ratings": {"q1": [1, 2, 6]}}, "3 ratings from 1 to 5"),
        ({"ratings": {"q1": [1, 2, True]}}, "3 ratings from 1 to 5"),
        ({"ratings": {"q1": [1, 2, None]}}, "no question is rated completely"),
        ({"ratings": {}}, "no question is rated completely"),
        (None, "cannot read ratings"),
    ],
)
def test_wrong_ratings_are_named(change: Any, said: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    path = ratings(folder, tmp_path / "one.json", {0: 5, 1: 2, 2: 3})
    path.write_text("{" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    assert main(["rate", "report", str(folder / "page.key.json"), str(path)]) == 3
    error = capsys.readouterr().err
    assert str(path) in error
    assert said in error


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"page": "a", "models": ["b"], "questions": []}'])
def test_wrong_key_is_named(text: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    path = ratings(folder, tmp_path / "one.json", {0: 5, 1: 2, 2: 3})
    (tmp_path / "key.json").write_text(text)
    assert main(["rate", "report", str(tmp_path / "key.json"), str(path)]) == 3
    assert "key.json" in capsys.readouterr().err


def test_key_may_have_twelve_models(tmp_path: Path) -> None:
    path = tmp_path / "page.key.json"

    def write(order: list[Any]) -> None:
        questions = [{"id": "q", "category": "", "order": order}]
        path.write_text(json.dumps({"page": "p", "models": [f"m{n}" for n in range(12)], "questions": questions}))

    write(list(range(11, -1, -1)))
    assert read_key(path).orders["q"][0] == 11
    for wrong in ([*range(11), 10], [*range(11), "11"], [*range(11), 11.0], [False, *range(1, 12)], [*range(11), None]):
        write(wrong)
        with pytest.raises(DataError, match="is no order of 12 models"):
            read_key(path)
