"""Scenes: phrases are readable, do not overlap, are in the record, and never in both splits."""

import json
import random
from importlib.util import find_spec
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from data_tools import build_corpus
from data_tools.corpus.pairs.fonts import find_faces, font_folders, supports_chinese, supports_latin
from data_tools.corpus.pairs.scenetext import drawing
from data_tools.corpus.pairs.scenetext.background import draw_background
from data_tools.corpus.pairs.scenetext.phrases import MAX_PHRASE_CHARACTERS, phrases_of
from data_tools.readers.formats import FORMATS

pytestmark = pytest.mark.skipif(not find_spec("fontTools"), reason="needs megavl[corpus]")
TEXT = (
    "The quick brown fox (not the red one) paid 35% more, i.e. £7.50, for a pair of jumping shoes: size 42!\n"
    + "\n".join(
        f"Platform {n} leads to gate {n * 3}, please mind the {word} between stops."
        for n, word in enumerate(("gap", "cat", "step"))
    )
)


@pytest.fixture(scope="module")
def faces():
    return [face for face in find_faces(font_folders([])) if not face.is_placeholder]


def build(output, source, *options):
    return build_corpus.main(["scenetext", "--output", str(output), "--input", str(source), "--side", "320", *options])


def records(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "text.txt").write_text(TEXT)
    assert build(folder / "out", folder / "text.txt", "--samples", "40", "--heldout-share", "0.25") == 0
    return folder / "out"


def test_records_name_the_phrases_in_the_image(corpus):
    both = {split: records(corpus, split) for split in ("train", "heldout")}
    assert (len(both["train"]), len(both["heldout"])) == (30, 10)
    phrases = {split: {box["text"] for record in found for box in record["boxes"]} for split, found in both.items()}
    assert len(phrases["train"]) > 10 and not phrases["train"] & phrases["heldout"]
    assert phrases["train"] | phrases["heldout"] <= set(phrases_of(TEXT, script="latin"))
    for record in both["train"] + both["heldout"]:
        assert record["category"] == "recognition/ocr/printed"
        image = Image.open(corpus / record["image"])
        assert image.format == "JPEG" and max(image.size) <= 320
        assert record["text"].split("\n") == [box["text"] for box in record["boxes"]]
        for box in record["boxes"]:
            assert all(0 <= x <= image.width and 0 <= y <= image.height for x, y in box["quad"])
        picture, text = FORMATS["caption"].read(record).parts
        assert picture.name == record["image"] and text == record["text"]
    assert len({record["background_id"] for record in both["train"]}) >= 4


