"""Pages of documents: each record has exactly the text that its page shows, also for hostile documents."""

import hashlib
import json
import re
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
from PIL import Image

from data_tools import build_corpus, preprocess
from data_tools.corpus.pairs.documents import blocks, pages, reading
from data_tools.corpus.pairs.documents.elements import FORMULA
from data_tools.corpus.pairs.documents.pages import make_pages, same_text
from data_tools.corpus.pairs.fonts import font_folders, load_fonts
from data_tools.corpus.pairs.sources import Dropped
from data_tools.readers.formats import FORMATS

PACKAGES = ("typst", "pypdfium2", "pypandoc", "fontTools", "matplotlib")
pytestmark = pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="needs megavl[corpus]")

MARKDOWN = r"""# Report on `things`

Plain, *stressed*, **strong**, ~~gone~~, [a link](http://example.org/secret) and $a^2 + \frac{b}{c}$. <!-- unseen -->

$$\begin{pmatrix} a & b \\ c & d \end{pmatrix} = \sum_{i=1}^n x_i \label{eq}$$

| name | count |
|:-----|------:|
| one  | 1     |
| two \| three | 2 `x` |

1. first
2. second
   - inner

```python
def f(x):
    return "#" * x  # sign
```

---

> quoted ![picture](secret.png) words[^1]

[^1]: A footnote.

$\nosuchmacro{x}$ is lost with its paragraph.
"""
LATEX = r"""\documentclass{article}\newcommand{\R}{\mathbb{R}}
\begin{document}\section{Reals}\label{s} Let $f\colon\R\to\R$ be \emph{smooth}. \input{/etc/passwd}
\begin{equation} \int_0^1 x\,dx = \tfrac12 \label{e} \end{equation}
\end{document}"""
HTML = """<html><head><title>no</title><style>p{}</style></head><body><h2>Head &amp; shoulders</h2>
<script>alert("no")</script><p>Water is H<sub>2</sub>O.<img src="file:///etc/passwd"></p>
<table><tr><td>sea</td><td>salt</td></tr><tr><td>land</td><td>soil</td></tr></table>
<ul><li>apple</li><li>pear</li></ul></body></html>"""
HOSTILE = """#read("/etc/passwd") and #import "@preview/cetz:0.3.0" stay words, as do \\u{41} "quoted" $ signs

] #panic("out") [ // no comment /* either */ -- --- ... ~ @ref <label> = heading - item + item / term: x

`#raw` `"]` and *]* in marks"""


@pytest.fixture(scope="module")
def fonts():
    return load_fonts(font_folders([]))


def sentences(count):
    """Different sentences, so that each can be found again."""
    return [f"Sentence number {n} speaks of {n * n} things and of {n % 7} others." for n in range(1, count + 1)]


