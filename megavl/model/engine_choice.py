"""Whether a run takes modules and optimizer state of Transformer Engine, which `training.transformer_engine` and
`optimizer.state_precision` choose."""

from __future__ import annotations

import re
import warnings

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.utils import get_te_version

from megavl.config.errors import UsageError
from megavl.config.recipe import Recipe

VERSIONS = ((2, 9), (2, 12))
"""First version of Transformer Engine that megatron-core 0.16.1 asks for, and the first that it does not take."""
_INSTALL = "megavl/model/README.md says how to install it"


def uses_transformer_engine(recipe: Recipe) -> bool:
    """Whether the decoder layers are built from Transformer Engine's modules.

    Raises:
        UsageError: the recipe asks for them, and they cannot be had.
    """
    choice = recipe.training.transformer_engine
    if choice == "never":
        return False
    problem = _problem()
    if problem is None and recipe.training.precision != "bf16":
        problem = f"its attention does not take training.precision {recipe.training.precision}"
    if choice == "always" and problem is not None:
        raise UsageError(f"training.transformer_engine: always, but {problem}; use auto or never. {_INSTALL}")
    if HAVE_TE and torch.cuda.is_available() and not _supported():
        warnings.warn(f"{problem}: the decoder is built without it", stacklevel=2)
    return problem is None


def check_engines(recipe: Recipe) -> None:
    """Refuse a recipe that asks for what is not installed, before anything is read.

    Raises:
        UsageError: modules or optimizer state of Transformer Engine are asked for, and cannot be had.
    """
    uses_transformer_engine(recipe)
    if recipe.optimizer.state_precision == "bf16" and (problem := _problem()) is not None:
        raise UsageError(
            f"optimizer.state_precision: bf16 needs Transformer Engine's optimizer, but {problem}; use fp32. {_INSTALL}"
        )


def _problem() -> str | None:
    """What keeps this process from Transformer Engine; None if it is ready."""
    if not HAVE_TE:
        return "Transformer Engine is not installed"
    if not torch.cuda.is_available():
        return "Transformer Engine needs a CUDA device, and none is visible"
    if not _supported():
        first, last = (".".join(map(str, version)) for version in VERSIONS)
        return f"Transformer Engine {get_te_version()} is none of {first} to {last} exclusive"
    return None


def _supported() -> bool:
    numbers = re.findall(r"\d+", str(get_te_version()))
    return VERSIONS[0] <= tuple(map(int, numbers[:2])) < VERSIONS[1]
