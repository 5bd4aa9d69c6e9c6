"""Tensors of a folder that transformers saved, under the names that every release reads."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from megavl.convert.table import NATIVE_SIGLIP, NATIVE_SIGLIP_UNNESTED


def saved_tensors(folder: Path, prefix: str = NATIVE_SIGLIP) -> dict[str, Tensor]:
    """SigLIP's names begin with `prefix`, whichever way the installed release saved them: from 5.10 on unnested."""
    found = load_file(folder / "model.safetensors")
    bare = {key.replace(NATIVE_SIGLIP, NATIVE_SIGLIP_UNNESTED): value for key, value in found.items()}
    return {key.replace(NATIVE_SIGLIP_UNNESTED, prefix): value for key, value in bare.items()}
