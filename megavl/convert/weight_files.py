"""Tensors of a weight file, of a sharded set, or of a Hugging Face folder, by the names in the files.

A folder is read as transformers 4.57 reads it: the file that `transformers_weights` in its configuration names, else
the first of `_NAMES` that is there. Of an index it takes the names of tensors and of files. Which file holds a tensor
follows from the files themselves. Archives of `torch.save` are read by torch's weights-only loader.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from megavl.config.errors import CheckpointError
from megavl.convert.pickle_in import PickleFile
from megavl.convert.safetensors_in import SafetensorsFile, read_json, read_optional_json
from megavl.files.model_folders import foreign_weights, require_whole_model
from megavl.foreign.reading import require_inside
from megavl.weights.lazy import LazyTensor

PICKLES = (".bin", ".pth", ".pt")
"""Endings of archives of `torch.save`."""
_INDEX = ".index.json"
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names that transformers looks for in a folder, in its order; the indices are those of sharded weights."""
_log = logging.getLogger(__name__)


WeightFile = SafetensorsFile | PickleFile


class StoredTensors(Mapping[str, LazyTensor]):
    """Every tensor of one file or of one sharded set, by the name that the file gives it.

    Shape and type are read when a tensor is taken from the mapping. So tensors that nobody takes may have any type.
    """

    def __init__(
        self, source: Path, files: Mapping[str, WeightFile], *, unlisted: Mapping[str, Path] | None = None
    ) -> None:
        """Keep the file of each name.

        Args:
            source: the file that lists the names: the index, or the only file.
            unlisted: files of the tensors that an index does not list, which are not read.
        """
        self.source = source
        self._files = dict(files)
        self._unlisted = dict(unlisted or {})
        self._aliases: dict[str, str] = {}

    def tie(self, name: str, *, to: str) -> None:
        """Give the tensor `to` under a second name, instead of what the file may hold under it."""
        if to not in self._files:
            return
        if name in self._files:
            _log.warning("%s: %s is not read: tie_word_embeddings makes it %s", self.locate(name), name, to)
        self._files[name], self._aliases[name] = self._files[to], to

    def __getitem__(self, name: str) -> LazyTensor:
        file = self._files[name]
        name = self.stored_name(name)
        shape, dtype = file.describe(name)
        return LazyTensor(
            shape=shape, dtype=dtype, load=partial(file.load, name), slicer=partial(file.load_slice, name)
        )

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def stored_name(self, name: str) -> str:
        """Name of a tensor in its file, which differs for one that was tied."""
        return self._aliases.get(name, name)

    def locate(self, name: str) -> str:
        """Path of the file that holds a tensor, or that should list it."""
        if name in self._unlisted:
            return f"{self.source} (which does not list what {self._unlisted[name].name} holds)"
        return str(self._files[name].path if name in self._files else self.source)


def open_file(path: Path) -> StoredTensors:
    """Tensors of a single file; its ending tells an archive of `torch.save` from safetensors.

    Raises:
        CheckpointError: missing, damaged or hostile.
    """
    file = _open(path)
    return StoredTensors(path, dict.fromkeys(file.names, file))


def open_folder(folder: Path) -> StoredTensors:
    """Tensors of a Hugging Face folder, from the file or the index that transformers would choose.

    Raises:
        CheckpointError: no weights, a PEFT adapter, a damaged or hostile file, an index that leaves the folder or does
            not fit its files.
    """
    require_whole_model(folder)
    path, others = _chosen(folder)
    tensors = _open_sharded(folder, path, others=others) if path.name.endswith(_INDEX) else open_file(path)
    if lora := next((name for name in tensors if ".lora_A." in name), None):
        raise CheckpointError(f"{path}: holds a LoRA adapter that is not merged (tensor {lora!r}); merge it first")
    return tensors


