"""A recipe on a number of devices: everything that a prediction depends on, derived sizes included.

Legend of the package: T tokens of a micro-batch, H decoder width, F its SwiGLU width, V vocabulary, t tensor-parallel
ranks, p pipeline ranks, v stages per pipeline rank (virtual ones included), m micro-batches, e bytes per element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from megavl.config.errors import UsageError
from megavl.config.recipe import Recipe

Placement = Literal["recompute", "split_tp", "split_all"]
"""Where the vision encoders run, `parallel.vision`: on every tensor-parallel rank of the first stage, all images on
each (`recompute`); there, each rank its share of a micro-batch's images (`split_tp`); or on all tensor x pipeline
ranks, each its share of the step's images, before the pipeline starts (`split_all`)."""
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
Kind = Literal["text", "multimodal"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Modalities of a step."""

PACKED_IMAGES = 5
"""Images that preprocessing packs into one sequence at most, by default."""
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of a weight or activation by training.precision."""


def expected_images(recipe: Recipe) -> int:
    """Images assumed in a multimodal sequence: what packing allows, or what fits; 0 without multimodal steps."""
    if recipe.data.multimodal_fraction == 0:
        return 0
    return min(PACKED_IMAGES, recipe.data.seq_length // recipe.model.image_tokens)


def multimodal_share(recipe: Recipe) -> float:
    """Mean share of multimodal steps over the run: the target, less what the linear warm-up from zero holds back."""
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
    def element(self) -> int:
        """Bytes e of a weight or activation."""
        return ELEMENT_BYTES[self.recipe.training.precision]

    @property
    def sequence_ranks(self) -> int:
        """Ranks over which norms and residuals are split."""
        return self.tensor if self.recipe.parallel.sequence_parallel else 1

    @property
    def hidden_bytes(self) -> float:
        """Bytes of one micro-batch's hidden states, whole."""
        return float(self.tokens * self.recipe.model.llm.hidden_size * self.element)

    @property
    def feature_bytes(self) -> float:
        """Bytes of one image's features as the towers hand them to the adaptor."""
        model = self.recipe.model
        return float((2 if model.sam else 1) * model.image_tokens * model.siglip.width * self.element)

    def weight(self, kind: Kind) -> float:
        """Share of steps of this kind."""
        return self.share if kind == "multimodal" else 1.0 - self.share

    def micro_batch_images(self, kind: Kind) -> float:
        """Images of one micro-batch."""
        return self.images * self.recipe.training.micro_batch_size if kind == "multimodal" else 0.0

    def loss_tokens(self, kind: Kind) -> float:
        """Positions of a micro-batch whose label can count: all but those of images; the head runs for these."""
        return self.tokens - self.micro_batch_images(kind) * self.recipe.model.image_tokens

    def tower_images(self, kind: Kind) -> float:
        """Images of a micro-batch that one rank of the first stage runs through the towers within the pipeline."""
        images = self.micro_batch_images(kind)
        if self.vision == "split_all":
            return 0.0
        return _share_of(images, self.tensor) if self.vision == "split_tp" else images

    def adaptor_images(self, kind: Kind) -> float:
        """Images of a micro-batch that one rank of the first stage runs through the adaptor; all under `split_all`."""
        return self.micro_batch_images(kind) if self.vision == "split_all" else self.tower_images(kind)

    def images_up_front(self, kind: Kind) -> float:
        """Images of the step that each tensor x pipeline rank encodes before the pipeline starts, `split_all` only."""
        if self.vision != "split_all":
            return 0.0
        return _share_of(self.micro_batch_images(kind) * self.micro_batches, self.tensor * self.pipeline)


def _share_of(images: float, ranks: int) -> float:
    """Most images on one of `ranks` ranks; of a mean number of images, the mean share, but at least one image."""
    if float(images).is_integer():
        return float(math.ceil(images / ranks))
    return max(images / ranks, min(images, 1.0))


def checked_devices(count: int) -> int:
    """`count`, where it is a number of devices.

    Raises:
        UsageError: it is none.
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
    # Not a number compares with nothing.
    if not 0 <= images <= most:
        raise UsageError(
            f"--images: a sequence of {recipe.data.seq_length} tokens cannot have {images} images of "
            f"{recipe.model.image_tokens} tokens; give 0 to {most:.1f}"
        )


def make_scenario(recipe: Recipe, *, devices: int | None = None, images: float | None = None) -> Scenario:
    """Check the sizes against each other and fill in what the recipe implies.

    Args:
        recipe: one training stage.
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
