"""A blind rating page: one HTML file that works without a network, and the key that says whose answers it shows.

The page has neither the names of the models nor any trace of their order. The key stays with whoever asks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavl.evaluate.endpoint import data_url
from megavl.evaluate.judge.answers import Compared

_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, kw_only=True)
class RatingPage:
    """What people get, and what is kept."""

    html: str
    key: dict[str, Any]
    """`page`, `models`, `seed`, and of each question in `questions` its `id`, `category` and `order`: the number of
    the model whose answer comes first, second and so on."""


def rating_page(questions: Sequence[Compared], *, models: Sequence[str], seed: int = 0) -> RatingPage:
    """Make a page. Answers of each question, and the questions, are shuffled by the seed.

    Raises:
        OSError, ValueError: an image cannot be read.
    """
    draw = random.Random(seed)
    shuffled = draw.sample(list(questions), len(questions))
    orders = [draw.sample(range(len(models)), len(models)) for _ in shuffled]
    # An image that several questions share is in the page once.
    images = list(dict.fromkeys(image for one in shuffled for image in one.images))
    asked = [
        {
            "id": one.id,
            "question": one.question,
            "answers": [one.answers[model].strip() for model in order],
            "images": [images.index(image) for image in one.images],
        }
        for one, order in zip(shuffled, orders)
    ]
    name = hashlib.sha256(json.dumps([asked, orders, list(models)]).encode()).hexdigest()[:16]
    data = {"page": name, "questions": asked, "images": [data_url(image) for image in images]}
    key = {
        "page": name,
        "models": list(models),
        "seed": seed,
        "questions": [{"id": one.id, "category": one.category, "order": order} for one, order in zip(shuffled, orders)],
    }
    return RatingPage(html=_filled(data), key=key)


def _filled(data: dict[str, Any]) -> str:
    template = _TEMPLATE.read_text(encoding="utf-8")
    hashes = {tag: _hash_of(tag, template) for tag in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    # Nothing in the text may end the element that holds it.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    head, _, tail = template.replace("@POLICY@", policy).partition("@DATA@")
    return head + text + tail


def _hash_of(tag: str, template: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"
