"""MegaVL against the released client, unmodified, on MegaVL's export in the original format.

The client knows towers of the published sizes only, so they have these, with random weights, above a small decoder.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from launch.bench.engines.random_models import IMAGE, random_tensors, relative_error, write_tokenizer
from launch.bench.engines.released_pixels import random_picture
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from megavl.config.presets import IMAGE_PRESETS
from megavl.convert.hf_write import write_hf
from megavl.convert.table import unused_parameters
from megavl.data.batch import make_batch
from megavl.data.image import canvas
from megavl.data.template import Turn, conversation_pieces, encode
from megavl.data.tokenizer import open_tokenizer
from megavl.generate.open_model import find_model, loaded
from megavl.generate.prompt import encode_prompt, prompt_pieces
from megavl.main.cli import main
from megavl.weights.lazy import LazyTensor
from tests.numerics.native_pair import TOLERANCE
from tests.numerics.released_client import import_client, why_absent
from tests.unit.generate.models import greedy_tokens

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_absent() is not None, reason=str(why_absent()))]

LLM = {"hidden_size": 256, "ffn_hidden_size": 704, "num_layers": 4, "num_attention_heads": 4, "vocab_size": 1024}
PROMPTS = {
    "one image in front": ([(517, 301)], f"{IMAGE}\nwhich colour is it?"),
    "two images inside": ([(640, 481), (333, 1000)], f"red {IMAGE} or {IMAGE} green?"),
    "no image": ([], "which colour is it?"),
}
NEW_TOKENS = 16
SIDES = [1, 2, 13, 14, 15, 31, 49, 90, 301, 333, 384, 400, 481, 517, 640, 1000, 1024, 1333, 1999]


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> ModuleType:
    return import_client(tmp_path_factory.mktemp("client"))


@dataclass(frozen=True)
class Export:
    """A model with random weights, unused parameters included, in the original format."""

    config: ModelConfig
    folder: Path


@pytest.fixture(scope="module", params=["7b", "1b"])
def export(request, tmp_path_factory) -> Iterator[Export]:
    root = tmp_path_factory.mktemp(request.param)
    config = load_model_config(request.param, llm=LLM, image_token_id=3)
    flat = {name: LazyTensor.of(tensor) for name, tensor in random_tensors(config).items()}
    dead = {row.key: LazyTensor.of(torch.randn(row.shape)) for row in unused_parameters(config)}
    options: dict[str, Any] = {"config": config, "tensors": flat, "fmt": "original", "unused": dead}
    folder = write_hf(root / "original", tokenizer_dir=write_tokenizer(root / "tokenizer"), **options)
    del flat, dead, options
    gc.collect()
    yield Export(config, folder)


@pytest.fixture(scope="module")
def released(client, export) -> Iterator[tuple[Any, Any]]:
    """The client's model and processor."""
    model = client.MultiModalityCausalLM.from_pretrained(export.folder, torch_dtype=torch.float32).eval()
    yield model, client.VLChatProcessor.from_pretrained(export.folder)
    del model
    gc.collect()


def pictures_of(prompt: str) -> tuple[list[Image.Image], str]:
    sizes, text = PROMPTS[prompt]
    return [random_picture(number, size) for number, size in enumerate(sizes)], text


def prepared(processor: Any, pictures: list[Image.Image], text: str) -> Any:
    conversation = [{"role": "User", "content": text}, {"role": "Assistant", "content": ""}]
    return processor(conversations=conversation, images=pictures, force_batchify=True)


def canvases_of(pictures: list[Image.Image], config: ModelConfig) -> torch.Tensor:
    side = config.canvas_size
    stacked = [canvas(picture, geometry=config.image_geometry) for picture in pictures]
    return torch.from_numpy(np.stack(stacked)) if stacked else torch.zeros((0, 3, side, side), dtype=torch.uint8)


