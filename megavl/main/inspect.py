"""`megavl inspect CKPT`: what a checkpoint holds, verified."""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path
from typing import Any

from megavl.checkpoint.reader import load_model_config, open_model_tensors, resolve
from megavl.checkpoint.store import read_manifest
from megavl.config.errors import CheckpointError
from megavl.config.identity import model_name
from megavl.convert.origins import ORIGINS
from megavl.convert.safetensors_in import read_json
from megavl.foreign.printing import say
from megavl.train.progress import read_content


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a checkpoint, or the directory that holds it")
    parser.add_argument("--tensors", action="store_true", help="list every weight")


def run(arguments: argparse.Namespace) -> int:
    """Verify every file's hash, and that every load would accept it; then print sizes and contents."""
    path = resolve(arguments.checkpoint)
    manifest = read_manifest(path)
    config, tensors = load_model_config(path), open_model_tensors(path)
    read_content(path)
    size = sum(record["size"] for record in manifest["files"].values())
    say(f"{path}: verified, {len(manifest['files'])} files, {size / 1e6:,.1f} MB")
    parameters = sum(prod(tensor.shape) for tensor in tensors.values())
    say(f"model {model_name(config)}: {len(tensors)} tensors, {parameters:,} parameters")
    for key, value in manifest["content"].items():
        say(f"  {key}: {json.dumps(value)}")
    origins = _origins(path) if ORIGINS in manifest["files"] else {}
    for name, source in origins.get("sources", {}).items():
        say(f"  {name} from {source}")
    if arguments.tensors:
        for name, tensor in tensors.items():
            origin = _origin(origins["tensors"].get(name, "?")) if origins else ""
            say(f"  {name}  {tuple(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}{origin}")
    return 0


def _origins(path: Path) -> dict[str, Any]:
    """Where the weights of a start checkpoint come from."""
    origins = read_json(path / ORIGINS)
    parts = origins.get("sources"), origins.get("tensors")
    entries = parts[1].values() if isinstance(parts[1], dict) else [None]
    if not isinstance(parts[0], dict) or not all(map(_is_origin, entries)):
        raise CheckpointError(f"{path / ORIGINS}: not readable, sources and tensors must say where each comes from")
    return origins


def _is_origin(entry: Any) -> bool:
    """Whether this is a text, or a list of files and of the tensors in them."""
    return isinstance(entry, str) or (
        isinstance(entry, list)
        and all(
            isinstance(part, dict) and isinstance(part.get("file"), str) and isinstance(part.get("tensor"), str)
            for part in entry
        )
    )


def _origin(entry: Any) -> str:
    parts = (
        entry if isinstance(entry, str) else ", ".join(f"{Path(part['file']).name}:{part['tensor']}" for part in entry)
    )
    return f"  <- {parts}"
