"""An error gives one message and the right exit code, and leaves no files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import build_corpus
from data_tools.corpus.demo import picture_set

TINY = ["--samples", "3", "--heldout", "4"]


def run(capsys, *arguments):
    """Exit code and standard error of one command."""
    code = build_corpus.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["shapes"], "--output"),
        (["shapes", "--output", "x", "--samples", "0"], "'0' is out of range; give a whole number from 1"),
        (["shapes", "--output", "x", "--samples", "many"], "'many' is out of range"),
        (["shapes", "--output", "x", "--level", "brutal"], "invalid choice: 'brutal'"),
        (["demo", "--output", "x", "--vocab-size", "100"], "from 260"),
        (["demo", "--output", "x", "--seed", "-1"], "'-1' is out of range"),
    ],
)
def test_a_wrong_command_line_gives_one_message(capsys, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    code, message = run(capsys, *arguments)
    assert code == 2 and expected in message and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_only_force_replaces_an_earlier_result(capsys, tmp_path):
    output = tmp_path / "out"
    assert run(capsys, "charts", "--output", output, *TINY)[0] == 0
    before = (output / "captions.jsonl").read_bytes()
    code, message = run(capsys, "charts", "--output", output, *TINY, "--seed", 1)
    assert code == 2 and f"--output {output}: the folder is not empty" in message and "--force" in message
    assert (output / "captions.jsonl").read_bytes() == before
    assert run(capsys, "charts", "--output", output, *TINY, "--seed", 1, "--force")[0] == 0
    assert (output / "captions.jsonl").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_two_builds_at_once_the_second_is_refused(capsys, monkeypatch, tmp_path):
    assert run(capsys, "charts", "--output", tmp_path / "alone", *TINY)[0] == 0
    second, add_training = [], picture_set.PictureSet.add_training

    def add_while_another_starts(self, mix, *, count):
        if not second:
            second.append(None)
            second[0] = run(capsys, "charts", "--output", tmp_path / "shared", *TINY, "--seed", 1, "--force")
        return add_training(self, mix, count=count)

    monkeypatch.setattr(picture_set.PictureSet, "add_training", add_while_another_starts)
    assert run(capsys, "charts", "--output", tmp_path / "shared", *TINY)[0] == 0
    code, message = second[0]
    assert code == 2 and "error: --output: " in message and "is in use by another process" in message, message
    first, alone = ((tmp_path / name / "captions.jsonl").read_bytes() for name in ("shared", "alone"))
    assert first == alone and sorted(path.name for path in tmp_path.iterdir()) == ["alone", "shared"]


def test_force_never_removes_a_foreign_folder(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    code, message = run(capsys, "charts", "--output", tmp_path / "mine", *TINY, "--force")
    assert code == 2 and "--force replaces earlier results only" in message
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"


def test_a_file_is_not_an_output_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, message = run(capsys, "charts", "--output", tmp_path / "file", *TINY)
    assert code == 2 and "is not a folder" in message
    code, message = run(capsys, "charts", "--output", tmp_path / "file/inside", *TINY)
    assert code == 5 and "choose a writable folder" in message


def test_a_failed_build_leaves_no_files(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(picture_set.PictureSet, "add_training", lambda self, mix, *, count: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(capsys, "charts", "--output", tmp_path / "out", *TINY)
    assert list(tmp_path.iterdir()) == []


def test_too_few_different_pictures_is_an_error(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(picture_set.random, "Random", lambda seed: FixedRandom(0))
    code, message = run(capsys, "charts", "--output", tmp_path / "out", *TINY)
    assert code == 3 and "no new picture" in message and "--samples" in message
    assert list(tmp_path.iterdir()) == []


class FixedRandom(picture_set.random.Random):
    """Draws the same picture every time."""

    def uniform(self, a, b):
        return a

    def randint(self, a, b):
        return a

    def choice(self, values):
        return values[0]

    def sample(self, values, k):
        return list(values)[:k]

    def shuffle(self, values):
        return None


def test_a_tokenizer_is_trained_from_files(capsys, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "some words about words " * 50}) + "\n")
    talks = [{"id": 1, "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This"}]}]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    output = tmp_path / "tokenizer"
    command = ["tokenizer", "--output", output, "--input", tmp_path / "text.jsonl", tmp_path / "talks.json"]
    assert run(capsys, *command, "--vocab-size", 600)[0] == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert run(capsys, *command)[0] == 2
    assert run(capsys, *command, "--force")[0] == 0


def test_a_tokenizer_is_trained_from_a_table(capsys, tmp_path):
    words = "some words about words " * 50
    images = pa.array(
        [{"bytes": b"", "path": "gone.png"}] * 2, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": images, "caption": [words, None]}), tmp_path / "in.parquet")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": words}))
    for name in ("in.parquet", "text.jsonl"):
        assert run(capsys, "tokenizer", "--output", tmp_path / name[:2], "--input", tmp_path / name)[0] == 0
    assert (tmp_path / "in/tokenizer.json").read_bytes() == (tmp_path / "te/tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ('{"text": "a"}\n{"text": \n', ":2: not valid JSON"),
        ('{"words": "a"}\n', ":1: of no known format (keys words)"),
        ("[3]", ":1: of no known format (a int)"),
        ("", "holds no text"),
    ],
)
def test_bad_tokenizer_input_is_named(capsys, tmp_path, content, expected):
    source = tmp_path / "input.jsonl"
    if content is not None:
        source.write_text(content)
    code, message = run(capsys, "tokenizer", "--output", tmp_path / "out", "--input", source)
    assert code == 3 and str(source) in message and expected in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
