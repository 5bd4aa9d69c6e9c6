"""Opening a dataset: everything that does not fit is refused with one message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megavl.config.errors import DataError
from megavl.config.presets import IMAGE_PRESETS
from megavl.data.dataset import Source
from megavl.data.table import ReadHandles
from tests.unit.data.corpus_files import GEOMETRY, SEQ_LENGTH, make_corpus, make_tokenizer, open_small, run_preprocess


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    tokenizer = make_tokenizer(root / "tokenizer")
    assert run_preprocess(make_corpus(root, images=9, texts=12), tokenizer=tokenizer, output=root / "out") == 0
    return root / "out", tokenizer


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "out")


def test_fingerprint_follows_content_and_weights(made: tuple[Path, Path]) -> None:
    first = open_small(made[0], made[0], tokenizer=made[1]).fingerprint
    assert first == open_small(made[0], made[0], tokenizer=made[1]).fingerprint
    assert first != open_small(made[0], made[0], tokenizer=made[1], weights=[1, 2]).fingerprint


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 4)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _remove(path: Path) -> None:
    path.unlink()


NAMES = ("tokens.bin", "tokens.idx", "images.bin", "images.idx", "images.npy", "samples.npy", "spans.npy", "json")


@pytest.mark.parametrize("name", [*NAMES, "packs.npy", "manifest.json"])
@pytest.mark.parametrize("damage", [_truncate, _lengthen, _flip, _remove])
def test_damage_is_refused_by_name(
    copy: Path, made: tuple[Path, Path], name: str, damage: Callable[[Path], None]
) -> None:
    path = copy / name if (copy / name).exists() else sorted(copy.glob(f"multimodal-*.{name}"))[0]
    if name == "manifest.json" and damage is _lengthen:
        path.write_text(path.read_text().replace('"text_packs": ', '"text_packs": 1'))
    else:
        damage(path)
    with pytest.raises(DataError, match=path.name):
        open_small(copy, tokenizer=made[1])


def test_unfinished_run_is_no_dataset(copy: Path, made: tuple[Path, Path]) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no finished dataset for 0 \(.*/out/manifest\.json not found\)"):
        open_small(copy, tokenizer=made[1])


def test_other_version_is_refused(copy: Path, made: tuple[Path, Path]) -> None:
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(DataError, match="version 99, this code reads 2"):
        open_small(copy, tokenizer=made[1])


def test_other_tokenizer_names_both_hashes(made: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other", vocab_size=300)
    with pytest.raises(DataError, match=r"data\.sources\.0 was made with tokenizer sha256 \w{64}.* has \w{64}; "):
        open_small(made[0], tokenizer=other)


def test_other_special_tokens_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    other = shutil.copytree(made[1], tmp_path / "other")
    (other / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<pad>"}))
    with pytest.raises(DataError, match="special tokens"):
        open_small(made[0], tokenizer=other)


def test_settings_of_run_and_data_must_agree(made: tuple[Path, Path]) -> None:
    asked = 2 * SEQ_LENGTH
    with pytest.raises(DataError, match=rf"packed to {SEQ_LENGTH} .*seq_length is {asked}; .*--seq-length {asked}"):
        open_small(made[0], tokenizer=made[1], seq_length=2 * SEQ_LENGTH)
    small = f"images of {GEOMETRY.tokens} tokens on a canvas of {GEOMETRY.canvas_size} pixels"
    with pytest.raises(DataError, match=f"{small}.*576 tokens and 384 pixels; .*--image-preset siglip-384"):
        open_small(made[0], tokenizer=made[1], geometry=IMAGE_PRESETS["siglip-384"])
    with pytest.raises(DataError, match=r"model\.llm\.vocab_size is 100"):
        open_small(made[0], tokenizer=made[1], vocab_size=100)
    with pytest.raises(DataError, match=r"id 3, but model\.image_token_id is 7"):
        open_small(made[0], tokenizer=made[1], image_token_id=7)


def test_all_that_disagrees_stands_in_one_message(made: tuple[Path, Path]) -> None:
    other = {"seq_length": 2 * SEQ_LENGTH, "geometry": IMAGE_PRESETS["siglip-384"], "vocab_size": 100}
    with pytest.raises(DataError) as caught:
        open_small(made[0], made[0].parent / "absent", tokenizer=made[1], image_token_id=7, **other)
    told = str(caught.value)
    wrong = (
        *("model.llm.vocab_size is 100", "model.image_token_id is 7", "no finished dataset for 1"),
        *(f"data.seq_length is {2 * SEQ_LENGTH}", "576 tokens and 384 pixels", "outside model.llm.vocab_size 100"),
    )
    assert [text for text in wrong if text not in told] == [] and "\n" not in told
    assert told.index("--image-preset siglip-384") > told.index("outside model.llm.vocab_size")


def test_text_alone_fits_any_image_geometry(made: tuple[Path, Path], tmp_path: Path) -> None:
    inputs = [made[0].parent / "text.jsonl"]
    assert run_preprocess(inputs, tokenizer=made[1], output=tmp_path / "text") == 0
    assert open_small(tmp_path / "text", tokenizer=made[1], geometry=IMAGE_PRESETS["siglip-384"]).counts[0]["text"]


def test_arrays_outlive_their_dataset(made: tuple[Path, Path]) -> None:
    source = Source(made[0], handles=ReadHandles())
    ids = source.shards[0].tokens.read(0)
    expected = ids.copy()
    del source
    np.testing.assert_array_equal(ids, expected)


def test_work_of_hashing_can_be_shared(copy: Path, made: tuple[Path, Path]) -> None:
    _flip(sorted(copy.glob("multimodal-*.tokens.bin"))[0])
    refused = 0
    for part in range(2):
        try:
            open_small(copy, tokenizer=made[1], check=False).check(share=(part, 2))
        except DataError:
            refused += 1
    assert refused == 1
