"""The demo corpus, built by its command at a small size."""

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data_tools import build_corpus
from data_tools.corpus.demo.build import TEXT_ONLY_SHARE
from data_tools.corpus.demo.details import LEVELS as DETAILS
from data_tools.corpus.demo.picture_set import FAMILIES
from megavl.data.tokenizer import open_tokenizer

ROOT = Path(__file__).parents[4]
SMALL = ["--samples", "150", "--heldout", "20", "--size", "250000"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "demo"
    command = [sys.executable, "data_tools/build_corpus.py", "demo", "--output", str(folder), *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    assert build_corpus.main(["demo", "--output", str(tmp_path / "again"), *SMALL]) == 0
    files = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    assert [name for name in files if digest(corpus / name) != digest(tmp_path / "again" / name)] == []


def test_another_seed_gives_another_corpus(corpus, tmp_path):
    assert build_corpus.main(["ocr", "--output", str(tmp_path / "a"), "--samples", "5", "--heldout", "4"]) == 0
    arguments = ["ocr", "--output", str(tmp_path / "b"), "--samples", "5", "--heldout", "4", "--seed", "1"]
    assert build_corpus.main(arguments) == 0
    names = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*-000000.png"))]
    assert names and all((tmp_path / "b" / name).is_file() for name in names)
    assert lines(tmp_path / "a/captions.jsonl") != lines(tmp_path / "b/captions.jsonl")


def test_the_description_counts_the_records(corpus):
    description = json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))
    records = description["records"]
    assert description["kind"] == "demo" and description["seed"] == 0 and description["chance"] == 0.25
    assert records["captions.jsonl"] == len(lines(corpus / "captions.jsonl")) == 150
    assert records["text.jsonl"] == len(lines(corpus / "text.jsonl")) > 5
    assert records["eval.jsonl"] == len(lines(corpus / "eval.jsonl")) == 20 * 7
    assert records["eval_hard.jsonl"] == len(lines(corpus / "eval_hard.jsonl")) == 20 * 7
    assert records["conversations.json"] == len(json.loads((corpus / "conversations.json").read_text(encoding="utf-8")))
    assert sum(source["bytes"] for source in description["text"].values()) >= 250_000
    assert str(corpus) not in json.dumps(description)


def test_training_and_heldout_images_are_disjoint(corpus):
    training = {digest(path) for path in (corpus / "images/train").iterdir()}
    heldout = {digest(path) for path in (corpus / "images/heldout").iterdir()}
    assert len(training) == 150 and len(heldout) == 280
    assert not training & heldout
    used = {record["image"] for record in lines(corpus / "captions.jsonl")}
    talks = json.loads((corpus / "conversations.json").read_text(encoding="utf-8"))
    used |= {talk["image"] for talk in talks if "image" in talk}
    assert {Path(name).parent.as_posix() for name in used} == {"images/train"}
    sizes = Counter(Image.open(corpus / name).size for name in used)
    assert len(sizes) >= 4 and any(width != height for width, height in sizes)