def test_same_bytes_with_any_number_of_workers(corpus, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--samples", "40", "--heldout-share", "0.25", "--workers", "1"]
    assert build(tmp_path / "again", tmp_path / "text.txt", *options) == 0
    names = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert [name for name in names if (corpus / name).read_bytes() != (tmp_path / "again" / name).read_bytes()] == []
    assert build(tmp_path / "other", tmp_path / "text.txt", *options, "--seed", "1") == 0
    assert (tmp_path / "other/train.jsonl").read_bytes() != (corpus / "train.jsonl").read_bytes()


def extremes(image, quad):
    """5th and 95th percentile of the luminance inside a phrase's bounds, computed here from the pixels."""
    xs, ys = zip(*quad, strict=True)
    part = np.asarray(image.crop((int(min(xs)), int(min(ys)), int(max(xs)) + 1, int(max(ys)) + 1)), float) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def test_phrases_do_not_overlap_and_have_contrast(faces):
    latin = [face for face in faces if supports_latin(face)]
    drawn = 0
    for seed in range(12):
        rng = random.Random(seed)
        _, image = draw_background(rng, (480, 400))
        before = image.copy()
        phrases = drawing.draw_phrases(rng, image, ["Exit 42", "mind the gap", "Tickets", "no smoking"], faces=latin)
        drawn += len(phrases)
        for one, other in combinations(phrases, 2):
            left, top, right, bottom = one.bounds
            assert (
                right <= other.bounds[0]
                or other.bounds[2] <= left
                or bottom <= other.bounds[1]
                or other.bounds[3] <= top
            )
        for one in phrases:
            after, ground = extremes(image, one.quad), extremes(before, one.quad)
            changed = np.abs(after - ground) > 0.01
            assert changed.mean() > 0.05
            # The brightest and the darkest pixels differ by about MIN_CONTRAST at least.
            low, high = np.percentile(after, (1, 99))
            assert (high + 0.05) / (low + 0.05) >= 0.9 * drawing.MIN_CONTRAST
    assert drawn >= 30


def test_contrast_follows_wcag():
    white, black, grey = drawing._luminance(np.array([[255, 255, 255], [0, 0, 0], [119, 119, 119]], float))
    assert drawing.contrast(white, black) == pytest.approx(21.0)
    assert drawing.contrast(white, grey) == pytest.approx(4.48, abs=0.01)
    assert drawing._readable(random.Random(0), 0.0, 1.0) is None


def test_reading_order_is_by_row_then_column():
    def at(text, x, y):
        return drawing.DrawnPhrase(text=text, quad=((x, y), (x + 50, y), (x + 50, y + 20), (x, y + 20)))

    mixed = [at("d", 200, 95), at("b", 120, 8), at("c", 10, 90), at("a", 0, 0), at("e", 0, 200)]
    assert "".join(one.text for one in drawing.in_reading_order(mixed)) == "abcde"


def test_phrases_are_short_and_stripped():
    found = list(phrases_of(TEXT, script="latin"))
    words = " ".join(found).split()
    assert {"35%", "£7.50", "i.e", "fox", "42"} <= set(words) and not {"(not", "one)", "42!"} & set(words)
    assert max(map(len, found)) <= MAX_PHRASE_CHARACTERS and len({len(phrase.split()) for phrase in found}) == 4
    chinese = list(phrases_of("深度学习（Deep Learning）是机器学习的一个分支。好。", script="chinese"))
    assert "".join(chinese) == "深度学习是机器学习的一个分支"[: len("".join(chinese))] and all(
        2 <= len(p) <= 8 for p in chinese
    )


def test_chinese_scenes_have_chinese_questions(tmp_path, faces):
    if not any(supports_chinese(face) for face in faces):
        pytest.skip("no Chinese font here (Debian: apt install fonts-wqy-microhei)")
    (tmp_path / "a.txt").write_text(
        "深度学习是机器学习的一个分支，它试图使用多个处理层对数据进行高层抽象。小心地滑，请勿吸烟。"
    )
    (tmp_path / "b.txt").write_text(TEXT)
    assert build(tmp_path / "out", tmp_path, "--samples", "12", "--records", "llava") == 0
    found = records(tmp_path / "out", "train")
    assert {record["script"] for record in found} == {"chinese", "latin"}
    for record in found:
        asked, told = FORMATS["llava"].read(record).turns
        chinese = record["script"] == "chinese"
        assert ("图" in asked.text) == chinese and ("\u4e00" <= told.text[0] <= "\u9fff") == chinese


def test_backgrounds_come_from_the_given_folder(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "photos").mkdir()
    options = ["--samples", "4", "--heldout-share", "0.25", "--backgrounds", str(tmp_path / "photos")]
    assert build(tmp_path / "out", tmp_path / "text.txt", *options) == 2
    assert "photos: holds no .jpg" in capsys.readouterr().err
    for name, size in (("large.png", (900, 700)), ("small.png", (60, 50))):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "photos" / name)
    assert build(tmp_path / "out", tmp_path / "text.txt", *options) == 0
    record = records(tmp_path / "out", "train")[0]
    red, green, _ = Image.open(tmp_path / "out" / record["image"]).resize((1, 1)).getpixel((0, 0))
    (heldout,) = records(tmp_path / "out", "heldout")
    assert {record["background_id"], heldout["background_id"]} == {"large.png", "small.png"} and red > green
    assert len({record["background_id"] for record in records(tmp_path / "out", "train")}) == 1
    (tmp_path / "photos/broken.png").write_bytes(b"no image")
    (tmp_path / "photos/large.png").unlink()
    (tmp_path / "photos/small.png").unlink()
    assert build(tmp_path / "new", tmp_path / "text.txt", *options) == 3
    assert "broken.png" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_single_phrase_cannot_be_held_out(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Exit")
    assert build(tmp_path / "out", tmp_path / "text.txt") == 3
    assert "--heldout-share 0" in capsys.readouterr().err
    assert build(tmp_path / "out", tmp_path / "text.txt", "--samples", "2", "--heldout-share", "0") == 0
