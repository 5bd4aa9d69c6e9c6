"""Tensors of a weight file, of a sharded set, or of a Hugging Face folder, by the names in the files.

Safetensors files are preferred. Where there are none, torch's weights-only loader reads `pytorch_model.bin` and other
archives of `torch.save`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from megavl.config.errors import CheckpointError
from megavl.convert.pickle_in import PickleFile
from megavl.convert.safetensors_in import SafetensorsFile, read_json
from megavl.weights.lazy import LazyTensor

PICKLES = (".bin", ".pth", ".pt")
"""Endings of archives of `torch.save`."""
_STEMS = ("model.safetensors", "pytorch_model.bin")
"""Names that transformers gives to weights, the preferred one first; sharded weights have `.index.json` after it."""


WeightFile = SafetensorsFile | PickleFile


class StoredTensors(Mapping[str, LazyTensor]):
    """Every tensor of one file or of one sharded set, by the name that the file gives it.

    Shape and type are read when a tensor is taken from the mapping. So tensors that nobody takes may have any type.
    """

    def __init__(self, source: Path, files: Mapping[str, WeightFile]) -> None:
        """Keep the file of each name; `source` is the file that lists the names: the index, or the only file."""
        self.source = source
        self._files = dict(files)

    def __getitem__(self, name: str) -> LazyTensor:
        file = self._files[name]
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

    def locate(self, name: str) -> str:
        """Path of the file that holds a tensor, or that should list it."""
        return str(self._files[name].path if name in self._files else self.source)


def open_file(path: Path) -> StoredTensors:
    """Tensors of a single file; its ending tells an archive of `torch.save` from safetensors.

    Raises:
        CheckpointError: missing, damaged or hostile.
    """
    file = _open(path)
    return StoredTensors(path, dict.fromkeys(file.names, file))


def open_folder(folder: Path) -> StoredTensors:
    """Tensors of a Hugging Face folder, from the file of a usual name or from the files of its index.

    Raises:
        CheckpointError: no weights, a damaged or hostile file, an index that leaves the folder or does not fit its
            files.
    """
    for stem in _STEMS:
        if (folder / f"{stem}.index.json").is_file():
            return _open_sharded(folder, folder / f"{stem}.index.json")
        if (folder / stem).is_file():
            return open_file(folder / stem)
    raise CheckpointError(
        f"{folder}: none of {', '.join(f'{stem}, {stem}.index.json' for stem in _STEMS)} is there; "
        "give a Hugging Face folder with weights"
    )


def open_source(path: Path) -> StoredTensors:
    """Tensors of a weight file, or of a folder with weights under the usual names or in a single file of any name.

    Raises:
        CheckpointError: nothing there, several files to choose from, a damaged or hostile file.
    """
    if not path.is_dir():
        return open_file(path)
    if any((path / f"{stem}{end}").is_file() for stem in _STEMS for end in ("", ".index.json")):
        return open_folder(path)
    for ends in ((".safetensors",), PICKLES):
        found = sorted(file for file in path.iterdir() if file.suffix in ends)
        if len(found) == 1:
            return open_file(found[0])
        if found:
            names = ", ".join(file.name for file in found[:5])
            raise CheckpointError(f"{path}: holds {len(found)} weight files ({names}); name the one to read")
    raise CheckpointError(f"{path}: no weights (*.safetensors, *{', *'.join(PICKLES)}) in this folder")


def _open(path: Path) -> WeightFile:
    return PickleFile(path) if path.suffix in PICKLES else SafetensorsFile(path)


def _open_sharded(folder: Path, index: Path) -> StoredTensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    files: dict[str, WeightFile] = {}
    for shard in sorted(set(weight_map.values())):
        file = _open(_inside(folder, shard, index))
        listed = {name for name, holder in weight_map.items() if holder == shard}
        absent, surplus = sorted(listed - set(file.names)), sorted(set(file.names) - listed)
        if absent:
            raise CheckpointError(f"{file.path}: no tensor {absent[0]!r}, which {index.name} places there")
        if surplus:
            raise CheckpointError(f"{file.path}: holds tensor {surplus[0]!r}, which {index.name} does not place there")
        files |= dict.fromkeys(listed, file)
    return StoredTensors(index, {name: files[name] for name in weight_map})


def _inside(folder: Path, name: str, index: Path) -> Path:
    # Checked by name only: the model cache of Hugging Face legitimately links its files to another folder.
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in parts or "\\" in name:
        raise CheckpointError(f"{index}: weight_map names {name!r}, which lies outside the folder; refused")
    return folder / name
