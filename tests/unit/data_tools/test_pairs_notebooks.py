"""Charts with their code: the paper's filter on stored figures, and figures drawn again in a sandbox."""

import base64
import io
import json
import socket
import threading
from importlib.util import find_spec

import pytest
from PIL import Image

from data_tools import build_corpus
from data_tools.corpus.pairs import fonts
from data_tools.corpus.pairs.notebooks import drawing
from data_tools.corpus.pairs.notebooks.figures import NotebookError, code_lines, read_notebook
from data_tools.corpus.pairs.sandbox import Limits, isolation_problem
from data_tools.readers.formats import FORMATS

pytestmark = pytest.mark.skipif(not (find_spec("nbformat") and find_spec("matplotlib")), reason="needs megavl[corpus]")
isolated_only = pytest.mark.skipif(isolation_problem() is not None, reason=f"no isolation here: {isolation_problem()}")

CODE = (
    "import matplotlib.pyplot as plt\n# a comment\nx = [1, 2, 3]\n\ny = [{n}, 4, 9]\nplt.plot(x, y)\nplt.title('{n}')\n"
)


def picture(colour, size=(120, 90), format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return base64.b64encode(buffer.getvalue()).decode()


def shown(*images):
    return [{"output_type": "display_data", "metadata": {}, "data": {"image/png": image}} for image in images]


def notebook(*cells, language="python"):
    """JSON of a notebook: cells of (code, outputs)."""
    listed = [
        {
            "cell_type": "code",
            "execution_count": None,
            "metadata": {},
            "source": code.splitlines(True),
            "outputs": outputs,
        }
        for code, outputs in cells
    ]
    listed.insert(0, {"cell_type": "markdown", "metadata": {}, "source": "# Title"})
    kernel = {"name": "k", "display_name": "K", "language": language}
    return json.dumps({"nbformat": 4, "nbformat_minor": 4, "metadata": {"kernelspec": kernel}, "cells": listed})


def build(output, source, *options):
    return build_corpus.main(["notebooks", "--output", str(output), "--input", str(source), *options])


def records(folder, split="train"):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]


def dropped(folder):
    return json.loads((folder / "corpus.json").read_text(encoding="utf-8"))["dropped"]


def test_the_filter_of_the_paper(tmp_path):
    stream = [{"output_type": "stream", "name": "stdout", "text": "no image"}]
    cells = [
        (CODE.format(n=1), shown(picture("red"))),
        (CODE.format(n=2), shown(picture("green"), picture("blue"))),
        ("plt.plot([1])\nplt.show()", shown(picture("cyan"))),
        (CODE.format(n=3), stream),
        (CODE.format(n=4), shown("!!not base64!!")),
        (CODE.format(n=5), shown(base64.b64encode(b"<html>").decode())),
        (CODE.format(n=6), shown(picture("pink", size=(20, 300)))),
        (CODE.format(n=7), shown(picture("navy", format="JPEG"))),
        (CODE.format(n=8), shown(picture("red"))),
        ("\n" + CODE.format(n=1), shown(picture("gold"))),
        (CODE.format(n=9), shown(picture("olive")[:-32])),
        (CODE.format(n=10), shown(picture("teal"))),
    ]
    (tmp_path / "a.ipynb").write_text(notebook(*cells))
    (tmp_path / "b.ipynb").write_text("{not json")
    assert build(tmp_path / "out", tmp_path, "--heldout-share", "0") == 0
    found = records(tmp_path / "out")
    assert [record["text"] for record in found] == [CODE.format(n=n).strip() for n in (1, 10)]
    assert [record["cell"] for record in found] == [2, 13] and found[0]["language"] == "python"
    assert Image.open(tmp_path / "out" / found[1]["image"]).getpixel((5, 5)) == (0, 128, 128)
    assert {reason: entry["count"] for reason, entry in dropped(tmp_path / "out").items()} == {
        "few_lines": 1,
        "image_empty": 1,
        "image_format": 2,
        "image_small": 1,
        "image_truncated": 1,
        "many_images": 1,
        "notebook": 1,
        "same_code": 1,
        "same_image": 1,
    }
    assert dropped(tmp_path / "out")["many_images"]["examples"] == ["a.ipynb, cell 3"]


