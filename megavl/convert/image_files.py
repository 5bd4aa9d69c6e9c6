"""How a Hugging Face folder normalises images, which no tensor's shape shows and MegaVL does in one way only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megavl.config.errors import CheckpointError
from megavl.config.presets import CLIP_MEAN, CLIP_STD, HALF
from megavl.convert.safetensors_in import read_optional_json

_MEANS, _STDS = (HALF, CLIP_MEAN), (HALF, CLIP_STD)
_KNOWN = {
    "image_mean": _MEANS,
    "image_std": _STDS,
    "high_res_image_mean": (CLIP_MEAN,),
    "high_res_image_std": (CLIP_STD,),
    "rescale_factor": ((1 / 255,),),
}
"""Values of the released models: SigLIP's, and SAM's, which the original format names `image_mean` too."""


def check_normalisation(folder: Path) -> None:
    """Refuse a `preprocessor_config.json` with another normalisation than the released models'; absent fields pass.

    Raises:
        CheckpointError: names the field, its value, and what MegaVL has.
    """
    path = folder / "preprocessor_config.json"
    raw = read_optional_json(path)
    for key, known in _KNOWN.items():
        found = raw.get(key)
        if found is not None and not any(_equal(found, value) for value in known):
            wanted = " or ".join(str(list(value) if len(value) > 1 else value[0]) for value in known)
            raise CheckpointError(
                f"{path}: {key}: MegaVL has {wanted} only, found {str(found)[:200]}; images of this model are "
                "normalised in another way, so it cannot be represented"
            )


def _equal(found: Any, value: tuple[float, ...]) -> bool:
    numbers = found if isinstance(found, list) else [found]
    return len(numbers) == len(value) and all(
        isinstance(number, (int, float)) and math.isclose(number, wanted, rel_tol=1e-4)
        for number, wanted in zip(numbers, value)
    )
