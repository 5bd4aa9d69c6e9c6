"""Whether two tokenizers give the same ids, so that weights trained with the one fit data prepared with the other."""

from __future__ import annotations

import json
from typing import Any

from megavl.data.tokenizer import HuggingFaceTokenizer, Tokenizer

_SECTIONS = ("model", "normalizer", "pre_tokenizer")
"""Parts of a `tokenizer.json` that decide about ids; its post-processor and decoder do not."""
_SAMPLE = "The sum of 12,345 and 0.5:\n\n  for i in range(3): print(f'{i} × ½')\t«Größe» 图像 изображение 🙂"


def difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """The first difference that changes ids, in words with the first tokenizer's value first; None if there is none."""
    for role in ("bos_id", "eos_id", "pad_id", "image_id"):
        first, second = getattr(one, role), getattr(other, role)
        if first != second:
            return f"{role} is {first} here and {second} there"
    if one.sha256 == other.sha256:
        return None
    if isinstance(one, HuggingFaceTokenizer) and isinstance(other, HuggingFaceTokenizer):
        return _of_files(one, other)
    if one.vocab_size != other.vocab_size:
        return f"it has {one.vocab_size} entries here and {other.vocab_size} there"
    # A SentencePiece model and a tokenizer.json made of it share no text, so they are tried.
    return None if one.encode(_SAMPLE) == other.encode(_SAMPLE) else "the same text gives other ids"


def _of_files(one: Tokenizer, other: Tokenizer) -> str | None:
    contents = [json.loads(tokenizer.path.read_bytes()) for tokenizer in (one, other)]
    first, second = (_vocabulary(content) for content in contents)
    for token in (*first, *(token for token in second if token not in first)):
        if first.get(token) != second.get(token):
            return f"token {token!r} has id {first.get(token)} here and {second.get(token)} there"
    differing = [part for part in _SECTIONS if contents[0].get(part) != contents[1].get(part)]
    return f"its {differing[0]} is another one" if differing else None


def _vocabulary(content: dict[str, Any]) -> dict[str, int]:
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, list):  # of a unigram model: pairs of text and score
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return {**(vocabulary or {}), **{entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}}