def _chosen(folder: Path) -> tuple[Path, list[str]]:
    """The file of weights that transformers chooses, and the names of others that it would read without this one."""
    where = folder / "config.json"
    named = read_optional_json(where).get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or not named.removesuffix(_INDEX).endswith(".safetensors"):
            raise CheckpointError(
                f"{where}: transformers_weights: {named!r} is no safetensors file and no index of one"
            )
        return _inside(folder, named, where, key="transformers_weights"), []
    found = [name for name in _NAMES if (folder / name).is_file()]
    for name in _NAMES:
        if name not in found and os.path.lexists(folder / name):
            _log.warning("%s: no regular file, so it is not read, as in transformers", folder / name)
    if not found:
        there = foreign_weights(folder)
        raise CheckpointError(
            f"{folder}: none of {', '.join(_NAMES)} is there{f', only {there}' if there else ''}; "
            "give a Hugging Face folder with weights, as transformers' save_pretrained writes it"
        )
    first, *others = found
    if first + _INDEX in others:
        _log.warning("%s: read as transformers does, and not %s", folder / first, first + _INDEX)
    return _inside(folder, first, folder), others


def open_source(path: Path) -> StoredTensors:
    """Tensors of a weight file, or of a folder with weights under the usual names or in a single file of any name.

    Raises:
        CheckpointError: nothing there, several files to choose from, a damaged or hostile file.
    """
    if not path.is_dir():
        return open_file(path)
    require_whole_model(path)
    if any((path / name).is_file() for name in _NAMES):
        return open_folder(path)
    for ends in ((".safetensors",), PICKLES):
        found = sorted(file for file in path.iterdir() if file.suffix in ends)
        if len(found) == 1:
            return open_file(_inside(path, found[0].name, path))
        if found:
            names = ", ".join(file.name for file in found[:5])
            raise CheckpointError(f"{path}: holds {len(found)} weight files ({names}); name the one to read")
    raise CheckpointError(f"{path}: no weights (*.safetensors, *{', *'.join(PICKLES)}) in this folder")


def _open(path: Path) -> WeightFile:
    return PickleFile(path) if path.suffix in PICKLES else SafetensorsFile(path)


def _open_sharded(folder: Path, index: Path, *, others: list[str]) -> StoredTensors:
    """Tensors that an index lists; of several files that hold one, transformers keeps the last.

    Args:
        others: names of weights that would be read if the index were not there, for messages.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    paths = {shard: _inside(folder, shard, index) for shard in sorted(set(weight_map.values()))}
    for path in paths.values():
        if not path.is_file():
            instead = f", or remove {index.name} to read {others[0]}" if others else ""
            raise CheckpointError(f"{path}: no such file, though {index.name} lists it; fetch it again{instead}")
    files = {shard: _open(path) for shard, path in paths.items()}
    holders: dict[str, list[str]] = {}
    for shard, file in files.items():
        for name in file.names:
            holders.setdefault(name, []).append(shard)
    for name, listed in weight_map.items():
        found = holders.get(name, [])
        if not found:
            raise CheckpointError(f"{folder / listed}: no tensor {name!r}, which {index.name} places there")
        if len(found) > 1 and listed != found[-1]:
            raise CheckpointError(
                f"{index}: ambiguous: places tensor {name!r} in {listed}, but {found[-1]} holds one too, which "
                "transformers would read; keep one of them"
            )
    return StoredTensors(
        index,
        {name: files[holders[name][-1]] for name in weight_map},
        unlisted={name: files[found[-1]].path for name, found in holders.items() if name not in weight_map},
    )


def _inside(folder: Path, name: str, index: Path, *, key: str = "weight_map") -> Path:
    """A file that `index` names, if neither its name nor a link leaves the folder."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in parts or "\\" in name:
        raise CheckpointError(f"{index}: {key} names {name!r}, which lies outside the folder; refused")
    path = folder / name
    try:
        require_inside(path, folder=folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: refused, {error}") from error
    return path
