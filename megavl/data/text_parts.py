"""Places at which a long text can be tokenized in parts, with the ids of the whole text.

A library needs about 140 bytes of memory for each byte of a text that it tokenizes in one go. A long text is
therefore cut where the pre-tokenizer has a border in any case, and where the cut moves no other border:

- After a line feed, if the pre-tokenizer first isolates line feeds: all later steps see one line at a time.
- Between a letter and a space or line feed, if a letter follows and the pre-tokenizer matches words. No match of the
  expressions listed here has a letter directly before white space, so none crosses the cut. A lookahead meets white
  space or the end of the text there, which is the same to it.

Only steps for which this is proven are listed. With any other step the text stays whole, and its length is limited.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megavl.config.errors import DataError

_PART = 32 << 10
"""Characters after which the next place is looked for."""
LONGEST_PART = 2 << 20
"""Most bytes of UTF-8 without a place; a library takes about 140 bytes of memory for each."""

_LETTERS = "A-Za-zА-ИК-Яа-ик-я一-龥가-힣"
"""Letters to every version of Unicode, which stay letters under each normal form."""
_LINE_END = r"\n"
_WORD_END = rf"(?<=[{_LETTERS}])(?={{blank}}[{_LETTERS}])"

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


def safe_places(content: dict[str, Any]) -> re.Pattern[str] | None:
    """Where a text may be cut for a parsed `tokenizer.json`: at the end of each match; None if nowhere."""
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
    prefixed = any(step.get("add_prefix_space") or step["type"] == "Metaspace" for step in steps)
    places = [_LINE_END] if effects[:1] == ["lines"] and not prefixed else []
    if "words" in effects:
        places.append(_WORD_END.format(blank=" " if prefixed else r"[ \n]"))
    return re.compile("|".join(places)) if places else None


def parts(text: str, *, places: re.Pattern[str] | None) -> Iterator[tuple[int, int]]:
    """Start and end of successive parts of a text.

    Raises:
        DataError: a part would be longer than LONGEST_PART.
    """
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > _PART and places is not None and (found := places.search(text, start + _PART)):
            end = found.end()
        if end - start > LONGEST_PART // 4 and (size := len(text[start:end].encode("utf-8"))) > LONGEST_PART:
            raise DataError(
                f"{size:,} bytes of text that this tokenizer can only take in one piece, above {LONGEST_PART:,}; "
                "divide the text into several records"
            )
        yield start, end
        start = end


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in order."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[key] for inner in _steps(part, key)]


def _looks_at_blanks(token: dict[str, Any]) -> bool:
    """Whether an added token that is matched in text holds white space or depends on what is beside it."""
    beside = token["lstrip"] or token["rstrip"] or token["single_word"]
    return not token["special"] and bool(beside or re.search(r"\s", token["content"]))


def _effect(step: dict[str, Any]) -> str | None:
    """What a pre-tokenizer separates: `words`, `lines` or `none`; None if a cut could move its borders."""
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
