"""Options to score, packed into rows: the prompt of all options of a request is in a row once.

A request's options share the longest prefix that all of them begin with. Each other option is a segment that continues
it (`Batch.parents`). The last token of an option is only predicted, never fed, so options of one token need no segment.

Legend: T tokens of a row, R labels of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile

from megavl.generate.prompt import ImageSource


@dataclass(frozen=True, kw_only=True)
class EncodedOption:
    """A prompt and one of its options."""

    ids: tuple[int, ...]
    start: int
    """Position of the option's first token, at least 1."""

    def __post_init__(self) -> None:
        if self.start < 1:
            raise ValueError(f"start {self.start} leaves no token before the option")


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """Options after one prompt, as the model reads them."""

    options: tuple[EncodedOption, ...]
    images: tuple[ImageSource, ...] = ()
    """Of the prompt, in the order of their positions."""
    location: str = ""
    """`file:line`, for messages."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens of a row that follow each other."""

    ids: tuple[int, ...]
    parent: int
    """Index in the row of the segment that it continues, or -1."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The labels of one option in a row."""

    request: int
    option: int
    positions: tuple[int, ...]
    """Rows of the tokens that predict the labels."""
    labels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """What the model reads at once."""

    segments: tuple[Segment, ...]
    predictions: tuple[Prediction, ...]
    images: tuple[ImageSource, ...]

    @property
    def tokens(self) -> int:
        """T, without padding."""
        return sum(len(segment.ids) for segment in self.segments)


def score_rows(requests: Sequence[ScoreRequest], *, limit: int, shared: bool = True) -> list[ScoreRow]:
    """Pack requests in their order.

    Args:
        limit: most tokens of a row; a prompt with one longer option gets a row of its own.
        shared: let options continue their common prefix; if false, each repeats it in a segment of its own.
    """
    rows: list[ScoreRow] = []
    open_row: list[_Tree] = []
    trees = (_trees(number, request, limit=limit, shared=shared) for number, request in enumerate(requests))
    for tree in chain.from_iterable(trees):
        if open_row and sum(one.tokens for one in open_row) + tree.tokens > limit:
            rows.append(_row(open_row, requests))
            open_row = []
        open_row.append(tree)
    return [*rows, _row(open_row, requests)] if open_row else rows


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """Options of a request that share a row: a common prefix, and what continues it."""

    request: int
    shared: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    hosts: tuple[tuple[int, int], ...]
    """Each option, and its branch; -1 where the prefix holds all of it."""

    @property
    def tokens(self) -> int:
        return len(self.shared) + sum(map(len, self.branches))


def _trees(number: int, request: ScoreRequest, *, limit: int, shared: bool) -> Iterator[_Tree]:
    contexts = [option.ids[:-1] for option in request.options]
    prefix = contexts[0][: _common_length(contexts)] if shared else ()
    rests = [context[len(prefix) :] for context in contexts]
    branches: list[tuple[int, ...]] = []
    hosts: list[tuple[int, int]] = []
    # Longest first: an option needs no branch where another one begins with it.
    for option in sorted(range(len(rests)), key=lambda index: -len(rests[index])):
        rest = rests[option]
        host = -1 if not rest else next((at for at, ids in enumerate(branches) if ids[: len(rest)] == rest), None)
        if host is None:
            if branches and len(prefix) + sum(map(len, branches)) + len(rest) > limit:
                yield _Tree(request=number, shared=prefix, branches=tuple(branches), hosts=tuple(hosts))
                branches, hosts = [], []
            host = len(branches)
            branches.append(rest)
        hosts.append((option, host))
    yield _Tree(request=number, shared=prefix, branches=tuple(branches), hosts=tuple(hosts))


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences)))


def _row(trees: Sequence[_Tree], requests: Sequence[ScoreRequest]) -> ScoreRow:
    segments: list[Segment] = []
    predictions: list[Prediction] = []
    begin = 0
    for tree in trees:
        root, starts = -1, []
        if tree.shared:
            segments.append(Segment(ids=tree.shared, parent=-1))
            root = len(segments) - 1
        end = begin + len(tree.shared)
        for ids in tree.branches:
            segments.append(Segment(ids=ids, parent=root))
            starts.append(end)
            end += len(ids)
        for option, host in tree.hosts:
            encoded = requests[tree.request].options[option]
            # A token is predicted at the position before it.
            before = range(encoded.start - 1, len(encoded.ids) - 1)
            shared = len(tree.shared)
            predictions.append(
                Prediction(
                    request=tree.request,
                    option=option,
                    positions=tuple(begin + at if at < shared else starts[host] + at - shared for at in before),
                    labels=encoded.ids[encoded.start :],
                )
            )
        begin = end
    # Without a shared prefix, each branch holds the prompt and its images.
    images = tuple(
        image
        for tree in trees
        for _ in range(1 if tree.shared else len(tree.branches))
        for image in requests[tree.request].images
    )
    return ScoreRow(segments=tuple(segments), predictions=tuple(predictions), images=images)
