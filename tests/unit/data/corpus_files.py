"""Small real tokenizers and corpora for the tests of data and data_tools."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.preprocess import main
from megavl.config.data import DataConfig, SourceConfig
from megavl.config.presets import IMAGE_PRESETS
from megavl.data.dataset import Dataset, open_dataset
from megavl.data.manifest import Modality
from megavl.data.mixture import Mixture
from megavl.data.plan import ModalityPlan
from megavl.data.sampler import Sampler
from megavl.data.tokenizer import open_tokenizer

GEOMETRY = IMAGE_PRESETS["tiny-hybrid"]
IMAGE_TOKENS = GEOMETRY.tokens
IMAGES_PER_PACK = 2
# Room for about one text beside a full pack of images, so that texts are left over for packs of their own.
SEQ_LENGTH = IMAGES_PER_PACK * IMAGE_TOKENS + 56
PLAIN = {"tokenizer": "unused", "seq_length": SEQ_LENGTH, "multimodal_fraction": 0.5}
SPECIALS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<pad>", "<image_placeholder>")
COLOURS = ("red", "green", "blue", "white", "black")
SENTENCES = [
    f"User: What is the {colour} thing?\n\nAssistant: It is a {colour} square, or 12 of them." for colour in COLOURS
]


def make_tokenizer(folder: Path, *, vocab_size: int = 400) -> Path:
    """A byte-level BPE with the special tokens of DeepSeek-VL, as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True) for name in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(SENTENCES * 4, trainer)
    inner.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIALS))
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


def make_sentencepiece(path: Path, *, image_token: bool = True) -> Path:
    """A SentencePiece model."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=out,
        vocab_size=90,
        hard_vocab_limit=False,
        user_defined_symbols=["<image_placeholder>"] if image_token else [],
        minloglevel=2,
    )
    path.write_bytes(out.getvalue())
    return path


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def make_images(folder: Path, *, count: int) -> list[str]:
    """PNG and JPEG files of one colour; returns names relative to the folder's parent."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        kind = "png" if number % 3 else "jpg"
        image = Image.new("RGB", (20 + number % 17, 30 + number % 11), COLOURS[number % 5])
        image.save(folder / f"{number}.{kind}")
        names.append(f"{folder.name}/{number}.{kind}")
    return names


def make_corpus(root: Path, *, images: int = 40, texts: int = 60, note: str = "") -> list[Path]:
    """Text, captions and conversations; `note` is a field that no reader looks at, to make records longer."""
    draw = random.Random(5)
    names = make_images(root / "images", count=images)
    texts_made = [{"text": " ".join(draw.choices(COLOURS, k=draw.randint(2, 40))), "note": note} for _ in range(texts)]
    captions = [
        {"image": name, "text": f"A {COLOURS[n % 5]} area, number {n}.", "note": note} for n, name in enumerate(names)
    ]
    talks = []
    for number in range(0, images, 2):
        chosen = names[number : number + 1 + number % 4 // 2]
        talks.append(
            {
                "id": number,
                "images": chosen,
                "conversations": [
                    {"from": "human", "value": "<image>" * len(chosen) + "\nWhich colour?"},
                    {"from": "gpt", "value": COLOURS[number % 5]},
                ],
            }
        )
    (root / "talks.json").write_text(json.dumps(talks, indent=1), encoding="utf-8")
    return [
        write_jsonl(root / "text.jsonl", texts_made),
        write_jsonl(root / "captions.jsonl", captions),
        root / "talks.json",
    ]


def arguments(inputs: Iterable[Path], *, tokenizer: Path, output: Path, more: Iterable[str] = ()) -> list[str]:
    """Command line of a small run."""
    return [
        *("--input", *map(str, inputs), "--output", str(output), "--tokenizer", str(tokenizer)),
        *("--image-preset", "tiny-hybrid", "--seq-length", str(SEQ_LENGTH)),
        *("--max-images-per-sequence", str(IMAGES_PER_PACK)),
        *("--workers", "1", "--system-prompt", "Be brief.", *more),
    ]


def run_preprocess(inputs: Iterable[Path], *, tokenizer: Path, output: Path, more: Iterable[str] = ()) -> int:
    """Run preprocessing in this process; returns its exit code."""
    return main(arguments(inputs, tokenizer=tokenizer, output=output, more=more))


def open_small(*paths: Path, tokenizer: Path, weights: Iterable[Any] = (), **changes: Any) -> Dataset:
    """Open datasets with the settings they were made with, apart from `changes`."""
    opened = open_tokenizer(tokenizer)
    shares = list(weights) or [1.0] * len(paths)
    settings = {"seq_length": SEQ_LENGTH, "geometry": GEOMETRY, "vocab_size": opened.vocab_size, **changes}
    sources = tuple(SourceConfig(path=str(path), weight=share) for path, share in zip(paths, shares))
    data = DataConfig(sources=sources, **PLAIN)
    return open_dataset(data.mixture, tokenizer=opened, **settings)


def small_sampler(dataset: Dataset, *, batch: int = 4, fraction: float = 0.5, seed: int = 11) -> Sampler:
    """Order of a run over all sources with equal weights."""
    weights: list[dict[Modality, float]] = [{"text": 1.0, "multimodal": 1.0} for _ in dataset.sources]
    plan = ModalityPlan(seed=seed, fraction=fraction)
    return Sampler(dataset.counts, mixture=Mixture(weights, plan=plan, global_batch_size=batch))
