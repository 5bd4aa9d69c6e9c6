"""The output of preprocessing: the stock class reads it, and it has exactly the tokens of the tokenizer."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from PIL import Image
from transformers import PreTrainedTokenizerFast

from data_tools import verify
from data_tools.pipeline import image_source, shard_writer
from data_tools.pipeline.histograms import histogram_lines, histograms
from megavl.config.errors import DataError
from megavl.config.version import VERSION
from megavl.data.dataset import Source
from megavl.data.image import ImageInfo
from megavl.data.manifest import FORMAT_VERSION
from megavl.data.table import ReadHandles
from tests.unit.data.corpus_files import (
    IMAGE_TOKENS,
    SEQ_LENGTH,
    make_corpus,
    make_sentencepiece,
    make_tokenizer,
    open_small,
    run_preprocess,
    write_jsonl,
)

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: list[Path], tokenizer: Path) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    assert run_preprocess(corpus, tokenizer=tokenizer, output=out) == 0
    return out


def _jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stock_dataset_reads_the_tokens(made: Path, corpus: list[Path], tokenizer: Path) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    bos, eos, image = reference.bos_token_id, reference.eos_token_id, 3
    stock = IndexedDataset(str(made / "text-00000.tokens"))
    for number, record in enumerate(_jsonl(corpus[0])):
        expected = [bos, *reference.encode(record["text"], add_special_tokens=False), eos]
        assert np.array(stock[number]).tolist() == expected
    assert len(stock) == stock.document_indices[-1] == number + 1

    captions = IndexedDataset(str(made / "multimodal-00001.tokens"))
    images = IndexedDataset(str(made / "multimodal-00001.images"))
    for number, record in enumerate(_jsonl(corpus[1])):
        text = reference.encode(record["text"], add_special_tokens=False)
        assert np.array(captions[number]).tolist() == [bos, *[image] * IMAGE_TOKENS, *text, eos]
        assert np.array(images[number]).tobytes() == (corpus[1].parent / record["image"]).read_bytes()


def test_manifests_record_version_tokenizer_and_geometry(made: Path, tokenizer: Path) -> None:
    whole = json.loads((made / "manifest.json").read_text())
    shards = [json.loads((made / f"{entry['name']}.json").read_text()) for entry in whole["shards"]]
    setup = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert {manifest["code_version"] for manifest in (whole, *shards)} == {setup.stdout.split()[-1]} == {VERSION}
    assert whole["templates"] == ["deepseek", "plain"] and {shard["template"] for shard in shards} == set(
        whole["templates"]
    )
    digest = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    for manifest in (whole, *shards):
        assert manifest["tokenizer"]["sha256"] == digest and manifest["geometry"]["tokens"] == IMAGE_TOKENS
        assert manifest["version"] == FORMAT_VERSION


def test_another_version_does_not_resume_a_run(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [write_jsonl(tmp_path / "t.jsonl", [{"text": "red"}])]
    assert run_preprocess(inputs, tokenizer=tokenizer, output=tmp_path / "out") == 0
    monkeypatch.setattr("data_tools.pipeline.job.VERSION", "9.9.9")
    assert run_preprocess(inputs, tokenizer=tokenizer, output=tmp_path / "out") == 2
    assert "other settings or inputs (code_version)" in capsys.readouterr().err


def test_conversations_follow_the_template(made: Path, corpus: list[Path], tokenizer: Path) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    shard = Source(made, handles=ReadHandles()).shards[-1]
    for number, record in enumerate(json.loads(corpus[2].read_text())):
        # The Hugging Face processor repeats the placeholder in the text; ids must agree.
        tag = "<image_placeholder>" * IMAGE_TOKENS
        question = record["conversations"][0]["value"].replace("<image>", tag)
        answer = record["conversations"][1]["value"]
        prompt = f"Be brief.\n\nUser: {question}\n\nAssistant:"
        ids = reference.encode(f"{prompt} {answer}", add_special_tokens=False)
        assert shard.tokens.read(number).tolist() == [0, *ids, 1]
        (span,) = shard.spans_of(number)
        assert span["start"] == 1 + len(reference.encode(prompt, add_special_tokens=False))
        assert span["end"] == len(ids) + 2
    assert shard.manifest.template == "deepseek"


def test_image_used_twice_is_stored_once(corpus: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    root = corpus[0].parent
    captions = write_jsonl(tmp_path / "c.jsonl", [{"image": "images/1.png", "text": f"number {n}"} for n in range(6)])
    more = ["--image-root", str(root)]
    assert run_preprocess([captions], tokenizer=tokenizer, output=tmp_path / "out", more=more) == 0
    shard = Source(tmp_path / "out", handles=ReadHandles()).shards[0]
    assert (len(shard.images), len(shard.tokens), list(shard.images_of(5))) == (1, 6, [0])
    open_small(tmp_path / "out", tokenizer=tokenizer).read(source=0, modality="multimodal", index=0)


def test_long_documents_are_divided_without_losing_tokens(tokenizer: Path, tmp_path: Path) -> None:
    text = "red square, " * 300
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text}, {"text": "green"}])
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out") == 0
    shard = Source(tmp_path / "out", handles=ReadHandles()).shards[0]
    parts = [shard.tokens.read(number).tolist() for number in range(len(shard.tokens))]
    reference = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    assert sum(parts[:-1], []) == [0, *reference.encode(text, add_special_tokens=False), 1]
    assert all(len(part) == SEQ_LENGTH for part in parts[:-2])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["documents_cut"] == 1


def test_every_sample_is_packed_once_within_limits(made: Path) -> None:
    counts = verify.verify(str(made))
    report = json.loads((made / "report.json").read_text())
    assert counts["samples"] == report["samples"] == 60 + 40 + 20
    assert counts["sequences"] == report["text"]["sequences"] + report["multimodal"]["sequences"]
    source = Source(made, handles=ReadHandles())
    for modality in ("text", "multimodal"):
        for index in range(source.counts[modality]):
            rows = source.members(modality=modality, index=index)
            assert rows["tokens"].sum() <= SEQ_LENGTH and rows["images"].sum() <= 2


def test_no_pack_gives_one_sample_per_sequence(corpus: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    assert run_preprocess(corpus, tokenizer=tokenizer, output=tmp_path / "out", more=["--no-pack"]) == 0
    dataset = open_small(tmp_path / "out", tokenizer=tokenizer)
    assert dataset.counts == [{"text": 60, "multimodal": 60}]
    sequence = dataset.read(source=0, modality="multimodal", index=3)
    assert len(sequence.members) == 1 and set(sequence.tokens[sequence.members[0].end :].tolist()) == {2}


def test_sentencepiece_tokenizer_works(corpus: list[Path], tmp_path: Path) -> None:
    model = make_sentencepiece(tmp_path / "tokenizer.model")
    assert run_preprocess(corpus, tokenizer=model, output=tmp_path / "out") == 0
    verify.verify(str(tmp_path / "out"))
    open_small(tmp_path / "out", tokenizer=model)


def test_verify_names_damage(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(made)]) == 0
    assert "good, 3 shards, 120 samples" in capsys.readouterr().out
    assert verify.main([str(tmp_path)]) == 3
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/manifest.json: not found")


def test_verify_explains_turned_tiffs_of_older_code(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.tif", tiffinfo={274: 6})
    path = write_jsonl(tmp_path / "in.jsonl", [{"image": "a.tif", "text": "red"}])
    # As version 0.2.0 did it.
    monkeypatch.setattr(shard_writer, "VERSION", "0.2.0")
    monkeypatch.setattr(verify, "VERSION", "0.3.0")
    prepare = image_source.prepare_image

    def turned(data: bytes, **options: Any) -> tuple[bytes, ImageInfo]:
        stored, info = prepare(data, **options)
        return stored, replace(info, width=info.height, height=info.width)

    monkeypatch.setattr(image_source, "prepare_image", turned)
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out") == 0
    with pytest.raises(
        DataError, match=r"is 40 x 30, but its table says 30 x 40, as versions up to 0\.2\.0.*version 0"
    ):
        verify.verify(str(tmp_path / "out"))


def test_dry_run_counts_the_same_and_writes_nothing(
    made: Path, corpus: list[Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_preprocess(corpus, tokenizer=tokenizer, output=tmp_path / "out", more=["--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    report = json.loads((made / "report.json").read_text())
    printed = capsys.readouterr().out
    assert f"{report['samples']} samples: {report['tokens']} tokens" in printed
    assert f"multimodal: {report['multimodal']['sequences']} sequences" in printed


def test_dry_run_of_a_sample_estimates_the_whole(
    made: Path, corpus: list[Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--dry-run", "--limit", "60"]
    assert run_preprocess(corpus, tokenizer=tokenizer, output=tmp_path / "out", more=more) == 0
    assert not (tmp_path / "out").exists()
    report = json.loads((made / "report.json").read_text())
    printed = capsys.readouterr().out
    assert "60 records to " in printed
    found = re.search(
        r"estimate for all (\d+) records: (\d+) samples, ([\d,]+) tokens, (\d+) images, about (\d+) ", printed
    )
    assert found is not None
    records, samples, tokens, images, sequences = (int(number.replace(",", "")) for number in found.groups())
    assert records == report["records"]
    assert samples == pytest.approx(report["samples"], rel=0.1)
    assert tokens == pytest.approx(report["tokens"], rel=0.15)
    assert images == pytest.approx(report["images"], rel=0.1)
    assert sequences == pytest.approx(sum(report[kind]["sequences"] for kind in ("text", "multimodal")), rel=0.2)


def test_histograms_count_everything_once(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((made / "report.json").read_text())
    found = report["histograms"]
    assert sum(row["count"] for row in found["sample_tokens"]) == report["samples"]
    assert [row["up_to"] for row in found["sample_tokens"]] == [32, 64, SEQ_LENGTH]
    assert sum(row["up_to"] * row["count"] for row in found["sample_images"]) == report["images"]
    sequences = sum(report[kind]["sequences"] for kind in ("text", "multimodal"))
    assert sum(row["count"] for row in found["fill"]) == sequences
    lines = list(histogram_lines(found))
    assert lines[0] == "tokens of a sample:" and "fill of a sequence:" in lines
    assert all(re.search(r"^  +(up to )?[\d.,]+%? +[\d,]+( #*)?$", line) for line in lines if line.startswith(" "))


def test_bins_include_their_upper_border() -> None:
    numbers = np.array([1, 32, 33, 64, 65, 100], np.int32)
    fills = np.array([0.4, 0.5, 0.51, 0.999, 1.0])
    images, times = np.array([0, 2, 0, 2, 0, 0], np.int32), np.array([1, 1, 1, 1, 1, 7])
    sequences = np.ones(5, np.int64)
    found = histograms(lengths=numbers, images=images, samples=times, fills=fills, sequences=sequences, seq_length=100)
    assert [row["count"] for row in found["sample_tokens"]] == [2, 2, 8]
    assert [row["count"] for row in found["sample_images"]] == [10, 0, 2]
    assert {row["up_to"]: row["count"] for row in found["fill"] if row["count"]} == {0.5: 2, 0.8: 1, 0.999: 1, 1.0: 1}


def test_limit_reads_the_first_records(corpus: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    assert run_preprocess(corpus, tokenizer=tokenizer, output=tmp_path / "out", more=["--limit", "70"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["records"] for entry in report["inputs"]] == [60, 10, 0]


def test_command_needs_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, data_tools.preprocess, data_tools.verify; "
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
