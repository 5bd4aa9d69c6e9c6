"""Start weights: SigLIP, SAM and a language model put together, and initial values for the rest.

- The adaptor and SAM's two convolutions are random, uniform within 1 / sqrt(fan in), biases too. This is how torch
  initialises a `Linear` or `Conv2d`, and so do MegaVL's model and the released code.
- `neck_hd` is a copy of SAM's neck.
- The scale of the HD branch is zero, so that the branch adds nothing at first.

Source: deepseek-ai/DeepSeek-VL at 681bffb, `deepseek_vl/models/sam.py`, `projector.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavl.config.errors import UsageError
from megavl.config.model import ModelConfig
from megavl.convert.start_sources import StartSource, read_llm, read_sam_tower, read_siglip_tower
from megavl.weights.canonical_names import Shape, canonical_shapes
from megavl.weights.dtypes import DTYPES
from megavl.weights.lazy import LazyTensor

_NECK, _NECK_HD, _HD_SCALE = "vision.sam.neck.", "vision.sam.neck_hd.", "vision.sam.hd_alpha_downsamples"


@dataclass(frozen=True, kw_only=True)
class StartWeights:
    """Every tensor of a model; values are read or generated on demand."""

    config: ModelConfig
    dtype: str
    seed: int
    sources: dict[str, StartSource]
    """Sources by `llm`, `siglip` and `sam`."""
    tensors: dict[str, LazyTensor]
    """By canonical name."""
    made: dict[str, str]
    """How each tensor without a source is made, by canonical name."""

    @property
    def unused(self) -> dict[str, LazyTensor]:
        """Unused parameters of the original format that a source has, by their original names."""
        return {name: tensor for source in self.sources.values() for name, tensor in source.unused.items()}

    def origins(self) -> dict[str, Any]:
        """Where every tensor comes from, as JSON."""
        parts = {name: origin for source in self.sources.values() for name, origin in source.origins.items()}
        return {
            "preset": self.config.preset,
            "dtype": self.dtype,
            "seed": self.seed,
            "sources": {name: str(source.path.absolute()) for name, source in self.sources.items()},
            "tensors": {name: self.made.get(name) or parts[name] for name in self.tensors},
            "unused": {name: parts[name] for name in self.unused},
        }

    def table(self) -> Iterator[str]:
        """Lines of a printed table: tensors, parameters, bytes and path of each origin."""
        groups: dict[str, list[LazyTensor]] = {name: [] for name in self.sources}
        for name, tensor in self.tensors.items():
            groups.setdefault(self._group(name), []).append(tensor)
        yield f"{'from':<20} {'tensors':>7} {'parameters':>13} {'bytes':>14}"
        for group, found in (*groups.items(), ("total", list(self.tensors.values()))):
            parameters = sum(math.prod(tensor.shape) for tensor in found)
            size = parameters * DTYPES[self.dtype].itemsize
            path = f"  {self.sources[group].path}" if group in self.sources else ""
            yield f"{group:<20} {len(found):7,} {parameters:13,} {size:14,}{path}"

    def _group(self, name: str) -> str:
        """Row of the table that a tensor belongs to."""
        if name in self.made:
            return "copy of SAM's neck" if name.startswith(_NECK_HD) else self.made[name]
        return next(key for key, source in self.sources.items() if name in source.tensors)


def start_weights(
    config: ModelConfig, *, llm: Path, siglip: Path, sam: Path | None, dtype: str = "bfloat16", seed: int = 0
) -> StartWeights:
    """Put a model together; names, shapes and types are checked here, and values are read later.

    Args:
        config: sizes of the model and of every source.
        llm: folder of the language model, in LLaMA format.
        siglip: file or folder of SigLIP.
        sam: file or folder of SAM; None for a model without it.
        dtype: float32, bfloat16 or float16; all tensors get this type.

    Raises:
        UsageError: `sam` is missing or not wanted, or an unknown dtype.
        CheckpointError: a source that does not fit, is damaged or hostile.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype: {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    if (sam is None) != (config.sam is None):
        need = "has no SAM tower; leave --sam out" if config.sam is None else "has a SAM tower; give --sam"
        raise UsageError(f"--preset {config.preset}: the model {need}")
    kind = DTYPES[dtype]
    sources = {
        "llm": read_llm(llm, config=config, dtype=kind),
        "siglip": read_siglip_tower(siglip, config=config, dtype=kind),
    }
    if sam is not None:
        sources["sam"] = read_sam_tower(sam, config=config, dtype=kind)
    taken = {name: tensor for source in sources.values() for name, tensor in source.tensors.items()}
    tensors, made = complete(config, taken, dtype=kind, seed=seed)
    return StartWeights(config=config, dtype=dtype, seed=seed, sources=sources, tensors=tensors, made=made)


def complete(
    config: ModelConfig, taken: Mapping[str, LazyTensor], *, dtype: torch.dtype, seed: int
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Every tensor of a model: those that are there, and initial values for the rest.

    Args:
        taken: decoder, SigLIP, and SAM's trunk and neck, by canonical name.
        dtype: of the initial values.

    Returns:
        The tensors by canonical name, and how each that was not there is made.
    """
    shapes = canonical_shapes(config)
    tensors: dict[str, LazyTensor] = {}
    made: dict[str, str] = {}
    for name, shape in shapes.items():
        if name in taken:
            tensors[name] = taken[name]
        elif name.startswith(_NECK_HD):
            copied = _NECK + name.removeprefix(_NECK_HD)
            tensors[name], made[name] = taken[copied], f"copy of {copied}"
        elif name == _HD_SCALE:
            tensors[name], made[name] = LazyTensor.of(torch.zeros(shape, dtype=dtype)), "zero"
        else:
            tensors[name] = _drawn(name, shape, bound=_bound(name, shapes), seed=seed, dtype=dtype)
            made[name] = f"random, seed {seed}"
    return tensors, made


def _drawn(name: str, shape: Shape, *, bound: float, seed: int, dtype: torch.dtype) -> LazyTensor:
    """Uniform random numbers up to `bound`, which depend on the seed and on the tensor's name alone."""

    def load() -> Tensor:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(dtype)

    return LazyTensor(shape=shape, dtype=dtype, load=load)


def _bound(name: str, shapes: dict[str, Shape]) -> float:
    """Return 1 / sqrt(fan in) of the layer; a bias has the fan in of its weight."""
    weight = shapes[f"{name.rpartition('.')[0]}.weight"]
    assert len(weight) >= 2, f"{name}: only matrices and convolutions are drawn"
    return 1 / math.sqrt(math.prod(weight[1:]))
