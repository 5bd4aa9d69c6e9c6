"""Compares MegaVL's logits with those of transformers' own class, in fp32, on prompts with and without images.

Of an export of the decoder alone, text is compared.

Both get the same tokens and the same pixels. The pixel tensors are made here by the released rule, because the image
processor of transformers rounds the low-resolution image to 8 bits, which moves logits by 1e-3.

Legend: I images, C canvas side in pixels, T tokens, V vocabulary rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from megavl.config.errors import CheckpointError, NumericsError, UsageError
from megavl.config.model import ModelConfig
from megavl.config.presets import CLIP_MEAN, CLIP_STD
from megavl.convert.hf_read import is_hf_folder, read_config, read_llm_config
from megavl.convert.start_sources import read_llm
from megavl.convert.table import DECODER
from megavl.data.batch import make_batch
from megavl.data.tokenizer import open_tokenizer
from megavl.generate.decode import Request, generate
from megavl.generate.open_model import ModelSource, find_model, loaded
from megavl.generate.prompt import encode_prompt, end_ids, prompt_pieces, read_canvases
from megavl.weights.canonical_names import canonical_shapes
from megavl.weights.lazy import LazyTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest logit of the prompt; a wrong GELU changes logits by 1e-4."""
NEW_TOKENS = 8
PROMPTS: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    "text": ("What is a picture, and what is it made of?", ()),
    "one image": ("Describe this picture.", ((517, 301),)),
    "two images": ("<image_placeholder>How does this differ from <image_placeholder>?", ((333, 1000), (640, 640))),
}
"""Text, and width and height of each image."""


Reply = tuple[torch.Tensor, tuple[int, ...]]
"""What one model makes of a prompt: logits fp32 (T, V), and greedy tokens."""


@dataclass(frozen=True)
class Difference:
    """Both models on one prompt."""

    name: str
    tokens: int
    max_abs: float
    max_rel: float
    """Relative to transformers' largest logit."""
    greedy: tuple[int, ...]
    their_greedy: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All prompts."""

    reference: str
    """Version and class of transformers."""
    differences: tuple[Difference, ...]

    @property
    def max_abs(self) -> float:
        """Largest difference of a logit."""
        return max(item.max_abs for item in self.differences)

    @property
    def max_rel(self) -> float:
        """Largest relative difference."""
        return max(item.max_rel for item in self.differences)

    @property
    def within_tolerance(self) -> bool:
        """Whether the models are the same."""
        return self.max_rel <= TOLERANCE

    def summary(self) -> str:
        """A line for each prompt, and the verdict."""
        lines = []
        for item in self.differences:
            same = item.greedy == item.their_greedy
            tokens = " ".join(map(str, item.greedy))
            theirs = "" if same else f", transformers' are {' '.join(map(str, item.their_greedy))}"
            apart = f"logits differ by at most {item.max_abs:.2e} absolute, {item.max_rel:.2e} relative"
            apart = apart if item.max_abs else "logits are equal"
            lines.append(f"{item.name}, {item.tokens} tokens: {apart}; greedy tokens {tokens}{theirs or ', the same'}")
        verdict = "within" if self.within_tolerance else "NOT within"
        lines.append(f"{self.reference}: {self.max_rel:.2e} relative, {verdict} the tolerance {TOLERANCE:.0e}")
        return "\n".join(lines)

    def report(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "class": self.reference,
            "prompts": len(self.differences),
            "max_abs_diff": self.max_abs,
            "max_rel_diff": self.max_rel,
            "tolerance": TOLERANCE,
            "greedy_equal": all(item.greedy == item.their_greedy for item in self.differences),
        }


@torch.no_grad()
def compare(model: str | Path, folder: str | Path) -> Comparison:
    """Run every prompt through both models; one model is in memory at a time.

    Args:
        model: what MegaVL opens: a checkpoint or a Hugging Face folder.
        folder: what transformers opens: a Hugging Face folder in the format native or llm; may be the same.

    Raises:
        UsageError: transformers is missing or too old.
        CheckpointError: either is no model, the folder is in neither format, or the two have other sizes.
        DataError: the tokenizer is missing or does not belong to the model.
        NumericsError: logits are not finite.
    """
    _require_transformers()
    exported, alone = _find_export(Path(folder))
    source = exported if alone and Path(model) == Path(folder) else find_model(model)
    if source.config.llm != exported.config.llm if alone else source.config != exported.config:
        raise CheckpointError(f"{model} and {folder}: models of different sizes; give a model and its own export")
    theirs_class = _llm_class() if alone else native_class(source.config)
    words = {name: words for name, words in PROMPTS.items() if not (alone and words[1])}
    prompts = [_prompt(source, *one) for one in words.values()]
    ours, theirs = list(_our_replies(source, prompts)), list(_their_replies(exported, prompts, theirs_class))
    differences = []
    for name, (logits, greedy), (expected, their_greedy) in zip(words, ours, theirs, strict=True):
        if not (logits.isfinite().all() and expected.isfinite().all()):
            raise NumericsError(f"{name}: logits of {model} or {folder} are not finite; check the weights")
        gap = float((logits - expected).abs().max())
        relative = gap / float(expected.abs().max())
        differences.append(Difference(name, len(logits), gap, relative, greedy, their_greedy))
    import transformers

    reference = f"transformers {transformers.__version__} {theirs_class.__name__}"
    return Comparison(reference=reference, differences=tuple(differences))


def native_class(config: ModelConfig) -> type[PreTrainedModel]:
    """transformers' class for a model of these sizes.

    Raises:
        UsageError: this transformers has none.
    """
    import transformers

    name = f"DeepseekVL{'Hybrid' if config.sam else ''}ForConditionalGeneration"
    found: type[PreTrainedModel] | None = getattr(transformers, name, None)
    if found is None:
        raise UsageError(f"transformers {transformers.__version__}: has no {name}; pip install 'megavl[hf]'")
    return found


def _llm_class() -> type[PreTrainedModel]:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM


def pixel_tensors(canvases: torch.Tensor, *, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Arguments of transformers' class from uint8 canvases (I, 3, C, C), by the released rule."""
    pixels = canvases.float() / 255
    if config.sam is None:
        return {"pixel_values": (pixels - 0.5) / 0.5}
    size = (config.siglip.image_size, config.siglip.image_size)
    low = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return {"pixel_values": (low - 0.5) / 0.5, "high_res_pixel_values": (pixels - mean) / std}


