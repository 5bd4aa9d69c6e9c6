"""Reading what `torch.save` wrote without letting the file run code: tensors by name, one at a time.

Only the zip archives of torch 1.6 and newer are opened, by torch's weights-only loader, which refuses every name that
is not part of a tensor. Older files are plain pickles.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavl.config.errors import CheckpointError
from megavl.convert.safetensors_in import DTYPES

_REFUSED_BY_TORCH = re.compile(r"GLOBAL ([\w.]+)")


class PickleFile:
    """One archive of `torch.save` that holds tensors by name.

    The archive is mapped and released anew for each tensor, so that what was read does not stay in memory.

    Raises:
        CheckpointError: naming the file, when it is missing, damaged, hostile, or holds anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, value in self._open().items():
            if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
                kind = f"{value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
                raise CheckpointError(f"{path}: {name!r} is a {kind}; a file of tensors by name is expected")
            self._described[name] = tuple(value.shape), value.dtype
        self.names = tuple(self._described)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        shape, dtype = self._described[name]
        if dtype not in DTYPES.values():
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {str(dtype).removeprefix('torch.')}; "
                f"weights are one of {', '.join(DTYPES)}"
            )
        return shape, dtype

    def load(self, name: str) -> Tensor:
        """Values of one tensor, in memory of their own."""
        tensor: Tensor = self._open()[name].detach().clone(memory_format=torch.contiguous_format)
        return tensor

    def load_slice(self, name: str, start: int, stop: int, *, axis: int) -> Tensor:
        """What lies between two indices of an axis, in memory of its own."""
        part: Tensor = self._open()[name].detach().narrow(axis, start, stop - start)
        return part.clone(memory_format=torch.contiguous_format)

    def _open(self) -> dict[Any, Any]:
        path = self.path
        try:
            if not zipfile.is_zipfile(path):
                with path.open("rb"):
                    raise CheckpointError(
                        f"{path}: refused, because it is not a complete archive of torch.save (torch 1.6 or newer), "
                        "and a plain pickle can run code when it is opened; fetch it again, or save its tensors as "
                        "safetensors"
                    )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file; the folder is incomplete, fetch it again") from error
        except Exception as error:  # a damaged archive raises RuntimeError, EOFError, IndexError, ...
            match = _REFUSED_BY_TORCH.search(str(error))
            if isinstance(error, pickle.UnpicklingError) and match:
                raise CheckpointError(f"refused global {match[1]} in {path}; do not trust this file") from error
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: not readable ({type(error).__name__}: {reason}); fetch it again") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: holds a {type(content).__name__}; tensors by name are expected")
        return content
