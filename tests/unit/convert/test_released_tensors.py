"""The key sets of both formats at full size are those of the released models, name by name and shape by shape."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from megavl.config.load import load_model_config
from megavl.convert.table import key_shapes, weight_rows
from tests.unit.convert.released_tensors.read import released_tensors

PRESETS = ("1b", "7b")


@pytest.mark.parametrize("preset", PRESETS)
def test_tables_hold_what_their_heads_say(preset):
    head = (Path(__file__).parent / "released_tensors" / f"{preset}.txt").read_text().partition("\n[")[0]
    stated = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:tensors|parameters)", head)]
    entries = released_tensors(preset)
    original = [math.prod(entry.shape) for entry in entries]
    native = [math.prod(entry.native_shape) for entry in entries for _ in entry.native]
    assert stated == [len(original), sum(original), len(native), sum(native)]


@pytest.mark.parametrize("preset", PRESETS)
def test_original_format_has_the_released_names_and_shapes(preset):
    entries = released_tensors(preset)
    assert key_shapes(load_model_config(preset), "original") == {entry.original: entry.shape for entry in entries}


@pytest.mark.parametrize("preset", PRESETS)
def test_native_format_has_the_released_names_and_shapes(preset):
    expected = {name: entry.native_shape for entry in released_tensors(preset) for name in entry.native}
    assert key_shapes(load_model_config(preset), "native") == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_the_two_formats_correspond_as_in_the_table(preset):
    config = load_model_config(preset)
    original = {row.name: row.keys for row in weight_rows(config, "original")}
    native = {row.name: row.keys for row in weight_rows(config, "native")}
    partner = {entry.original: entry.native for entry in released_tensors(preset) if entry.native}
    found = {}
    for flat, keys in original.items():
        names = native[flat]
        # One flat tensor may be several on both sides (decoder), or on the native side only (SigLIP's qkv).
        found |= {keys[0]: names} if len(keys) == 1 else {key: (name,) for key, name in zip(keys, names, strict=True)}
    assert found == partner
