"""Loads a checked `Recipe` from YAML: one optional base file, presets, `key.path=value` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from megavl.config.errors import UsageError, one_line
from megavl.config.model import ModelConfig
from megavl.config.presets import CUSTOM, MODELS
from megavl.config.recipe import Recipe
from megavl.foreign.yaml_text import parse_yaml, read_yaml

_RECIPE = TypeAdapter(Recipe)
_MODEL = TypeAdapter(ModelConfig)
_TYPED = "on the command line"
_MARKS_OF_TEXT = "'\"|>!&"
"""How text begins in YAML that is not taken as it stands."""
_KEY = re.compile(r"[a-z_]+(?:\.\w+)+")
"""A dotted path in a message."""
_SHOWN = 300
"""Most characters of a wrong value that a message shows."""


StoredModel = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Gives the sizes, as `to_dict` writes them, of the checkpoint that a raw recipe starts from."""


def load_recipe(path: str | Path, *, overrides: Sequence[str] = (), stored_model: StoredModel | None = None) -> Recipe:
    """Read a recipe file.

    Args:
        path: YAML file; its `base:` key may name one other file, relative to it.
        overrides: `key.path=value` strings that replace values of the file; values are YAML.
        stored_model: what `model: {from: init}` calls; without it, that is refused.

    Raises:
        UsageError: names the file, the dotted path, the value and the remedy.
    """
    raw = read_raw(path, overrides=overrides)
    try:
        if raw.get("parallel") == "auto":
            raise UsageError(
                f"parallel: auto leaves the choice open; `megavl plan {path} --devices N --device KIND` ranks what is "
                "possible and prints the lines to put there"
            )
        if "model" in raw:
            raw = {**raw, "model": _with_preset(_with_stored(raw, stored_model))}
        recipe: Recipe = _validate(_RECIPE, raw)
    except UsageError as error:
        raise UsageError(f"{_origin(str(error), raw, path=Path(path), overrides=overrides)}: {error}") from None
    return recipe


