"""Tells what a folder of weights is, where it is not what a command expects, and what to do with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megavl.config.errors import CheckpointError
from megavl.foreign.parsing import JSON_FILE, parse_json
from megavl.foreign.reading import read_limited

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
_FOREIGN = {
    ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights",
    ".gguf": "a GGUF file",
    ".onnx": "an ONNX model",
    ".safetensors": "weights under another name",
    ".bin": "weights under another name",
    ".pth": "weights under another name",
    ".pt": "weights under another name",
}
"""What a file is that transformers would not read as the weights of a folder, by its ending."""
_WHOLE_MODELS = ("deepseek_vl", "deepseek_vl_hybrid", "multi_modality")
"""`model_type` of the folders that `megavl convert from-hf` reads."""
_MERGE = (
    "merge it first, for instance with peft: AutoPeftModel.from_pretrained(ADAPTER).merge_and_unload()"
    ".save_pretrained(OUT), and give OUT"
)


def hub_snapshot(path: str | Path) -> Path:
    """The snapshot of a folder `models--ORG--NAME` in the cache of the Hugging Face Hub; any other path as it is.

    The revision `main` is taken, as transformers does, else the only snapshot.

    Raises:
        CheckpointError: there is no snapshot, or there are several and none is `main`.
    """
    path = Path(path)
    snapshots = path if path.name == "snapshots" else path / "snapshots"
    root = snapshots.parent
    if not root.absolute().name.startswith("models--") or not snapshots.is_dir():
        return path
    found = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    main = _text(root / "refs" / "main").strip()
    if main in found:
        return snapshots / main
    if len(found) == 1 and not main:
        return snapshots / found[0]
    missing = f"refs/main names {main[:80]!r}, which is not there; " if main else ""
    raise CheckpointError(
        f"{root}: a model in the cache of the Hugging Face Hub with {len(found)} snapshots: {missing}"
        + (f"give one of them, such as {snapshots / found[-1]}" if found else "download the model again")
    )


def require_whole_model(folder: Path) -> None:
    """Refuse a folder of a PEFT adapter, such as LoRA, which is no whole model.

    Raises:
        CheckpointError: names the adapter's base model, and how to merge it.
    """
    present = [name for name in _ADAPTER_FILES if os.path.lexists(folder / name)]
    whole = os.path.lexists(folder / "config.json")
    if not present:
        # peft saves each of several adapters in a folder of its own.
        for inner in sorted(folder.glob(f"*/{ADAPTER_CONFIG}")) if not whole else ():
            require_whole_model(inner.parent)
        return
    base = _json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    of = f" of {base[:200]!r}" if isinstance(base, str) else ""
    if not whole:
        raise CheckpointError(f"{folder}: a PEFT adapter{of} ({', '.join(present)}), not a whole model; {_MERGE}")
    if ADAPTER_CONFIG in present:
        raise CheckpointError(
            f"{folder}: ambiguous: it holds a model and a PEFT adapter{of}, and transformers reads the one or the "
            f"other, as peft is installed or not; remove {ADAPTER_CONFIG} to read the model, or to use the adapter "
            f"{_MERGE}"
        )


def describe(path: Path) -> str | None:
    """What a path is that holds no MegaVL checkpoint, and what to give instead; None where nothing is known of it."""
    if path.is_file():
        return f"a file; give a MegaVL checkpoint. {_CONVERT}" if path.suffix in _FOREIGN else "a file, no checkpoint"
    try:
        require_whole_model(path)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    if os.path.lexists(path / "config.json"):
        return _hf_folder(path)
    if path.absolute().name.startswith("models--") and (path / "snapshots").is_dir():
        return f"a model in the cache of the Hugging Face Hub, not a MegaVL checkpoint; {_convert(path)}"
    if (path / "checkpoints").is_dir():
        return f"a run's folder; its checkpoints are in {path / 'checkpoints'}, give that"
    if found := foreign_weights(path):
        return f"no MegaVL checkpoint: it holds {found}. {_CONVERT}"
    return None


_CONVERT = "`megavl convert from-hf DIR OUT` makes one of a Hugging Face folder, `megavl convert init` of public models"


def _hf_folder(path: Path) -> str:
    kind = _json(path / "config.json").get("model_type")
    if not isinstance(kind, str) or kind in _WHOLE_MODELS:
        return f"a Hugging Face folder, not a MegaVL checkpoint; {_convert(path)}"
    return (
        f"a Hugging Face folder of model_type {kind[:80]!r}; `megavl convert init` puts start weights together from a "
        "language model, SigLIP and SAM"
    )


def _convert(path: Path) -> str:
    return f"convert it with `megavl convert from-hf {path} OUT`, and give OUT"


def foreign_weights(folder: Path) -> str | None:
    """Names of files that look like weights, each with what it is; None where there is none."""
    found = [
        f"{file.name} ({_FOREIGN[file.suffix]})"
        for file in sorted(folder.iterdir())
        if file.suffix in _FOREIGN and file.is_file()
    ]
    return ", ".join([*found[:3], *([f"and {len(found) - 3} more"] if len(found) > 3 else [])]) if found else None


def _text(path: Path) -> str:
    try:
        return read_limited(path, limit=JSON_FILE.size).decode("utf-8")
    except (OSError, ValueError):
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(_text(path).encode("utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
