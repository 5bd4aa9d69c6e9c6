"""The last step of a run: packs over all shards, the report, and the manifest that makes it a dataset."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.commit import NewFile, sync_directory, write_file
from data_tools.histograms import histograms
from data_tools.job import Job, Unit, tokenizer_at
from data_tools.output import Output, UnitSummary
from megavl.config.errors import DataError
from megavl.config.version import VERSION
from megavl.data.index_file import ReadHandles
from megavl.data.manifest import (
    MODALITIES,
    PACK_ROW,
    DatasetManifest,
    FileEntry,
    Modality,
    fingerprint,
    geometry_entry,
    to_json,
)
from megavl.data.packing import Packs, pack
from megavl.data.shard import Shard

Numbers = npt.NDArray[np.int32]
_EXAMPLES = 20
"""Rejected records that the report names per reason."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Lengths and image counts of all samples, in the order of shards."""

    lengths: Numbers
    images: Numbers
    shards: Numbers
    """Samples of each shard."""

    @classmethod
    def joined(cls, parts: Sequence[tuple[Any, Any]]) -> Samples:
        """From lengths and image counts, shard by shard."""
        none = np.zeros(0, np.int32)
        return cls(
            lengths=np.concatenate([none, *(np.asarray(lengths, np.int32) for lengths, _ in parts)]),
            images=np.concatenate([none, *(np.asarray(images, np.int32) for _, images in parts)]),
            shards=np.array([len(lengths) for lengths, _ in parts], np.int32),
        )


def finish(job: Job, units: Sequence[Unit], *, max_bad_frac: float) -> dict[str, Any]:
    """Pack, report, and commit the dataset.

    Args:
        job: settings.
        units: all of them, committed.
        max_bad_frac: rejected share of the records above which there is no dataset.

    Returns:
        The report, as in `report.json`.

    Raises:
        DataError: too many records were rejected, or none is left.
        StorageError: the output cannot be written.
    """
    output, directory = Output(job.output), Path(job.output)
    output.remove_leftovers()
    summaries = [summary for unit in units if (summary := output.read_unit(unit.number)) is not None]
    assert len(summaries) == len(units), "finish is called when every unit is committed"
    samples = _read_samples(summaries, directory)
    packs = _pack(job, samples)
    examples = _merge_rejects(output, units, directory)
    report = build_report(job, units, summaries, samples=samples, packs=packs, examples=examples)
    write_file(directory / "report.json", to_json(report))
    check_rejected(report, max_bad_frac=max_bad_frac, where=f"{directory / 'rejects.jsonl'}")
    entry = _write_packs(directory, samples, packs)
    shards = tuple(shard for summary in summaries for shard in summary.shards)
    content = DatasetManifest(
        code_version=VERSION,
        config_sha256=job.config_sha256,
        pack=job.pack_settings,
        shards=shards,
        packs=entry,
        text_packs=packs["text"].count,
        multimodal_packs=packs["multimodal"].count,
        tokenizer=tokenizer_at(job.tokenizer).entry,
        geometry=geometry_entry(job.geometry),
        templates=tuple(sorted({item.template for item in job.inputs})),
        fingerprint="",
    )
    manifest = replace(content, fingerprint=fingerprint(content))
    sync_directory(directory)
    write_file(directory / "manifest.json", to_json(manifest))
    sync_directory(directory)
    return {**report, "fingerprint": manifest.fingerprint}


def dry_run_report(
    job: Job, units: Sequence[Unit], summaries: Sequence[UnitSummary], *, records: Sequence[int]
) -> dict[str, Any]:
    """The report of a run that wrote nothing.

    Args:
        job: settings.
        units: what was looked at, or looked into.
        summaries: what was found.
        records: records of each input, the number that the estimate is made for.
    """
    samples = Samples.joined([(summary.lengths, summary.images) for summary in summaries])
    report = build_report(job, units, summaries, samples=samples, packs=_pack(job, samples), examples={})
    if any(unit.sample is not None for unit in units):
        report["estimate"] = _estimate(job, units, summaries, report=report, records=records)
    return report


def _estimate(
    job: Job,
    units: Sequence[Unit],
    summaries: Sequence[UnitSummary],
    *,
    report: dict[str, Any],
    records: Sequence[int],
) -> dict[str, Any]:
    """Samples, tokens and images of the whole inputs, from the share of each that was looked at."""
    total: Counter[str] = Counter()
    for number, whole in enumerate(records):
        own = [summary for unit, summary in zip(units, summaries) if unit.input == number]
        seen = sum(summary.records for summary in own)
        scale = whole / seen if seen else 0.0
        total["records"] += whole
        total["samples"] += round(scale * sum(len(summary.lengths) for summary in own))
        total["tokens"] += round(scale * sum(sum(summary.lengths) for summary in own))
        total["images"] += round(scale * sum(sum(summary.images) for summary in own))
    found = sum(report[modality]["tokens"] for modality in MODALITIES)
    sequences = sum(report[modality]["sequences"] for modality in MODALITIES)
    fill = found / (sequences * job.seq_length) if sequences else 0.0
    return {**total, "fill": round(fill, 6), "sequences": round(total["tokens"] / (fill or 1) / job.seq_length)}


