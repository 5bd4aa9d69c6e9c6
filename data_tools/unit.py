"""One unit of work: a stretch of input to its shards. The result depends on the job and the unit alone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.image_source import ImageSource
from data_tools.job import Input, Job, Unit
from data_tools.output import Output, UnitSummary
from data_tools.readers.formats import READERS
from data_tools.readers.record import Record, RecordError
from data_tools.readers.stretches import MAX_RECORD, records
from data_tools.shard_writer import ShardIdentity, ShardWriter
from megavl.config.errors import DataError
from megavl.data.image import ImageError
from megavl.data.manifest import MODALITIES, Modality, SourceEntry, geometry_entry
from megavl.data.template import Encoded, Piece, Turn, conversation_pieces, document_pieces, encode_batch
from megavl.data.tokenizer import Tokenizer, open_tokenizer

_BATCH = 256
"""Records tokenized together."""
_BLOCK = 1 << 22


@dataclass(kw_only=True)
class _Tally:
    """What happened to the records of a unit."""

    records: int = 0
    cut: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, str]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Parsed:
    place: int
    record: Record
    pieces: list[Piece]


def process_unit(job: Job, unit: Unit, *, count: int, advance: Callable[[int], None]) -> UnitSummary:
    """Write the shards of a unit and, last, its own summary, which commits it.

    Args:
        job: settings.
        unit: what to do.
        count: number of units of the job.
        advance: called with the number of records done so far.

    Raises:
        DataError: a record was rejected and the job says to fail then.
        StorageError: the output cannot be written.
    """
    work = _Work(job, unit, count=count)
    try:
        for batch in _batches(records(unit.stretch)):
            work.take(batch)
            advance(work.seen)
        return work.finish()
    finally:
        work.discard()


class _Work:
    def __init__(self, job: Job, unit: Unit, *, count: int) -> None:
        self.seen = 0
        self._job, self._unit = job, unit
        self._input: Input = job.inputs[unit.input]
        self._tokenizer = _tokenizer(job.tokenizer)
        self._tally = _Tally()
        self._source = ImageSource(
            root=job.image_root if job.image_root is not None else str(Path(self._input.path).parent),
            verify=job.verify,
            max_aspect=job.max_aspect,
            max_side=job.max_side,
        )
        self._identity = ShardIdentity(
            config_sha256=job.config_sha256,
            number=unit.number,
            count=count,
            tokenizer=self._tokenizer.entry,
            seq_length=job.seq_length,
            geometry=geometry_entry(job.geometry),
            template=self._input.template,
        )
        self._writers: dict[Modality, ShardWriter] = {}

    def take(self, batch: Sequence[tuple[int, bytes | None]]) -> None:
        self.seen += len(batch)
        parsed = []
        for place, raw in batch:
            if raw is not None and not raw.strip():
                continue
            self._tally.records += 1
            try:
                parsed.append(self._parse(place, raw))
            except RecordError as error:
                self._reject(place, error.reason, str(error))
        for item, encoded in self._encode(parsed):
            try:
                self._write(item, encoded)
            except (ImageError, RecordError) as error:
                self._reject(item.place, error.reason, str(error))

    def finish(self) -> UnitSummary:
        shards = []
        if self._writers:
            source = self._source_entry()
            shards = [self._writers[modality].commit(source) for modality in MODALITIES if modality in self._writers]
        summary = UnitSummary(
            number=self._unit.number,
            config_sha256=self._identity.config_sha256,
            records=self._tally.records,
            cut=self._tally.cut,
            rejected=dict(sorted(self._tally.rejected.items())),
            shards=tuple(shards),
            lengths=tuple(self._tally.lengths) if self._job.dry_run else (),
            images=tuple(self._tally.images) if self._job.dry_run else (),
        )
        if not self._job.dry_run:
            Output(self._job.output).commit_unit(summary, rejects=self._tally.rejects)
        return summary

    def discard(self) -> None:
        for writer in self._writers.values():
            writer.discard()

    def _parse(self, place: int, raw: bytes | None) -> _Parsed:
        if raw is None:
            raise RecordError(f"longer than {MAX_RECORD} bytes", "record_too_long")
        try:
            text = raw.decode("utf-8")
            content = json.loads(text.removeprefix("\ufeff"))
        except UnicodeDecodeError as error:
            raise RecordError(f"not UTF-8 ({error.reason} at byte {error.start})", "encoding") from error
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not valid JSON ({error})", "json") from error
        record = READERS[self._input.format](content)
        if len(record.images) > self._job.max_images:
            raise RecordError(
                f"{len(record.images)} images, above --max-images-per-sequence {self._job.max_images}",
                "too_many_images",
            )
        try:
            pieces = self._pieces(record)
            "".join(piece.text for piece in pieces).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError("holds half of a surrogate pair, which is no text", "encoding") from error
        except DataError as error:
            raise RecordError(str(error), "turns") from error
        return _Parsed(place=place, record=record, pieces=pieces)

    def _pieces(self, record: Record) -> list[Piece]:
        template = self._input.template
        if record.turns:
            if template == "deepseek":
                _refuse_empty_answers(record.turns)
            return conversation_pieces(record.turns, template=template, system=self._job.system_prompt)
        return document_pieces(record.text, template=template, tagged=record.tagged)

    def _encode(self, parsed: Sequence[_Parsed]) -> Iterator[tuple[_Parsed, Encoded]]:
        image_tokens = self._job.geometry.tokens
        try:
            batch = encode_batch([i.pieces for i in parsed], tokenizer=self._tokenizer, image_tokens=image_tokens)
            yield from zip(parsed, batch)
        except DataError:
            # One sample spoils the batch: find out which.
            for item in parsed:
                try:
                    alone = encode_batch([item.pieces], tokenizer=self._tokenizer, image_tokens=image_tokens)
                    yield item, alone[0]
                except DataError as error:
                    self._reject(item.place, "image_token", str(error))

    def _write(self, item: _Parsed, encoded: Encoded) -> None:
        limit = self._job.seq_length
        if len(encoded.ids) > limit and (item.record.images or item.record.turns):
            raise RecordError(
                f"{len(encoded.ids)} tokens, above --seq-length {limit}; only text documents are cut", "too_long"
            )
        images = [self._source.load(reference) for reference in item.record.images]
        parts = list(_cut(encoded, limit))
        self._tally.cut += len(parts) > 1
        for ids, spans in parts:
            if self._job.dry_run:
                self._tally.lengths.append(len(ids))
                self._tally.images.append(len(images))
            else:
                self._writer("multimodal" if images else "text").add(ids, spans=spans, images=images, place=item.place)

    def _writer(self, modality: Modality) -> ShardWriter:
        if modality not in self._writers:
            self._writers[modality] = ShardWriter(Path(self._job.output), modality=modality, identity=self._identity)
        return self._writers[modality]

    def _reject(self, place: int, reason: str, detail: str) -> None:
        where = f"{self._input.path}:{place}"
        if self._job.fail_on_error:
            raise DataError(f"{where}: {reason}: {detail}; correct the record, or reject it with --on-error skip")
        self._tally.rejected[reason] += 1
        self._tally.rejects.append({"reason": reason, "record": where, "detail": detail[:500]})

    def _source_entry(self) -> SourceEntry:
        stretch, digest = self._unit.stretch, hashlib.sha256()
        with open(stretch.path, "rb") as stream:
            stream.seek(stretch.start)
            left = stretch.end - stretch.start
            while left and (block := stream.read(min(_BLOCK, left))):
                digest.update(block)
                left -= len(block)
        return SourceEntry(
            name=stretch.path,
            start=stretch.start,
            end=stretch.end,
            sha256=digest.hexdigest(),
            places=stretch.places,
        )


def _refuse_empty_answers(turns: Sequence[Turn]) -> None:
    """An empty answer teaches nothing, and the next question would follow `Assistant:` at once."""
    for number, turn in enumerate(turns, start=1):
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(f"turn {number} (assistant) is empty; fill it in, or leave it out with its question")


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return open_tokenizer(path)


def _batches(items: Iterable[tuple[int, bytes | None]]) -> Iterator[list[tuple[int, bytes | None]]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _cut(encoded: Encoded, limit: int) -> Iterator[tuple[npt.NDArray[np.int32], list[tuple[int, int]]]]:
    """A sample, or successive parts of at most `limit` tokens."""
    for start in range(0, len(encoded.ids), limit):
        end = min(start + limit, len(encoded.ids))
        spans = [(max(a, start) - start, min(b, end) - start) for a, b in encoded.spans if a < end and b > start]
        yield encoded.ids[start:end], spans