@pytest.fixture(scope="module", autouse=True)
def no_time_limits():
    """A busy machine must not drop a page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "LIMITS", replace(pages.LIMITS, seconds=1800, cpu_seconds=1800))
        patch.setattr(reading, "SECONDS", 1800)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    (folder / "a.md").write_text(MARKDOWN)
    (folder / "b.tex").write_text(LATEX)
    (folder / "c.html").write_text(HTML)
    long = [" ".join(sentences(200)[start : start + 8]) for start in range(0, 200, 8)]
    (folder / "d.txt").write_text("\n\n".join(long))
    (folder / "e.md").write_text(HOSTILE)
    return folder


def build(output, inputs, *options):
    return build_corpus.main(["documents", "--output", str(output), "--input", str(inputs), "--side", "640", *options])


@pytest.fixture(scope="module")
def corpus(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "out"
    assert build(folder, inputs, "--heldout-share", "0.2", "--workers", "2") == 0
    return folder


def records(corpus):
    return [
        json.loads(line)
        for split in ("train", "heldout")
        for line in (corpus / f"{split}.jsonl").open(encoding="utf-8")
    ]


def of(corpus, source):
    return [record for record in records(corpus) if record["source"] == source]


def test_markdown_has_the_visible_text_only(corpus):
    (page,) = of(corpus, "a.md")
    assert page["text"].split("\n\n") == [
        "# Report on `things`",
        r"Plain, *stressed*, **strong**, ~~gone~~, a link and $a^2 + \frac{b}{c}$.",
        r"$$\begin{pmatrix} a & b \\ c & d \end{pmatrix} = \sum_{i=1}^n x_i$$",
        "| name | count |\n|:--|--:|\n| one | 1 |\n| two \\| three | 2 `x` |",
        "1. first\n2. second\n   - inner",
        '```\ndef f(x):\n    return "#" * x  # sign\n```',
        "---",
        "> quoted words",
    ]
    assert page["format"] == "markdown" and page["script"] == "latin" and page["page"] == 1
    dropped = json.loads((corpus / "corpus.json").read_text())["dropped"]
    assert dropped["formula"] == {"count": 1, "examples": ["a.md"]}


def test_latex_and_html_become_markdown(corpus):
    (latex,) = of(corpus, "b.tex")
    assert latex["text"].startswith("# Reals\n\nLet $f\\colon\\mathbb{R}\\to\\mathbb{R}$ be *smooth*.")
    assert "tfrac12" in latex["text"] and "label" not in latex["text"] and "root:" not in latex["text"]
    (html,) = of(corpus, "c.html")
    assert html["text"] == (
        "## Head & shoulders\n\nWater is H_{2}O.\n\n| sea | salt |\n|---|---|\n| land | soil |\n\n- apple\n- pear"
    )


def test_text_never_becomes_code(corpus):
    (page,) = of(corpus, "e.md")
    for words in ('#read("/etc/passwd")', '#import "@preview/cetz:0.3.0"', '#panic("out")', "-- --- ...", "`#raw`"):
        assert words in page["text"]


def test_every_sentence_is_on_one_page_in_order(corpus):
    found = sorted(of(corpus, "d.txt"), key=lambda record: record["page"])
    assert len(found) >= 3 and [record["page"] for record in found] == list(range(1, len(found) + 1))
    numbers = [int(n) for record in found for n in re.findall(r"Sentence number (\d+)", record["text"])]
    assert numbers == list(range(1, 201))
    assert len({(record["template"], record["font_size"]) for record in found}) == 1


def test_images_have_ink_and_empty_margins(corpus):
    for record in records(corpus):
        image = Image.open(corpus / record["image"])
        assert max(image.size) == 640 and image.mode == "RGB" and image.format == "PNG"
        paper = image.getpixel((0, 0))
        assert image.crop((0, 0, image.width, 8)).getcolors(1) == [(8 * image.width, paper)]
        dark = sum(count for count, grey in image.convert("L").getcolors(256) if grey < 110)
        assert dark > 2 * len(record["text"])


def test_same_bytes_with_any_number_of_workers(corpus, inputs, tmp_path):
    assert build(tmp_path / "again", inputs, "--heldout-share", "0.2", "--workers", "1") == 0
    names = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    assert [name for name in names if (corpus / name).read_bytes() != (tmp_path / "again" / name).read_bytes()] == []


def test_no_source_is_in_both_files(corpus):
    train, heldout = (
        {json.loads(line)["source"] for line in (corpus / f"{split}.jsonl").open()} for split in ("train", "heldout")
    )
    assert not train & heldout and len(train) + len(heldout) == 5 and len(heldout) == 1
    digests = [hashlib.sha256((corpus / record["image"]).read_bytes()).digest() for record in records(corpus)]
    assert len(set(digests)) == len(digests)


def test_the_preprocessor_reads_both_record_formats(corpus, tmp_path, capsys):
    (tmp_path / "a.md").write_text("# One\n\n" + " ".join(sentences(5)))
    (tmp_path / "b.md").write_text("# Two\n\n" + " ".join(sentences(9)))
    assert build(tmp_path / "talks", tmp_path, "--records", "llava") == 0
    (record,) = [json.loads(line) for line in (tmp_path / "talks/train.jsonl").open()]
    asked, told = FORMATS["llava"].read(record).turns
    assert "Markdown" in asked.text or "page" in asked.text
    assert told.text.startswith("# ") and told.text.endswith("others.")
    tokenizer = ["tokenizer", "--output", str(tmp_path / "tokenizer"), "--input", str(corpus / "train.jsonl")]
    assert build_corpus.main([*tokenizer, "--vocab-size", "400"]) == 0
    capsys.readouterr()
    for folder, format in ((corpus, "caption"), (tmp_path / "talks", "llava")):
        command = ["--input", str(folder / "train.jsonl"), "--output", str(tmp_path / "set"), "--dry-run"]
        command += ["--tokenizer", str(tmp_path / "tokenizer"), "--format", format, "--workers", "1"]
        assert preprocess.main(command) == 0
        lines = len((folder / "train.jsonl").read_text().splitlines())
        assert f"{lines} records to {lines} samples" in capsys.readouterr().out


def test_a_page_with_other_text_is_dropped(fonts, monkeypatch):
    """Every record is compared with the text layer of its page."""
    real = blocks.inlines

    def forgetful(nodes, formulas):
        element = real(nodes, formulas)
        return type(element)(element.typst.replace("needle", "noodle"), element.markdown, element.visible)

    text = "A haystack with a needle in it, and enough other words to fill a line."
    arguments = {"name": "x", "format": "markdown", "script": "latin", "seed": "0", "fonts": fonts, "side": 400}
    made = make_pages(text, **arguments)
    assert [page.text for page in made.pairs] == [text] and not made.dropped.counts
    monkeypatch.setattr(blocks, "inlines", forgetful)
    made = make_pages(text, **arguments)
    assert not made.pairs and made.dropped.counts == {"text_differs": 1}


@pytest.mark.parametrize(
    ("seen", "expected", "same"),
    [
        ("a b\r\nc", "abc", True),
        ("exam-\r\nple • item", "example - item", True),
        ("ﬁne", "fine", True),
        ("abd", "abc", False),
        ("ab", "abc", False),
        ("acb", "abc", False),
        ("so 𝑥2 is", f"so {FORMULA} is", True),
        ("so 𝑥2", f"so {FORMULA} is", False),
        ("is 𝑥2 so", f"so {FORMULA} is", False),
    ],
)
def test_texts_are_compared_without_spaces_and_formulas(seen, expected, same):
    assert same_text(seen, expected=expected) is same


def test_blocks_that_do_not_fit_are_dropped_alone(fonts):
    """A word, and a line of code, which is never broken."""
    before, after = "Kept before it, a sentence of some length.", "Kept after it, another such sentence."
    wide = "\n\n".join([before, "w" * 400, "```\n" + "code " * 19 + "\n```", after])
    made = make_pages(wide, name="x", format="markdown", script="latin", seed="1", fonts=fonts, side=400)
    assert [page.text for page in made.pairs] == [f"{before}\n\n{after}"]
    assert made.dropped.counts == {"overflow": 2}


def test_characters_without_a_glyph_are_dropped(fonts):
    text = "This paragraph is written in the letters of the font.\n\nThis one has \U0001f9ff and \U00012000."
    made = make_pages(text, name="x", format="markdown", script="latin", seed="2", fonts=fonts, side=400)
    assert len(made.pairs) == 1 and "U+12000" in made.dropped.examples["no_glyph"][0]


def test_a_renderer_crash_drops_only_its_document(fonts, monkeypatch):
    monkeypatch.setattr(pages.page_worker, "__file__", "/nonexistent/worker.py")
    made = make_pages(
        "Some words that are never set on any page.",
        name="x",
        format="text",
        script="latin",
        seed="0",
        fonts=fonts,
        side=400,
    )
    assert not made.pairs and made.dropped.counts == {"not_set": 1}


def test_long_blocks_are_split():
    words = " ".join(sentences(40))
    for text, format in ((words, "markdown"), (words, "text"), (words.replace(".", ""), "markdown")):
        parts = blocks.read_blocks(text, format=format, name="x", dropped=Dropped())
        assert len(parts) > 3 and max(blocks.weight(part.visible) for part in parts) <= 1.2 * blocks.MAX_WEIGHT
        assert " ".join(part.markdown for part in parts) == text
    chinese = "深度学习是机器学习的分支。" * 100
    parts = blocks.read_blocks(chinese, format="markdown", name="x", dropped=Dropped())
    assert len(parts) > 3 and "".join(part.markdown for part in parts) == chinese
    listed = "\n".join(f"{n}. item {n}" for n in range(3, 30))
    parts = blocks.read_blocks(listed, format="markdown", name="x", dropped=Dropped())
    assert len(parts) > 3 and "\n".join(part.markdown for part in parts) == listed


def test_deep_nesting_ends_in_a_count():
    for text, format in (("> " * 500 + "deep", "markdown"), ("<div><b>" * 3000 + "deep", "html")):
        dropped = Dropped()
        found = blocks.read_blocks(text, format=format, name="x", dropped=dropped)
        assert found or dropped.counts


@pytest.fixture
def no_chinese(tmp_path):
    import matplotlib

    return f"{matplotlib.__path__[0]}/mpl-data/fonts/ttf"


def test_chinese_without_a_font_gives_one_message(tmp_path, capsys, no_chinese):
    (tmp_path / "a.txt").write_text("深度学习是机器学习的分支。" * 5)
    assert build(tmp_path / "out", tmp_path / "a.txt", "--fonts", no_chinese) == 3
    message = capsys.readouterr().err
    assert "a.txt: is written in Chinese" in message and "apt install fonts-wqy-microhei" in message
    assert not (tmp_path / "out").exists()


def test_chinese_text_becomes_pages(tmp_path, fonts):
    if not fonts.chinese:
        pytest.skip("no Chinese font here (Debian: apt install fonts-wqy-microhei)")
    (tmp_path / "a.md").write_text(
        "# 引言\n\n深度学习（Deep Learning）是机器学习的\n一个分支，公式为 $E=mc^2$。\n\n- 一项\n- 两项"
    )
    (tmp_path / "b.md").write_text("另一篇文章。" * 30)
    assert build(tmp_path / "out", tmp_path, "--heldout-share", "0") == 0
    first, second = records(tmp_path / "out")
    assert (
        first["text"] == "# 引言\n\n深度学习（Deep Learning）是机器学习的一个分支，公式为 $E=mc^2$。\n\n- 一项\n- 两项"
    )
    assert first["script"] == second["script"] == "chinese"
    image = Image.open(tmp_path / "out" / second["image"]).convert("L")
    assert sum(count for count, grey in image.getcolors(256) if grey < 200) > 10 * 180


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--input", "missing.md"], 2, "missing.md: no such file"),
        (["--fonts", "missing", "--input", "a.txt"], 2, "--fonts missing: no such folder"),
        (["--side", "10", "--input", "a.txt"], 2, "'10' is out of range; give a whole number from 256 to 4096"),
        (["--heldout-share", "0.9", "--input", "a.txt"], 2, "'0.9' is out of range; give a number from 0 to 0.5"),
    ],
)
def test_wrong_usage_gives_one_message(tmp_path, monkeypatch, capsys, arguments, code, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Some words.")
    assert build_corpus.main(["documents", "--output", "out", *arguments]) == code
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_gives_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typst", None)
    assert build(tmp_path / "out", tmp_path) == 2
    assert "typst: not installed; pip install 'megavl[corpus]'" in capsys.readouterr().err
