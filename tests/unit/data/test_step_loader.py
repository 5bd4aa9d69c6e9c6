"""Steps from real shards: batches, their targets, and independence of ranks and workers."""

import shutil
import struct
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megavl.config.errors import DataError, UsageError
from megavl.data.batch import INDICES, Batch
from megavl.data.dataset import Dataset
from megavl.data.image import canvas, decode_image
from megavl.data.loader import StepLoader
from tests.unit.data.corpus_files import (
    GEOMETRY,
    IMAGE_TOKENS,
    IMAGES_PER_PACK,
    SEQ_LENGTH,
    make_corpus,
    make_tokenizer,
    open_small,
    run_preprocess,
    small_sampler,
)

STEPS = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of a dataset, and its tokenizer."""
    root = tmp_path_factory.mktemp("made")
    tokenizer = make_tokenizer(root / "tokenizer")
    assert run_preprocess(make_corpus(root), tokenizer=tokenizer, output=root / "out") == 0
    return root / "out", tokenizer


@pytest.fixture
def dataset(made: tuple[Path, Path]) -> Dataset:
    return open_small(made[0], tokenizer=made[1])


def _loader(dataset: Dataset, *, batch: int = 4, fraction: float = 0.5, **changes: Any) -> StepLoader:
    settings = {
        "sampler": small_sampler(dataset, batch=batch, fraction=fraction),
        "micro_batch_size": 2,
        "dp_rank": 0,
        "dp_size": 1,
        "num_workers": 0,
        "prefetch_images": 64,
        "max_bad_in_row": 2,
        "cross_document_attention": False,
        "total_steps": STEPS,
    }
    return StepLoader(dataset, **{**settings, **changes})


def _equal(first: Batch, second: Batch) -> bool:
    same = all(torch.equal(getattr(first, name), getattr(second, name)) for name in (*INDICES, "images"))
    return same and all(getattr(first, name) == getattr(second, name) for name in ("modality", "borders", "sample_ids"))


def _counts(batch: Batch) -> torch.Tensor:
    """Whether the label of each position counts."""
    return torch.zeros(len(batch.tokens), dtype=torch.bool).index_fill(0, batch.loss_rows, True)


def test_global_batch_ignores_ranks_and_workers(dataset: Dataset) -> None:
    alone = _loader(dataset)
    steps = [alone.get(step) for step in range(STEPS)]
    split = [_loader(dataset, dp_rank=rank, dp_size=2, num_workers=2) for rank in range(2)]
    for step, expected in enumerate(steps):
        got = [batch for loader in split for batch in loader.get(step)]
        assert len(got) == len(expected)
        assert all(_equal(a, b) for a, b in zip(got, expected))
    for loader in split:
        loader.close()


@pytest.mark.parametrize("start", [1, 7])
def test_resume_at_any_step(dataset: Dataset, start: int) -> None:
    whole, resumed = _loader(dataset), _loader(dataset, start_step=start, num_workers=1)
    steps = [whole.get(step) for step in range(STEPS)]
    for step in range(start, STEPS):
        assert all(_equal(a, b) for a, b in zip(resumed.get(step), steps[step]))
    # Back again, as after a step that is repeated.
    assert all(_equal(a, b) for a, b in zip(resumed.get(start), steps[start]))
    resumed.close()


@pytest.mark.parametrize("cross", [False, True])
def test_batches_are_well_formed(dataset: Dataset, cross: bool) -> None:
    loader = _loader(dataset, cross_document_attention=cross)
    seen = set()
    for step in range(STEPS):
        for batch in loader.get(step):
            seen.add(batch.modality)
            assert batch.tokens.shape == batch.positions.shape == (2 * SEQ_LENGTH,)
            borders = list(batch.borders)
            assert borders == sorted(set(borders)) and (borders[0], borders[-1]) == (0, 2 * SEQ_LENGTH)
            assert SEQ_LENGTH in borders
            assert torch.equal(batch.image_rows, (batch.tokens == 3).nonzero().flatten())
            assert len(batch.image_rows) == IMAGE_TOKENS * len(batch.images)
            assert (len(batch.images) > 0) == (batch.modality == "multimodal")
            _check_targets(batch, cross=cross)
    assert seen == {"text", "multimodal"}


def _check_targets(batch: Batch, *, cross: bool) -> None:
    tokens, labels, mask = batch.tokens, batch.labels, _counts(batch)
    assert torch.equal(batch.loss_rows, mask.nonzero().flatten())
    assert torch.equal(labels, torch.roll(tokens, -1)[mask])
    # Image tokens, padding and the BOS that begins each sample are never predicted.
    assert not set(labels.tolist()) & {0, 2, 3}
    assert not mask[[end - 1 for end in batch.borders[1:]]].any()
    if not cross:
        assert set(tokens[list(batch.borders[:-1])].tolist()) <= {0, 2}
        # In a segment of padding nothing counts.
        for first, last in pairwise(batch.borders):
            assert batch.positions[first:last].tolist() == list(range(last - first))
            if tokens[first] == 2:
                assert not mask[first:last].any()


def test_images_follow_the_order_of_placeholders(made: tuple[Path, Path], dataset: Dataset) -> None:
    source = dataset.sources[0]
    loader = _loader(dataset, fraction=1.0, batch=1, micro_batch_size=1)
    (batch,) = loader.get(0)
    ref = small_sampler(dataset, batch=1, fraction=1.0).global_batch(0)[0]
    expected = []
    for row in source.members(modality="multimodal", index=ref.index):
        shard = source.shards[int(row["shard"])]
        for number in shard.images_of(int(row["sample"])):
            expected.append(canvas(decode_image(shard.images.read_bytes(number)), geometry=GEOMETRY))
    np.testing.assert_array_equal(batch.images.numpy(), np.stack(expected))


def _damage_images(out: Path, *, every: int) -> None:
    """Overwrite the middle of every n-th stored image; sizes stay."""
    for path in out.glob("*.images.idx"):
        raw = path.read_bytes()
        count = struct.unpack_from("<Q", raw, 18)[0]
        offsets = struct.unpack_from(f"<{count}q", raw, 34 + 4 * count)
        with open(path.with_suffix(".bin"), "r+b") as stream:
            for offset in offsets[::every]:
                stream.seek(offset + 40)
                stream.write(b"\0damage\0")


def test_damaged_image_is_skipped_in_place(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = shutil.copytree(made[0], tmp_path / "out")
    _damage_images(out, every=5)
    with pytest.raises(DataError, match=r"images\.bin: sha256"):
        open_small(out, tokenizer=made[1])
    damaged = open_small(out, tokenizer=made[1], skip_hash=True)
    settings = {"fraction": 1.0, "max_bad_in_row": 50}
    good, bad = _loader(open_small(made[0], tokenizer=made[1]), **settings), _loader(damaged, num_workers=1, **settings)
    skipped = 0
    for step in range(4):
        for before, after in zip(good.get(step), bad.get(step)):
            assert torch.equal(before.tokens, after.tokens) and before.images.shape == after.images.shape
            counted, still = _counts(before), _counts(after)
            assert (still <= counted).all()
            assert bool(after.bad_samples) == bool((still < counted).any())
            assert all("image_damaged" in text and ".json" in text for text in after.bad_samples)
            assert all("images.bin at byte" in text for text in after.bad_samples)
            skipped += len(after.bad_samples)
    assert skipped
    bad.close()


def test_too_many_bad_samples_end_the_run(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = shutil.copytree(made[0], tmp_path / "out")
    _damage_images(out, every=1)
    loader = _loader(open_small(out, tokenizer=made[1], skip_hash=True), fraction=1.0, max_bad_in_row=2)
    with pytest.raises(DataError, match="2 samples in a row failed to load"):
        loader.get(0)


def test_text_between_damaged_images_is_not_counted(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = shutil.copytree(made[0], tmp_path / "out")
    _damage_images(out, every=1)
    dataset = open_small(out, tokenizer=made[1], skip_hash=True)
    refs = [ref for step in range(5) for ref in small_sampler(dataset, fraction=1.0).global_batch(step)]
    members = [
        member for ref in refs for member in dataset.read(source=0, modality="multimodal", index=ref.index).members
    ]
    runs = [len(list(run)) for images, run in groupby(members, key=lambda member: bool(member.images)) if images]
    limit = max(runs) + 1
    assert len(runs) > 1 and limit <= sum(runs)
    loader = _loader(dataset, fraction=1.0, max_bad_in_row=limit)
    with pytest.raises(DataError, match=f"{limit} samples in a row failed to load"):
        for step in range(5):
            loader.get(step)


@pytest.mark.parametrize("limit", [1, 5])
def test_prefetched_images_are_bounded(dataset: Dataset, limit: int) -> None:
    free, bounded = _loader(dataset, fraction=0.7), _loader(dataset, fraction=0.7, num_workers=1, prefetch_images=limit)
    held = []
    for step in range(STEPS):
        assert all(_equal(a, b) for a, b in zip(free.get(step), bounded.get(step), strict=True))
        held.append(bounded._images)
        assert bounded._images == sum(len(futures) for _, futures in bounded._pending)
    assert limit <= max(held) < limit + IMAGES_PER_PACK
    bounded.close()


def test_damaged_tokens_keep_positions_and_images(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = shutil.copytree(made[0], tmp_path / "out")
    for path in out.glob("multimodal*.tokens.bin"):
        data = np.fromfile(path, "<i4")
        data[data > 10] ^= 1
        data.tofile(path)
    damaged = open_small(out, tokenizer=made[1], skip_hash=True)
    loader = _loader(damaged, fraction=1.0, max_bad_in_row=10**6)
    for batch in loader.get(0):
        assert int((batch.tokens == 3).sum()) == IMAGE_TOKENS * len(batch.images) > 0
        assert not len(batch.loss_rows) or batch.modality == "multimodal"
        assert "crc32" in batch.bad_samples[0]


def test_shard_that_vanishes_is_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = shutil.copytree(made[0], tmp_path / "out")
    loader = _loader(open_small(out, tokenizer=made[1]), fraction=1.0, num_workers=1, start_step=STEPS)
    for path in out.glob("*.images.bin"):
        path.unlink()
    with pytest.raises(DataError, match=r"images\.bin: cannot read"):
        loader.get(0)
    loader.close()


def test_global_batch_must_divide(dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="training.global_batch_size: 4"):
        _loader(dataset, dp_size=3)
