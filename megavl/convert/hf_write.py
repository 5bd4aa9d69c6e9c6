"""Writes a MegaVL model as a Hugging Face folder; the folder appears complete or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megavl.config.chat import IMAGE_TOKEN
from megavl.config.errors import StorageError, UsageError
from megavl.config.model import ModelConfig
from megavl.convert import llm_format, native_format, original_format
from megavl.convert.chat_template import chat_template
from megavl.convert.safetensors_out import OutputRow, write_safetensors
from megavl.convert.table import DECODER, EXPORTS, Export, WeightRow, unused_parameters, weight_rows
from megavl.convert.tokenizer_files import (
    TOKENIZER_FILES,
    TokenizerFolder,
    fitting_tokenizer,
    read_file,
    special_tokens_map,
    tokenizer_config,
    with_bos_first,
)
from megavl.convert.transforms import Copy
from megavl.files.durable import write_durably
from megavl.files.new_folder import new_folder, require_free
from megavl.weights.dtypes import DTYPES, cast, dtype_name
from megavl.weights.lazy import LazyTensor, require_exactly

_SIDE_FILES = {
    "native": native_format.side_files,
    "original": original_format.side_files,
    "llm": llm_format.side_files,
}
EXPORT_FILES = (
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Names of all files of an export but the weights and the model card."""
DEFAULT_SHARD_BYTES = 5_000_000_000
"""Largest weight file in bytes; the default of transformers 4."""


def write_hf(
    out: str | Path,
    *,
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    fmt: Export,
    tokenizer_dir: str | Path,
    dtype: str | None = None,
    unused: Mapping[str, LazyTensor] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    source: str = "checkpoint",
    confirm: Callable[[], object] | None = None,
    more_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write weights, configuration, tokenizer and processor files; memory holds one parameter at a time.

    Args:
        out: folder to create; it may exist if it is empty.
        tensors: every parameter by canonical name.
        fmt: native, original, or llm for the decoder alone.
        dtype: float32, bfloat16 or float16; None keeps each tensor's type.
        unused: unused parameters of the original format by original name; absent ones are synthesised.
        max_shard_bytes: largest weight file, bytes.
        source: file or folder of `tensors`, for messages.
        more_files: content by name of files that no client needs, such as a model card.
        confirm: called when everything is written; if it raises, the output is removed.

    Returns:
        The folder.

    Raises:
        UsageError: `out` is not empty, or another process writes it. Or an unknown dtype, or an adaptor that the format
            cannot hold.
        CheckpointError: tensors that do not fit `config`, or a value beyond float16.
        DataError: a tokenizer that does not fit `config`.
        StorageError: writing failed; nothing is left of it.
    """
    if fmt not in EXPORTS:
        raise UsageError(f"format: {fmt!r} is unknown; choose from {', '.join(EXPORTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype: {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    if max_shard_bytes <= 0:
        raise UsageError(f"max_shard_bytes: {max_shard_bytes} must be positive")
    target = Path(out)
    require_free(target)
    rows = _output_rows(config, tensors, fmt, DTYPES[dtype] if dtype else None, unused or {}, source)
    tokenizer = fitting_tokenizer(tokenizer_dir, config)
    files = {**(more_files or {}), **_side_files(config, tokenizer, fmt, dtype or _main_dtype(rows))}

    try:
        with new_folder(target, name="output") as folder:
            write_safetensors(folder, rows, max_shard_bytes=max_shard_bytes)
            for path in tokenizer.files:
                if path.name not in files:
                    write_durably(folder / path.name, read_file(path))
            for name, content in files.items():
                write_durably(folder / name, content)
            if confirm is not None:
                confirm()
    except OSError as error:
        raise StorageError(f"{target}: cannot write ({error}); free space or choose another place") from error
    return target


def _output_rows(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    fmt: Export,
    dtype: torch.dtype | None,
    unused: Mapping[str, LazyTensor],
    source: str,
) -> list[OutputRow]:
    table = weight_rows(config, fmt)
    left_out = [name for name in tensors if not name.startswith(DECODER)] if fmt == "llm" else []
    require_exactly({row.name: row.shape for row in table}, found=tensors, locate=lambda _: source, ignored=left_out)
    given = [(row, tensors[row.name]) for row in table]
    if fmt == "original":
        given += _unused_rows(config, unused, source, fallback=given[0][1].dtype)
    return [
        OutputRow(row.key_shapes, dtype or tensor.dtype, _loader(row, tensor, dtype, source)) for row, tensor in given
    ]


def _loader(row: WeightRow, tensor: LazyTensor, dtype: torch.dtype | None, source: str) -> Callable[[], list[Tensor]]:
    def load() -> list[Tensor]:
        values = cast(tensor.load(), dtype, name=row.name, source=source)
        return list(row.transform.from_canonical(values))

    return load


def _unused_rows(
    config: ModelConfig, given: Mapping[str, LazyTensor], source: str, *, fallback: torch.dtype
) -> list[tuple[WeightRow, LazyTensor]]:
    parameters = {parameter.key: parameter for parameter in unused_parameters(config)}
    expected = {key: parameters[key].shape for key in given if key in parameters}
    require_exactly(expected, found=given, locate=lambda _: f"{source}: passthrough")
    return [
        (
            WeightRow(key, parameter.shape, (key,), Copy()),
            given[key] if key in given else LazyTensor.of(parameter.synthesise(fallback)),
        )
        for key, parameter in parameters.items()
    ]


def _side_files(config: ModelConfig, tokenizer: TokenizerFolder, fmt: Export, dtype: str) -> dict[str, bytes]:
    """Files in the order of writing: config.json, which makes a folder a model, comes last."""
    plain = _SIDE_FILES[fmt](config, ids=tokenizer.ids, dtype=dtype)
    files = {
        "tokenizer_config.json": tokenizer_config(
            tokenizer, fmt=fmt, max_length=config.llm.max_position_embeddings, system=config.system_prompt
        )
    }
    special = special_tokens_map(tokenizer)
    if special is not None:
        files["special_tokens_map.json"] = special
    if fmt != "original":
        template = chat_template(
            eos_token=tokenizer.tokens["eos_token"],
            image_token=IMAGE_TOKEN,
            system=config.system_prompt,
            bos=fmt == "llm",
        )
        files["chat_template.jinja"] = template.encode()
        changed = with_bos_first(tokenizer)
        if changed is not None:
            files["tokenizer.json"] = changed
    for name in sorted(plain, key=lambda name: name == "config.json"):
        files[name] = (json.dumps(plain[name], indent=2, ensure_ascii=False) + "\n").encode()
    assert files.keys() <= set(EXPORT_FILES), f"EXPORT_FILES lacks {files.keys() - set(EXPORT_FILES)}"
    return files


def _main_dtype(rows: Sequence[OutputRow]) -> str:
    """Name of the type that most bytes of the weights have."""
    sizes: dict[torch.dtype, int] = {}
    for row in rows:
        sizes[row.dtype] = sizes.get(row.dtype, 0) + row.nbytes
    return dtype_name(max(sizes, key=lambda kind: sizes[kind]))
