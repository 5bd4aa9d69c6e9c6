"""Inputs of the pair commands: which texts are read, which faults are counted, and which texts are held out."""

import json

import pytest

from data_tools.corpus.pairs.records import in_order
from data_tools.corpus.pairs.sources import Dropped, InputFormats, choose_heldout, find_sources, heldout_sources, load
from data_tools.corpus.scripts import script_of
from megavl.config.errors import DataError, UsageError

FORMATS = InputFormats(suffixes={".txt": "text", ".md": "markdown"}, keys={"markdown": "markdown", "text": "text"})


def found(inputs, **options):
    dropped = Dropped()
    sources = find_sources(inputs, formats=FORMATS, dropped=dropped, **options)
    return sources, dropped


def test_files_folders_and_jsonl_are_read(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.md").write_text("# B\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain words")
    (tmp_path / "image.png").write_bytes(b"ignored")
    records = [{"id": "one", "text": "first"}, {"text": "深度学习", "format": "markdown"}, {"markdown": "*third*"}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    sources, dropped = found([tmp_path])
    listed = [(source.name, source.format, source.script, load(source, formats=FORMATS)) for source in sources]
    assert listed == [
        ("a.txt", "text", "latin", "plain words"),
        ("one", "text", "latin", "first"),
        ("c.jsonl:2", "markdown", "chinese", "深度学习"),
        ("c.jsonl:3", "markdown", "latin", "*third*"),
        ("sub/b.md", "markdown", "latin", "# B\n"),
    ]
    assert not dropped.counts
    assert [source.name for source in found([tmp_path], limit=2)[0]] == ["a.txt", "one"]


def test_faults_are_counted_with_their_line(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.corpus.pairs.sources.MAX_SOURCE_BYTES", 100)
    lines = [
        '{"text": "good"}',
        '{"text": ',
        "[1]",
        '{"words": "x"}',
        '{"text": "y", "format": "pdf"}',
        '{"text": "\\ud800"}',
        json.dumps({"text": "z" * 200}),
        '{"text": "  "}',
        '{"text": " good\\n"}',
        '{"text": "after the long line"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text("w" * 200)
    sources, dropped = found([tmp_path])
    assert [source.name for source in sources] == ["a.jsonl:1", "a.jsonl:10"]
    assert dropped.counts == {"record": 5, "too_long": 2, "empty": 1, "copy": 1, "unreadable": 1}
    examples = dropped.summary()["record"]["examples"]
    assert [example.partition(": ")[0] for example in examples] == [f"a.jsonl:{line}" for line in (2, 3, 4, 5, 6)]
    assert "none of the keys markdown, text" in examples[2] and "format 'pdf'" in examples[3]


@pytest.mark.parametrize(
    ("name", "content", "error", "expected"),
    [
        ("missing.txt", None, UsageError, "no such file or folder; give .txt, .md files"),
        ("page.pdf", "x", UsageError, "unknown ending '.pdf'"),
        ("empty.txt", " \n", DataError, "nothing usable (empty 1)"),
    ],
)
def test_nothing_to_read_is_an_error(tmp_path, name, content, error, expected):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error) as caught:
        found([tmp_path / name])
    assert expected in str(caught.value) and name in str(caught.value)


def test_a_changed_file_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    sources, _ = found([tmp_path / "a.txt"])
    (tmp_path / "a.txt").write_text("after!")
    with pytest.raises(DataError, match=r"a\.txt: was changed during the run"):
        load(sources[0], formats=FORMATS)


def test_the_heldout_share_is_exact_and_stable():
    keys = [f"key {number}" for number in range(1000)]
    held = choose_heldout(keys, share=0.05, seed=0)
    assert len(held) == 50 and held == choose_heldout(keys[::-1], share=0.05, seed=0)
    assert held != choose_heldout(keys, share=0.05, seed=1)
    assert len(held & choose_heldout([*keys, *(f"new {n}" for n in range(100))], share=0.05, seed=0)) >= 40
    assert [len(choose_heldout(keys[:count], share=0.05, seed=0)) for count in (0, 1, 2, 3, 30)] == [0, 0, 1, 1, 2]
    assert choose_heldout(keys, share=0.0, seed=0) == set()


def test_records_of_one_source_share_a_split(tmp_path):
    """The name of the source does not matter."""
    for name in ("here", "there"):
        records = [{"source": f"{name}/{n // 5}", "text": f"piece {n}"} for n in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    chosen = {}
    for name in ("here", "there"):
        sources, _ = found([tmp_path / f"{name}.jsonl"])
        held = heldout_sources(sources, share=0.2, seed=0)
        chosen[name] = {source.name.removeprefix(name) for source in sources if source.key in held}
        assert len(chosen[name]) == 4 and len(held) == 20
        assert not {source.name for source in sources if source.key not in held} & {name + n for n in chosen[name]}
    assert chosen["here"] == chosen["there"]


def test_script_follows_the_share_of_chinese():
    assert script_of("深度学习是 deep learning 的方法") == "chinese"
    assert script_of("One word of Chinese: 学习, the rest is not") == "latin"
    assert script_of("123 ...") == "latin"


def test_threads_keep_the_order_and_raise():
    assert list(in_order(lambda item: item * item, range(50), workers=4)) == [item * item for item in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // item, [1, 0, 1], workers=2))
