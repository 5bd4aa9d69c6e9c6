"""Native exports in transformers 4.57, against the release of the test environment.

Slow, and only where an interpreter is named: `make test-clients` makes that environment and runs this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavl.config.load import load_model_config
from megavl.convert.hf_read import canonical_tensors, open_hf_tensors, read_config
from megavl.convert.hf_write import write_hf
from tests import clients

CLASSES = {
    "tiny-hybrid": "DeepseekVLHybridForConditionalGeneration",
    "tiny-siglip": "DeepseekVLForConditionalGeneration",
}
TOLERANCE = 1e-6
"""Of the largest logit."""
PIXELS = 0.031
"""2/255 after normalisation: where torchvision is installed, it resizes instead of Pillow."""
SCRIPT = Path(__file__).with_name("load_export.py")


@pytest.fixture(scope="module")
def older():
    return clients.interpreter("MEGAVL_TRANSFORMERS_4", "transformers 4.57")


def run(python, folder, inputs, out):
    said = clients.run([python, str(SCRIPT), str(folder), str(inputs), str(out)])
    return json.loads(said.splitlines()[-1]), load_file(out)


def example(preset, path):
    config, generator = load_model_config(preset), torch.Generator().manual_seed(1)
    ids = torch.randint(4, config.llm.vocab_size, (2, config.image_tokens + 24), generator=generator)
    ids[:, 5 : 5 + config.image_tokens] = config.image_token_id
    low, high = config.siglip.image_size, config.canvas_size
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, low, low, generator=generator)}
    if config.sam is not None:
        inputs["high_res_pixel_values"] = torch.randn(2, 3, high, high, generator=generator)
    save_file(inputs, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("preset", CLASSES)
def test_native_export_in_both_releases(older, sources, tokenizer_dir, tmp_path, preset, report_table):
    config, fmt = read_config(sources[preset])
    flat = canonical_tensors(open_hf_tensors(sources[preset]), config=config, fmt=fmt)
    folder = write_hf(tmp_path / "hf", config=config, tensors=flat, fmt="native", tokenizer_dir=tokenizer_dir)
    inputs = example(preset, tmp_path / "inputs.safetensors")
    old, old_tensors = run(older, folder, inputs, tmp_path / "4.safetensors")
    new, new_tensors = run(sys.executable, folder, inputs, tmp_path / "5.safetensors")
    versions = old.pop("transformers"), new.pop("transformers")
    assert [version.split(".")[0] for version in versions] == ["4", "5"]
    # No weight is missing, unexpected, of another shape or newly initialised.
    assert new["loading"] == old["loading"] == {}
    assert (new["class"], new["tied"], new["special"]) == (CLASSES[preset], False, [0, 1, 2])
    assert new["prompt"].endswith("User: <image_placeholder>Which colour?\n\nAssistant:")
    assert new["input_ids"][0].count(3) == config.image_tokens and new["text"].endswith("square, é?")
    assert new == old
    names, largest = sorted(old_tensors), float(old_tensors["logits"].abs().max())
    errors = {name: float((new_tensors[name] - old_tensors[name]).abs().max()) for name in names}
    limits = {name: PIXELS if "pixel" in name else TOLERANCE * largest for name in names}
    title = f"{preset}, transformers {versions[1]} against {versions[0]}: largest difference, limit"
    report_table(title, *([name, errors[name], limits[name]] for name in names))
    assert old_tensors["logits"].std() > 0.1
    assert all(errors[name] <= limits[name] for name in names)
