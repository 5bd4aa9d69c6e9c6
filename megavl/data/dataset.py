"""Finished preprocessing runs, opened and checked for training, then read one packed sequence at a time.

Legend: S sequence length.
"""

from __future__ import annotations

import hashlib
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megavl.config.data import MixtureSource, ModalityWeights
from megavl.config.errors import DataError
from megavl.config.presets import IMAGE_PRESETS, ImageGeometry
from megavl.data.image import ImageFile
from megavl.data.manifest import (
    MODALITIES,
    PACK_ROW,
    DatasetManifest,
    Modality,
    TokenizerEntry,
    fingerprint,
    geometry_entry,
    read_manifest,
    to_json,
)
from megavl.data.sampler import ORDER_VERSION
from megavl.data.shard import Shard, check_file
from megavl.data.table import ReadHandles, open_table
from megavl.data.tokenizer import Tokenizer
from megavl.foreign.printing import visible

_AGAIN = "preprocess the data again with the recipe's settings, or correct the recipe"
_AFRESH = "restore the file or start data_tools/preprocess.py again with --no-resume"
Problem = tuple[str, str]
"""What is wrong, and the remedy."""
_MEMBERS = 32
"""Rows of a pack that are read at once; longer packs take more reads."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One sample inside a packed sequence."""

    start: int
    """First position in the sequence."""
    end: int
    images: tuple[ImageFile, ...]
    origin: str
    """`file:record` that it was made from."""
    damage: str = ""
    """What is wrong with its tokens; empty when they are sound."""


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """One sequence, padded to S."""

    number: int
    """Global number of the pack."""
    source: int
    """Number of the source that it belongs to."""
    tokens: npt.NDArray[np.int32]
    """(S,)"""
    supervised: npt.NDArray[np.bool_]
    """(S,): positions that are targets."""
    members: tuple[Member, ...]


class Source:
    """One preprocessed dataset; its memory grows with its shards, not with its samples."""

    def __init__(self, path: str | Path, *, handles: ReadHandles) -> None:
        """Check the manifests, and the header and size of every file; `check` reads the contents.

        Raises:
            DataError: naming the file that is missing or contradicts its manifest.
        """
        self.path = Path(path)
        where = self.path / "manifest.json"
        self.manifest = read_manifest(where, kind=DatasetManifest)
        found = fingerprint(self.manifest)
        if found != self.manifest.fingerprint:
            raise DataError(
                f"{where}: its content gives fingerprint {found}, not the {self.manifest.fingerprint} it states; "
                "restore the file or start data_tools/preprocess.py again"
            )
        self.shards = [
            Shard(self.path, name=entry.name, handles=handles, sha256=entry.sha256) for entry in self.manifest.shards
        ]
        self._sizes = np.array([len(shard.samples) for shard in self.shards], np.int64)
        self.packs = open_table(self.path / self.manifest.packs.name, dtype=PACK_ROW, handles=handles)
        self.counts: dict[Modality, int] = {
            "text": self.manifest.text_packs,
            "multimodal": self.manifest.multimodal_packs,
        }

    def members(self, *, modality: Modality, index: int) -> npt.NDArray[np.void]:
        """Rows of the packs table of one pack.

        Raises:
            DataError: the table contradicts itself or the shards.
        """
        number = index + (self.counts["text"] if modality == "multimodal" else 0)
        # Packs are numbered in order, so a search by halves finds one in log2(rows) reads.
        first = bisect_left(range(len(self.packs)), number, key=lambda row: int(self.packs[row]["pack"]))
        rows, size = self.packs.rows(first, _MEMBERS), _MEMBERS
        while len(rows) == size and rows["pack"][-1] == number:
            size *= 4
            rows = self.packs.rows(first, size)
        rows = rows[: int(np.searchsorted(rows["pack"], number, side="right"))]
        if not len(rows) or rows["pack"][0] != number or (rows["modality"] != MODALITIES.index(modality)).any():
            raise self._wrong_pack(number, "is missing, or of the other modality")
        if not self._inside(rows) or int(rows["tokens"].sum(dtype=np.int64)) > self.manifest.pack.seq_length:
            raise self._wrong_pack(number, "names samples that do not exist, or holds too many tokens")
        return rows

    def check(self, *, share: tuple[int, int], skip_hash: bool = False) -> None:
        """Compare every file with its hash.

        Args:
            share: (part, parts): read only the files whose number modulo `parts` is `part`, to divide them among ranks.
            skip_hash: hash index files and tables only, not tokens and images.

        Raises:
            DataError: naming the first file whose bytes are not those that were written.
        """
        files = [self.manifest.packs, *(entry for shard in self.shards for entry in shard.manifest.files)]
        if skip_hash:
            files = [entry for entry in files if not entry.name.endswith(".bin")]
        # By size, so that each part gets as much to read as the others.
        files.sort(key=lambda entry: (-entry.size, entry.name))
        mine = files[share[0] :: share[1]]
        quiet, name = share[0] > 0, visible(str(self.path), keep="")
        for entry in tqdm(mine, desc=f"check {name}", unit=" files", disable=quiet, delay=5, mininterval=5):
            check_file(self.path, entry)

    def _inside(self, rows: npt.NDArray[np.void]) -> bool:
        shard, sample = rows["shard"], rows["sample"]
        if not bool(((shard >= 0) & (shard < len(self.shards)) & (sample >= 0) & (rows["tokens"] >= 0)).all()):
            return False
        return bool((sample < self._sizes[shard]).all())

    def _wrong_pack(self, number: int, what: str) -> DataError:
        return DataError(f"{self.packs.path}: sequence {number} {what}; {_AFRESH}")


