"""Finished preprocessing runs, opened and checked for training, and read one packed sequence at a time.

Legend: S sequence length.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megavl.config.errors import DataError
from megavl.config.presets import ImageGeometry
from megavl.config.recipe import SourceConfig
from megavl.data.image import ImageFile
from megavl.data.index_file import ReadHandles
from megavl.data.manifest import (
    MODALITIES,
    PACK_ROW,
    DatasetManifest,
    Modality,
    TokenizerEntry,
    fingerprint,
    geometry_entry,
    read_manifest,
    read_table,
    to_json,
)
from megavl.data.shard import Shard, check_file
from megavl.data.tokenizer import Tokenizer

_AGAIN = "preprocess the data again with the recipe's settings, or correct the recipe"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One sample inside a packed sequence."""

    start: int
    """First position in the sequence."""
    end: int
    images: tuple[ImageFile, ...]
    origin: str
    """`file:place` of the record it was made from."""
    damage: str = ""
    """Why its tokens are not those that were written; empty when they are."""


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """One sequence, padded to S."""

    number: int
    """Global number of the pack."""
    tokens: npt.NDArray[np.int32]
    """(S,)"""
    supervised: npt.NDArray[np.bool_]
    """(S,): positions that are targets."""
    members: tuple[Member, ...]


