"""Positions at which a long text can be divided for tokenization, with the ids of the whole text.

A library needs about 140 bytes of memory for each byte of a text that it tokenizes in one go. A long text is therefore
divided where the pre-tokenizer has a border in any case, and where the division moves no other border:

- After a line feed, if the pre-tokenizer first isolates line feeds: all later steps see one line at a time.
- Between a letter and a space or line feed, if a letter follows and the pre-tokenizer matches words. No match of the
  expressions listed here has a letter directly before white space, so none crosses that position. A lookahead meets
  white space or the end of the text there, which is the same to it.

A long word, such as Chinese without a line feed or a run of spaces, is divided between two characters of one kind. Each
side is still one word to the pre-tokenizer. A merge of a byte-pair model looks at nothing but the two parts that it
joins. So if a merge crosses the position, it also does when the two tokens beside it are tokenized alone. The position
counts only if these two stay apart.

Only steps for which this is proven are listed. With any other step the text stays whole, and its length is limited.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from megavl.config.errors import DataError

_PART = 32 << 10
"""Characters after which the next border is looked for."""
LONG = 4 * _PART
"""Characters of a long word."""
AHEAD = 1 << 10
"""Characters that show the first token after a position."""
_TRIES = 32
"""Positions of a long word that are tried in turn; tokens of spaces or equal letters have at most so many."""

_LETTERS = "A-Za-zА-ИК-Яа-ик-я一-龥가-힣"
"""Letters to every version of Unicode, which stay letters under each normal form."""
_LINE_END = r"\n"
_INSIDE = re.compile("|".join(f"(?<={kind}{kind})(?={kind}{kind})" for kind in ("[a-z]", "[A-Z]", "[一-龥]", " ")))
_WORD_END = rf"(?<=[{_LETTERS}])(?={{blank}}[{_LETTERS}])"
_BESIDE_LETTERS = r"\n -&(-@\[-`{-~"
"""ASCII without letters, control characters, and the apostrophe, which joins `'s` to a word."""
_LETTERS_END = rf"(?<=[A-Za-z])(?=[{_BESIDE_LETTERS}])"
_BLANK_BEFORE_WORD = r"(?<=[!-~])(?= [A-Za-z][\n -~])"
_PLAIN_WORD = rf" ?[A-Za-z]+(?=[{_BESIDE_LETTERS}])"

_WORDS = {
    r" ?\p{L}+",
    r"\s?\p{L}+",
    r"\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
}
"""Expressions, each an alternative of a pattern, that match every run of letters to its end."""
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PAIRS = ({_LOWER, _UPPER}, {f"{_LOWER}{_SUFFIX}?", f"{_UPPER}{_SUFFIX}?"})
"""Two expressions that do so together."""
_OTHERS = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _SUFFIX),
    *(r" ?\p{N}+", r"\p{N}+", r"\p{N}", r"\p{N}{1,3}", r"\p{Nd}", r"\d+", r"\d", r"[0-9]", r"[0-9][0-9][0-9]"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[\p{P}\p{S}]+[\r\n]*"),
    *(r"\s+(?!\S)", r"\s+", r"\s*[\r\n]+", r"[\r\n]", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"[一-龥぀-ゟ゠-ヿ]+"),
    *_PAIRS[0],
    *_PAIRS[1],
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
}
"""Further expressions without a match in which white space follows a letter."""
_FORMS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"}
"""Normalizers that change a character alone or with the marks after it, and leave white space alone."""


class TextTooLongError(DataError):
    """A text that would take too much memory, and cannot be tokenized in parts."""


def safe_borders(content: dict[str, Any]) -> re.Pattern[str] | None:
    """Borders for a parsed `tokenizer.json`, each at the end of a match; None if there are none."""
    if content["model"].get("dropout") or any(map(_looks_at_blanks, content.get("added_tokens") or [])):
        return None
    if any(step["type"] not in _FORMS for step in _steps(content.get("normalizer"), "normalizers")):
        return None
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    # What puts other characters in the place of the text's must come last: the expressions are proven for text.
    if any(step["type"] in ("ByteLevel", "Metaspace") for step in steps[:-1]):
        return None
    effects = [_effect(step) for step in steps]
    if None in effects:
        return None
    prefixed = _puts_blank_first(steps)
    borders = [_LINE_END] if effects[:1] == ["lines"] and not prefixed else []
    if "words" in effects:
        borders.append(_WORD_END.format(blank=" " if prefixed else r"[ \n]"))
    return re.compile("|".join(borders)) if borders else None


def word_borders(content: dict[str, Any]) -> str | None:
    """More borders, for a parsed `tokenizer.json` that has `safe_borders`: those between short words.

    Expressions without a width, of which each is proven alone:

    - On both sides of a line feed that the pre-tokenizer isolates first.
    - After letters, before another ASCII character. Some expression matches the letters to their end, and none goes on.
    - Before a space and a word, where the first expression that matches the word takes the space with it.

    Returns:
        Their union, or None if there are none.
    """
    if safe_borders(content) is None:
        return None
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    effects = [_effect(step) for step in steps]
    prefixed = _puts_blank_first(steps)
    # Added tokens that are looked for in the text come before the pre-tokenizer.
    names = [token["content"] for token in content.get("added_tokens") or [] if not token["special"]]
    ascii_only = all(map(str.isascii, names))
    borders = [r"(?<=\n)", r"(?=\n)"] if effects[0] == "lines" and not prefixed else []
    if "words" in effects:
        borders.append(_WORD_END.format(blank=" " if prefixed else r"[ \n]"))
        within = any(re.search(rf"(?!\A){_LETTERS_END}(?!\Z)", name) for name in names)
        if ascii_only and not prefixed and not within and any(map(_ends_letters, steps)):
            borders.append(_LETTERS_END)
        first = any(name[:1].isalpha() for name in names)
        if ascii_only and not first and _takes_blank(steps[effects.index("words")]):
            borders.append(_BLANK_BEFORE_WORD)
    return "|".join(reversed(borders))


def word_pattern(borders: str) -> re.Pattern[str]:
    """Matches each part of a text between two `word_borders`."""
    plain = f"{_PLAIN_WORD}|" if _LETTERS_END in borders else ""
    return re.compile(rf"{plain}.+?(?:{borders}|\Z)", re.DOTALL)


def divides_words(content: dict[str, Any]) -> bool:
    """Whether `inner_ends` holds for a parsed `tokenizer.json` that has `safe_borders`."""
    model, steps = content["model"], _steps(content.get("pre_tokenizer"), "pretokenizers")
    apart = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    return model.get("type") == "BPE" and steps[-1]["type"] == "ByteLevel" and not any(map(model.get, apart))


def parts(text: str, *, borders: re.Pattern[str] | None) -> Iterator[tuple[int, int]]:
    """Start and end of successive parts of a text."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > _PART and borders is not None and (found := borders.search(text, start + _PART)):
            end = found.end()
        yield start, end
        start = end


