"""The tokenizer of an export: special ids, files byte for byte, and a completed `tokenizer_config.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers

from megavl.config.chat import IMAGE_TOKEN, SYSTEM_PROMPT, USUAL_NAMES
from megavl.config.errors import CheckpointError, DataError, one_line
from megavl.config.model import ModelConfig
from megavl.convert.chat_template import chat_template
from megavl.convert.safetensors_in import read_json
from megavl.foreign.panics import panics_as_errors
from megavl.foreign.parsing import JSON_FILE, LARGE_JSON_FILE, Limit
from megavl.foreign.reading import read_limited, regular_file_in

_COPIED = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_CONFIG, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
TOKENIZER_FILES = (*_COPIED, _CONFIG)
"""Names of all files that a tokenizer may bring into an export."""
_LARGEST = LARGE_JSON_FILE.size


@dataclass(frozen=True)
class TokenizerIds:
    """Ids of the special tokens."""

    bos: int
    eos: int
    pad: int
    image: int


@dataclass(frozen=True)
class TokenizerFolder:
    """Special tokens and configuration of a folder with a `tokenizer.json`."""

    folder: Path
    tokens: dict[str, str]
    """Texts of bos_token, eos_token and pad_token."""
    ids: TokenizerIds
    config: dict[str, Any]
    """Content of its `tokenizer_config.json`; empty if there is none."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files to copy byte for byte; `tokenizer_config.json` is not one of them."""
        return tuple(path for name in _COPIED if (path := _file(self.folder, name)))


def read_tokenizer(folder: str | Path) -> TokenizerFolder:
    """Special tokens and their ids from the files of a tokenizer folder.

    Padding is the EOS token if no file names another.

    Raises:
        DataError: no tokenizer.json, a damaged file, or a special token without an id.
    """
    folder = Path(folder)
    vocabulary = _vocabulary(folder)
    config, tokens = _special_tokens(folder, vocabulary)
    bos, eos, pad = (_id(folder, vocabulary, tokens[part]) for part in USUAL_NAMES)
    ids = TokenizerIds(bos=bos, eos=eos, pad=pad, image=_id(folder, vocabulary, IMAGE_TOKEN))
    return TokenizerFolder(folder, tokens, ids, config)