class Source:
    """One preprocessed dataset."""

    def __init__(self, path: str | Path, *, handles: ReadHandles) -> None:
        """Read and check the manifests, tables and indexes.

        Raises:
            DataError: naming the file that is missing or contradicts its manifest.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path / "manifest.json", kind=DatasetManifest)
        self.shards = [
            Shard(self.path, name=entry.name, handles=handles, sha256=entry.sha256) for entry in self.manifest.shards
        ]
        check_file(self.path, self.manifest.packs)
        self.packs = read_table(self.path / self.manifest.packs.name, dtype=PACK_ROW)
        starts = np.flatnonzero(np.diff(self.packs["pack"], prepend=-1))
        self._borders = np.append(starts, len(self.packs))
        self.counts: dict[Modality, int] = {
            "text": self.manifest.text_packs,
            "multimodal": self.manifest.multimodal_packs,
        }
        self._check_packs()
        self._check_members()

    def _check_members(self) -> None:
        lengths = [shard.tokens.lengths for shard in self.shards]
        sizes = np.array([len(part) for part in lengths], np.int64)
        shard, sample = self.packs["shard"], self.packs["sample"]
        sound = bool(((shard >= 0) & (shard < len(sizes)) & (sample >= 0)).all()) and bool(
            (sample < sizes[shard]).all()
        )
        if sound:
            found = np.concatenate(lengths)[(np.cumsum(sizes) - sizes)[shard] + sample]
            sums = np.add.reduceat(self.packs["tokens"].astype(np.int64), self._borders[:-1])
            sound = bool((found == self.packs["tokens"]).all() and (sums <= self.manifest.pack.seq_length).all())
        if not sound:
            raise DataError(
                f"{self.path / self.manifest.packs.name}: a sequence names samples that do not exist or do not fit "
                f"into {self.manifest.pack.seq_length} tokens; preprocess the dataset again"
            )

    def _check_packs(self) -> None:
        shards = {entry.name: entry.sha256 for entry in self.manifest.shards}
        found = fingerprint(shards=shards, packs_sha256=self.manifest.packs.sha256, settings=self.manifest.pack)
        kinds = self.packs["modality"][self._borders[:-1]]
        counts = {modality: int((kinds == number).sum()) for number, modality in enumerate(MODALITIES)}
        if found != self.manifest.fingerprint or counts != self.counts:
            raise DataError(
                f"{self.path / 'manifest.json'}: fingerprint {self.manifest.fingerprint} or counts {self.counts} "
                f"do not follow from the files beside it ({found}, {counts}); preprocess the dataset again"
            )

    def members(self, *, modality: Modality, index: int) -> npt.NDArray[np.void]:
        """Rows of the packs table of one pack."""
        number = index + (self.counts["text"] if modality == "multimodal" else 0)
        return self.packs[self._borders[number] : self._borders[number + 1]]

    def check_hashes(self, *, share: tuple[int, int]) -> None:
        """Hash every file whose number modulo share[1] is share[0].

        Raises:
            DataError: naming the first file whose bytes are not those that were written.
        """
        files = [entry for shard in self.shards for entry in shard.manifest.files]
        for entry in files[share[0] :: share[1]]:
            check_file(self.path, entry)


class Dataset:
    """All sources of a run."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        weights: Sequence[float],
        pad_id: int,
        geometry: ImageGeometry,
        handles: ReadHandles,
    ) -> None:
        """Use `open_dataset`, which checks that the sources fit together."""
        self.geometry = geometry
        self.sources = list(sources)
        self.weights = list(weights)
        self.pad_id = pad_id
        self.seq_length = sources[0].manifest.pack.seq_length
        self._handles = handles
        sizes = [sum(source.counts.values()) for source in sources]
        self._first = [sum(sizes[:number]) for number in range(len(sizes))]

    @property
    def fingerprint(self) -> str:
        """Identity of the data and their weights; a resumed run must find the same."""
        parts = [[source.manifest.fingerprint, weight] for source, weight in zip(self.sources, self.weights)]
        return hashlib.sha256(to_json(parts)).hexdigest()

    @property
    def counts(self) -> list[dict[Modality, int]]:
        """Packed sequences per modality, for each source."""
        return [source.counts for source in self.sources]

    def read(self, *, source: int, modality: Modality, index: int) -> PackedSequence:
        """One packed sequence.

        Args:
            source: number of the source.
            modality: kind of pack.
            index: number of the pack among those of its kind.

        Raises:
            DataError: a file has vanished or shrunk since it was opened.
        """
        tokens = np.full(self.seq_length, self.pad_id, np.int32)
        supervised = np.zeros(self.seq_length, np.bool_)
        members, start = [], 0
        for row in self.sources[source].members(modality=modality, index=index):
            shard = self.sources[source].shards[int(row["shard"])]
            sample = int(row["sample"])
            ids, damage = self._tokens(shard, sample)
            end = start + len(ids)
            tokens[start:end] = ids
            for span in shard.spans_of(sample):
                supervised[start + int(span["start"]) : start + int(span["end"])] = True
            images = tuple(
                ImageFile(
                    path=shard.images.path, offset=offset, size=size, crc32=int(shard.image_table["crc32"][number])
                )
                for number in shard.images_of(sample)
                for offset, size in [shard.images.byte_range(number)]
            )
            members.append(Member(start=start, end=end, images=images, origin=shard.origin(sample), damage=damage))
            start = end
        number = self._first[source] + index + (self.sources[source].counts["text"] if modality == "multimodal" else 0)
        return PackedSequence(number=number, tokens=tokens, supervised=supervised, members=tuple(members))

    def _tokens(self, shard: Shard, sample: int) -> tuple[npt.NDArray[np.int32], str]:
        """Tokens of a sample; where damaged, placeholders for the same images and padding to the same length."""
        ids = shard.tokens.read(sample)
        if zlib.crc32(ids.astype("<i4").tobytes()) == int(shard.samples["crc32"][sample]):
            return ids, ""
        entry = shard.manifest
        placeholders = int(shard.samples["images"][sample]) * entry.geometry.tokens
        substitute = np.full(len(ids), self.pad_id, np.int32)
        substitute[:placeholders] = -1 if entry.tokenizer.image_id is None else entry.tokenizer.image_id
        return substitute, f"{shard.tokens.path}: tokens of sample {sample} damaged (crc32)"


