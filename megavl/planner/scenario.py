"""A recipe on a number of devices: everything that a prediction depends on, derived sizes included.

Legend of the package. Sizes: T tokens of a micro-batch, H decoder width, F its SwiGLU width, V vocabulary, e bytes per
element. Ranks: t tensor-parallel, p pipeline, v stages per pipeline rank, m micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from megavl.config.errors import UsageError
from megavl.config.recipe import Recipe

Placement = Literal["recompute", "split_tp", "split_all"]
"""Where the vision encoders run, `parallel.vision`:

- `recompute`: every tensor-parallel rank of the first stage encodes all images of a micro-batch.
- `split_tp`: these ranks share the images of a micro-batch.
- `split_all`: all tensor x pipeline ranks share the images of the step, before the pipeline starts."""
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
Kind = Literal["text", "multimodal"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Modalities of a step."""

PACKED_IMAGES = 5
"""Most images that preprocessing packs into one sequence by default."""
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of a weight or activation by training.precision."""


def expected_images(recipe: Recipe) -> int:
    """Images assumed in a multimodal sequence: what packing allows and the sequence holds; 0 without such steps."""
    if recipe.data.multimodal_fraction == 0:
        return 0
    return min(PACKED_IMAGES, recipe.data.seq_length // recipe.model.image_tokens)


def multimodal_share(recipe: Recipe) -> float:
    """Mean share of multimodal steps over the run, with its linear warm-up from zero."""
    data, steps = recipe.data, recipe.training.steps
    warm = min(steps, data.modality_warmup_steps)
    rising = warm * (warm - 1) / (2 * data.modality_warmup_steps) if warm else 0.0
    return data.multimodal_fraction * (rising + steps - warm) / steps


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One recipe on `devices` devices."""

    recipe: Recipe
    devices: int
    """World size."""
    images: float
    """Images of a multimodal sequence."""
    share: float
    """Share of multimodal steps."""

    @property
    def tensor(self) -> int:
        """Tensor-parallel ranks t."""
        return self.recipe.parallel.tensor

    @property
    def pipeline(self) -> int:
        """Pipeline ranks p."""
        return self.recipe.parallel.pipeline

    @property
    def virtual(self) -> int:
        """Stages per pipeline rank v."""
        return self.recipe.parallel.virtual_pipeline

    @property
    def stages(self) -> int:
        """Stages p x v; stage g runs on pipeline rank g % p, as its virtual stage g // p."""
        return self.recipe.stages

    @property
    def vision(self) -> Placement:
        """Where the encoders run."""
        return self.recipe.parallel.vision

    @property
    def data_parallel(self) -> int:
        """Data-parallel ranks."""
        return self.devices // (self.tensor * self.pipeline)

    @property
    def optimizer_ranks(self) -> int:
        """Ranks over which the optimizer's state and update are divided."""
        return self.data_parallel if self.recipe.parallel.distributed_optimizer else 1

    @property
    def micro_batches(self) -> int:
        """Micro-batches m per step and data-parallel rank."""
        training = self.recipe.training
        return training.global_batch_size // (self.data_parallel * training.micro_batch_size)

    @property
    def tokens(self) -> int:
        """Tokens T of a micro-batch."""
        return self.recipe.training.micro_batch_size * self.recipe.data.seq_length

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all devices."""
        return self.recipe.training.global_batch_size * self.recipe.data.seq_length

    @property
    def element(self) -> int:
        """Bytes e of a weight or activation."""
        return ELEMENT_BYTES[self.recipe.training.precision]

    @property
    def sequence_ranks(self) -> int:
        """Ranks over which norms and residuals are split: t under sequence parallelism, else 1."""
        return self.tensor if self.recipe.parallel.sequence_parallel else 1

    @property
    def hidden_bytes(self) -> float:
        """Bytes of one micro-batch's hidden states over all tensor-parallel ranks."""
        return float(self.tokens * self.recipe.model.llm.hidden_size * self.element)

    @property
    def feature_bytes(self) -> float:
        """Bytes of one image's features between towers and adaptor."""
        model = self.recipe.model
        return float((2 if model.sam else 1) * model.image_tokens * model.siglip.width * self.element)

    def weight(self, kind: Kind) -> float:
        """Share of steps of this kind."""
        return self.share if kind == "multimodal" else 1.0 - self.share

    def micro_batch_images(self, kind: Kind) -> float:
        """Images of one micro-batch."""
        return self.images * self.recipe.training.micro_batch_size if kind == "multimodal" else 0.0

    def loss_tokens(self, kind: Kind) -> float:
        """Positions of a micro-batch that can have a label: all but those of images. The head runs on these."""
        return self.tokens - self.micro_batch_images(kind) * self.recipe.model.image_tokens

    def tower_images(self, kind: Kind) -> float:
        """Images of a micro-batch that one rank of the first stage encodes within the pipeline."""
        images = self.micro_batch_images(kind)
        if self.vision == "split_all":
            return 0.0
        return _share_of(images, self.tensor) if self.vision == "split_tp" else images

    def adaptor_images(self, kind: Kind) -> float:
        """Images of a micro-batch that pass the adaptor on one rank of the first stage; all under `split_all`."""
        return self.micro_batch_images(kind) if self.vision == "split_all" else self.tower_images(kind)

    def images_up_front(self, kind: Kind) -> float:
        """Images of the step that each rank encodes before the pipeline starts; `split_all` only."""
        if self.vision != "split_all":
            return 0.0
        return _share_of(self.micro_batch_images(kind) * self.micro_batches, self.tensor * self.pipeline)


def _share_of(images: float, ranks: int) -> float:
    """Images on the fullest of `ranks` ranks; of a fractional mean, the mean share, but at least one image."""
    if float(images).is_integer():
        return float(math.ceil(images / ranks))
    return max(images / ranks, min(images, 1.0))


def checked_devices(count: int) -> int:
    """`count`, if it is positive.

    Raises:
        UsageError: it is not.
    """
    if count < 1:
        raise UsageError(f"--devices: {count} is no number of devices; give 1 or more")
    return count


def check_images(recipe: Recipe, images: float) -> None:
    """Refuse a number of images that no sequence of the recipe holds.

    Raises:
        UsageError: with the most that fit.
    """
    most = recipe.data.seq_length / recipe.model.image_tokens
    # NaN fails every comparison.
    if not 0 <= images <= most:
        raise UsageError(
            f"--images: a sequence of {recipe.data.seq_length} tokens cannot have {images} images of "
            f"{recipe.model.image_tokens} tokens; give 0 to {most:.1f}"
        )


def make_scenario(recipe: Recipe, *, devices: int | None = None, images: float | None = None) -> Scenario:
    """Check the sizes against each other and fill in what the recipe implies.

    Args:
        devices: world size; default: one model replica.
        images: images of a multimodal sequence; default `expected_images`.

    Raises:
        UsageError: sizes do not fit each other.
    """
    world = recipe.parallel.tensor * recipe.parallel.pipeline if devices is None else devices
    checked_devices(world)
    if images is not None:
        check_images(recipe, images)
    recipe.data_parallel(world)
    found = float(expected_images(recipe) if images is None else images)
    return Scenario(recipe=recipe, devices=world, images=found, share=multimodal_share(recipe))
