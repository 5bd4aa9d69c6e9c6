"""Key phrases and numbers of a free-form answer, as the graders of MMMU and CMMMU extract them.

Sources: MMMU's `eval/eval_utils.py` and CMMMU's `eval/cmmmu_util.py` (as in lmms-eval, `tasks/mmmu` and `tasks/cmmmu`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")


def key_phrases(sentences: Sequence[str], *, indicators: Sequence[str]) -> list[str]:
    """What follows the last indicator word of each sentence, the shortest of them; all text where none has one.

    In the last sentence `=` indicates too, because an answer may be a formula alone.
    """
    found = []
    for number, sentence in enumerate(sentences):
        words = (*indicators, "=") if number == len(sentences) - 1 else tuple(indicators)
        tails = [sentence.split(word)[-1].strip() for word in words if word in sentence]
        shortest = min((tail for tail in tails if tail), key=len, default="")
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    return found


def numbers_in(text: str, *, comma: str = ",") -> list[str]:
    """Numbers with separators of thousands, in scientific notation, and plain ones."""
    separated = rf"-?\b\d{{1,3}}(?:{comma}\d{{3}})+\b"
    scientific = r"-?\d+(?:\.\d+)?[eE][+-]?\d+"
    plain = rf"(?<![\d.])(?<!\d{comma})-?(?:\d+\.\d+|\.\d+|\d+(?!\d))(?![eE][+-]?\d)(?!{comma}?\d)"
    return [*re.findall(separated, text), *re.findall(scientific, text), *re.findall(plain, text)]


def number_of(text: str) -> float | None:
    """A number rounded to two decimals; None if the text is no number, or not a finite one."""
    try:
        value = float(re.sub("[,\uff0c]", "", text.strip()))
    except ValueError:
        return None
    return round(value, 2) if abs(value) < float("inf") else None


def matches(found: Iterable[str], answers: Iterable[str], *, as_text: Callable[[str], list[str]]) -> bool:
    """Whether a phrase holds a right text, or is a right number.

    Args:
        found: phrases and numbers of the answer.
        answers: right ones.
        as_text: the forms in which a text is compared; empty where it counts for nothing.
    """
    texts = [form for one in found if number_of(one) is None for form in as_text(one)]
    numbers = {number for one in found if (number := number_of(one)) is not None}
    for answer in answers:
        number = number_of(answer)
        if number is not None and number in numbers:
            return True
        if number is None and any(form in text for form in as_text(answer) for text in texts):
            return True
    return False