class Dataset:
    """All sources of a run."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        weights: Sequence[ModalityWeights],
        pad_id: int,
        geometry: ImageGeometry,
        handles: ReadHandles,
    ) -> None:
        """Use `open_dataset`, which checks that the sources fit together."""
        self.geometry = geometry
        self.sources = list(sources)
        self.weights = list(weights)
        self.pad_id, self.image_id = pad_id, sources[0].manifest.tokenizer.image_id
        self.seq_length = sources[0].manifest.pack.seq_length
        self._handles = handles
        sizes = [sum(source.counts.values()) for source in sources]
        self._first = [sum(sizes[:number]) for number in range(len(sizes))]

    @property
    def fingerprint(self) -> str:
        """Identity of the data and their weights; a resumed run must find the same."""
        parts = [[source.manifest.fingerprint, asdict(weight)] for source, weight in zip(self.sources, self.weights)]
        return hashlib.sha256(to_json({"order": ORDER_VERSION, "sources": parts})).hexdigest()

    @property
    def counts(self) -> list[dict[Modality, int]]:
        """Packed sequences per modality, for each source."""
        return [source.counts for source in self.sources]

    def check(self, *, share: tuple[int, int] = (0, 1), skip_hash: bool = False) -> None:
        """Compare every file with its hash; arguments and errors as of `Source.check`."""
        for source in self.sources:
            source.check(share=share, skip_hash=skip_hash)

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
            if len(ids) != int(row["tokens"]):
                raise DataError(
                    f"{self.sources[source].packs.path}: says {int(row['tokens'])} tokens where sample {sample} of "
                    f"{shard.manifest.name} has {len(ids)}; {_AFRESH}"
                )
            end = start + len(ids)
            tokens[start:end] = ids
            for span in shard.spans_of(sample):
                supervised[start + int(span["start"]) : start + int(span["end"])] = True
            images = tuple(
                ImageFile(
                    path=shard.images.path, offset=offset, size=size, crc32=int(shard.image_table[number]["crc32"])
                )
                for number in shard.images_of(sample)
                for offset, size in [shard.images.byte_range(number)]
            )
            members.append(Member(start=start, end=end, images=images, origin=shard.origin(sample), damage=damage))
            start = end
        number = self._first[source] + index + (self.sources[source].counts["text"] if modality == "multimodal" else 0)
        return PackedSequence(
            number=number, source=source, tokens=tokens, supervised=supervised, members=tuple(members)
        )

    def _tokens(self, shard: Shard, sample: int) -> tuple[npt.NDArray[np.int32], str]:
        """Tokens of a sample, and "" or what is wrong with them.

        Damaged tokens become placeholders for the same images, and padding to the same length.
        """
        ids = shard.tokens.read(sample)
        if zlib.crc32(ids.astype("<i4").tobytes()) == int(shard.samples[sample]["crc32"]):
            return ids, ""
        placeholders = int(shard.samples[sample]["images"]) * shard.manifest.geometry.tokens
        substitute = np.full(len(ids), self.pad_id, np.int32)
        substitute[:placeholders] = -1 if self.image_id is None else self.image_id
        return substitute, f"{shard.tokens.path}: tokens of sample {sample} damaged (crc32)"


def open_dataset(
    sources: Sequence[MixtureSource],
    *,
    tokenizer: Tokenizer,
    seq_length: int,
    geometry: ImageGeometry,
    vocab_size: int,
    image_token_id: int | None = None,
    skip_hash: bool = False,
    check: bool = True,
) -> Dataset:
    """Open preprocessed datasets and check that they fit the run.

    Args:
        sources: `DataConfig.mixture`: directories written by data_tools/preprocess.py, with names and weights.
        tokenizer: the run's tokenizer.
        seq_length: tokens per sequence S.
        geometry: how the model reads images.
        vocab_size: rows of the model's embedding.
        image_token_id: the model's image token; default: no check.
        skip_hash: do not hash tokens and images; the crc32 of each record is compared when it is read.
        check: read all files and compare their hashes; otherwise `Dataset.check` must do it before data are used.

    Raises:
        DataError: a file is missing or damaged; or tokenizer, vocabulary, sequence length or image geometry differ from
            the run's, all of them in one message.
    """
    handles = ReadHandles()
    problems = [
        *_tokenizer_problems(tokenizer, vocab_size=vocab_size, image_token_id=image_token_id),
        *_missing(sources),
    ]
    opened = [Source(config.path, handles=handles) for config in sources if _is_finished(config)]
    for source, config in zip(opened, filter(_is_finished, sources), strict=True):
        problems += _misfits(
            source,
            where=f"data.sources.{config.name}",
            tokenizer=tokenizer,
            seq_length=seq_length,
            geometry=geometry,
            vocab_size=vocab_size,
        )
    if problems:
        # Every remedy once, after all that is wrong.
        raise DataError(
            "; ".join(dict.fromkeys([*(what for what, _ in problems), *(remedy for _, remedy in problems)]))
        )
    weights = [config.weight for config in sources]
    dataset = Dataset(opened, weights=weights, pad_id=tokenizer.pad_id, geometry=geometry, handles=handles)
    if check:
        dataset.check(skip_hash=skip_hash)
    return dataset


def _is_finished(source: MixtureSource) -> bool:
    return Path(source.path, "manifest.json").is_file()


def _missing(sources: Sequence[MixtureSource]) -> Iterator[Problem]:
    """One problem for all sources that are missing."""
    absent = [source for source in sources if not _is_finished(source)]
    if not absent:
        return
    slots = ", ".join(f"{source.name} ({source.path}/manifest.json not found)" for source in absent)
    parents = sorted({Path(source.path).parent for source in absent})
    whole = next((parent for parent in parents if (parent / "manifest.json").is_file()), None)
    yield (
        f"data.sources: no finished dataset for {slots}",
        "preprocess one into each, point data.sources.NAME.path elsewhere, or leave a source out with "
        "data.sources.NAME.weight=0"
        + (f"; {whole} itself is a dataset, which data.sources=[{{}}] trains on alone" if whole else ""),
    )


def _tokenizer_problems(tokenizer: Tokenizer, *, vocab_size: int, image_token_id: int | None) -> Iterator[Problem]:
    if tokenizer.vocab_size > vocab_size:
        yield (
            f"{tokenizer.path}: has ids up to {tokenizer.vocab_size - 1}, but model.llm.vocab_size is {vocab_size}",
            "use the model's own tokenizer or more rows",
        )
    if image_token_id is not None and tokenizer.image_id != image_token_id:
        yield (
            f"{tokenizer.path}: <image_placeholder> has id {tokenizer.image_id}, but model.image_token_id is "
            f"{image_token_id}",
            "correct model.image_token_id or use the model's own tokenizer",
        )


def _misfits(
    source: Source, *, where: str, tokenizer: Tokenizer, seq_length: int, geometry: ImageGeometry, vocab_size: int
) -> Iterator[Problem]:
    """Settings in which a dataset and the run differ."""
    manifest, path = source.manifest, source.path / "manifest.json"
    if manifest.tokenizer.sha256 != tokenizer.sha256:
        yield (
            f"{path}: {where} was made with tokenizer sha256 {manifest.tokenizer.sha256}, but data.tokenizer "
            f"{tokenizer.path} has {tokenizer.sha256}",
            _AGAIN,
        )
    if _specials(manifest.tokenizer) != _specials(tokenizer.entry):
        yield (
            f"{path}: {where} has special tokens {_specials(manifest.tokenizer)}, but data.tokenizer {tokenizer.path} "
            f"has {_specials(tokenizer.entry)}",
            _AGAIN,
        )
    if manifest.pack.seq_length != seq_length:
        yield (
            f"{path}: {where} is packed to {manifest.pack.seq_length} tokens, but data.seq_length is {seq_length}",
            f"preprocess the data again with --seq-length {seq_length}, or correct the recipe",
        )
    if manifest.multimodal_packs and manifest.geometry != geometry_entry(geometry):
        yield (
            f"{path}: {where} has images of {manifest.geometry.tokens} tokens on a canvas of "
            f"{manifest.geometry.canvas_size} pixels, but the model reads {geometry.tokens} tokens and "
            f"{geometry.canvas_size} pixels",
            f"preprocess the data again with --image-preset {_preset_of(geometry)}",
        )
    largest = max(source.shards, key=lambda shard: shard.manifest.max_token, default=None)
    if largest is not None and largest.manifest.max_token >= vocab_size:
        yield (
            f"{source.path / largest.manifest.name}.json: holds token id {largest.manifest.max_token}, outside "
            f"model.llm.vocab_size {vocab_size}",
            "train a model with more rows or use its own tokenizer",
        )


def _preset_of(geometry: ImageGeometry) -> str:
    """The preset of a model's images; a model of its own shape has none."""
    names = (name for name, preset in IMAGE_PRESETS.items() if geometry_entry(preset) == geometry_entry(geometry))
    return next(names, "for this model")


def _specials(entry: TokenizerEntry) -> dict[str, int | None]:
    return {"bos": entry.bos_id, "eos": entry.eos_id, "pad": entry.pad_id, "image": entry.image_id}
