"""Loads a checked `Recipe` from YAML: one optional base file, presets, `key.path=value` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from megavl.config.errors import UsageError, one_line
from megavl.config.model import ModelConfig
from megavl.config.presets import MODELS
from megavl.config.recipe import Recipe

_RECIPE = TypeAdapter(Recipe)
_MODEL = TypeAdapter(ModelConfig)


def load_recipe(path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: YAML file; its `base:` key may name one other file, relative to it.
        overrides: `key.path=value` strings that replace values of the file; values are YAML.

    Raises:
        UsageError: names the file, the dotted path, the value and the remedy.
    """
    raw = read_raw(path, overrides=overrides)
    if raw.get("parallel") == "auto":
        raise UsageError(
            f"{path}: parallel: auto leaves the choice open; `megavl plan {path} --devices N --device KIND` ranks what "
            "is possible and prints the lines to put there"
        )
    if "model" in raw:
        raw = {**raw, "model": _with_preset(raw["model"], source=str(path))}
    recipe: Recipe = _validate(_RECIPE, raw, source=str(path))
    return recipe


def read_raw(path: str | Path, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file with its base and the overrides into a mapping, without checks.

    Raises:
        UsageError: the file cannot be read.
    """
    raw = _read_with_base(Path(path))
    for override in overrides:
        raw = _merge(raw, _parse_override(override))
    return raw


def load_model_config(preset: str, **changes: Any) -> ModelConfig:
    """Model sizes of a preset; `changes` replace values and are nested as a recipe's `model:`."""
    raw = _with_preset(_merge({"preset": preset}, changes), source="model")
    config: ModelConfig = _validate(_MODEL, raw, source="model")
    return config


def model_config_from_dict(raw: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Model sizes from a complete mapping, as `to_dict` writes it into a checkpoint."""
    config: ModelConfig = _validate(_MODEL, dict(raw), source=source)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-ready mapping of a config dataclass."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it gives the same recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def _read_with_base(path: Path) -> dict[str, Any]:
    raw = _read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return raw
    base_path = path.parent / str(base)
    parent = _read_yaml(base_path)
    if "base" in parent:
        raise UsageError(f"{base_path}: base: a base file may not have a base itself; name {path}'s root directly")
    return _merge(parent, raw)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the recipe ({error}); give the path of a YAML file") from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {one_line(error, limit=None)}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values, found {type(raw).__name__}")
    return raw


def _parse_override(text: str) -> dict[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UsageError(f"{text!r}: an override reads key.path=value")
    try:
        node: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"{text!r}: the value is not valid YAML: {one_line(error, limit=None)}") from error
    if isinstance(node, str):
        node = _number_or_text(node)
    for part in reversed(key.split(".")):
        node = {part: node}
    result: dict[str, Any] = node
    return result


def _number_or_text(text: str) -> Any:
    """Convert text such as `1e-3`, which YAML 1.1 does not read as a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _merge(under: Mapping[str, Any], over: Mapping[str, Any], *, at: str = "") -> dict[str, Any]:
    """Merge `over` into `under`; `at` is their dotted path, with a dot at its end."""
    merged = dict(under)
    for key, value in over.items():
        merged[key] = _merged(merged.get(key), value, at=f"{at}{key}.")
    return merged


def _merged(old: Any, value: Any, *, at: str) -> Any:
    if isinstance(old, Mapping) and isinstance(value, Mapping):
        return _merge(old, value, at=at)
    if isinstance(old, list) and isinstance(value, Mapping):
        return _merge_entries(old, value, at=at)
    return value


def _merge_entries(under: Sequence[Any], over: Mapping[str, Any], *, at: str) -> list[Any]:
    """Merge changes into single entries of a list, addressed by their `name:` or number."""
    merged = list(under)
    names = [str(entry["name"]) if isinstance(entry, Mapping) and "name" in entry else None for entry in under]
    for address, value in over.items():
        number = names.index(address) if address in names else int(address) if str(address).isdecimal() else -1
        if not 0 <= number < len(under):
            known = ", ".join(name or str(number) for number, name in enumerate(names))
            raise UsageError(f"{at}{address}: no such entry; there are {known or 'none'}")
        merged[number] = _merged(merged[number], value, at=f"{at}{address}.")
    return merged


def _with_preset(model: Any, *, source: str) -> Any:
    if not isinstance(model, Mapping):
        raise UsageError(f"{source}: model: expected a mapping with a preset, found {model!r}")
    preset = model.get("preset")
    if preset not in MODELS:
        raise UsageError(f"{source}: model.preset: unknown preset {preset!r}; choose from {', '.join(MODELS)}")
    return _merge(MODELS[preset], model)


def _validate(adapter: TypeAdapter[Any], raw: Mapping[str, Any], *, source: str) -> Any:
    # UsageError is a ValueError, which pydantic would wrap; its text is unwrapped again here.
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        # An unknown key explains the missing one beside it, so it is reported first.
        found = sorted(error.errors(), key=lambda item: item["type"] != "unexpected_keyword_argument")
        first = found[0]
        path = ".".join(str(part) for part in first["loc"])
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UsageError):
            raise UsageError(f"{source}: {cause}") from None
        if first["type"] == "unexpected_keyword_argument":
            raise UsageError(f"{source}: {path}: unknown key{_nearest(first['loc'], adapter)}") from None
        if first["type"].startswith("missing"):
            raise UsageError(f"{source}: {path}: this key is required; add it") from None
        raise UsageError(f"{source}: {path}: found {first['input']!r}; {first['msg']}") from None


def _nearest(location: Sequence[int | str], adapter: TypeAdapter[Any]) -> str:
    """Suggest the field of the enclosing dataclass whose name is most like the unknown key."""
    cls: Any = Recipe if adapter is _RECIPE else ModelConfig
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        if part not in kinds:
            break
        cls = _dataclass_in(_resolve(cls, part)) or cls
    names = [f.name for f in dataclasses.fields(cls)]
    match = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known keys: {', '.join(names)}"


def _resolve(cls: Any, name: str) -> Any:
    return cls.__pydantic_fields__[name].annotation


def _dataclass_in(kind: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return kind
    return next((found for arg in get_args(kind) if (found := _dataclass_in(arg))), None)
