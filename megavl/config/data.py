"""The `data:` section of a recipe: datasets and their mixture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from megavl.config.bounds import Fraction, NonNegative, NonNegativeReal, PathText, Positive, PositiveReal, Workers
from megavl.config.errors import UsageError
from megavl.config.model import STRICT

Grouping = Literal["step", "sequence"]
"""Whether each step or each sequence holds only text or only multimodal samples."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModalityWeights:
    """Weight of a source in text steps and in multimodal steps; with 0, nothing is drawn from it there."""

    text: NonNegativeReal = 0.0
    """Relative to the other sources, in text steps."""
    multimodal: NonNegativeReal = 0.0
    """Relative to the other sources, in multimodal steps."""


def _in_both(weight: object) -> object:
    """Turn a plain number into the weight of both modalities."""
    if isinstance(weight, (int, float)):
        return {"text": weight, "multimodal": weight}
    if not isinstance(weight, (Mapping, ModalityWeights)):
        raise ValueError("a weight is a number, or {text: ..., multimodal: ...}")
    return weight


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig:
    """One preprocessed dataset: a folder `name` in data.root, or any `path`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")] | None = None
    """Name of the source in overrides (`data.sources.NAME.path=...`) and in messages."""
    path: PathText | None = None
    """Directory written by data_tools/preprocess.py, relative to the working directory. Default: `name` in data.root,
    or data.root itself if the source has no name."""
    weight: Annotated[ModalityWeights, BeforeValidator(_in_both)] = field(
        default_factory=lambda: ModalityWeights(text=1.0, multimodal=1.0)
    )
    """Share of a modality's sequences that comes from this source, relative to the other sources of that modality. One
    number for both modalities, or {text: ..., multimodal: ...}; 0 leaves the source out."""
    max_epochs: PositiveReal | None = None
    """Most epochs over this source; a run that needs more is refused before its first step. Default: no limit."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureSource:
    """A source with a weight and a resolved path."""

    name: str
    """Name of the source, or its number if it has none; for messages."""
    path: str
    weight: ModalityWeights
    max_epochs: float | None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """The data and its mixture. Grouping, ratio and warm-up follow the paper, section 3.2.2."""

    root: PathText | None = None
    """Folder of the sources without `path`, relative to the working directory."""
    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    """Datasets; each may hold text and multimodal shards. Default: data.root is the only dataset."""
    tokenizer: PathText
    """Tokenizer directory or file. Its hash must be the one in the shards."""
    seq_length: Positive
    """Tokens per sequence S."""
    multimodal_fraction: Fraction
    """Share of multimodal steps after the warm-up; 0.3 in stage 2."""
    modality_warmup_steps: NonNegative = 0
    """Steps in which the multimodal share rises linearly from 0 to multimodal_fraction."""
    grouping: Grouping = "step"
    """`step`: every step is pure text or pure multimodal on all ranks (paper, section 3.2.2). `sequence`: every step
    mixes both, shuffled over micro-batches and ranks. This is slower and meant for comparison."""
    cross_document_attention: bool = False
    """Let attention cross document borders in a packed sequence; the paper does not state it."""
    num_workers: Literal["auto"] | Workers = "auto"
    """Processes per data-parallel rank that decode images. With `auto`, as many as the planner's images per second
    need."""
    prefetch_images: Literal["auto"] | Positive = "auto"
    """Decoded images that a data-parallel rank prefetches; with `auto`, those of two multimodal steps, 64 to 512. An
    image takes 0.44 MB at 384 pixels and 3.1 MB at 1024."""
    max_bad_in_row: Positive = 16
    """Samples in a row that may fail in the loader before the run ends with code 3. Samples with and without images are
    counted separately."""
    skip_hash: bool = False
    """Skip the hashes of token and image files at the start. A crc32 of every sample and image is compared at each read
    in any case, and index files and tables are always hashed."""

    @property
    def mixture(self) -> tuple[MixtureSource, ...]:
        """The sources with a weight above 0."""
        return tuple(
            MixtureSource(
                name=source.name or str(number),
                path=self._path_of(number, source),
                weight=source.weight,
                max_epochs=source.max_epochs,
            )
            for number, source in enumerate(self.sources)
            if source.weight.text > 0 or source.weight.multimodal > 0
        )

    def _path_of(self, number: int, source: SourceConfig) -> str:
        if source.path is not None:
            return source.path
        if self.root is None:
            name = f"data.sources.{source.name or number}"
            raise UsageError(f"{name}: has no path; set data.root to the folder that holds the sources, or {name}.path")
        return self.root if source.name is None else f"{self.root}/{source.name}"


def check_sources(data: DataConfig) -> None:
    """Check the sources of a recipe together.

    Raises:
        UsageError: there are none, two have one name, or a kind of step has no source.
    """
    if not data.mixture:
        reason = "the list is empty" if not data.sources else "every weight is 0"
        raise UsageError(f"data.sources: {reason}; name at least one preprocessed dataset")
    names = [source.name for source in data.sources if source.name is not None]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"data.sources: two entries are named {doubled[0]!r}; give each its own name")
    fraction = data.multimodal_fraction
    wanted = {"text": fraction < 1 or data.modality_warmup_steps > 0, "multimodal": fraction > 0}
    for modality, needed in wanted.items():
        if needed and not any(getattr(source.weight, modality) > 0 for source in data.mixture):
            raise UsageError(
                f"data.sources: none has a {modality} weight, though data.multimodal_fraction is {fraction} and "
                f"data.modality_warmup_steps {data.modality_warmup_steps}; give at least one source such a weight"
            )
