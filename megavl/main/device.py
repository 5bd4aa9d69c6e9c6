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


def choose_device(name: str | None) -> None:
    """Settle on the CPU or on CUDA for this process.

    Args:
        name: cpu, cuda, or None for CUDA where it is found.

    Raises:
        UsageError: CUDA is asked for and absent, or the command was started as one of several ranks.
    """
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks not in ("", "1"):
        raise UsageError(f"WORLD_SIZE is {ranks}, but this command is one process; start it without torchrun or srun")
    if name == "cpu":
        # CUDA reads the variable when devices are first counted, which importing megatron-core already does.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this PyTorch finds no CUDA device; use --device cpu")
    if name == "cpu" and torch.cuda.is_available():
        raise UsageError("--device cpu: CUDA is already in use in this process; start a new one")
