"""Screenshots: a record has the HTML that its picture shows, and a page reaches neither files nor network."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from data_tools import build_corpus
from data_tools.corpus.pairs.screens import browser
from data_tools.corpus.pairs.screens.isolation import isolation_problem, write_isolated_launcher
from data_tools.corpus.pairs.screens.page_source import shown_source
from data_tools.readers.formats import FORMATS

MISSING = "Chromium is not installed (Debian: apt install chromium)"

PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>Shop</title><style>body{{margin:0;background:{colour}}}</style></head>
<body>{body}</body></html>
"""


def build(output, source, *options):
    return build_corpus.main(["screens", "--output", str(output), "--input", str(source), *options])


def test_invisible_elements_are_removed_from_the_source():
    html = (
        "<!DOCTYPE html>\n<html><head><title>T &amp; U</title><base href='http://x'><link rel=stylesheet href=a.css>"
        "<meta charset='utf-8'><meta http-equiv='refresh' content='0'><style>p > b {color: red}</style>"
        "<script>if (a < b) document.write('<p>no</p>')</script></head>\n<!-- no -->\n\n\n\n"
        "<body onload='x()'>A &lt; B &#169; <IMG SRC=x.png><br/><iframe src='file:///etc/passwd'><p>in</p></iframe>"
        "<object><object></object>x</object><embed src=y><template><p>t</p></template> end</body></html>"
    )
    source, words = shown_source(html)
    assert source == (
        "<!DOCTYPE html>\n<html><head><title>T &amp; U</title>"
        "<meta charset='utf-8'><style>p > b {color: red}</style>"
        "</head>\n\n<body onload='x()'>A &lt; B &#169; <IMG SRC=x.png><br/> end</body></html>\n"
    )
    assert " ".join(words.split()) == "A < B © end"
    assert shown_source(source) == (source, shown_source(source)[1])


@pytest.mark.parametrize(
    ("given", "expected"), [([], MISSING), (["--browser", "none"], "--browser none: is no program")]
)
def test_a_missing_browser_gives_one_message(tmp_path, monkeypatch, capsys, given, expected):
    pytest.importorskip("playwright", reason="needs megavl[screens]")
    pytest.importorskip("fontTools", reason="needs megavl[corpus]")
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    (tmp_path / "a.html").write_text(PAGE.format(colour="red", body="x"))
    assert build(tmp_path / "out", tmp_path / "a.html", *given) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.fixture
def chromium(monkeypatch):
    pytest.importorskip("playwright", reason="needs megavl[screens]")
    if not any(map(shutil.which, browser.NAMES)):
        pytest.skip(MISSING)
    problem = isolation_problem()
    if problem and os.geteuid() == 0:
        pytest.skip(f"Chromium has no sandbox for root, and {problem}")
    monkeypatch.setattr(browser, "SECONDS", 1800)


@pytest.mark.skipif(isolation_problem() is not None, reason=f"no isolation here: {isolation_problem()}")
def test_isolation_hides_files_processes_and_network(tmp_path):
    (tmp_path / "secret").write_text("abc")
    launcher = write_isolated_launcher("/usr/bin/env", folder=tmp_path)
    script = f"""id -u
for path in {tmp_path}/secret /proc/{os.getpid()}/environ /etc/passwd /home /root /var; do ls $path; done
touch /usr/written
grep : /proc/net/dev | grep -v lo: && echo network
echo done"""
    told = subprocess.run([launcher, "sh", "-c", script], capture_output=True, text=True, timeout=1800, check=False)
    assert told.stdout.split() == ["65534", "done"], told.stderr


def test_root_needs_isolation(chromium, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(browser, "isolation_problem", lambda: "bubblewrap is not installed")
    monkeypatch.setattr(browser.os, "geteuid", lambda: 0)
    (tmp_path / "a.html").write_text(PAGE.format(colour="red", body="x"))
    assert build(tmp_path / "out", tmp_path / "a.html") == 2
    message = capsys.readouterr().err
    assert "bubblewrap is not installed" in message and "ordinary user" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pages_become_pictures_without_reaching_files(chromium, tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    secret = Path(tmp_path / "secret.png")
    Image.new("RGB", (300, 300), "black").save(secret)
    bodies = {
        "a": "<h1>Hello</h1><p>words</p>",
        "b": f"<img src='file://{secret}' width=300 height=300><img src='{secret}'>",
        "c": "<script>document.body.style.background='black'</script><p>no script</p>",
        "d": "<div style='height:1500px'>tall</div>",
        "e": "<div style='height:9000px'>too tall</div>",
        "f": "",
        "g": "\U00012000 has no glyph",
    }
    for name, body in bodies.items():
        (pages / f"{name}.html").write_text(PAGE.format(colour="rgb(0,200,0)", body=body))
    assert build(tmp_path / "out", pages, "--heldout-share", "0") == 0
    found = {record["source"]: record for record in map(json.loads, (tmp_path / "out/train.jsonl").open())}
    described = json.loads((tmp_path / "out/corpus.json").read_text())
    assert sorted(found) == ["a.html", "b.html", "c.html", "d.html"]
    assert {reason: entry["examples"] for reason, entry in described["dropped"].items()} == {
        "too_tall": ["e.html"],
        "blank": ["f.html"],
        "no_glyph": ["g.html: U+12000"],
    }
    for name, record in found.items():
        image = Image.open(tmp_path / "out" / record["image"])
        assert image.width == record["window"][0] and image.height >= record["window"][1]
        assert image.getpixel((image.width - 1, image.height - 1)) == (0, 200, 0)
        picture, text = FORMATS["caption"].read(record).parts
        assert picture.name == record["image"] and text == record["text"]
        assert "script" not in record["text"] or name == "c.html"
    # The file is not shown: its address gives a broken picture, and its path the grey one that stands for all others.
    colours = {
        colour: count for count, colour in Image.open(tmp_path / "out" / found["b.html"]["image"]).getcolors(9999)
    }
    assert colours[190, 190, 190] >= 320 * 200 and (0, 0, 0) not in colours
    assert Image.open(tmp_path / "out" / found["d.html"]["image"]).height >= 1500
    # A page is the same whatever was shown beside it.
    assert build(tmp_path / "again", pages, "--heldout-share", "0", "--workers", "1", "--limit", "2") == 0
    names = sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.png"))
    assert len(names) == 2
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