def test_conversations_and_split(tmp_path):
    source = tmp_path / "notebooks"
    source.mkdir()
    for number in range(4):
        cell = (CODE.format(n=number), shown(picture((number, 9, 9))))
        (source / f"{number}.ipynb").write_text(notebook(cell, language="R" if number else "python"))
    assert build(tmp_path / "out", source, "--records", "llava", "--heldout-share", "0.25") == 0
    train, heldout = records(tmp_path / "out"), records(tmp_path / "out", "heldout")
    assert (len(train), len(heldout)) == (3, 1)
    for record in [*train, *heldout]:
        asked, told = FORMATS["llava"].read(record).turns
        assert told.text.startswith("```r\n" if record["source"] != "0.ipynb" else "```python\n")
        assert any(word in asked.text for word in ("chart", "figure", "plot"))
    assert build(tmp_path / "again", source, "--records", "llava", "--heldout-share", "0.25") == 0
    names = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")]
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_notebooks_without_figures_are_named(tmp_path, capsys):
    (tmp_path / "a.ipynb").write_text(notebook((CODE.format(n=1), [])))
    assert build(tmp_path / "out", tmp_path / "a.ipynb") == 3
    message = capsys.readouterr().err
    assert "no_figure 1; a.ipynb: none is stored; --render draws them" in message and message.count("\n") == 1


def test_old_and_foreign_notebooks():
    old = {
        "nbformat": 3,
        "nbformat_minor": 0,
        "metadata": {"name": ""},
        "worksheets": [
            {
                "metadata": {},
                "cells": [
                    {
                        "cell_type": "code",
                        "language": "python",
                        "metadata": {},
                        "collapsed": False,
                        "input": "x = 1",
                        "outputs": [{"output_type": "display_data", "metadata": {}, "png": picture("red")}],
                    }
                ],
            }
        ],
    }
    (cell,) = read_notebook(json.dumps(old)).cells
    assert cell.code == "x = 1" and cell.figures[0].startswith(b"\x89PNG")
    for text in ("", "[]", "3", '{"nbformat": 4}', '{"nbformat": 4, "cells": [3]}', "[" * 100_000):
        with pytest.raises(NotebookError):
            read_notebook(text)


def test_lines_that_count():
    assert code_lines("x = 1\n\n  # comment\n%matplotlib inline\n!pip install y\n  y = 2  # here\n") == 2


@pytest.mark.parametrize(
    ("answer", "figures", "errors"),
    [
        (b'{"cell": 1, "size": 3}\nabc{"errors": {}}\n', {1: [b"abc"]}, {}),
        (b'{"errors": {"2": "E"}}\n', {}, {"cell_error": "cell 2: E"}),
        (
            b'{"errors": {"2": "E", "4": "F"}, "no_glyph": {"3": "G"}}\n',
            {},
            {"cell_error": "cell 2: E; cell 4: F", "no_glyph": "cell 3: G"},
        ),
        (b'{"errors": {}, "no_glyph": 3}\n', {}, {"not_run": "the answer is not in the expected form"}),
        (b'{"cell": 1, "size": 9}\nabc', {}, {"not_run": "the answer is cut off"}),
        (b'{"cell": 1, "size": -3}\nabc', {}, {"not_run": "the answer is cut off"}),
        (b"printed\n", {}, {"not_run": "the answer is not in the expected form"}),
        (b'{"cell": "x", "size": 1}\n', {}, {"not_run": "the answer is not in the expected form"}),
        (b'{"errors": 3}\n', {}, {"not_run": "the answer is not in the expected form"}),
        (b"[" * 100_000, {}, {"not_run": "the answer is not in the expected form"}),
        (b"", {}, {"not_run": "the answer is cut off"}),
    ],
)
def test_answers_are_not_believed(answer, figures, errors):
    assert drawing.parse_answer(answer) == (figures, errors)


CHART = """import matplotlib.pyplot as plt
figure = plt.figure(figsize=(3, 2))
plt.bar(range(5), data)
plt.xlabel("x")
plt.show()"""
ATTACK = """
import os, socket, matplotlib.pyplot as plt
done = []
try: socket.create_connection(("127.0.0.1", {port}), 3); done.append("network")
except OSError: pass
try: open({secret!r}).read(); done.append("read")
except OSError: pass
try: open({target!r}, "w").write("x"); done.append("write")
except OSError: pass
print("x" * 10_000_000)
plt.figure(figsize=(2 + len(done), 2))
plt.plot([1, 2])
"""