def open_dataset(
    sources: Sequence[SourceConfig],
    *,
    tokenizer: Tokenizer,
    seq_length: int,
    geometry: ImageGeometry,
    vocab_size: int,
    image_token_id: int | None = None,
    skip_hash: bool = False,
    hash_share: tuple[int, int] = (0, 1),
) -> Dataset:
    """Open preprocessed datasets and check that they fit the run.

    Args:
        sources: directories written by data_tools/preprocess.py, with weights.
        tokenizer: the run's tokenizer.
        seq_length: tokens per sequence S.
        geometry: how the model reads images.
        vocab_size: rows of the model's embedding.
        image_token_id: the model's image token; default: no check.
        skip_hash: leave damage to the crc32 of each record, checked when it is read.
        hash_share: (part, parts) of the files to hash here, to share the work among ranks.

    Raises:
        DataError: a file is missing or damaged, or tokenizer, vocabulary, sequence length or image geometry differ.
    """
    handles = ReadHandles()
    _check_tokenizer(tokenizer, vocab_size=vocab_size, image_token_id=image_token_id)
    opened = []
    for number, config in enumerate(sources):
        source = Source(config.path, handles=handles)
        _check_fit(
            source, where=f"data.sources[{number}]", tokenizer=tokenizer, seq_length=seq_length, geometry=geometry
        )
        for shard in source.shards:
            if shard.manifest.max_token >= vocab_size:
                raise DataError(
                    f"{source.path / shard.manifest.name}.json: holds token id {shard.manifest.max_token}, outside "
                    f"model.llm.vocab_size {vocab_size}; train a model with more rows or use its own tokenizer"
                )
        if not skip_hash:
            source.check_hashes(share=hash_share)
        opened.append(source)
    weights = [config.weight for config in sources]
    return Dataset(opened, weights=weights, pad_id=tokenizer.pad_id, geometry=geometry, handles=handles)


def _check_tokenizer(tokenizer: Tokenizer, *, vocab_size: int, image_token_id: int | None) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{tokenizer.path}: has ids up to {tokenizer.vocab_size - 1}, but model.llm.vocab_size is {vocab_size}; "
            "use the model's own tokenizer or more rows"
        )
    if image_token_id is not None and tokenizer.image_id != image_token_id:
        raise DataError(
            f"{tokenizer.path}: <image_placeholder> has id {tokenizer.image_id}, but model.image_token_id is "
            f"{image_token_id}; correct model.image_token_id or use the model's own tokenizer"
        )


def _check_fit(source: Source, *, where: str, tokenizer: Tokenizer, seq_length: int, geometry: ImageGeometry) -> None:
    manifest, path = source.manifest, source.path / "manifest.json"
    if manifest.tokenizer.sha256 != tokenizer.sha256:
        raise DataError(
            f"{path}: {where} was made with tokenizer sha256 {manifest.tokenizer.sha256}, but data.tokenizer "
            f"{tokenizer.path} has {tokenizer.sha256}; {_AGAIN}"
        )
    if _specials(manifest.tokenizer) != _specials(tokenizer.entry):
        raise DataError(
            f"{path}: {where} has special tokens {_specials(manifest.tokenizer)}, but data.tokenizer {tokenizer.path} "
            f"has {_specials(tokenizer.entry)}; {_AGAIN}"
        )
    if manifest.pack.seq_length != seq_length:
        raise DataError(
            f"{path}: {where} is packed to {manifest.pack.seq_length} tokens, but data.seq_length is {seq_length}; "
            f"{_AGAIN}"
        )
    if manifest.multimodal_packs and manifest.geometry != geometry_entry(geometry):
        raise DataError(
            f"{path}: {where} has images of {manifest.geometry.tokens} tokens on a canvas of "
            f"{manifest.geometry.canvas_size} pixels, but the model reads {geometry.tokens} tokens and "
            f"{geometry.canvas_size} pixels; choose --image-preset for this model and preprocess again"
        )


def _specials(entry: TokenizerEntry) -> dict[str, int | None]:
    return {"bos": entry.bos_id, "eos": entry.eos_id, "pad": entry.pad_id, "image": entry.image_id}
