"""Which device a single-process command uses. Must run before anything counts CUDA devices, so it is imported first."""

from __future__ import annotations

import argparse
import os

from megavl.config.errors import UsageError


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--dtype`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where it is found")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type of the weights; default: float32 on cpu, bfloat16 on cuda",
    )


def choose_device(name: str | None, *, ranks: int | None = None) -> None:
    """Settle on the CPU or on CUDA for this process.

    Args:
        name: cpu, cuda, or None for CUDA where it is found.
        ranks: processes that the command takes, as its options say; None for a command that is always one process.

    Raises:
        UsageError: CUDA is asked for and absent, or another number of processes was started.
    """
    started = os.environ.get("WORLD_SIZE") or "1"
    if ranks is None and started != "1":
        raise UsageError(f"WORLD_SIZE is {started}, but this command is one process; start it without torchrun or srun")
    if ranks is not None and started != str(ranks):
        raise UsageError(
            f"WORLD_SIZE is {started}, but --tensor x --pipeline takes {ranks} processes; start {ranks} "
            f"(torchrun --nproc-per-node {ranks} -m megavl ...), or choose sizes whose product is {started}"
        )
    if name == "cpu":
        # CUDA reads the variable when devices are first counted, which importing megatron-core already does.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megavl.parallel.first_import import import_engine

    import_engine()
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this PyTorch finds no CUDA device; use --device cpu")
    if name == "cpu" and torch.cuda.is_available():
        raise UsageError("--device cpu: CUDA is already in use in this process; start a new one")
