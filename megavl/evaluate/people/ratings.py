"""What people said on a rating page: read, checked against the page's key, and averaged by model and category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megavl.config.errors import DataError
from megavl.foreign.parsing import read_json

SCALE = (1, 5)
"""Worst and best rating."""
DRAWS = 10_000
"""Of the bootstrap over questions."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """Whose answers a page shows."""

    page: str
    models: tuple[str, ...]
    orders: Mapping[str, tuple[int, ...]]
    """By question: the number of the model whose answer comes first, second and so on."""
    categories: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """One person's complete ratings: by question, one for each model in the key's order."""

    rater: str
    found: Mapping[str, tuple[int, ...]]
    incomplete: int
    """Questions of which not every answer was rated; they do not count."""


def read_key(path: Path) -> Key:
    """The key of a page.

    Raises:
        DataError: it cannot be read, or is none.
    """
    raw = _read(path, what="the key of a rating page")
    try:
        models = tuple(str(name) for name in raw["models"])
        questions = {str(one["id"]): one for one in raw["questions"]}
        orders = {id: tuple(one["order"]) for id, one in questions.items()}
        key = Key(
            page=str(raw["page"]),
            models=models,
            orders=orders,
            categories={id: str(one["category"]) for id, one in questions.items()},
        )
    except (LookupError, TypeError) as error:
        raise DataError(f"{path}: is no key of a rating page; give the file that `megavl rate page` wrote") from error
    wanted = list(range(len(models)))
    wrong = next((id for id, order in orders.items() if not _is_order(order, wanted)), None)
    if wrong is not None or not orders:
        raise DataError(
            f"{path}: order of {wrong!r} is no order of {len(models)} models; give the key as it was written"
        )
    return key


def read_ratings(path: Path, *, key: Key) -> Ratings:
    """The file that a person saved.

    Raises:
        DataError: it cannot be read, is about another page, or holds something else than ratings.
    """
    raw = _read(path, what="ratings")
    if raw.get("page") != key.page:
        raise DataError(
            f"{path}: is about page {str(raw.get('page'))[:40]!r}, the key about {key.page!r}; give its ratings"
        )
    given = raw.get("ratings")
    if not isinstance(given, dict):
        raise DataError(f"{path}: ratings: an object is expected, found {str(given)[:80]!r}")
    found: dict[str, tuple[int, ...]] = {}
    incomplete = 0
    for id, values in given.items():
        order = key.orders.get(id)
        if order is None:
            raise DataError(f"{path}: ratings: question {id[:80]!r} is not on the page")
        if not isinstance(values, list) or len(values) != len(order) or not all(map(_is_rating, values)):
            raise DataError(
                f"{path}: ratings: {id[:80]!r}: {len(order)} ratings from {SCALE[0]} to {SCALE[1]} are expected, found "
                f"{str(values)[:80]}"
            )
        if None in values:
            incomplete += any(value is not None for value in values)
            continue
        by_model = dict(zip(order, values))
        found[id] = tuple(by_model[model] for model in range(len(order)))
    return Ratings(rater=str(raw.get("rater") or "anonymous"), found=found, incomplete=incomplete)


def figures(people: Sequence[Ratings], *, key: Key, seed: int = 0) -> dict[str, Any]:
    """Mean rating of each model, over all questions and by category.

    The rating of a question is the mean over the people who rated it. Intervals of 95% are a paired bootstrap:
    questions are drawn with the answers of all models.
    """
    means = {
        id: np.mean([one.found[id] for one in people if id in one.found], axis=0)
        for id in key.orders
        if any(id in one.found for one in people)
    }
    categories = list(dict.fromkeys(key.categories[id] for id in key.orders if key.categories[id]))
    return {
        "models": list(key.models),
        "people": [{"rater": one.rater, "questions": len(one.found), "incomplete": one.incomplete} for one in people],
        "not_rated": len(key.orders) - len(means),
        "all": _means([*means.values()], models=key.models, seed=seed),
        "by_category": {
            name: _means([means[id] for id in means if key.categories[id] == name], models=key.models, seed=seed)
            for name in sorted(categories)
        },
    }


def _means(rows: Sequence[npt.NDArray[np.float64]], *, models: Sequence[str], seed: int) -> dict[str, Any]:
    if not rows:
        return {"n": 0, "ratings": dict.fromkeys(models), "intervals": dict.fromkeys(models)}
    table = np.stack(rows)
    draws = np.random.default_rng(seed).multinomial(len(rows), [1 / len(rows)] * len(rows), size=DRAWS)
    low, high = np.quantile(draws @ table / len(rows), (0.025, 0.975), axis=0)
    return {
        "n": len(rows),
        "ratings": dict(zip(models, map(float, table.mean(axis=0)))),
        "intervals": {name: [float(one), float(other)] for name, one, other in zip(models, low, high)},
    }


def table(found: Mapping[str, Any]) -> str:
    """The figures as a table in Markdown."""
    models = found["models"]
    lines = [
        f"| category | n | {' | '.join(name.replace('|', '/') for name in models)} |",
        f"|---|---:|{'---|' * len(models)}",
    ]
    for name, row in {"all": found["all"], **found["by_category"]}.items():
        cells = []
        for model in models:
            mean, ends = row["ratings"][model], row["intervals"][model]
            cells.append("-" if mean is None else f"{mean:.2f} ({ends[0]:.2f} to {ends[1]:.2f})")
        lines.append(f"| {name.replace('|', '/')} | {row['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_order(order: Sequence[Any], wanted: list[int]) -> bool:
    return all(type(one) is int for one in order) and sorted(order) == wanted


def _is_rating(value: Any) -> bool:
    return value is None or (type(value) is int and SCALE[0] <= value <= SCALE[1])


def _read(path: Path, *, what: str) -> dict[str, Any]:
    try:
        raw = read_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot read {what} ({reason})") from error
    if not isinstance(raw, dict):
        raise DataError(f"{path}: {what}: a JSON object is expected, found {str(raw)[:80]!r}")
    return raw