def fitting_tokenizer(folder: str | Path, config: ModelConfig) -> TokenizerFolder:
    """Read the tokenizer of a folder and check that it belongs to the model.

    Raises:
        DataError: as `read_tokenizer`, or its image token has another id than the model's, or a special id has no row.
    """
    tokenizer = read_tokenizer(folder)
    ids = tokenizer.ids
    if ids.image != config.image_token_id:
        raise DataError(
            f"{tokenizer.folder}: {IMAGE_TOKEN} has id {ids.image}, the model was trained with model.image_token_id "
            f"{config.image_token_id}; give the tokenizer that the model was trained with"
        )
    largest = max(ids.bos, ids.eos, ids.pad)
    if largest >= config.llm.vocab_size:
        raise DataError(
            f"{tokenizer.folder}: special token id {largest} is outside model.llm.vocab_size {config.llm.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    return tokenizer


def with_image_token(folder: str | Path, *, image_id: int) -> tuple[dict[str, bytes | Path], bool]:
    """Tokenizer files of a language model for a model with images.

    A tokenizer without the image token gets it as the last special token, as in the released client. The other entries
    of `tokenizer.json` stay as they are, so all other text is tokenized as before.

    Args:
        image_id: id that the model has for the image token.

    Returns:
        Content or source of each file by name, and whether the token was added.

    Raises:
        DataError: as `read_tokenizer`, or the token has or would get another id than `image_id`.
    """
    folder = Path(folder)
    path, vocabulary = folder / "tokenizer.json", _vocabulary(folder)
    _special_tokens(folder, vocabulary)
    files: dict[str, bytes | Path] = {file.name: file for file in tokenizer_paths(folder)}
    found = _find(vocabulary, IMAGE_TOKEN)
    if found is not None:
        if found != image_id:
            raise DataError(f"{path}: {IMAGE_TOKEN} has id {found}, the model has model.image_token_id {image_id}")
        return files, False
    entry = {"id": image_id, "content": IMAGE_TOKEN, "single_word": False, "lstrip": False, "rstrip": False}
    added = vocabulary.get("added_tokens")
    more = [*(added if isinstance(added, list) else []), {**entry, "normalized": False, "special": True}]
    text = json.dumps({**vocabulary, "added_tokens": more}, indent=2, ensure_ascii=False)
    before, after = (_library_vocabulary(path, content) for content in (_text_of(path), text))
    if after != {**before, IMAGE_TOKEN: image_id}:
        free = max(before.values()) + 1
        raise DataError(
            f"{path}: {IMAGE_TOKEN} is not in it, and the next free id is {free}, but the model has "
            f"model.image_token_id {image_id}; give the tokenizer that belongs to the language model"
        )
    return {**files, path.name: text.encode()}, True


def image_token_id(folder: str | Path) -> int:
    """Id of the image token in a tokenizer folder.

    Raises:
        DataError: no tokenizer.json, or the token is not in it.
    """
    return _id(Path(folder), _vocabulary(Path(folder)), IMAGE_TOKEN)


def tokenizer_paths(folder: str | Path) -> tuple[Path, ...]:
    """Tokenizer files of a Hugging Face folder, to be kept with a checkpoint."""
    return tuple(path for name in TOKENIZER_FILES if (path := _file(Path(folder), name)))


def tokenizer_config(
    tokenizer: TokenizerFolder,
    *,
    fmt: Literal["native", "original", "llm"],
    max_length: int,
    system: str = SYSTEM_PROMPT,
) -> bytes:
    """`tokenizer_config.json` of an export: the source's, with additions that the clients need.

    A chat template is a program. One from outside becomes ours, and neither code nor other files are named.

    With images the class is LlamaTokenizerFast: the released client accepts no other, and it puts BOS first as training
    did. Its unk_token is written even when there is none, or the class would add an `<unk>` to the vocabulary. The
    decoder alone has the class that takes `tokenizer.json` as it is. Under the other one, transformers 5 up to 5.20 at
    least splits its text at blanks, and loses them.
    """
    raw = tokenizer.config
    absent: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "unk_token": None,
        **tokenizer.tokens,
    }
    kept = {key: value for key, value in raw.items() if key != "auto_map" and not key.endswith("_file")}
    merged = {**absent, **kept}
    if raw.get("chat_template") is not None:
        merged["chat_template"] = chat_template(
            eos_token=tokenizer.tokens["eos_token"], image_token=IMAGE_TOKEN, system=system, bos=fmt == "llm"
        )
    for part, text in tokenizer.tokens.items():
        if merged[part] is None:
            merged[part] = text
    merged["tokenizer_class"] = "PreTrainedTokenizerFast" if fmt == "llm" else "LlamaTokenizerFast"
    if fmt == "native":
        extra = merged.get("extra_special_tokens")
        merged["extra_special_tokens"] = {**(extra if isinstance(extra, dict) else {}), "image_token": IMAGE_TOKEN}
        merged["image_token"] = IMAGE_TOKEN
    if merged == raw:
        return read_file(tokenizer.folder / _CONFIG)
    return (json.dumps(merged, indent=2, ensure_ascii=False) + "\n").encode()