@pytest.fixture
def attack(tmp_path):
    """Code that draws a wider figure for each barrier that it gets through, and a port that it might reach."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/secret").write_text("abc")
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept(), daemon=True).start()
        yield ATTACK.format(
            port=server.getsockname()[1],
            secret=str(tmp_path / "home/secret"),
            target=str(tmp_path / "home/written"),
        )


def widths(folder):
    return {record["cell"]: Image.open(folder / record["image"]).width // 50 for record in records(folder)}


@isolated_only
def test_drawn_again_in_isolation(tmp_path, attack):
    """Also what the code may do: use earlier cells, fail, and use the notebook's own commands."""
    cells = [
        ("%matplotlib inline\n!touch /tmp/x\nimport numpy as np\ndata = np.random.rand(5)", []),
        (
            CHART,
            [],
        ),
        ("a = 1\nb = 2\nc = 3\nd = 4\n1 / 0\nplt.plot([1])", shown(picture("red"))),
        (attack, []),
    ]
    (tmp_path / "a.ipynb").write_text(notebook(*cells))
    options = ["--render", "--dpi", "50", "--heldout-share", "0"]
    assert build(tmp_path / "out", tmp_path / "a.ipynb", *options) == 0
    assert widths(tmp_path / "out") == {3: 3, 5: 2}
    assert not (tmp_path / "home/written").exists()
    assert "ZeroDivisionError" in dropped(tmp_path / "out")["cell_error"]["examples"][0]
    described = json.loads((tmp_path / "out/corpus.json").read_text())["options"]
    assert described["figures"] == "drawn again" and described["isolated"] is True
    assert build(tmp_path / "again", tmp_path / "a.ipynb", *options) == 0
    image = records(tmp_path / "out")[0]["image"]
    assert (tmp_path / "out" / image).read_bytes() == (tmp_path / "again" / image).read_bytes()


@isolated_only
def test_no_figure_shows_boxes_for_letters(tmp_path):
    """Chinese labels are drawn where a font for them is installed; a figure with an unknown character is no pair."""
    pytest.importorskip("fontTools", reason="needs megavl[corpus]")
    chinese = CHART.replace("data", "range(5)").replace('"x"', '"销售额"')
    unknown = CHART.replace("range(5), data", "range(4), range(4)").replace('"x"', '"\U00012000"')
    (tmp_path / "a.ipynb").write_text(notebook((chinese, []), (unknown, []), (unknown.replace("\U00012000", "ok"), [])))
    options = ["--render", "--dpi", "50", "--heldout-share", "0"]
    assert build(tmp_path / "out", tmp_path / "a.ipynb", *options) == 0
    written = any(map(fonts.writes_chinese, fonts.find_faces(fonts.SYSTEM_FOLDERS)))
    assert [record["cell"] for record in records(tmp_path / "out")] == ([2, 4] if written else [4])
    (told,) = dropped(tmp_path / "out")["no_glyph"]["examples"]
    assert "cell 3: Glyph 73728" in told and ("cell 2" not in told) == written


def test_the_weak_sandbox_is_weak(tmp_path, attack, monkeypatch):
    """The same code gets through where it is only limited, which shows that the test above tests something."""
    (tmp_path / "a.ipynb").write_text(notebook((attack, []), ("while True: pass", [])))
    monkeypatch.setattr(drawing, "LIMITS", Limits(**{**vars(drawing.LIMITS), "seconds": 20, "cpu_seconds": 3}))
    options = ["--render", "--weak-sandbox", "--dpi", "50", "--heldout-share", "0"]
    assert build(tmp_path / "out", tmp_path / "a.ipynb", *options) == 0
    assert widths(tmp_path / "out") == {2: 5}
    assert dropped(tmp_path / "out")["not_run"]["count"] == 1


def test_no_isolation_is_a_message_not_a_risk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "isolation_problem", lambda: "bubblewrap is not installed")
    (tmp_path / "a.ipynb").write_text(notebook((CODE, [])))
    assert build(tmp_path / "out", tmp_path / "a.ipynb", "--render") == 2
    message = capsys.readouterr().err
    assert "bubblewrap is not installed" in message and "--weak-sandbox" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
