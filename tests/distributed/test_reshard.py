"""Weights and both moments stay bitwise equal from layout to layout."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megavl.checkpoint.safe_unpickle import read_metadata
from tests.distributed.reshard import LAYOUTS
from tests.tiny_run import PATIENCE_S, ROOT, environment, forked, free_port


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every whole tensor in a checkpoint."""
    stored = read_metadata(folder).state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(tensors, storage_reader=checkpoint.FileSystemReader(folder), no_dist=True)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def test_another_layout_changes_no_bit(tmp_path: Path) -> None:
    env = forked(environment())
    command = [env["PYTHON_EXEC"], "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "tests.distributed.reshard", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *others = (hashes(tmp_path / str(number) / "iter_0000002") for number in range(len(LAYOUTS)))
    for kind in ("model.", "exp_avg.", "exp_avg_sq."):
        assert sum(kind in name for name in first) > 40, (kind, list(first))
    assert len(set(first.values())) > len(first) / 2
    for layout, found in zip(LAYOUTS[1:], others, strict=True):
        assert found == first, layout
