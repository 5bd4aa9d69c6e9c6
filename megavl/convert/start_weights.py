"""Start weights: SigLIP, SAM and a language model put together, and what none of them has made anew.

Made anew are the adaptor and SAM's two convolutions (drawn as torch draws the weights of a fresh `Linear` or `Conv2d`,
which is how the model itself and the released code begin: uniform within 1 / sqrt(fan in), biases too), `neck_hd` (a
copy of SAM's neck) and the scale of the HD branch (zero, so that the branch starts silent).
Source: deepseek-ai/DeepSeek-VL at 681bffb, `deepseek_vl/models/sam.py`, `projector.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavl.config.errors import UsageError
from megavl.config.model import ModelConfig
from megavl.convert.dtypes import DTYPE_NAMES
from megavl.convert.flat_names import Shape, flat_shapes
from megavl.convert.start_sources import StartSource, TakenTensor, read_llm, read_sam_tower, read_siglip_tower

_NECK, _NECK_HD, _HD_SCALE = "vision.sam.neck.", "vision.sam.neck_hd.", "vision.sam.hd_alpha_downsamples"


@dataclass(frozen=True, kw_only=True)
class DrawnTensor:
    """Uniform random numbers that depend on the seed and on the tensor's name alone."""

    name: str
    shape: Shape
    bound: float
    """Largest magnitude."""
    seed: int
    dtype: torch.dtype

    def load(self) -> Tensor:
        """Draw them, in float32, and cast."""
        digest = hashlib.sha256(f"{self.seed}:{self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.empty(self.shape).uniform_(-self.bound, self.bound, generator=generator).to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class ZeroTensor:
    """Zeros."""

    shape: Shape
    dtype: torch.dtype

    def load(self) -> Tensor:
        """Make them."""
        return torch.zeros(self.shape, dtype=self.dtype)


StartTensor = TakenTensor | DrawnTensor | ZeroTensor


@dataclass(frozen=True, kw_only=True)
class StartWeights:
    """Every tensor of a model, read or drawn when asked for."""

    config: ModelConfig
    dtype: str
    seed: int
    sources: dict[str, StartSource]
    """By `llm`, `siglip` and `sam`."""
    tensors: dict[str, StartTensor]
    """By flat name."""

    @property
    def unused(self) -> dict[str, TakenTensor]:
        """Dead tensors of the original format that a source has, by their original names."""
        return {name: tensor for source in self.sources.values() for name, tensor in source.unused.items()}

    def origins(self) -> dict[str, Any]:
        """Where every tensor comes from, as JSON."""
        return {
            "preset": self.config.preset,
            "dtype": self.dtype,
            "seed": self.seed,
            "sources": {name: str(source.path.absolute()) for name, source in self.sources.items()},
            "tensors": {name: self._origin(name) for name in self.tensors},
            "unused": {name: _parts(tensor) for name, tensor in self.unused.items()},
        }

    def table(self) -> Iterator[str]:
        """Lines for people: tensors, parameters, bytes and path of each origin."""
        groups: dict[str, list[StartTensor]] = {name: [] for name in self.sources}
        for name, tensor in self.tensors.items():
            groups.setdefault(self._group(name), []).append(tensor)
        yield f"{'from':<20} {'tensors':>7} {'parameters':>13} {'bytes':>14}"
        for group, found in (*groups.items(), ("total", list(self.tensors.values()))):
            parameters = sum(math.prod(tensor.shape) for tensor in found)
            size = parameters * DTYPE_NAMES[self.dtype].itemsize
            path = f"  {self.sources[group].path}" if group in self.sources else ""
            yield f"{group:<20} {len(found):7,} {parameters:13,} {size:14,}{path}"

    def _group(self, name: str) -> str:
        """Row of the table that a tensor belongs to."""
        origin = self._origin(name)
        if isinstance(origin, list):
            return next(key for key, source in self.sources.items() if name in source.tensors)
        return "copy of SAM's neck" if name.startswith(_NECK_HD) else str(origin)

    def _origin(self, name: str) -> Any:
        tensor = self.tensors[name]
        if isinstance(tensor, DrawnTensor):
            return f"random, seed {tensor.seed}"
        if isinstance(tensor, ZeroTensor):
            return "zero"
        return f"copy of {tensor.row.flat}" if tensor.row.flat != name else _parts(tensor)


def start_weights(
    config: ModelConfig, *, llm: Path, siglip: Path, sam: Path | None, dtype: str = "bfloat16", seed: int = 0
) -> StartWeights:
    """Put a model together; names, shapes and types are checked here, values are read later.

    Args:
        config: sizes of the model; every source must have them.
        llm: folder of the language model, in LLaMA format.
        siglip: file or folder of SigLIP.
        sam: file or folder of SAM; None for a model without it.
        dtype: float32, bfloat16 or float16: one type for all tensors, whatever the sources have.
        seed: of the tensors that are drawn.

    Raises:
        UsageError: `sam` is missing or not wanted, or an unknown dtype.
        CheckpointError: a source that does not fit, is damaged or hostile.
    """
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"dtype: {dtype!r} is unknown; choose from {', '.join(DTYPE_NAMES)}")
    if (sam is None) != (config.sam is None):
        need = "has no SAM tower; leave --sam out" if config.sam is None else "has a SAM tower; give --sam"
        raise UsageError(f"--preset {config.preset}: the model {need}")
    kind = DTYPE_NAMES[dtype]
    sources = {
        "llm": read_llm(llm, config=config, dtype=kind),
        "siglip": read_siglip_tower(siglip, config=config, dtype=kind),
    }
    if sam is not None:
        sources["sam"] = read_sam_tower(sam, config=config, dtype=kind)
    taken = {name: tensor for source in sources.values() for name, tensor in source.tensors.items()}
    shapes = flat_shapes(config)
    tensors: dict[str, StartTensor] = {}
    for name, shape in shapes.items():
        if name in taken:
            tensors[name] = taken[name]
        elif name.startswith(_NECK_HD):
            tensors[name] = taken[_NECK + name.removeprefix(_NECK_HD)]
        elif name == _HD_SCALE:
            tensors[name] = ZeroTensor(shape=shape, dtype=kind)
        else:
            tensors[name] = DrawnTensor(name=name, shape=shape, bound=_bound(name, shapes), seed=seed, dtype=kind)
    return StartWeights(config=config, dtype=dtype, seed=seed, sources=sources, tensors=tensors)


def _bound(name: str, shapes: dict[str, Shape]) -> float:
    """1 / sqrt(fan in) of the layer; a bias has the fan in of its weight."""
    weight = shapes[f"{name.rpartition('.')[0]}.weight"]
    assert len(weight) >= 2, f"{name}: only matrices and convolutions are drawn"
    return 1 / math.sqrt(math.prod(weight[1:]))


def _parts(tensor: TakenTensor) -> list[dict[str, str]]:
    return [{"file": str(part.file.path.absolute()), "tensor": part.name} for part in tensor.parts]
