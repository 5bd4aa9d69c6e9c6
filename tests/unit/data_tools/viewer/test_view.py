"""Packed sequences on the terminal and as a page: text, loss mask, and no markup from the data."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import view
from data_tools.viewer.packed_view import PackReader
from megavl.data.tokenizer import open_tokenizer
from megavl.foreign.printing import visible
from tests.unit.data.corpus_files import (
    IMAGE_TOKENS,
    make_images,
    make_sentencepiece,
    make_tokenizer,
    run_preprocess,
    write_jsonl,
)

HOSTILE = (
    "</span></title><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> "
    "& 'quoted' \x1b[31mred\x07 ‮gnp.exe 你好 🙂\n\tend"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "headless_shell")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspected")
    tokenizer = make_tokenizer(root / "tokenizer")
    names = make_images(root / "images", count=5)
    talk = [{"from": "human", "value": "<image>What <b>colour</b>?"}, {"from": "gpt", "value": "red"}]
    inputs = [
        write_jsonl(root / "hostile <i>name.jsonl", [{"text": HOSTILE}, {"text": "red green"}]),
        write_jsonl(root / "talks.jsonl", [{"image": name, "conversations": talk} for name in names]),
    ]
    assert (
        run_preprocess(
            inputs, tokenizer=tokenizer, output=root / "out", more=["--system-prompt", "", "--seq-length", "400"]
        )
        == 0
    )
    return root / "out"


def _reader(made: Path) -> PackReader:
    return PackReader(made, tokenizer=open_tokenizer(made.parent / "tokenizer"))


def test_pieces_have_the_text_and_its_mask(made: Path) -> None:
    reader = _reader(made)
    views = [reader.view(number) for number in range(sum(reader.source.counts.values()))]
    segments = {s.origin.rsplit("/", 1)[1]: s for view in views for s in view.segments}
    hostile = segments["hostile <i>name.jsonl:1"]
    plain = [piece for piece in hostile.pieces if not piece.special]
    assert "".join(piece.text for piece in plain) == HOSTILE
    assert all(piece.supervised for piece in plain)
    assert [piece.text for piece in hostile.pieces if piece.special] == ["BOS", "EOS"]
    talk = segments["talks.jsonl:2"]
    assert "".join(p.text for p in talk.pieces if p.supervised) == " redEOS"
    assert talk.supervised == sum(p.tokens for p in talk.pieces if p.supervised)
    pictures = [piece for piece in talk.pieces if piece.picture]
    assert [(piece.tokens, piece.picture.title) for piece in pictures if piece.picture] == [
        (IMAGE_TOKENS, "21 x 31 PNG")
    ]
    for shown in views:
        assert shown.tokens == sum(piece.tokens for segment in shown.segments for piece in segment.pieces)


def test_terminal_shows_sequences(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view.main([str(made), "--count", "9"]) == 0
    shown = capsys.readouterr().out
    assert "hostile <i>name.jsonl:1" in shown and "<21 x 31 PNG, " in shown and "<BOS>" in shown
    assert "␛[31mred␇ [U+202E]gnp.exe 你好 🙂\n\tend" in shown and not re.search("[\x07\x1b‮]", shown)
    assert re.search(r"sequence 0 \(\w+\) \[#+\.*\] \d+/\d+ tokens, \d", shown)


def test_other_or_missing_tokenizer_is_reported(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_tokenizer(tmp_path / "other", vocab_size=300)
    assert view.main([str(made), "--tokenizer", str(other)]) == 3
    assert "but" in capsys.readouterr().err
    copy = shutil.copytree(made, tmp_path / "copy")
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps({**report, "tokenizer": "/nowhere"}))
    assert view.main([str(copy), "--sample", "0"]) == 0
    seen = capsys.readouterr()
    assert "is no longer at /nowhere: ids are shown" in seen.err and re.search(r"tokens>( \d+)+<EOS>", seen.out)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [(["--sample", "99"], 2, "--sample 99: .* has sequences 0 to"), (["--sample", "-1"], 2, "--sample -1")],
)
def test_mistakes_are_named(
    made: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str
) -> None:
    assert view.main([str(made), *more]) == code
    assert re.search(f"^error: {message}", capsys.readouterr().err)


def test_unfinished_dataset_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view.main([str(tmp_path)]) == 3
    assert "manifest.json: not found" in capsys.readouterr().err


def test_control_characters_are_named() -> None:
    assert visible("a\x00\x1b\x7f‮\n\tb") == "a␀␛[U+007F][U+202E]\n\tb"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.shown += data


@pytest.fixture(scope="module")
def page(made: Path) -> Path:
    path = made.parent / "page.html"
    assert view.main([str(made), "--html", str(path), "--count", "9"]) == 0
    return path


def test_page_has_no_markup_of_the_data(page: Path) -> None:
    parsed = _Page()
    parsed.feed(page.read_text(encoding="utf-8"))
    names = {name for name, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "object"} and names >= {"span", "figure", "article"}
    for name, attributes in parsed.tags:
        assert not [key for key in attributes if key.startswith("on")]
        if name == "img":
            assert (attributes["src"] or "").startswith("data:image/jpeg;base64,")
    assert "<script>document.title='owned'</script>" in parsed.shown.replace("\n", "")
    assert "<b>colour</b>" in parsed.shown and "hostile <i>name.jsonl:1" in parsed.shown


def _render(program: str, page: Path, *, what: str) -> subprocess.CompletedProcess[str]:
    profile = page.with_suffix(".profile")
    switches = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=900,1200"]
    command = [program, *switches, what, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Chromium that can show a page of one word, so that later failures come from our page."""
    program = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    plain = tmp_path_factory.mktemp("browser") / "plain.html"
    plain.write_text("<title>plain</title><p>word")
    done = _render(program, plain, what="--dump-dom")
    if done.returncode or "word" not in done.stdout:
        pytest.skip(f"{program} shows no page at all here: {done.stderr[-200:]}")
    return program


def test_browser_shows_the_page(page: Path, browser: str, tmp_path: Path) -> None:
    done = _render(browser, page, what="--dump-dom")
    assert done.returncode == 0, done.stderr
    assert f"<title>{page.parent / 'out'}</title>" in done.stdout and done.stdout.count("<img") == 5
    shot = tmp_path / "page.png"
    done = _render(browser, page, what=f"--screenshot={shot}")
    assert done.returncode == 0 and shot.is_file(), done.stderr
    colours = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 30
    # The bar of the first sequence, in the colour of its first segment.
    assert (colours == (0x3B, 0x78, 0xD8)).all(axis=1).sum() > 1000


def test_an_end_token_that_also_pads_is_shown_as_end(tmp_path: Path) -> None:
    tokenizer = make_sentencepiece(tmp_path / "tokenizer.model")
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "a red thing"}])
    assert run_preprocess([text], tokenizer=tokenizer, output=tmp_path / "out") == 0
    reader = PackReader(tmp_path / "out", tokenizer=open_tokenizer(tokenizer))
    assert open_tokenizer(tokenizer).pad_id == open_tokenizer(tokenizer).eos_id
    (segment,) = reader.view(0).segments
    assert [piece.text for piece in segment.pieces if piece.special] == ["BOS", "EOS"]
