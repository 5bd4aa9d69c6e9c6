"""Reads tensors by name from an archive of `torch.save`, one at a time, without letting the file run code.

Only the zip archives of torch 1.6 and newer are opened; older files are plain pickles. The weights-only loader of torch
refuses every name that is not part of a tensor.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavl.checkpoint.safe_unpickle import safe_load
from megavl.config.errors import CheckpointError
from megavl.foreign.reading import open_regular
from megavl.weights.canonical_names import Shape
from megavl.weights.dtypes import CODE_OF_DTYPE, DTYPE_OF_CODE, dtype_name


class PickleFile:
    """One archive of `torch.save` that holds tensors by name.

    The archive is mapped anew for each tensor, so that tensors that were read do not stay in memory.

    Raises:
        CheckpointError: the file is missing, damaged, hostile, or holds anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._described: dict[str, tuple[Shape, torch.dtype]] = {}
        self._checked = False
        for name, value in self._open().items():
            if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
                kind = f"{value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
                raise CheckpointError(f"{path}: {name!r} is a {kind}; a file of tensors by name is expected")
            if value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise CheckpointError(f"{path}: refused, {name!r} repeats its numbers to the shape {list(value.shape)}")
            self._described[name] = tuple(value.shape), value.dtype
        self.names = tuple(self._described)

    def describe(self, name: str) -> tuple[Shape, torch.dtype]:
        """Shape and dtype of one tensor."""
        shape, dtype = self._described[name]
        if dtype not in CODE_OF_DTYPE:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {dtype_name(dtype)}; "
                f"weights are one of {', '.join(DTYPE_OF_CODE)}"
            )
        return shape, dtype

    def load(self, name: str) -> Tensor:
        """Values of one tensor, in memory of their own."""
        tensor: Tensor = self._open()[name].detach().clone(memory_format=torch.contiguous_format)
        return tensor

    def load_slice(self, name: str, start: int, stop: int, *, axis: int) -> Tensor:
        """The indices `start` to `stop` of an axis, in memory of their own."""
        part: Tensor = self._open()[name].detach().narrow(axis, start, stop - start)
        return part.clone(memory_format=torch.contiguous_format)

    def _open(self) -> dict[Any, Any]:
        path = self.path
        try:
            with open_regular(path) as file:
                complete = zipfile.is_zipfile(file)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file; the folder is incomplete, fetch it again") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not readable ({type(error).__name__}: {error}); fetch it again") from error
        if not complete:
            raise CheckpointError(
                f"{path}: refused, because it is not a complete archive of torch.save (torch 1.6 or newer), and a "
                "plain pickle can run code when it is opened; fetch it again, or save its tensors as safetensors"
            )
        content = safe_load(path, source=str(path), mmap=True, checked=self._checked, remedy="; fetch it again")
        self._checked = True
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: holds a {type(content).__name__}; tensors by name are expected")
        return content
