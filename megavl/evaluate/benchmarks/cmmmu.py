"""CMMMU: Chinese questions of 30 subjects, to choose, to judge and to fill in; Parquet files.

Source: CMMMU-Benchmark/CMMMU, `eval/cmmmu_util.py`, as in lmms-eval, `tasks/cmmmu`. There are two differences. A
judgement that is neither true nor false is a failed parse, where the original draws one at random. And `不正确` is
false, where the original finds `正确` in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from megavl.data.template import IMAGE_TAG
from megavl.evaluate.benchmarks.files import benchmark_files, read_rows
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.letters import LETTER_LINE_CN, lettered
from megavl.evaluate.benchmarks.row import Row
from megavl.evaluate.benchmarks.sentences import key_phrases, matches, number_of, numbers_in
from megavl.generate.prompt import ImageSource

CHOOSE, JUDGE, FILL = "选择", "判断", "填空"
_LINES = {
    CHOOSE: f"请从给出的选项中选出正确答案。{LETTER_LINE_CN}",
    JUDGE: "请判断题目中的说法是否正确。请直接回答“对”或“错”。",
    FILL: "请根据题目和图片填写答案。请直接给出答案。",
}
_FILL_INDICATORS = ("是", "为", "所以", "等于", "方案", "选择", "正确答案", "因此", "最后", "答案", "结果")
_JUDGE_INDICATORS = ("是", "为", "所以", "判断", "陈述", "说法", "表达", "答案", "结果")
_FALSE = ("不对", "错误", "不正确", "不准确", "不合适", "否定", "错的", "错")
_TRUE = ("正确", "准确", "肯定", "对")
_AMBIGUOUS = ("对错", "是否正确", "否正确", "或者", "是否", "正确性", "对不")
_MAX_IMAGES = 5


def read(where: str) -> Iterator[Item]:
    """Questions of a file, of a folder of Parquet files of one split, or of a pattern."""
    for path in benchmark_files(where, names=("*.parquet",), several=True):
        yield from map(_item, read_rows(path))


def _item(row: Row) -> Item:
    type_ = row.text("type")
    if type_ not in _LINES:
        raise row.error(f"type: {type_[:20]!r} is none of {', '.join(_LINES)}")
    answer = row.text("answer")
    if type_ == CHOOSE:
        answer = "".join(sorted(re.sub(r"[\s,，、]", "", answer)))
    options = _options(row) if type_ == CHOOSE else {}
    choices: Sequence[str] = {CHOOSE: tuple(options), JUDGE: ("对", "错"), FILL: ()}[type_]
    if type_ == JUDGE and answer not in choices:
        raise row.error(f"answer: {answer[:20]!r} is neither 对 nor 错")
    if type_ == CHOOSE and not set(answer) <= set(options):
        raise row.error(f"answer: {answer[:20]!r} names options that are none of {', '.join(options)}")
    lines = [f"({letter}) {text}" for letter, text in options.items()]
    body = "\n".join([f"问题:{row.text('question')}", *(["选项:", *lines] if lines else []), _LINES[type_]])
    prompt, images = _with_images(row, body)
    return Item(
        id=row.text("id"),
        location=row.location,
        prompt=prompt,
        images=images,
        options=options,
        answer=answer,
        answers=(answer,),
        # Questions with several right options have no letter that is right alone.
        choices=tuple(choices) if answer in choices else (),
        kind=row.optional("subcategory", "category") or type_,
        details={"type": type_},
    )


def _options(row: Row) -> dict[str, str]:
    texts = [row.optional(f"option{number}") for number in range(1, 5)]
    given = [text for text in texts if text]
    if len(given) < 2 or texts[: len(given)] != given:
        raise row.error(f"option1 to option4: {texts} must be two or more texts without a gap")
    return lettered(given)


def _with_images(row: Row, text: str) -> tuple[str, tuple[ImageSource, ...]]:
    """The text with its images where `<img="NAME">` names them first."""
    images: list[ImageSource] = []
    for number in range(1, _MAX_IMAGES + 1):
        if not row.has(f"image_{number}"):
            continue
        mark = f'<img="{row.optional(f"image_{number}_filename")}">'
        if mark in text:
            text = text.replace(mark, f"\0{number}", 1).replace(mark, f"图片 {number}")
    if unknown := re.search(r'<img="([^"]*)">', text):
        raise row.error(f"names image {unknown.group(1)[:60]!r}, which is in none of its columns image_1 to image_5")
    for number in re.findall("\0(\\d)", text):
        images.append(row.image(f"image_{number}"))
    return re.sub("\0\\d", IMAGE_TAG, text), tuple(images)


def parse(item: Item, answer: str) -> str | None:
    """Letters in the order of the options, 对 or 错, or phrases and numbers, a line each."""
    kind = item.details["type"]
    if kind == CHOOSE:
        return _letters(answer, item)
    if kind == JUDGE:
        return _judgement(answer)
    text = answer.strip("。").strip()
    phrases = key_phrases(re.split(r"。|\n", text), indicators=_FILL_INDICATORS) or [text]
    found = [part for one in phrases for part in (one.replace("\n", " "), *numbers_in(one, comma="[,\uff0c]"))]
    return "\n".join(dict.fromkeys(part for part in found if part.strip())) or None


def is_right(item: Item, prediction: str) -> bool:
    """Equal letters or judgements; a filled-in answer must hold the right text, or the right number to two decimals."""
    if item.details["type"] != FILL:
        return prediction == item.answer
    (answer,) = item.answers

    def as_text(text: str) -> list[str]:
        # A long text would hold any short answer.
        long = len(text) > len(answer) + 20 or _latin(text) > _latin(answer) + 2
        return [] if long and number_of(answer) is None else [text.strip()]

    return matches(prediction.split("\n"), item.answers, as_text=as_text)


def _letters(answer: str, item: Item) -> str | None:
    """The options named most often, in brackets if any is, else as letters, else by their text."""
    counts = {letter: answer.count(f"({letter})") + answer.count(f"\uff08{letter}\uff09") for letter in item.options}
    if not any(counts.values()):
        counts = {letter: answer.count(letter) for letter in item.options}
    if not any(counts.values()):
        counts = {letter: answer.count(text) for letter, text in item.options.items()}
    most = max(counts.values(), default=0)
    return "".join(letter for letter, count in counts.items() if count == most) if most else None


def _judgement(answer: str) -> str | None:
    text = answer.strip("。").strip()
    found = {True: 0, False: 0}
    for phrase in key_phrases(re.split(r"。|\n", text), indicators=_JUDGE_INDICATORS) or [text]:
        if any(word in phrase for word in _AMBIGUOUS):
            continue
        if any(word in phrase for word in _FALSE):
            found[False] += 1
        elif any(word in phrase for word in _TRUE):
            found[True] += 1
    if found[True] == found[False]:
        return None
    return "对" if found[True] > found[False] else "错"


def _latin(text: str) -> int:
    return len(re.findall("[A-Za-z]", text))
