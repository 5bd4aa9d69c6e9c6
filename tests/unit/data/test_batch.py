"""What a batch derives from its tokens."""

from __future__ import annotations

import torch

from megavl.data.batch import INDICES, make_batch

IMAGE = 3
TOKENS = torch.tensor([9, IMAGE, IMAGE, 7, 8, 9, IMAGE, IMAGE, 6, 2])


def test_rows_follow_from_mask_and_image_tokens() -> None:
    mask = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 0, 0])
    images = torch.zeros((2, 3, 4, 4), dtype=torch.uint8)
    batch = make_batch(TOKENS, borders=[0, 5, 9, 10], loss_mask=mask, images=images, image_token_id=IMAGE)
    assert batch.modality == "multimodal" and batch.image_count == 2 and batch.borders == (0, 5, 9, 10)
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0]
    assert batch.loss_rows.tolist() == [2, 3, 7] and batch.labels.tolist() == [7, 8, 6]
    assert batch.image_rows.tolist() == [1, 2, 6, 7]
    assert {getattr(batch, name).dtype for name in INDICES} == {torch.int64}


def test_without_images_their_tokens_are_ordinary() -> None:
    batch = make_batch(TOKENS, image_token_id=IMAGE)
    assert batch.modality == "text" and batch.borders == (0, 10)
    assert not len(batch.image_rows) and not len(batch.loss_rows) and not len(batch.labels)


def test_a_description_keeps_shapes_alone() -> None:
    batch = make_batch(TOKENS, loss_mask=torch.ones(10), sample_ids=[4])
    described = batch.to("meta")
    assert described.sample_ids == (4,) and described.borders == batch.borders
    for name in (*INDICES, "images"):
        kept, whole = getattr(described, name), getattr(batch, name)
        assert kept.is_meta and (kept.shape, kept.dtype) == (whole.shape, whole.dtype)
