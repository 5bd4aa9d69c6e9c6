"""The last step of a run: packs all shards, writes the report, and then the manifest, which commits the dataset."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.pipeline.balance import balance_report, check_balance
from data_tools.pipeline.histograms import histograms
from data_tools.pipeline.job import Job, Task, tokenizer_at
from data_tools.pipeline.output import Output, TaskSummary
from data_tools.pipeline.pack_table import Block, PackTable, Tally
from megavl.config.errors import DataError
from megavl.config.version import VERSION
from megavl.data.manifest import MODALITIES, DatasetManifest, fingerprint, geometry_entry, to_json
from megavl.data.shard import Shard
from megavl.data.table import ReadHandles
from megavl.files.new_file import NewFile, sync_directory, write_file

_EXAMPLES = 20
"""Rejected records that the report names per reason."""


def finish(job: Job, tasks: Sequence[Task], *, max_bad_frac: float) -> dict[str, Any]:
    """Pack all tasks, which must be committed, commit the dataset, and return the report.

    Raises:
        DataError: more than `max_bad_frac` of the records were rejected, or none is left.
        StorageError: the output cannot be written.
    """
    output, directory = Output(job.output), Path(job.output)
    output.remove_leftovers()
    summaries = [summary for task in tasks if (summary := output.read_task(task.number)) is not None]
    assert len(summaries) == len(tasks), "finish is called when every task is committed"
    examples = _merge_rejects(output, tasks, directory)
    packs = _pack(job, partial(_read_samples, summaries, directory))
    with NewFile(directory / "packs.npy") as file:
        packs.write(file)
        report = build_report(job, tasks, summaries, packs=packs, examples=examples)
        write_file(directory / "report.json", to_json(report))
        check_balance(report["balance"])
        check_rejected(report, max_bad_frac=max_bad_frac, where=f"{directory / 'rejects.jsonl'}")
        entry = file.commit()
    shards = tuple(shard for summary in summaries for shard in summary.shards)
    content = DatasetManifest(
        code_version=VERSION,
        config_sha256=job.config_sha256,
        pack=job.pack_settings,
        shards=shards,
        packs=entry,
        text_packs=packs.tallies["text"].count,
        multimodal_packs=packs.tallies["multimodal"].count,
        tokenizer=tokenizer_at(job.tokenizer).entry,
        geometry=geometry_entry(job.geometry),
        templates=tuple(sorted({name for summary in summaries for name in summary.templates})),
        fingerprint="",
    )
    manifest = replace(content, fingerprint=fingerprint(content))
    sync_directory(directory)
    write_file(directory / "manifest.json", to_json(manifest))
    sync_directory(directory)
    return {**report, "fingerprint": manifest.fingerprint}


def dry_run_report(
    job: Job, tasks: Sequence[Task], summaries: Sequence[TaskSummary], *, records: Sequence[int]
) -> dict[str, Any]:
    """The report of a run that wrote nothing; `records` has the number of records of each input, for the estimate."""
    packs = _pack(job, partial(_counted_samples, summaries))
    packs.count()
    report = build_report(job, tasks, summaries, packs=packs, examples={})
    if any(task.sample is not None for task in tasks):
        report["estimate"] = _estimate(job, tasks, summaries, report=report, records=records)
    return report


def _estimate(
    job: Job, tasks: Sequence[Task], summaries: Sequence[TaskSummary], *, report: dict[str, Any], records: Sequence[int]
) -> dict[str, Any]:
    """Samples, tokens and images of the whole inputs, scaled up from the records that were read."""
    total: Counter[str] = Counter()
    for number, whole in enumerate(records):
        own = [summary for task, summary in zip(tasks, summaries) if task.input == number]
        seen = sum(summary.records for summary in own)
        scale = whole / seen if seen else 0.0
        total.update(
            records=whole,
            samples=round(scale * sum(len(summary.lengths) for summary in own)),
            tokens=round(scale * sum(sum(summary.lengths) for summary in own)),
            images=round(scale * sum(sum(summary.images) for summary in own)),
        )
    found = sum(report[modality]["tokens"] for modality in MODALITIES)
    sequences = sum(report[modality]["sequences"] for modality in MODALITIES)
    fill = found / (sequences * job.seq_length) if sequences else 0.0
    return {**total, "fill": round(fill, 6), "sequences": round(total["tokens"] / (fill or 1) / job.seq_length)}


def build_report(
    job: Job,
    tasks: Sequence[Task],
    summaries: Sequence[TaskSummary],
    *,
    packs: PackTable,
    examples: dict[str, list[dict[str, str]]],
) -> dict[str, Any]:
    """Content of `report.json`, which follows from the job alone."""
    _, lengths, images_of, samples = packs.kinds.T
    images_in_all, totals = int(images_of @ samples), packs.tallies["text"].totals + packs.tallies["multimodal"].totals
    rejected: Counter[str] = Counter()
    counts = [Counter[str]() for _ in job.inputs]
    # What the samples hold is counted from them, not from what the readers said.
    balance = Counter({"images/stored": images_in_all})
    for task, summary in zip(tasks, summaries):
        rejected.update(summary.rejected)
        balance.update(summary.balance)
        images = sum(summary.images) if job.dry_run else sum(shard.images for shard in summary.shards)
        counts[task.input].update(
            records=summary.records, images=images, images_without_file=summary.images_without_file
        )
    return {
        "tokenizer": os.path.abspath(job.tokenizer),
        "inputs": [
            {
                "path": item.path,
                "format": item.format,
                "template": item.template,
                **{name: count[name] for name in ("records", "images", "images_without_file")},
            }
            for item, count in zip(job.inputs, counts)
        ],
        "files_left_out": dict(job.files_left_out),
        "records": sum(summary.records for summary in summaries),
        "documents_cut": sum(summary.cut for summary in summaries),
        "conversations_cut": sum(summary.shortened for summary in summaries),
        "images_without_file": sum(summary.images_without_file for summary in summaries),
        "images_without_tag": sum(summary.untagged for summary in summaries),
        "records_with_empty_image": sum(summary.image_empty for summary in summaries),
        "balance": balance_report(balance),
        "samples": packs.samples,
        "tokens": int(lengths @ samples),
        "images": images_in_all,
        "image_tokens": images_in_all * job.geometry.tokens,
        **{modality: _sequences(job, packs.tallies[modality]) for modality in MODALITIES},
        "histograms": histograms(
            lengths=lengths,
            images=images_of,
            samples=samples,
            fills=np.array([*totals], np.float64) / job.seq_length,
            sequences=np.array([*totals.values()], np.int64),
            seq_length=job.seq_length,
        ),
        "rejected": {
            reason: {
                "count": count,
                "examples": [reject["record"] for reject in examples.get(reason, [])],
                "detail": next((reject["detail"] for reject in examples.get(reason, [])), ""),
            }
            for reason, count in sorted(rejected.items())
        },
    }


def check_rejected(report: dict[str, Any], *, max_bad_frac: float, where: str) -> None:
    """Raise DataError when the rejected share is above the limit, or when nothing is left."""
    bad = sum(entry["count"] for entry in report["rejected"].values())
    reasons = ", ".join(f"{reason} {entry['count']}" for reason, entry in report["rejected"].items())
    if bad > max_bad_frac * report["records"]:
        most = max(report["rejected"].values(), key=lambda entry: entry["count"])
        first = f" The first of the most frequent: {most['detail']}" if most["detail"] else ""
        raise DataError(
            f"{where}: {bad} of {report['records']} records rejected ({reasons}), above --max-bad-frac "
            f"{max_bad_frac:g}; correct the input or raise the limit.{first}"
        )
    for item in report["inputs"]:
        if item["images_without_file"] and not item["images"]:
            raise DataError(
                f"{item['path']}: none of its {item['images_without_file']} images has a file; fetch them, give their "
                "folder as --image-root, and where they are named by address, their files in --image-map"
            )
    if not report["samples"]:
        raise DataError(
            f"no record left of {report['records']} ({reasons or 'the inputs are empty'}); correct the input"
        )


def _sequences(job: Job, tally: Tally) -> dict[str, Any]:
    room = tally.count * job.seq_length
    return {
        "sequences": tally.count,
        "tokens": tally.tokens,
        "fill": round(tally.tokens / room, 6) if room else 0.0,
        "images_per_sequence": round(tally.images / tally.count, 4) if tally.count else 0.0,
        "filler_tokens": tally.filler_tokens,
    }


def _pack(job: Job, blocks: Callable[[], Iterator[Block]]) -> PackTable:
    return PackTable(blocks, seq_length=job.seq_length, max_images=job.max_images, packed=job.packed)


def _read_samples(summaries: Sequence[TaskSummary], directory: Path) -> Iterator[Block]:
    """All samples, shard by shard."""
    handles = ReadHandles()
    for number, entry in enumerate(shard for summary in summaries for shard in summary.shards):
        shard = Shard(directory, name=entry.name, handles=handles)
        for first, rows in shard.samples.blocks():
            lengths = shard.tokens.lengths_of(first, len(rows))
            yield Block(shard=number, first=first, lengths=lengths, images=rows["images"])
    handles.close()


def _counted_samples(summaries: Sequence[TaskSummary]) -> Iterator[Block]:
    """The samples of a run that wrote nothing."""
    for number, summary in enumerate(summaries):
        lengths, images = (np.array(column, np.int32) for column in (summary.lengths, summary.images))
        yield Block(shard=number, first=0, lengths=lengths, images=images)


def _merge_rejects(output: Output, tasks: Sequence[Task], directory: Path) -> dict[str, list[dict[str, str]]]:
    """Write `rejects.jsonl`; returns the first examples per reason."""
    examples: dict[str, list[dict[str, str]]] = {}
    with NewFile(directory / "rejects.jsonl") as merged:
        for task in tasks:
            with open(output.rejects_path(task.number), "rb") as stream:
                for line in stream:
                    merged.write(line)
                    reject = json.loads(line)
                    known = examples.setdefault(reject["reason"], [])
                    if len(known) < _EXAMPLES:
                        known.append(reject)
        merged.commit()
    return examples
