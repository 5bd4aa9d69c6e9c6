"""Writes the weights that an arm starts from: `python -m launch.ablations.start SPEC.json OUT`.

Decoder and towers come from checkpoints. The adaptor and SAM's convolutions are new and depend on the seed, as in
`megavl convert init`, which does the same for the public models.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megavl.checkpoint.reader import open_model_tensors, resolve, tokenizer_folder
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.errors import CheckpointError, MegaVLError
from megavl.config.load import model_config_from_dict
from megavl.config.model import ModelConfig
from megavl.convert.start_weights import complete
from megavl.foreign.printing import say_error
from megavl.weights.canonical_names import canonical_shapes
from megavl.weights.lazy import LazyTensor

PARTS = {"llm": ("language_model.",), "siglip": ("vision.siglip.",), "sam": ("vision.sam.",)}
"""How canonical names of a part begin."""
_NEW = ("vision.sam.downsamples.", "vision.sam.neck_hd.", "vision.sam.hd_alpha_downsamples")
"""Of SAM; the public model does not have them."""


def taken_from(sources: dict[str, str], config: ModelConfig) -> Iterator[tuple[str, LazyTensor]]:
    """Canonical name and tensor of everything that the sources give.

    Args:
        sources: checkpoint by part.

    Raises:
        CheckpointError: a source is damaged, or lacks a tensor, or has it in another shape.
    """
    shapes = canonical_shapes(config)
    for part, path in sources.items():
        tensors = open_model_tensors(path)
        for name, shape in shapes.items():
            if name.startswith(PARTS[part]) and not name.startswith(_NEW):
                found = tensors.get(name)
                if found is None or tuple(found.shape) != tuple(shape):
                    has = "no such tensor" if found is None else f"the shape {list(found.shape)}"
                    raise CheckpointError(
                        f"{path}: {name}: the arm's model needs the shape {list(shape)}, the ancestor has {has}; give "
                        "both the same sizes"
                    )
                yield name, found


def write_start(spec: Path, out: Path) -> None:
    """Write a checkpoint.

    Args:
        spec: JSON with `model`, `sources` and `seed`.
        out: made anew.

    Raises:
        CheckpointError: as `taken_from`.
        StorageError: the storage failed.
    """
    content = json.loads(spec.read_text(encoding="utf-8"))
    config = model_config_from_dict(content["model"], source=str(spec))
    shutil.rmtree(out, ignore_errors=True)
    taken = dict(taken_from(content["sources"], config))
    tensors, _ = complete(config, taken, dtype=torch.float32, seed=content["seed"])
    tokenizer = tokenizer_folder(resolve(content["sources"]["llm"]))
    files: dict[str, bytes | Path] = {f"tokenizer/{path.name}": path for path in sorted(tokenizer.iterdir())}
    pairs = ((name, tensor.load().float()) for name, tensor in tensors.items())
    with torch.no_grad():
        write_model_checkpoint(out, config=config, tensors=pairs, files=files)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    spec, out = sys.argv[1:] if arguments is None else arguments
    try:
        write_start(Path(spec), Path(out))
    except MegaVLError as error:
        say_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
