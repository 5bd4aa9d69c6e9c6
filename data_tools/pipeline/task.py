"""One unit of work: a stretch of input to its shards. The result depends on the job and the unit alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from data_tools.pipeline.image_map import open_image_map
from data_tools.pipeline.image_source import ImageSource, LoadedImage
from data_tools.pipeline.job import Input, Job, Unit, tokenizer_at
from data_tools.pipeline.output import Output, UnitSummary
from data_tools.pipeline.shard_writer import ShardIdentity, ShardWriter
from data_tools.readers.files import entries
from data_tools.readers.formats import FORMATS
from data_tools.readers.record import MAX_IMAGE, Entry, Picture, Record, RecordError, parse_json
from megavl.config.errors import DataError
from megavl.data.image import ImageError
from megavl.data.manifest import MODALITIES, Modality, SourceEntry, geometry_entry
from megavl.data.table import ReadHandles
from megavl.data.template import Encoded, Piece, Turn, conversation_pieces, document_pieces, encode_batch

_BATCH = 256
"""Records tokenized together, at most."""
_BATCH_BYTES = 256 << 10
"""Input held in memory at a time, apart from the last record."""


@dataclass(kw_only=True)
class _Tally:
    """What happened to the records of a unit."""

    records: int = 0
    cut: int = 0
    shortened: int = 0
    without_file: int = 0
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
        for batch in _batches(islice(entries(unit.stretch), unit.sample)):
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
        self._tokenizer = tokenizer_at(job.tokenizer)
        self._tally = _Tally()
        self._handles = ReadHandles(limit=4)
        self._source = ImageSource(
            handles=self._handles,
            root=job.image_root if job.image_root is not None else str(Path(self._input.path).parent),
            image_map=open_image_map(job.image_map) if job.image_map is not None else None,
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

    def take(self, batch: Sequence[Entry]) -> None:
        self.seen += len(batch)
        parsed = []
        for entry in batch:
            if isinstance(entry.content, bytes) and not entry.content.strip():
                continue
            self._tally.records += 1
            try:
                parsed.append(self._parse(entry))
            except RecordError as error:
                self._reject(entry.place, error.reason, str(error))
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
            shortened=self._tally.shortened,
            images_without_file=self._tally.without_file,
            rejected=dict(sorted(self._tally.rejected.items())),
            shards=tuple(shards),
            lengths=tuple(self._tally.lengths) if self._job.dry_run else (),
            images=tuple(self._tally.images) if self._job.dry_run else (),
        )
        if not self._job.dry_run:
            Output(self._job.output).commit_unit(summary, rejects=self._tally.rejects)
        return summary

    def discard(self) -> None:
        """Close and remove what is not committed."""
        self._handles.close()
        for writer in self._writers.values():
            writer.discard()

    def _parse(self, entry: Entry) -> _Parsed:
        content = entry.content
        if isinstance(content, RecordError):
            raise content
        record = FORMATS[self._input.format].read(parse_json(content) if isinstance(content, bytes) else content)
        record = self._with_files(record)
        if len(record.pictures) > self._job.max_images and not (record.divisible or self._may_end_early(record)):
            raise self._too_many_images(record)
        try:
            pieces = self._pieces(record)
            "".join(piece.text for piece in pieces).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError("holds half of a surrogate pair, which is no text", "encoding") from error
        except DataError as error:
            raise RecordError(str(error), "turns") from error
        return _Parsed(place=entry.place, record=record, pieces=pieces)

    def _with_files(self, record: Record) -> Record:
        """The record without those optional images that have no file, which are counted."""
        if not any(isinstance(part, Picture) and part.optional for part in record.parts):
            return record
        parts = tuple(
            part
            for part in record.parts
            if not (isinstance(part, Picture) and part.optional) or self._source.has_file(part)
        )
        self._tally.without_file += len(record.parts) - len(parts)
        return replace(record, parts=parts)

    def _pieces(self, record: Record) -> list[Piece]:
        template = self._input.template
        if record.turns:
            if template == "deepseek":
                _refuse_empty_answers(record.turns)
            return conversation_pieces(record.turns, template=template, system=self._job.system_prompt)
        # A tar or table may hold conversations and documents.
        frame = document_pieces("", template="plain" if template == "deepseek" else template, tagged=False)
        body = [
            Piece(kind="image") if isinstance(part, Picture) else Piece(kind="text", text=part, supervised=True)
            for part in record.parts
        ]
        return [piece for slot in frame for piece in (body if slot.kind == "text" else [slot])]

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
        encoded = self._fitting(item.record, encoded)
        highest = int(encoded.ids.max(initial=0))
        if highest >= self._tokenizer.vocab_size:
            raise RecordError(
                f"the tokenizer gave id {highest}, outside its vocabulary of {self._tokenizer.vocab_size}", "token_id"
            )
        images = self._images(item.record.pictures[: encoded.images])
        parts = list(self._cut(encoded))
        self._tally.cut += len(parts) > 1
        used = 0
        for part in parts:
            own, used = images[used : used + part.images], used + part.images
            if self._job.dry_run:
                self._tally.lengths.append(len(part.ids))
                self._tally.images.append(len(own))
            else:
                writer = self._writer("multimodal" if own else "text")
                writer.add(part.ids, spans=part.spans, images=own, place=item.place)

    def _fitting(self, record: Record, encoded: Encoded) -> Encoded:
        """The sample, or its first rounds; only a divisible record may exceed the limits of a sequence here."""
        job = self._job
        if record.divisible or (len(encoded.ids) <= job.seq_length and encoded.images <= job.max_images):
            return encoded
        if self._may_end_early(record):
            shorter = first_rounds(
                *(encoded,), limit=job.seq_length, max_images=job.max_images, eos_id=self._tokenizer.eos_id,
                image_id=self._tokenizer.image_id, image_tokens=job.geometry.tokens,
            )  # fmt: skip
            if shorter is not None:
                self._tally.shortened += 1
                return shorter
        if encoded.images > job.max_images:
            raise self._too_many_images(record)
        raise RecordError(
            f"{len(encoded.ids)} tokens, above --seq-length {job.seq_length}; text and interleaved documents are cut, "
            "and with --over-long cut conversations after an answer, where one fits",
            "too_long",
        )

    def _may_end_early(self, record: Record) -> bool:
        return self._job.over_long == "cut" and bool(record.turns) and self._input.template == "deepseek"

    def _too_many_images(self, record: Record) -> RecordError:
        return RecordError(
            f"{len(record.pictures)} images, above --max-images-per-sequence {self._job.max_images}", "too_many_images"
        )

    def _images(self, pictures: Sequence[Picture]) -> list[LoadedImage]:
        """The images of a record, checked before the first of its samples is written."""
        images: list[LoadedImage] = []
        size = 0
        for picture in pictures:
            images.append(self._source.load(picture))
            size += len(images[-1].data)
            if size > MAX_IMAGE:
                raise ImageError(f"the images of the record have more than {MAX_IMAGE} bytes", "image_too_large")
        return images

    def _cut(self, encoded: Encoded) -> Iterator[Encoded]:
        if len(encoded.ids) <= self._job.seq_length and encoded.images <= self._job.max_images:
            return iter([encoded])
        return cut(
            encoded,
            limit=self._job.seq_length,
            max_images=self._job.max_images,
            image_id=self._tokenizer.image_id,
            image_tokens=self._job.geometry.tokens,
        )

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
        stretch = self._unit.stretch
        return SourceEntry(
            name=stretch.path, start=stretch.start, end=stretch.end, sha256=stretch.sha256(), places=stretch.places
        )


def _refuse_empty_answers(turns: Sequence[Turn]) -> None:
    """An empty answer teaches nothing, and the next question would follow `Assistant:` at once."""
    for number, turn in enumerate(turns, start=1):
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(f"turn {number} (assistant) is empty; fill it in, or leave it out with its question")


def _batches(items: Iterable[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in items:
        batch.append(entry)
        size += entry.size
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def cut(encoded: Encoded, *, limit: int, max_images: int, image_id: int | None, image_tokens: int) -> Iterator[Encoded]:
    """Successive parts of a sample under both limits; never cut inside an image.

    Args:
        encoded: the sample.
        limit: tokens of a part, at least `image_tokens`.
        max_images: images of a part.
        image_id: token of images.
        image_tokens: positions of one image.
    """
    count = len(encoded.ids)
    firsts = np.flatnonzero(encoded.ids == image_id)[::image_tokens] if encoded.images else np.zeros(0, np.int64)
    start = 0
    while start < count:
        end = min(start + limit, count)
        ahead = firsts[firsts >= start]
        if len(ahead) > max_images:
            end = min(end, int(ahead[max_images]))
        split = ahead[(ahead < end) & (ahead + image_tokens > end)]
        if len(split):
            end = int(split[0])
        spans = tuple((max(a, start) - start, min(b, end) - start) for a, b in encoded.spans if a < end and b > start)
        yield Encoded(ids=encoded.ids[start:end], spans=spans, images=int((ahead < end).sum()))
        start = end


def first_rounds(
    encoded: Encoded, *, limit: int, max_images: int, eos_id: int | None, image_id: int | None, image_tokens: int
) -> Encoded | None:
    """A conversation up to its last answer within both limits; None when not even the first one is.

    Text is tokenized between special tokens, so this is what the shorter conversation alone would give.

    Args:
        encoded: the conversation; what is supervised of an answer ends with EOS.
        limit: tokens.
        max_images: images.
        eos_id: token at which answers end.
        image_id: token of images.
        image_tokens: positions of one image.
    """
    for count, (_, end) in reversed(list(enumerate(encoded.spans, start=1))):
        images = int((encoded.ids[:end] == image_id).sum()) // image_tokens
        if end <= limit and images <= max_images and encoded.ids[end - 1] == eos_id:
            return Encoded(ids=encoded.ids[:end], spans=encoded.spans[:count], images=images)
    return None