def _require_transformers() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise UsageError("--against transformers: it is not installed; pip install 'megavl[hf]'") from error
    # What it says while loading is about settings that a comparison of logits does not use.
    transformers.logging.set_verbosity_error()


def _find_export(folder: Path) -> tuple[ModelSource, bool]:
    """The model, and whether it is a decoder alone."""
    remedy = "give a folder that `megavl convert to-hf CKPT OUT --format native` (or llm) wrote"
    if not is_hf_folder(folder):
        raise CheckpointError(f"{folder}: has no config.json of a Hugging Face model; {remedy}")
    config = read_llm_config(folder)
    if config is not None:
        return _decoder(folder, config), True
    if read_config(folder)[1] != "native":
        raise CheckpointError(f"{folder}: is in the original format, for which transformers has no class; {remedy}")
    return find_model(folder), False


def _decoder(folder: Path, config: ModelConfig) -> ModelSource:
    """A decoder with towers of zeros, which text never reaches."""
    shapes = {name: shape for name, shape in canonical_shapes(config).items() if not name.startswith(DECODER)}
    towers = {name: LazyTensor.of(torch.zeros(shape)) for name, shape in shapes.items()}
    tensors = {**towers, **read_llm(folder, config=config, dtype=torch.float32).tensors}
    return ModelSource(path=folder, config=config, tokenizer=open_tokenizer(folder), tensors=tensors)


def _prompt(source: ModelSource, text: str, sizes: Sequence[tuple[int, int]]) -> Request:
    pictures = [_picture(number, size) for number, size in enumerate(sizes)]
    pieces = prompt_pieces(text, images=len(pictures))
    ids = encode_prompt(pieces, tokenizer=source.tokenizer, config=source.config, room=NEW_TOKENS)
    images = read_canvases(pictures, geometry=source.config.image_geometry)
    return Request(ids=ids, images=images, max_new_tokens=NEW_TOKENS)


def _picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def _our_replies(source: ModelSource, prompts: Sequence[Request]) -> Iterator[Reply]:
    with loaded(source, dtype="float32") as model:
        for prompt in prompts:
            tokens, image_id = torch.tensor(prompt.ids), source.config.image_token_id
            logits = model.logits(make_batch(tokens, images=prompt.images, image_token_id=image_id))
            greedy = tuple(token for _, token, _ in generate(model, [prompt], eos_id=_ends(source)))
            yield logits, greedy


def _ends(source: ModelSource) -> tuple[int, ...]:
    return end_ids(source.config, tokenizer=source.tokenizer)


def _their_replies(
    source: ModelSource, prompts: Sequence[Request], model_class: type[PreTrainedModel]
) -> Iterator[Reply]:
    model: Any = model_class.from_pretrained(source.path, dtype=torch.float32).eval()
    ends = list(_ends(source))
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": ends, "pad_token_id": ends[0]}
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        inputs: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.images is not None and len(prompt.images):
            inputs |= pixel_tensors(prompt.images, config=source.config)
        logits = model(**inputs).logits[0]
        yield logits, tuple(model.generate(**inputs, **options)[0, len(prompt.ids) :].tolist())
