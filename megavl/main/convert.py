"""`megavl convert {from-hf,to-hf,verify}`: Hugging Face folders to MegaVL checkpoints and back."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save

from megavl.checkpoint.reader import load_model_config, open_model_tensors, resolve
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.errors import UsageError
from megavl.convert.hf_read import flat_view, is_hf_folder, open_hf_tensors, read_config, read_passthrough
from megavl.convert.hf_write import write_hf
from megavl.convert.lazy import LazyTensor
from megavl.convert.table import FORMATS
from megavl.convert.tokenizer_files import tokenizer_paths
from megavl.convert.verify import compare, open_flat
from megavl.convert.weight_files import open_file
from megavl.main.progress import counted

PASSTHROUGH = "passthrough.safetensors"
"""File of a checkpoint that keeps the original format's unused tensors for a complete export."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    load = actions.add_parser("from-hf", help="Hugging Face folder (either format) to a MegaVL checkpoint")
    load.add_argument("source", metavar="SRC", type=Path)
    load.add_argument("out", metavar="OUT", type=Path, help="directory of checkpoints; iter_0000000 is made in it")
    save = actions.add_parser("to-hf", help="MegaVL checkpoint to a Hugging Face folder")
    save.add_argument("source", metavar="CKPT", type=Path)
    save.add_argument("out", metavar="OUT", type=Path)
    save.add_argument("--format", choices=FORMATS, required=True, help="transformers' own classes, or the release's")
    save.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    check = actions.add_parser("verify", help="compare the weights of two models, whatever their formats")
    check.add_argument("source", metavar="A", type=Path)
    check.add_argument("out", metavar="B", type=Path)


def run(arguments: argparse.Namespace) -> int:
    """Run one action."""
    actions = {"from-hf": _from_hf, "to-hf": _to_hf, "verify": _verify}
    return actions[arguments.action](arguments)


def open_weights(path: Path) -> dict[str, LazyTensor]:
    """Weights of a checkpoint or Hugging Face folder under their flat names, read when asked for."""
    return dict(open_flat(path) if is_hf_folder(path) else open_model_tensors(path))


def _from_hf(arguments: argparse.Namespace) -> int:
    config, fmt = read_config(arguments.source)
    tensors = open_hf_tensors(arguments.source)
    flat = flat_view(tensors, config=config, fmt=fmt)
    files: dict[str, bytes | Path] = {f"tokenizer/{p.name}": p for p in tokenizer_paths(arguments.source)}
    dead = read_passthrough(tensors, config=config, fmt=fmt)
    if dead:
        files[PASSTHROUGH] = save({name: tensor.load().contiguous() for name, tensor in dead.items()})
    with counted(flat, what="from-hf") as source:
        out = write_model_checkpoint(
            arguments.out,
            config=config,
            tensors=((name, tensor.load()) for name, tensor in source.items()),
            files=files,
        )
    print(f"{arguments.source} ({fmt} format, {config.preset} sizes): {len(flat)} tensors to {out}")
    return 0


def _to_hf(arguments: argparse.Namespace) -> int:
    source = resolve(arguments.source, skip_hash=True)
    if is_hf_folder(source):
        raise UsageError(f"{source}: already a Hugging Face folder; run `megavl convert from-hf` on it first")
    passthrough = source / PASSTHROUGH
    tensors = open_model_tensors(source, skip_hash=True)
    # The files are hashed while they are converted: both read them, and the disk is read once.
    with ThreadPoolExecutor(max_workers=1) as pool, counted(tensors, what="to-hf") as flat:
        verified = pool.submit(resolve, source)
        out = write_hf(
            arguments.out,
            config=load_model_config(source),
            flat=flat,
            fmt=arguments.format,
            tokenizer_dir=source / "tokenizer",
            dtype=arguments.dtype,
            passthrough=open_file(passthrough) if passthrough.exists() else None,
            source=str(source),
            confirm=verified.result,
        )
    print(f"{source} to {out} ({arguments.format} format)")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with torch.no_grad():
        result = compare(open_weights(arguments.source), open_weights(arguments.out))
    print(result.summary())
    return 0 if result.identical else 4