def our_ids(export: Export, text: str, *, images: int) -> list[int]:
    tokenizer = open_tokenizer(export.folder)
    return encode_prompt(prompt_pieces(text, images=images), tokenizer=tokenizer, config=export.config, room=NEW_TOKENS)


def test_the_client_loads_every_tensor(export, released, report_table) -> None:
    state, count = released[0].state_dict(), 0
    for path in sorted(export.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = file.keys()
            for name in names:
                assert torch.equal(state[name], file.get_tensor(name)), name
            count += len(names)
    assert count == len(state)
    size = sum(tensor.numel() for tensor in state.values())
    report_table(f"{export.config.preset}: {count} tensors, {size:,} parameters, equal after loading")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_processor_prepares_the_same_prompt(prompt, export, released, report_table) -> None:
    pictures, text = pictures_of(prompt)
    batch = prepared(released[1], pictures, text)
    ids = our_ids(export, text, images=len(pictures))
    assert batch["input_ids"][0].tolist() == ids
    at_image = torch.tensor(ids) == export.config.image_token_id
    assert torch.equal(batch["images_seq_mask"][0], at_image)
    assert int(at_image.sum()) == export.config.image_tokens * len(pictures) == int(batch["images_emb_mask"].sum())
    if pictures:
        pixels = canvases_of(pictures, export.config).float() / 255
        if export.config.sam is None:
            pixels = (pixels - 0.5) / 0.5
        difference = float((batch["pixel_values"][0] - pixels).abs().max())
        report_table(f"{export.config.preset}, {prompt}: pixels differ by {difference:.1e}, limit 2.4e-07 (2 ulp at 1)")
        assert difference <= 2.4e-7


def test_a_conversation_gives_the_same_training_ids(export, released) -> None:
    texts = [f"{IMAGE} which colour?", "It is red.", "\n and now? ", "green\n"]
    roles = ["User", "Assistant"] * 2
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    expected = released[1].process_one(conversations=turns, images=[random_picture(0, (64, 48))]).input_ids.tolist()
    pieces = conversation_pieces(
        [Turn(role=role.lower(), text=text) for role, text in zip(roles, texts)], template="deepseek"
    )
    tokenizer = open_tokenizer(export.folder)
    assert encode(pieces, tokenizer=tokenizer, image_tokens=export.config.image_tokens).ids.tolist() == expected


@pytest.mark.parametrize("preset", ["hybrid-1024", "siglip-384"])
def test_canvases_are_the_processors_bit_for_bit(preset, client, report_table) -> None:
    geometry = IMAGE_PRESETS[preset]
    mean = (0.48145466, 0.4578275, 0.40821073) if preset == "hybrid-1024" else (0.5, 0.5, 0.5)
    processor = client.VLMImageProcessor(image_size=geometry.canvas_size, image_mean=mean, image_std=mean)
    generator = np.random.default_rng(0)
    sizes = [(517, 301), (640, 481), (1000, 333), (1999, 1333), (1, 400), (400, 1), (1, 1), (640, 640), (1024, 1024)]
    sizes += [tuple(generator.choice(SIDES, 2).tolist()) for _ in range(40)]
    sizes += [tuple(generator.integers(1, 1500, 2).tolist()) for _ in range(40)]
    for number, size in enumerate(sizes):
        picture = random_picture(number, size)
        np.testing.assert_array_equal(canvas(picture, geometry=geometry), processor.resize(picture), err_msg=str(size))
    report_table(f"{preset}: canvases of {len(sizes)} image sizes are equal")


@torch.no_grad()
def test_logits_and_greedy_tokens(export, released, report_table) -> None:
    model, processor = released
    with loaded(find_model(export.folder), dtype="float32") as ours:
        for prompt in PROMPTS:
            pictures, text = pictures_of(prompt)
            batch = prepared(processor, pictures, text).to("cpu", dtype=torch.float32)
            theirs: dict[str, torch.Tensor] = {}
            mine: dict[str, torch.Tensor] = {}
            handles = [*watch_released(model, theirs), *watch(ours, mine)]
            embeddings = model.prepare_inputs_embeds(**batch)
            expected = model.language_model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits[0]
            ids = our_ids(export, text, images=len(pictures))
            images = canvases_of(pictures, export.config)
            found = ours.logits(make_batch(torch.tensor(ids), images=images, image_token_id=ours.image_token_id))
            for handle in handles:
                handle.remove()
            errors = {name: relative_error(mine[name], theirs[name]) for name in mine} if pictures else {}
            errors["logits"] = relative_error(found, expected)
            shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            answer = model.language_model.generate(
                inputs_embeds=embeddings,
                attention_mask=batch["attention_mask"],
                pad_token_id=processor.tokenizer.eos_token_id,
                bos_token_id=processor.tokenizer.bos_token_id,
                eos_token_id=processor.tokenizer.eos_token_id,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                use_cache=True,
            )[0].tolist()
            eos = processor.tokenizer.eos_token_id
            tokens = greedy_tokens(ours, ids, images=images, eos_id=eos, count=NEW_TOKENS)
            report_table(
                f"{export.config.preset}, {prompt}: {shown}, limit {TOLERANCE:.0e}; {len(tokens)} greedy tokens equal"
            )
            assert all(error < TOLERANCE for error in errors.values())
            assert tokens == answer


def watch(ours: Any, seen: dict[str, torch.Tensor]) -> Iterator[Any]:
    """Record the towers' inputs and outputs, and the adaptor's output."""
    vision = ours.vision
    yield vision.siglip.register_forward_hook(keep(seen, "siglip"))
    if vision.sam is not None:
        yield vision.sam.register_forward_hook(keep(seen, "sam"))
    yield vision.adaptor.register_forward_hook(keep(seen, "adaptor", inputs=False))


def watch_released(model: Any, seen: dict[str, torch.Tensor]) -> Iterator[Any]:
    """The same of the released model."""
    if hasattr(model.vision_model, "vision_tower_low"):
        yield model.vision_model.vision_tower_low.vision_tower.register_forward_hook(keep(seen, "siglip"))
        tower = model.vision_model.vision_tower_high.vision_tower
        yield tower.register_forward_hook(keep(seen, "sam", arrange=lambda x: x.flatten(2).transpose(1, 2)))
    else:
        yield model.vision_model.vision_tower.register_forward_hook(keep(seen, "siglip"))
    yield model.aligner.register_forward_hook(keep(seen, "adaptor", inputs=False))


def keep(
    seen: dict[str, torch.Tensor],
    name: str,
    *,
    inputs: bool = True,
    arrange: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Callable[..., None]:
    def hook(_: Any, args: tuple[Any, ...], out: torch.Tensor) -> None:
        if inputs:
            seen[f"{name} pixels"] = args[0]
        seen[name] = arrange(out)

    return hook


def test_original_to_megavl_to_original_is_bitwise(export, released, tmp_path, report_table, capsys) -> None:
    """Starts from a file that the client itself wrote."""
    released[0].save_pretrained(tmp_path / "saved")
    for path in export.folder.iterdir():
        if path.suffix != ".safetensors" and not (tmp_path / "saved" / path.name).exists():
            (tmp_path / "saved" / path.name).write_bytes(path.read_bytes())
    assert main(["convert", "from-hf", str(tmp_path / "saved"), str(tmp_path / "megavl")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "megavl"), str(tmp_path / "back"), "--format", "original"]) == 0
    capsys.readouterr()
    files = [tmp_path / folder / "model.safetensors" for folder in ("saved", "back")]
    with safe_open(files[0], "pt") as first, safe_open(files[1], "pt") as last:
        names = set(first.keys())
        assert names == set(last.keys())
        for name in names:
            a, b = first.get_tensor(name), last.get_tensor(name)
            assert a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32)), name
    report_table(f"{export.config.preset}: {len(names)} tensors of the client's own file come back bitwise")
