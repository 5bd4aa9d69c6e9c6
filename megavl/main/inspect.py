"""`megavl inspect CKPT`: what a checkpoint holds, verified."""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path
from typing import Any

from megavl.checkpoint.reader import load_model_config, open_model_tensors, resolve
from megavl.checkpoint.store import read_manifest
from megavl.config.identity import model_name
from megavl.convert.checkpoint_files import ORIGINS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a checkpoint, or the directory that holds it")
    parser.add_argument("--tensors", action="store_true", help="list every weight")


def run(arguments: argparse.Namespace) -> int:
    """Verify every file's hash, then print sizes and contents."""
    path = resolve(arguments.checkpoint)
    manifest = read_manifest(path)
    config, tensors = load_model_config(path), open_model_tensors(path)
    size = sum(record["size"] for record in manifest["files"].values())
    print(f"{path}: verified, {len(manifest['files'])} files, {size / 1e6:,.1f} MB")
    parameters = sum(prod(tensor.shape) for tensor in tensors.values())
    print(f"model {model_name(config)}: {len(tensors)} tensors, {parameters:,} parameters")
    for key, value in manifest["content"].items():
        print(f"  {key}: {json.dumps(value)}")
    origins = json.loads((path / ORIGINS).read_text(encoding="utf-8")) if ORIGINS in manifest["files"] else {}
    for name, source in origins.get("sources", {}).items():
        print(f"  {name} from {source}")
    if arguments.tensors:
        for name, tensor in tensors.items():
            origin = _origin(origins["tensors"][name]) if origins else ""
            print(f"  {name}  {tuple(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}{origin}")
    return 0


def _origin(entry: Any) -> str:
    parts = (
        entry if isinstance(entry, str) else ", ".join(f"{Path(part['file']).name}:{part['tensor']}" for part in entry)
    )
    return f"  <- {parts}"
