"""Which option a free-form answer means: its letter, else the text of one option.

MMBench (arXiv:2307.06281, section 4) looks for the letter, then for the option's text. VLMEvalKit
(`vlmeval/utils/matching_util.py`) and lmms-eval (`tasks/seedbench`) agree on the common forms. An answer that names no
option, or several, means none: nothing is guessed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

LETTER_LINE = "Answer with the option's letter from the given choices directly."
LETTER_LINE_CN = "请直接回答选项字母。"
WORD_LINE = "Answer the question using a single word or phrase."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARKS = " \t\r\n.,;:!?()[]{}<>*_`'\"#“”‘’、。"
_STATED = r"(?:answer|option|choice|select|choose|答案|选择|选项|选)(?:\s+(?:is|would be|should be|be)\b|是|为|应为)?"
_OPENING = r"[\s(\[*\"'“.:)\]、]*"
"""What may stand between a letter and its option's text."""

_SMALL = re.compile(r"\([a-z]\)|^[\s([*\"'“]*[a-z](?=[.):\]]+[*\s])")
"""A small letter that is as clear as a capital one: `(b)`, or `b.` at the beginning."""
_AFTER_LETTER = r"(?:or|and|because|since|as|is|but|due)\b"
"""Words before which `A` is a letter and no article."""


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Options by their letter."""
    return dict(zip(LETTERS, options))


def option_lines(options: Mapping[str, str]) -> str:
    """`A. text`, a line each."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def letter_of(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer means; None if it means none, or more than one."""
    text = _SMALL.sub(lambda found: found.group().upper(), unicodedata.normalize("NFKC", answer).strip())
    bare = text.strip(_MARKS)
    if len(bare) == 1 and bare.upper() in options:
        return bare.upper()
    if (exact := [letter for letter, option in options.items() if _plain(option) == _plain(text)]) and len(exact) == 1:
        return exact[0]
    letters = "".join(options)
    for found in (_stated(text, letters), _leading(text, options)):
        if len(found) == 1:
            return found.pop()
        if found:
            return None
    named = _by_text(text, options)
    # `Solution B is stronger` names the option with that text, and not option B.
    if named is not None and len(options[named]) > 1 and _standing_alone(options[named], letters):
        return named
    found = _standing_alone(_without_texts(text, options), letters)
    if found:
        return found.pop() if len(found) == 1 else None
    return named


def _stated(text: str, letters: str) -> set[str]:
    """Letters of the last statement such as `the answer is B` or `\\boxed{B}`."""
    after = rf"{_STATED}\s*[:]?\s*(?:(?:option|choice|letter|选项)\s*)?[\s(\[*\"'“]*([{letters}])(?![A-Za-z'])"
    found = [*re.finditer(rf"(?i:{after})|\\boxed\{{(?:\\text\{{)?([{letters}])\}}", text)]
    if not found:
        return set()
    letter = found[-1].group(1) or found[-1].group(2)
    end = found[-1].end()
    # `the answer is a dog` states no letter, `the answer is b.` does, and `the answer is A or B` two.
    if letter.islower() and not re.match(r"\W*$|[.):\]]+\s", text[end:]):
        return set()
    if letter == "A" and re.match(rf" (?!{_AFTER_LETTER})[a-z]", text[end:]):
        return set()
    more = re.match(rf"[)\]]*\s*(?:or|and|/|,|或|和)\s*[(\[]?([{letters}])(?![A-Za-z'])", text[end:])
    return {letter.upper(), more.group(1)} if more else {letter.upper()}


def _leading(text: str, options: Mapping[str, str]) -> set[str]:
    """The letter that an answer begins with, as in `B. a dog`; all that it lists in that form.

    Letters inside of the option's text, as in `B. Solution A`, or of an explanation do not count.
    """
    mark = rf"[\s(\[*\"'“]*([{''.join(options)}])\s*(?:[.):\]、*]|$)"
    first = re.match(mark, text, re.MULTILINE)
    if first is None:
        return set()
    rest = re.sub(rf"^{_OPENING}{_spelled(options[first.group(1)])}", "", text[first.end() :], flags=re.IGNORECASE)
    found = {first.group(1), *re.findall(rf"(?m)^(?:\s*(?:or|and|/|,|或|和))?{mark}(?!\w\.)", rest)}
    for letter, option in options.items():
        if re.search(rf"(?<![A-Za-z0-9]){letter}\s*[.):\]、*]{_OPENING}{_spelled(option)}", rest, re.IGNORECASE):
            found.add(letter)
    return found


def _standing_alone(text: str, letters: str) -> set[str]:
    """Letters that are words of their own; `A` before a lower-case word is an article."""
    found = set(re.findall(rf"(?<![A-Za-z0-9'])([{letters}])(?![A-Za-z0-9'])", text))
    if re.search(rf"(?<![A-Za-z0-9(])A (?!{_AFTER_LETTER})[a-z]", text) and not re.search(r"\(A\)|A[.):,]|A$", text):
        found.discard("A")
    return found


def _without_texts(text: str, options: Mapping[str, str]) -> str:
    """An answer without the options' texts, whose letters are no option's."""
    for option in sorted(options.values(), key=len, reverse=True):
        if len(option) > 1:
            text = re.sub(rf"(?<![A-Za-z0-9]){_spelled(option)}", " ", text, flags=re.IGNORECASE)
    return text


def _spelled(option: str) -> str:
    """A pattern for an option's text, whatever the white space."""
    words = unicodedata.normalize("NFKC", option).strip(_MARKS).split()
    return r"\s+".join(map(re.escape, words)) + r"(?![A-Za-z0-9])" if words else "(?!)"


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    """The option whose text occurs in an answer; a text inside another one that occurs does not count."""
    plain = _plain(text)
    if len(plain) > 2 * sum(map(len, options.values())) + 80:
        return None
    texts = {letter: _plain(option) for letter, option in options.items()}
    found = {letter: option for letter, option in texts.items() if option and _occurs(option, plain)}
    longest = [
        letter
        for letter, option in found.items()
        if not any(option != other and option in other for other in found.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _occurs(wanted: str, text: str) -> bool:
    """Whether a text occurs in another one, and is no part of a longer word or number."""
    sign = r"(?<!^[-\u2212])(?<!\s[-\u2212])" if wanted[0].isdigit() else ""
    before, after = rf"(?<![a-z0-9])(?<!\d[.,]){sign}", r"(?![a-z0-9])(?![.,]\d)"
    return re.search(before + re.escape(wanted) + after, text) is not None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_MARKS)