def read_raw(path: str | Path, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file with its base and the overrides into a mapping, without checks.

    Raises:
        UsageError: the file cannot be read, or an override changes no key or an entry that is not there.
    """
    own, *base = _read_files(Path(path)).values()
    source = str(path)
    try:
        raw = _merge(base[0], own) if base else own
        source = _TYPED
        for override in overrides:
            raw = _merge(raw, _parse_override(override))
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    return raw


def recipe_files(path: str | Path) -> tuple[Path, ...]:
    """A recipe file and its base.

    Raises:
        UsageError: one of them cannot be read.
    """
    return tuple(_read_files(Path(path)))


def load_model_config(preset: str, **changes: Any) -> ModelConfig:
    """Model sizes of a preset; `changes` replace values and are nested as a recipe's `model:`."""
    return model_config_from_dict(_with_preset(_merge({"preset": preset}, changes)), source="model")


def model_config_from_dict(raw: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Model sizes from a complete mapping, as `to_dict` writes it into a checkpoint."""
    try:
        config: ModelConfig = _validate(_MODEL, dict(raw))
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-ready mapping of a config dataclass."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it gives the same recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def _read_files(path: Path) -> dict[Path, dict[str, Any]]:
    """The content of a recipe file, and then of its base."""
    raw = _read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return {path: raw}
    if not isinstance(base, str):
        raise UsageError(f"{path}: base: expected the path of one file, found {repr(base)[:_SHOWN]}")
    base_path = path.parent / base
    if not os.path.exists(base_path):
        raise UsageError(
            f"{path}: base: {base[:_SHOWN]!r} would be the file {str(base_path)[:_SHOWN]}, which is not there; give a "
            f"path relative to the recipe's own folder, {path.parent}"
        )
    parent = _read_yaml(base_path)
    if "base" in parent:
        raise UsageError(f"{base_path}: base: a base file may not have a base itself; name {path}'s root directly")
    return {path: raw, base_path: parent}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error, limit=_SHOWN)
        raise UsageError(f"{path}: cannot read the recipe ({reason}); give the path of a YAML file") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values, found {type(raw).__name__}")
    _require_text_keys(raw, at=f"{path}: ")
    return raw


def _require_text_keys(node: Any, *, at: str) -> None:
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(node, Mapping) and not isinstance(key, str):
            raise UsageError(f"{at}key {repr(key)[:_SHOWN]} is a {type(key).__name__}; keys are text, quote it")
        _require_text_keys(value, at=f"{at}{key}.")


def _parse_override(text: str) -> dict[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UsageError(f"{text!r}: an override reads key.path=value")
    try:
        node: Any = parse_yaml(value)
    except ValueError as error:
        raise UsageError(f"{text[:_SHOWN]!r}: the value cannot be read: {one_line(error, limit=_SHOWN)}") from error
    # Quoted text stays text.
    if isinstance(node, str) and node == value.strip():
        node = _number_or_text(node)
    elif isinstance(node, str) and value.lstrip()[0] not in _MARKS_OF_TEXT:
        # YAML has dropped a comment, as in `run.dir=/tmp/a #b`, or joined lines.
        node = value.strip()
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
    for address, value in over.items():
        number = _number_of(under, address)
        if number is None:
            known = ", ".join(name or str(number) for number, name in enumerate(_names(under)))
            raise UsageError(f"{at}{address}: no such entry; there are {known or 'none'}")
        merged[number] = _merged(merged[number], value, at=f"{at}{address}.")
    return merged


def _names(entries: Sequence[Any]) -> list[str | None]:
    return [str(entry["name"]) if isinstance(entry, Mapping) and "name" in entry else None for entry in entries]


def _number_of(entries: Sequence[Any], address: Any) -> int | None:
    """The number of the entry of this `name:` or number; None if there is none."""
    names = _names(entries)
    number = names.index(address) if address in names else int(address) if str(address).isdecimal() else -1
    return number if 0 <= number < len(entries) else None


def _origin(message: str, raw: Mapping[str, Any], *, path: Path, overrides: Sequence[str]) -> str:
    """Where the value comes from that a message names first: an override, the recipe file, or its base."""
    changed = {_find(text.partition("=")[0], raw)[0]: text for text in overrides}
    blamed, _, rest = message.partition(":")
    if _override_of(blamed, raw, changed=changed):
        return _TYPED
    files = _read_files(path)
    source = next((file for file, content in files.items() if _find(blamed, content)[1]), path)
    others = (_override_of(key, raw, changed=changed) for key in _KEY.findall(rest))
    other = next((text for text in others if text), None)
    return f"{source} with {other} {_TYPED}" if other else str(source)


def _override_of(key: str, raw: Mapping[str, Any], *, changed: Mapping[tuple[str, ...], str]) -> str | None:
    """The override that sets a key, its section, or a key below it."""
    parts, _ = _find(key, raw)
    # Later overrides win.
    found = [text for own, text in changed.items() if own[: len(parts)] == parts or parts[: len(own)] == own]
    return found[-1] if found else None


def _find(key: str, raw: Any) -> tuple[tuple[str, ...], bool]:
    """A dotted path as its parts, with numbers for the names of list entries, and whether `raw` has it."""
    parts: list[str] = []
    there = True
    for part in key.split("."):
        found: Any = part
        if isinstance(raw, list) and (number := _number_of(raw, part)) is not None:
            found, raw = number, dict(enumerate(raw))
        there = there and isinstance(raw, Mapping) and found in raw
        raw = raw[found] if there else None
        parts.append(str(found))
    return tuple(parts), there


def _with_stored(raw: Mapping[str, Any], stored_model: StoredModel | None) -> Any:
    """`model:` with the sizes of a checkpoint under its own keys if it says `from: init`, which replaces a preset."""
    model = raw["model"]
    if not isinstance(model, Mapping) or "from" not in model:
        return model
    own = {key: value for key, value in model.items() if key != "from"}
    if model["from"] is None:
        return own
    if model["from"] != "init":
        raise UsageError(
            f"model.from: found {model['from']!r}; `init` is the only value, and takes the sizes of checkpoint.init"
        )
    if stored_model is None:
        raise UsageError(
            "model.from: this command reads no checkpoint; add model.from=null model.preset=PRESET with the preset of "
            "the weights, or take the recipe.yaml that a run has saved, where all sizes stand"
        )
    own.pop("preset", None)
    return _merge(stored_model(raw), own)


def _with_preset(model: Any) -> Any:
    if not isinstance(model, Mapping):
        raise UsageError(f"model: expected a mapping with a preset, found {repr(model)[:_SHOWN]}")
    preset = model.get("preset")
    if preset == CUSTOM:
        return model
    if not isinstance(preset, str) or preset not in MODELS:
        known = ", ".join([*MODELS, CUSTOM])
        raise UsageError(f"model.preset: unknown preset {repr(preset)[:_SHOWN]}; choose from {known}")
    return _merge(MODELS[preset], model)


def _validate(adapter: TypeAdapter[Any], raw: Mapping[str, Any]) -> Any:
    # UsageError is a ValueError, which pydantic would wrap; its text is unwrapped again here.
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        # An unknown key explains the missing one beside it, so it is reported first.
        found = sorted(error.errors(), key=lambda item: item["type"] != "unexpected_keyword_argument")
        # A list of which one element is wrong is no word either: the element is what matters.
        inside = [item for item in found if _path_of(item["loc"]).startswith(f"{_path_of(found[0]['loc'])}.")]
        first = (inside or found)[0]
        path = _path_of(first["loc"])
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UsageError):
            raise UsageError(str(cause)) from None
        if first["type"] == "unexpected_keyword_argument":
            raise UsageError(f"{path}: unknown key{_nearest(first['loc'], adapter)}") from None
        if first["type"].startswith("missing"):
            raise UsageError(f"{path}: this key is required; add it") from None
        # A value of none of several types has an error for each.
        texts = dict.fromkeys(item["msg"] for item in found if _path_of(item["loc"]) == path)
        raise UsageError(f"{path}: found {repr(first['input'])[:_SHOWN]}; {', or: '.join(texts)}") from None


_TYPE = re.compile(r"(literal|tuple|function-[a-z]+|constrained-[a-z]+)\b")
"""What pydantic puts into a location for one of several types."""


def _path_of(location: Sequence[int | str]) -> str:
    """Key of a value, without pydantic's names of the types that it could have."""
    return ".".join(str(part) for part in location if not _TYPE.match(str(part)))


def _nearest(location: Sequence[int | str], adapter: TypeAdapter[Any]) -> str:
    """Suggest the field of the enclosing dataclass whose name is most like the unknown key."""
    cls: Any = Recipe if adapter is _RECIPE else ModelConfig
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        if part not in kinds:
            break
        cls = dataclass_in(_resolve(cls, part)) or cls
    names = [f.name for f in dataclasses.fields(cls)]
    match = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known keys: {', '.join(names)}"


def _resolve(cls: Any, name: str) -> Any:
    return cls.__pydantic_fields__[name].annotation


def dataclass_in(kind: Any) -> Any:
    """The dataclass in a field's type, such as `tuple[SourceConfig, ...]`; None if there is none."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind
    return next((found for arg in get_args(kind) if (found := dataclass_in(arg))), None)
