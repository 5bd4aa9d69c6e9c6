"""One task: turns a split of an input into shards. The result depends on the job and the task alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from data_tools.pipeline.balance import Balance
from data_tools.pipeline.image_source import LoadedImage, open_image_source
from data_tools.pipeline.job import Input, Job, Task, needs_image_token, tokenizer_at
from data_tools.pipeline.output import Output, TaskSummary
from data_tools.pipeline.sequence_limits import SequenceLimits
from data_tools.pipeline.shard_writer import ShardWriter
from data_tools.readers.files import entries
from data_tools.readers.formats import count_ignored, count_media, read_record
from data_tools.readers.record import Entry, Picture, Record, RecordError, parse_json
from megavl.config.errors import DataError
from megavl.data.image import ImageError
from megavl.data.inline_image import MAX_IMAGE
from megavl.data.manifest import MODALITIES, Modality, SourceEntry
from megavl.data.table import ReadHandles
from megavl.data.template import Encoded, Piece, Template, Turn, conversation_pieces, encode_batch, framed_document
from megavl.data.text_parts import TextTooLongError

_BATCH = 256
"""Records tokenized together, at most."""
_BATCH_BYTES = 256 << 10
"""Input held in memory at a time; one more record may exceed it."""


@dataclass(frozen=True, kw_only=True)
class _Parsed:
    position: int
    record: Record
    pieces: list[Piece]
    template: Template
    found: Mapping[str, int]
    """What the record holds, by kind."""


def process_task(job: Job, task: Task, *, count: int, advance: Callable[[int], None]) -> TaskSummary:
    """Write the shards of a task and last its summary, which commits it.

    Args:
        count: number of tasks of the job.
        advance: called with the number of records done so far.

    Raises:
        DataError: a record was rejected, and the job fails on rejects.
        StorageError: the output cannot be written.
    """
    worker = _Worker(job, task, count=count)
    try:
        for batch in _batches(islice(entries(task.split), task.sample)):
            worker.process(batch)
            advance(worker.seen)
        return worker.finish()
    finally:
        worker.discard()


class _Worker:
    def __init__(self, job: Job, task: Task, *, count: int) -> None:
        self.seen = 0
        self._job, self._task = job, task
        self._input: Input = job.inputs[task.input]
        self._tokenizer = tokenizer_at(job.tokenizer)
        self._counts = Counter(records=0, cut=0, shortened=0, images_without_file=0, untagged=0, image_empty=0)
        self._balance = Balance()
        self._templates: set[Template] = set()
        self._columns = dict(job.columns)
        self._rejects: list[dict[str, str]] = []
        # Of each sample, in dry runs only.
        self._tokens_of: list[int] = []
        self._images_of: list[int] = []
        self._handles = ReadHandles(limit=4)
        self._source = open_image_source(job, self._input, handles=self._handles)
        self._count = count
        self._limits = SequenceLimits(
            tokens=job.seq_length,
            images=job.max_images,
            image_id=self._tokenizer.image_id,
            image_tokens=job.geometry.tokens,
            eos_id=self._tokenizer.eos_id,
        )
        self._writers: dict[Modality, ShardWriter] = {}

    def process(self, batch: list[Entry]) -> None:
        """Empties the batch: the JSON text of a long record is not needed once it is parsed."""
        self.seen += len(batch)
        for item, encoded in self._encode(self._parse_all(batch)):
            try:
                self._write(item, encoded)
            except (ImageError, RecordError) as error:
                self._reject(item.position, error.reason, str(error), found=item.found)

    def _parse_all(self, batch: list[Entry]) -> list[_Parsed]:
        parsed = []
        for entry in batch:
            if isinstance(entry.content, bytes) and not entry.content.strip():
                continue
            self._counts["records"] += 1
            self._count_ignored(entry)
            if item := self._parsed(entry):
                parsed.append(item)
        batch.clear()
        return parsed

    def finish(self) -> TaskSummary:
        shards = []
        if self._writers:
            split = self._task.split
            source = SourceEntry(
                name=split.path, start=split.start, end=split.end, sha256=split.sha256(), places=split.position_kind
            )
            shards = [self._writers[kind].commit(source=source) for kind in MODALITIES if kind in self._writers]
        summary = TaskSummary(
            number=self._task.number,
            config_sha256=self._job.config_sha256,
            rejected=dict(sorted(Counter(reject["reason"] for reject in self._rejects).items())),
            shards=tuple(shards),
            lengths=tuple(self._tokens_of),
            images=tuple(self._images_of),
            balance=dict(sorted(self._balance.counts.items())),
            templates=tuple(sorted(self._templates)),
            **self._counts,
        )
        if not self._job.dry_run:
            Output(self._job.output).commit_task(summary, rejects=self._rejects)
        return summary

    def discard(self) -> None:
        """Remove what is not committed."""
        self._handles.close()
        for writer in self._writers.values():
            writer.discard()

    def _parsed(self, entry: Entry) -> _Parsed | None:
        """The record of an entry; None where it is rejected."""
        raw: Any = None
        record: Record | None = None
        try:
            if isinstance(entry.content, RecordError):
                raise entry.content
            raw = parse_json(entry.content) if isinstance(entry.content, bytes) else entry.content
            record = read_record(raw, format=self._input.only, columns=self._columns, ignore=self._job.ignore)
            return self._prepared(record, position=entry.position)
        except RecordError as error:
            if record is not None:
                found = _held(record)
            elif raw is not None:
                found = count_media(raw, columns=self._columns, ignore=self._job.ignore)
            else:
                found = error.held
            self._reject(entry.position, error.reason, str(error), found=found)
            return None

    def _count_ignored(self, entry: Entry) -> None:
        """Count what the user leaves out of a record, whatever becomes of the rest."""
        if not self._job.ignore or isinstance(entry.content, RecordError):
            return
        with contextlib.suppress(RecordError):
            raw = parse_json(entry.content) if isinstance(entry.content, bytes) else entry.content
            left = count_ignored(raw, columns=self._columns, ignore=self._job.ignore)
            self._balance.found(left)
            self._balance.left_out(left, reason="ignored")

    def _prepared(self, record: Record, *, position: int) -> _Parsed:
        """A record that was read, as pieces for the tokenizer."""
        found, template = _held(record), self._template(record)
        kept = self._with_files(record)
        if kept.pictures and self._tokenizer.image_id is None:
            raise needs_image_token(self._job.tokenizer, where=f"{self._input.path}:{position}")
        if len(kept.pictures) > self._job.max_images and not (kept.divisible or self._may_truncate(kept)):
            raise self._too_many_images(kept)
        try:
            pieces = self._pieces(kept, template=template)
            for piece in pieces:
                piece.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError("holds half of a surrogate pair, which is no text", "encoding") from error
        except DataError as error:
            raise RecordError(str(error), "turns") from error
        return _Parsed(position=position, record=kept, pieces=pieces, template=template, found=found)

    def _with_files(self, record: Record) -> Record:
        """The record without its optional images that have no file."""
        if not any(isinstance(part, Picture) and part.optional for part in record.parts):
            return record
        parts = tuple(
            part
            for part in record.parts
            if not (isinstance(part, Picture) and part.optional) or self._source.has_file(part)
        )
        return replace(record, parts=parts)

    def _template(self, record: Record) -> Template:
        """The template that was asked for, or the usual one of conversations and of documents."""
        if record.turns:
            return self._input.template if self._input.template_given else "deepseek"
        # A tar archive or table may hold documents beside conversations.
        given = self._input.template_given and self._input.template != "deepseek"
        return self._input.template if given else "plain"

    def _pieces(self, record: Record, *, template: Template) -> list[Piece]:
        if record.turns:
            if template == "deepseek":
                _refuse_empty_answers(record.turns)
            return conversation_pieces(record.turns, template=template, system=self._job.system_prompt)
        body = [
            Piece(kind="image") if isinstance(part, Picture) else Piece(kind="text", text=part, supervised=True)
            for part in record.parts
        ]
        return framed_document(body, template=template)

    def _encode(self, parsed: Sequence[_Parsed]) -> Iterator[tuple[_Parsed, Encoded]]:
        image_tokens = self._job.geometry.tokens
        try:
            batch = encode_batch([i.pieces for i in parsed], tokenizer=self._tokenizer, image_tokens=image_tokens)
            yield from zip(parsed, batch)
        except DataError:
            # One sample fails the whole batch: find out which.
            for item in parsed:
                try:
                    alone = encode_batch([item.pieces], tokenizer=self._tokenizer, image_tokens=image_tokens)
                    yield item, alone[0]
                except DataError as error:
                    reason = "text_too_long" if isinstance(error, TextTooLongError) else "control_token"
                    self._reject(item.position, reason, str(error), found=item.found)

    def _write(self, item: _Parsed, encoded: Encoded) -> None:
        whole, encoded = encoded, self._truncated(item.record, encoded)
        highest = int(encoded.ids.max(initial=0))
        if highest >= self._tokenizer.vocab_size:
            raise RecordError(
                f"the tokenizer gave id {highest}, outside its vocabulary of {self._tokenizer.vocab_size}", "token_id"
            )
        images = self._images(item.record.pictures[: encoded.images])
        self._account(item, encoded, truncated=encoded is not whole)
        parts = list(self._limits.divide(encoded))
        self._counts["cut"] += len(parts) > 1
        used = 0
        for part in parts:
            own, used = images[used : used + part.images], used + part.images
            if self._job.dry_run:
                self._tokens_of.append(len(part.ids))
                self._images_of.append(len(own))
            else:
                writer = self._writer("multimodal" if own else "text")
                writer.add(part.ids, spans=part.spans, images=own, position=item.position)

    def _truncated(self, record: Record, encoded: Encoded) -> Encoded:
        """The sample, truncated where needed; only divisible records may still exceed the limits of a sequence."""
        if record.divisible or self._limits.allow(encoded):
            return encoded
        if self._may_truncate(record):
            shorter = self._limits.truncate(encoded)
            if shorter is not None:
                return shorter
        if encoded.images > self._job.max_images:
            raise self._too_many_images(record)
        raise RecordError(
            f"{len(encoded.ids)} tokens, above --seq-length {self._job.seq_length}; text and interleaved documents are "
            "divided, and --over-long cut truncates conversations after the last answer that fits",
            "too_long",
        )

    def _account(self, item: _Parsed, encoded: Encoded, *, truncated: bool) -> None:
        """Say what becomes of everything that a record holds, once nothing can reject it any more."""
        record = item.record
        self._balance.found(item.found)
        self._templates.add(item.template)
        self._counts["untagged"] += record.untagged
        self._counts["image_empty"] += record.image_empty
        without_file = item.found["images"] - len(record.pictures)
        self._counts["images_without_file"] += without_file
        self._balance.left_out({"images": without_file}, reason="without_file")
        for reason, count in record.left_out.items():
            self._balance.left_out({"turns": count}, reason=reason)
        turns = len(record.turns)
        if truncated:
            self._counts["shortened"] += 1
            # Every answer that is kept ends with EOS, which no text yields.
            turns = int(record.turns[0].role == "system") + 2 * int((encoded.ids == self._tokenizer.eos_id).sum())
            left = {"images": len(record.pictures) - encoded.images, "turns": len(record.turns) - turns}
            self._balance.left_out(left, reason="over_long")
        self._balance.stored({"turns": turns})

    def _may_truncate(self, record: Record) -> bool:
        return self._job.over_long == "cut" and bool(record.turns) and self._template(record) == "deepseek"

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

    def _writer(self, modality: Modality) -> ShardWriter:
        if modality not in self._writers:
            self._writers[modality] = ShardWriter(self._job, self._task, count=self._count, modality=modality)
        return self._writers[modality]

    def _reject(self, position: int, reason: str, detail: str, *, found: Mapping[str, int]) -> None:
        where = f"{self._input.path}:{position}"
        if self._job.fail_on_error:
            raise DataError(f"{where}: {reason}: {detail}; correct the record, or reject it with --on-error skip")
        self._rejects.append({"reason": reason, "record": where, "detail": detail[:500]})
        self._balance.found(found)
        self._balance.rejected(found, reason=reason)


def _held(record: Record) -> dict[str, int]:
    """What a record holds, by kind."""
    return {"images": len(record.pictures), "turns": record.messages}


def _refuse_empty_answers(turns: Sequence[Turn]) -> None:
    """Raise DataError at an empty answer, which would train the model to stay silent."""
    for number, turn in enumerate(turns, start=1):
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(f"turn {number} (assistant) is empty; fill it in, or leave it out with its question")


def _batches(items: Iterable[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in items:
        batch.append(entry)
        size += entry.size
        # The variable would keep a long record in memory.
        del entry
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