def build_report(
    job: Job,
    units: Sequence[Unit],
    summaries: Sequence[UnitSummary],
    *,
    samples: Samples,
    packs: dict[Modality, Packs],
    examples: dict[str, list[str]],
) -> dict[str, Any]:
    """Counts of everything, the same for the same job."""
    rejected: Counter[str] = Counter()
    counts = [Counter[str]() for _ in job.inputs]
    for unit, summary in zip(units, summaries):
        rejected.update(summary.rejected)
        images = sum(summary.images) if job.dry_run else sum(shard.images for shard in summary.shards)
        counts[unit.input].update(
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
        "records": sum(summary.records for summary in summaries),
        "documents_cut": sum(summary.cut for summary in summaries),
        "images_without_file": sum(summary.images_without_file for summary in summaries),
        "samples": len(samples.lengths),
        "tokens": int(samples.lengths.sum(dtype=np.int64)),
        "images": int(samples.images.sum(dtype=np.int64)),
        "image_tokens": int(samples.images.sum(dtype=np.int64)) * job.geometry.tokens,
        **{modality: _sequences(job, samples, packs[modality]) for modality in MODALITIES},
        "histograms": histograms(
            lengths=samples.lengths,
            images=samples.images,
            fills=np.concatenate([_fills(samples, packs[modality], job.seq_length) for modality in MODALITIES]),
            seq_length=job.seq_length,
        ),
        "rejected": {
            reason: {"count": count, "examples": examples.get(reason, [])} for reason, count in sorted(rejected.items())
        },
    }


def check_rejected(report: dict[str, Any], *, max_bad_frac: float, where: str) -> None:
    """Raise DataError when the rejected share is above the limit, or when nothing is left."""
    bad = sum(entry["count"] for entry in report["rejected"].values())
    reasons = ", ".join(f"{reason} {entry['count']}" for reason, entry in report["rejected"].items())
    if bad > max_bad_frac * report["records"]:
        raise DataError(
            f"{where}: {bad} of {report['records']} records rejected ({reasons}), above --max-bad-frac "
            f"{max_bad_frac:g}; correct the input or raise the limit"
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


def _sequences(job: Job, samples: Samples, packs: Packs) -> dict[str, Any]:
    lengths, images = samples.lengths[packs.samples], samples.images[packs.samples]
    held = np.bincount(packs.packs, weights=images, minlength=packs.count)
    filler = (images == 0) & (held[packs.packs] > 0)
    room, tokens = packs.count * job.seq_length, int(lengths.sum(dtype=np.int64))
    return {
        "sequences": packs.count,
        "tokens": tokens,
        "fill": round(tokens / room, 6) if room else 0.0,
        "images_per_sequence": round(float(held.sum()) / packs.count, 4) if packs.count else 0.0,
        "filler_tokens": int(lengths[filler].sum(dtype=np.int64)),
    }


def _fills(samples: Samples, packs: Packs, seq_length: int) -> npt.NDArray[np.float64]:
    tokens = np.bincount(packs.packs, weights=samples.lengths[packs.samples], minlength=packs.count)
    return tokens / seq_length


def _read_samples(summaries: Sequence[UnitSummary], directory: Path) -> Samples:
    handles, parts = ReadHandles(), []
    for entry in (shard for summary in summaries for shard in summary.shards):
        shard = Shard(directory, name=entry.name, handles=handles)
        parts.append((shard.tokens.lengths, shard.samples.column("images")))
    return Samples.joined(parts)


def _pack(job: Job, samples: Samples) -> dict[Modality, Packs]:
    text, multimodal = pack(
        samples.lengths,
        images=samples.images,
        seq_length=job.seq_length,
        max_images=job.max_images,
        packed=job.packed,
    )
    return {"text": text, "multimodal": multimodal}


def _write_packs(directory: Path, samples: Samples, packs: dict[Modality, Packs]) -> FileEntry:
    shards = np.repeat(np.arange(len(samples.shards), dtype=np.int32), samples.shards)
    firsts = np.cumsum(samples.shards, dtype=np.int64) - samples.shards
    rows = np.zeros(len(samples.lengths), PACK_ROW)
    row = number = 0
    for kind, modality in enumerate(MODALITIES):
        members = packs[modality]
        part = rows[row : row + len(members.samples)]
        part["pack"], part["modality"] = members.packs.astype(np.int64) + number, kind
        part["shard"] = shards[members.samples]
        part["sample"] = members.samples - firsts[part["shard"]]
        part["tokens"], part["images"] = samples.lengths[members.samples], samples.images[members.samples]
        row, number = row + len(part), number + members.count
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(rows))
    with NewFile(directory / "packs.npy") as file:
        # Not through np.save, which would hold the table three times.
        file.write(header.getvalue())
        file.write(rows.view(np.uint8).data)
        return file.commit()


def _merge_rejects(output: Output, units: Sequence[Unit], directory: Path) -> dict[str, list[str]]:
    """Write `rejects.jsonl`; returns the first examples per reason."""
    examples: dict[str, list[str]] = {}
    with NewFile(directory / "rejects.jsonl") as merged:
        for unit in units:
            with open(output.rejects_path(unit.number), "rb") as stream:
                for line in stream:
                    merged.write(line)
                    reject = json.loads(line)
                    known = examples.setdefault(reject["reason"], [])
                    if len(known) < _EXAMPLES:
                        known.append(reject["record"])
        merged.commit()
    return examples
