"""Charts with their code: which stored figures pass the filter of the paper."""

import base64
import io
import json
from importlib.util import find_spec

import pytest
from PIL import Image

from data_tools import build_corpus
from data_tools.corpus.pairs.notebooks.figures import NotebookError, code_lines, read_notebook
from data_tools.readers.formats import FORMATS

pytestmark = pytest.mark.skipif(not find_spec("nbformat"), reason="needs megavl[corpus]")

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


def test_only_single_figures_with_enough_code_pass(tmp_path):
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


def test_conversations_fence_the_code_and_runs_repeat(tmp_path):
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
    assert "no_figure 1; a.ipynb: none is stored; run the notebook and save it" in message and message.count("\n") == 1


def test_old_notebooks_are_read_and_others_refused():
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
    old_text = json.dumps(old)
    (cell,) = read_notebook(old_text).cells
    assert cell.code == "x = 1" and cell.figures[0].startswith(b"\x89PNG")
    for text in (
        "",
        "[]",
        "3",
        '{"nbformat": 4}',
        '{"nbformat": 4, "cells": [3]}',
        "[" * 100_000,
        old_text.replace("x = 1", "\\ud800"),
    ):
        with pytest.raises(NotebookError):
            read_notebook(text)


def test_comments_and_commands_are_no_code():
    assert code_lines("x = 1\n\n  # comment\n%matplotlib inline\n!pip install y\n  y = 2  # here\n") == 2


@pytest.mark.parametrize("options", [["--render"], ["--render", "--weak-sandbox", "--dpi", "50"]])
def test_render_was_removed(tmp_path, capsys, options):
    (tmp_path / "a.ipynb").write_text(notebook((CODE.format(n=1), shown(picture("red")))))
    assert build(tmp_path / "out", tmp_path / "a.ipynb", *options) == 2
    message = capsys.readouterr().err
    assert "--render was removed in 0.2; the figures stored in the notebooks are used" in message
    assert message.count("\n") == 1 and not (tmp_path / "out").exists()