def inner_ends(word: str, *, start: int) -> Iterator[int]:
    """Positions to try as the end of the part of a long word that begins at `start`."""
    if len(word) - start <= 2 * _PART:
        yield len(word)
    else:
        yield from islice((found.start() for found in _INSIDE.finditer(word, start + _PART)), _TRIES)


def require_short(text: str, *, longest: int) -> str:
    """The text itself.

    Raises:
        TextTooLongError: it has more than `longest` bytes.
    """
    if len(text) > longest // 4 and (size := len(text.encode("utf-8"))) > longest:
        raise TextTooLongError(
            f"{size:,} bytes of text that this tokenizer can only take in one piece, above {longest:,}; "
            "divide the text into several records"
        )
    return text


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in order."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[key] for inner in _steps(part, key)]


def _puts_blank_first(steps: list[dict[str, Any]]) -> bool:
    """Whether a part without a blank at its start gets one."""
    return any(step.get("add_prefix_space") or step["type"] == "Metaspace" for step in steps)


def _looks_at_blanks(token: dict[str, Any]) -> bool:
    """Whether an added token that is matched in text holds white space or depends on what is beside it."""
    beside = token["lstrip"] or token["rstrip"] or token["single_word"]
    return not token["special"] and bool(beside or re.search(r"\s", token["content"]))


def _effect(step: dict[str, Any]) -> str | None:
    """What a pre-tokenizer separates: `words`, `lines` or `none`; None if a division could move its borders."""
    match step["type"]:
        case "ByteLevel":
            return "words" if step.get("use_regex", True) else "none"
        case "Metaspace":
            return "words" if step.get("split", True) else None
        case "Whitespace" | "WhitespaceSplit" | "BertPreTokenizer":
            return "words"
        case "Digits" | "Punctuation":
            return "none"
        case "Split" if step["behavior"] in ("Isolated", "Removed"):
            pattern = step["pattern"].get("Regex")
            if pattern == r"[\r\n]" and step["behavior"] == "Isolated":
                return "lines"
            found = set(_alternatives(pattern or ""))
            if found <= _WORDS | _OTHERS:
                return "words" if found & _WORDS or any(pair <= found for pair in _PAIRS) else "none"
    return None


def _ends_letters(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer has a border after each run of ASCII letters."""
    return step["type"] in ("Split", "ByteLevel") and _effect(step) == "words"


def _takes_blank(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer that separates words has a border before the one space in front of a word."""
    if step["type"] != "Split":
        return True
    found = set(_alternatives(step["pattern"]["Regex"]))
    return bool(found & (_WORDS - {r"\p{L}+"})) or any(pair <= found for pair in _PAIRS)


def _alternatives(pattern: str) -> Iterator[str]:
    """The alternatives of a regular expression, divided at the outer bars."""
    depth = start = position = 0
    inside = False
    while position < len(pattern):
        char = pattern[position]
        if char == "\\":
            position += 1
        elif inside:
            inside = char != "]"
        elif char == "[":
            inside = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            yield pattern[start:position]
            start = position + 1
        position += 1
    yield pattern[start:]