def test_conversations_are_llava_records(corpus):
    talks = json.loads((corpus / "conversations.json").read_text(encoding="utf-8"))
    questions = {q.text: q for levels in FAMILIES.values() for level in levels.values() for q in level.questions}
    text_only = [talk for talk in talks if "image" not in talk]
    assert len(text_only) == round(150 * TEXT_ONLY_SHARE) and len({talk["id"] for talk in talks}) == len(talks)
    lengths = set()
    for talk in talks:
        turns = talk["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert sum(turn["value"].count("<image>") for turn in turns) == ("image" in talk)
        if "image" in talk:
            lengths.add(len(turns) // 2)
            assert turns[0]["value"].startswith("<image>") and (corpus / talk["image"]).is_file()
            for asked, told in zip(turns[::2], turns[1::2], strict=True):
                assert told["value"] in questions[asked["value"].removeprefix("<image>")].values
    assert lengths == {1, 2, 3}


@pytest.mark.parametrize("name", ["eval.jsonl", "eval_hard.jsonl"])
def test_questions_need_the_picture(corpus, name):
    tasks = lines(corpus / name)
    asked = {q.text for levels in FAMILIES.values() for level in levels.values() for q in level.questions}
    best = Counter()
    for kind in {task["kind"] for task in tasks}:
        same = [task for task in tasks if task["kind"] == kind]
        assert len({task["prompt"] for task in same}) == 1
        by_position = Counter(task["answer"] for task in same)
        by_value = Counter(task["choices"][task["answer"]] for task in same)
        best["position"] += max(by_position.values())
        best["value"] += max(by_value.values())
    assert max(best.values()) / len(tasks) <= 0.25 + 0.05
    for task in tasks:
        assert task["prompt"].count("<image_placeholder>") == 1
        assert task["prompt"].removeprefix("<image_placeholder>") in asked
        assert len(set(task["choices"])) == 4 and 0 <= task["answer"] < 4
        assert [(corpus / image).is_file() for image in task["images"]] == [True]


def test_the_next_picture_does_not_help(corpus):
    """Answers taken from the picture of the next question stay near chance."""
    tasks = lines(corpus / "eval.jsonl")
    others = [*tasks[1:], tasks[0]]
    right = [
        1.0 if other["choices"][other["answer"]] == task["choices"][task["answer"]] else 0.0
        for task, other in zip(tasks, others, strict=True)
        if other["choices"][other["answer"]] in task["choices"]
    ]
    assert len(right) >= 15 and sum(right) / len(right) <= 0.25 + 0.25


def test_tokenizer_loads_in_transformers(corpus):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids("<image_placeholder>") == 3 == tokenizer.image_token_id
    assert len(tokenizer) == 1024
    assert tokenizer.unk_token is None
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    ids = tokenizer("<image_placeholder>Which shape is it?")["input_ids"]
    assert ids[:2] == [1, 3] and ids[-1] != 2
    for text in ("naïve  café\t42\r\n世界 🙂", *(record["text"] for record in lines(corpus / "text.jsonl"))):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_agrees_with_the_training_reader(corpus):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(corpus / "tokenizer")
    ours = open_tokenizer(corpus / "tokenizer")
    assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.image_id, ours.vocab_size) == (0, 1, 2, 3, 1024)
    for record in lines(corpus / "text.jsonl")[:20]:
        assert ours.encode(record["text"]) == theirs.encode(record["text"], add_special_tokens=False)


def test_answers_are_single_tokens(corpus):
    tokenizer = open_tokenizer(corpus / "tokenizer")
    for levels in FAMILIES.values():
        for level in levels.values():
            for question in level.questions:
                assert len(tokenizer.encode(question.text)) == len(question.text.split()) + 1
                for value in question.values:
                    assert len(tokenizer.encode(f" {value}")) == 1, value
    assert len(tokenizer.encode("User:")) == len(tokenizer.encode("Assistant:")) == 2


def test_larger_corpus_has_details_and_held_out_text(corpus, tmp_path):
    options = [*SMALL, "--details", "--heldout-text", "20000", "--side", "48"]
    assert build_corpus.main(["demo", "--output", str(tmp_path / "more"), *options]) == 0
    more = tmp_path / "more"
    records = json.loads((more / "corpus.json").read_text(encoding="utf-8"))["records"]
    kinds = Counter(task["kind"] for task in lines(more / "eval_detail.jsonl"))
    assert kinds == {"detail-letter": 20, "detail-shape": 20} and records["eval_detail.jsonl"] == 40
    kept, trained = ({line["text"] for line in lines(more / name)} for name in ("text_heldout.jsonl", "text.jsonl"))
    assert sum(len(text.encode()) for text in kept) >= 20_000 and not kept & trained
    assert any("details-" in record["image"] for record in lines(more / "captions.jsonl"))
    assert max(max(Image.open(path).size) for path in (more / "images/heldout").iterdir()) == 48
    # The same questions, so that a smaller corpus of the same seed is a fair control.
    assert lines(more / "eval.jsonl") == lines(corpus / "eval.jsonl")
    tokenizer = open_tokenizer(more / "tokenizer")
    for task in lines(more / "eval_detail.jsonl"):
        assert all(len(tokenizer.encode(f" {choice}")) == 1 for choice in task["choices"])


def test_smaller_images_leave_every_record_as_it_is(corpus, tmp_path):
    low = tmp_path / "low"
    assert build_corpus.main(["demo", "--output", str(low), *SMALL, "--side", "48"]) == 0
    for name in ("conversations.json", "captions.jsonl", "text.jsonl", "eval.jsonl", "eval_hard.jsonl"):
        assert (low / name).read_bytes() == (corpus / name).read_bytes(), name
    side = max(max(Image.open(path).size) for path in (low / "images/train").iterdir())
    assert side == 48 < max(max(Image.open(path).size) for path in (corpus / "images/train").iterdir())


def test_small_marks_are_small():
    for level in DETAILS.values():
        (question,) = level.questions
        for value in question.values:
            picture = level.draw(random.Random(value), {question.kind: value})
            dark = picture.image.convert("L").point(lambda grey: 255 * (grey < 128))
            left, top, right, bottom = dark.getbbox()
            assert 0.03 <= max(right - left, bottom - top) / min(picture.image.size) <= 0.1, value
            assert picture.answers == {question.kind: value} and value in picture.caption
