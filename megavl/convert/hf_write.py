"""A MegaVL model as a Hugging Face folder in either format; the folder appears complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megavl.config.chat import IMAGE_TOKEN
from megavl.config.errors import StorageError, UsageError
from megavl.config.model import ModelConfig
from megavl.convert import native_format, original_format
from megavl.convert.chat_template import chat_template
from megavl.convert.dtypes import DTYPE_NAMES, cast
from megavl.convert.lazy import LazyTensor, LoadedTensor, require_exactly
from megavl.convert.safetensors_out import OutputRow, sync_folder, write_safetensors, write_synced
from megavl.convert.table import FORMATS, Format, WeightRow, dead_tensors, weight_rows
from megavl.convert.tokenizer_files import (
    TokenizerFolder,
    fitting_tokenizer,
    tokenizer_config,
    with_bos_first,
)
from megavl.convert.transforms import Copy

DEFAULT_SHARD_BYTES = 5_000_000_000
"""Largest weight file, bytes: what transformers 4 chooses."""


def write_hf(
    out: str | Path,
    *,
    config: ModelConfig,
    flat: Mapping[str, LazyTensor],
    fmt: Format,
    tokenizer_dir: str | Path,
    dtype: str | None = None,
    passthrough: Mapping[str, LazyTensor] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    source: str = "checkpoint",
    confirm: Callable[[], object] | None = None,
) -> Path:
    """Write weights, configuration, tokenizer and processor files; memory holds one flat tensor at a time.

    Args:
        out: folder to create; it may exist if it is empty.
        flat: every flat tensor of the model.
        tokenizer_dir: folder with `tokenizer.json`.
        dtype: float32, bfloat16 or float16; None keeps each tensor as it is.
        passthrough: dead tensors of the original format by original name; absent ones are synthesised.
        max_shard_bytes: largest weight file, bytes.
        source: what `flat` was read from, for messages.
        confirm: called when everything is written; if it raises, nothing is left behind.

    Returns:
        The folder.

    Raises:
        UsageError: `out` is in use, an unknown dtype, or an adaptor that the format cannot hold.
        CheckpointError: tensors that do not fit `config`, or a value beyond float16.
        DataError: a tokenizer that does not fit `config`.
        StorageError: writing failed; nothing is left behind.
    """
    if fmt not in FORMATS:
        raise UsageError(f"format: {fmt!r} is unknown; choose from {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UsageError(f"dtype: {dtype!r} is unknown; choose from {', '.join(DTYPE_NAMES)}")
    if max_shard_bytes <= 0:
        raise UsageError(f"max_shard_bytes: {max_shard_bytes} must be positive")
    target = _free_target(Path(out))
    rows = _output_rows(config, flat, fmt, DTYPE_NAMES[dtype] if dtype else None, passthrough or {}, source)
    tokenizer = fitting_tokenizer(tokenizer_dir, config)
    files = _side_files(config, tokenizer, fmt, dtype or _dtype_name(rows))

    def fill(folder: Path) -> None:
        write_safetensors(folder, rows, max_shard_bytes=max_shard_bytes)
        for path in tokenizer.files:
            if path.name not in files:
                write_synced(folder / path.name, path.read_bytes())
        for name, content in files.items():
            write_synced(folder / name, content)
        if confirm is not None:
            confirm()

    return _commit(target, fill)


def _free_target(out: Path) -> Path:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: exists and is not a folder; choose another output")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: exists and is not empty; choose another output or empty it")
    return out


def _commit(target: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a neighbour of `target` and rename it, so that `target` is never there in part."""
    partial = target.parent / f".{target.name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # One that a killed run left; its name says that it is not a model.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            fill(partial)
            sync_folder(partial)
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"{target}: cannot write ({error}); free space or choose another place") from error
    return target


def _output_rows(
    config: ModelConfig,
    flat: Mapping[str, LazyTensor],
    fmt: Format,
    dtype: torch.dtype | None,
    passthrough: Mapping[str, LazyTensor],
    source: str,
) -> list[OutputRow]:
    table = weight_rows(config, fmt)
    require_exactly({row.flat: row.shape for row in table}, found=flat, locate=lambda _: source)
    rows = []
    for row in table:
        tensor = flat[row.flat]
        rows.append(OutputRow(row.key_shapes, dtype or tensor.dtype, _loader(row, tensor, dtype, source)))
    if fmt == "original":
        rows += _dead_rows(config, dtype, passthrough, source, fallback=flat[table[0].flat].dtype)
    return rows


def _loader(row: WeightRow, tensor: LazyTensor, dtype: torch.dtype | None, source: str) -> Callable[[], list[Tensor]]:
    def load() -> list[Tensor]:
        values = cast(tensor.load(), dtype, name=row.flat, source=source)
        return list(row.transform.from_flat(values))

    return load


def _dead_rows(
    config: ModelConfig,
    dtype: torch.dtype | None,
    passthrough: Mapping[str, LazyTensor],
    source: str,
    *,
    fallback: torch.dtype,
) -> list[OutputRow]:
    dead = dead_tensors(config)
    known = {row.key: row.shape for row in dead}
    given = {key: known[key] for key in passthrough if key in known}
    require_exactly(given, found=passthrough, locate=lambda _: f"{source}: passthrough")
    rows = []
    for row in dead:
        tensor = passthrough[row.key] if row.key in passthrough else LoadedTensor(row.synthesise(fallback))
        table_row = WeightRow(row.key, row.shape, (row.key,), Copy())
        rows.append(OutputRow({row.key: row.shape}, dtype or tensor.dtype, _loader(table_row, tensor, dtype, source)))
    return rows


def _side_files(config: ModelConfig, tokenizer: TokenizerFolder, fmt: Format, dtype: str) -> dict[str, bytes]:
    """Files in the order of writing: config.json, which makes a folder a model, comes last."""
    module = native_format if fmt == "native" else original_format
    plain = module.side_files(config, ids=tokenizer.ids, dtype=dtype)
    files = {
        "tokenizer_config.json": tokenizer_config(tokenizer, fmt=fmt, max_length=config.llm.max_position_embeddings)
    }
    if fmt == "native":
        template = chat_template(eos_token=tokenizer.tokens["eos_token"], image_token=IMAGE_TOKEN)
        files["chat_template.jinja"] = template.encode()
        changed = with_bos_first(tokenizer)
        if changed is not None:
            files["tokenizer.json"] = changed
    for name in sorted(plain, key=lambda name: name == "config.json"):
        files[name] = (json.dumps(plain[name], indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _dtype_name(rows: Sequence[OutputRow]) -> str:
    """Type of most of the weights, by bytes."""
    sizes: dict[torch.dtype, int] = {}
    for row in rows:
        sizes[row.dtype] = sizes.get(row.dtype, 0) + row.nbytes
    return str(max(sizes, key=lambda kind: sizes[kind])).removeprefix("torch.")