def special_tokens_map(tokenizer: TokenizerFolder) -> bytes | None:
    """A `special_tokens_map.json` of special tokens alone; None if there is none, or it holds nothing else.

    Transformers 4 takes every other key for a setting of the tokenizer, a chat template too.
    """
    raw = _optional(tokenizer.folder / _SPECIAL)
    kept = {key: value for key, value in raw.items() if key.endswith(("_token", "special_tokens"))}
    return None if kept == raw else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def with_bos_first(tokenizer: TokenizerFolder) -> bytes | None:
    """A `tokenizer.json` whose post-processor puts BOS first; None if the file has it or the configuration forbids it.

    Transformers 4 reads `add_bos_token` in `tokenizer_config.json`; transformers 5 reads `tokenizer.json` alone. Only
    the post-processor changes, and transformers 4 replaces it by the same one.
    """
    path, bos = tokenizer.folder / "tokenizer.json", tokenizer.tokens["bos_token"]
    text = _text_of(path)
    first = _from_library(path, text).encode("a").tokens[:1]
    if first == [bos] or tokenizer.config.get("add_bos_token") is False:
        return None
    one, other = (
        [{"SpecialToken": {"id": bos, "type_id": n}}, {"Sequence": {"id": "AB"[n], "type_id": n}}] for n in (0, 1)
    )
    template = {
        "type": "TemplateProcessing",
        "single": one,
        "pair": [*one, *other],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.ids.bos], "tokens": [bos]}},
    }
    return json.dumps({**json.loads(text), "post_processor": template}, indent=2, ensure_ascii=False).encode()


def _special_tokens(folder: Path, vocabulary: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Content of `tokenizer_config.json`, and the texts of BOS, EOS and padding."""
    config, special = _optional(folder / _CONFIG), _optional(folder / _SPECIAL)
    tokens: dict[str, str] = {}
    for part, usual in USUAL_NAMES.items():
        named = _text(config.get(part)) or _text(special.get(part))
        text = named or next((name for name in usual if _find(vocabulary, name) is not None), None)
        if text is None and part == "pad_token":
            text = tokens["eos_token"]
        if text is None:
            raise DataError(f"{folder / _CONFIG}: {part} is not given; add it, so that the export knows its id")
        tokens[part] = text
    return config, tokens


def _library_vocabulary(path: Path, content: str) -> dict[str, int]:
    """Ids by token as the library assigns them, which may differ from the ids in `added_tokens`."""
    found: dict[str, int] = _from_library(path, content).get_vocab(with_added_tokens=True)
    return found


def _from_library(path: Path, content: str) -> tokenizers.Tokenizer:
    try:
        with panics_as_errors():
            return tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not a Hugging Face tokenizer ({error}); give a tokenizer.json") from error


def _vocabulary(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not _file(folder, path.name):
        raise DataError(f"{path}: no such file; a Hugging Face folder needs the tokenizer in this form")
    return _readable(path, limit=LARGE_JSON_FILE)


def _optional(path: Path) -> dict[str, Any]:
    return _readable(path) if _file(path.parent, path.name) else {}


def _readable(path: Path, *, limit: Limit = JSON_FILE) -> dict[str, Any]:
    try:
        return read_json(path, limit=limit)
    except CheckpointError as error:
        raise DataError(str(error)) from error


def _file(folder: Path, name: str) -> Path | None:
    """A file that may be copied; None if there is none.

    Raises:
        DataError: a link that leaves the folder, no regular file, or a larger one than tokenizers have.
    """
    try:
        path = regular_file_in(folder, name)
        if path is not None and path.stat().st_size > _LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes, at most {_LARGEST:,} are read")
        return path
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / name}: refused, {one_line(error, limit=700)}") from error


def read_file(path: Path) -> bytes:
    """Content of a tokenizer's file.

    Raises:
        DataError: as for all its files, or it is not readable.
    """
    try:
        return read_limited(path, limit=_LARGEST)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable ({one_line(error)})") from error


def _text_of(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not readable ({one_line(error)})") from error


def _text(token: Any) -> str | None:
    """Text of a token in `tokenizer_config.json`, which is the text or an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _id(folder: Path, vocabulary: dict[str, Any], token: str) -> int:
    found = _find(vocabulary, token)
    if found is None:
        raise DataError(f"{folder / 'tokenizer.json'}: token {token!r} is not in it; use the model's own tokenizer")
    return found


def _find(vocabulary: dict[str, Any], token: str) -> int | None:
    found = next((value for text, value in _added(vocabulary) if text == token), None)
    if found is None:
        model = vocabulary.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        found = vocab.get(token) if isinstance(vocab, dict) else None
    return found if isinstance(found, int) else None


def _added(vocabulary: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    added = vocabulary.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict):
            yield entry.get("content"), entry.get("id")
