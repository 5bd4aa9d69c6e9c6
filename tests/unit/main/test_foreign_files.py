"""Forged and damaged files given to commands: each costs bounded time and memory and ends with its exit code.

`pytest tests/unit/main/test_foreign_files.py` prints the table of `launch/bench/results/foreign_files_202611.md`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.bench.engines.random_models import random_weights
from megavl.checkpoint import commit
from megavl.checkpoint.directory import recover
from megavl.checkpoint.reader import require_usable
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.errors import DataError
from megavl.config.load import load_model_config
from megavl.convert.checkpoint_files import export_checkpoint
from megavl.data.tokenizer import open_tokenizer
from megavl.main.cli import main

Change = Callable[[Path], None]
SECONDS, MEGABYTES = 300, 400
"""Bounds of one case on a shared machine; processor time and growth of the largest resident set."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A checkpoint `iter_0000000` and the folder `hf` made of it."""
    from contextlib import nullcontext

    folder = tmp_path_factory.mktemp("originals")
    config = load_model_config("tiny-siglip", image_token_id=3)
    files: dict[str, bytes | Path] = {f"tokenizer/{file.name}": file for file in tokenizer_dir.iterdir()}
    write_model_checkpoint(folder, config=config, tensors=random_weights(config), files=files)
    export_checkpoint(folder / "iter_0000000", folder / "hf", fmt="native", dtype=None, progress=nullcontext)
    return folder


def write(name: str, content: bytes | str | Callable[[], bytes | str]) -> Change:
    """A file with another content; a large one is made when a case needs it."""
    return lambda path: _write(path / name, content() if callable(content) else content)


def _write(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def forged(change: Change) -> Change:
    """The change, with a manifest that fits the new files."""

    def both(path: Path) -> None:
        change(path)
        (path / "manifest.json").unlink()
        records = commit.file_records(path, [file for file in path.rglob("*") if file.is_file()])
        commit.write_manifest(path, iteration=0, world_size=1, content={}, records=records)

    return both


def manifest(**values: Any) -> Change:
    """The manifest with other values and a digest that fits them."""

    def change(path: Path) -> None:
        from megavl.checkpoint.manifest import _digest

        body = json.loads((path / "manifest.json").read_text())
        del body["digest"]
        body = {key: value for key, value in (body | values).items() if value is not ...}
        _write(path / "manifest.json", json.dumps({**body, "digest": _digest(body)}))

    return change


def model_size(key: str, value: int) -> Change:
    """Another size of the decoder."""

    def change(path: Path) -> None:
        model = json.loads((path / "model.json").read_text())
        _write(path / "model.json", json.dumps({**model, "llm": {**model["llm"], key: value}}))

    return change


def facts(**values: Any) -> dict[str, Any]:
    """Content of a run's manifest with other values."""
    return {"step": 0, "bad_steps": 0, "consumed_samples": 0, "global_batch_size": 4, "seed": 1, **values}


def shard_bytes(change: Callable[[bytes], bytes]) -> Change:
    """Another content of the same length in the file of weights."""

    def both(path: Path) -> None:
        (file,) = path.glob("*.distcp")
        _write(file, change(file.read_bytes()))

    return both


def special(name: str, make: Callable[[Path], Any]) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return change


def index(text: str, *, shard: Callable[[Path], Any] = lambda path: None) -> Change:
    """An index of weights, whose shard is another file."""

    def change(path: Path) -> None:
        (path / "model.safetensors").unlink()
        shard(path / "model-1.safetensors")
        _write(path / "model.safetensors.index.json", text.replace("model.safetensors", "model-1.safetensors"))

    return change


def _socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    # The address of a socket is short.
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def tuples(depth: int) -> bytes:
    """A pickle of tuples in tuples as the key of a dictionary, whose hash takes 2^depth steps."""
    # Each tuple is noted and dropped, and the next one holds it twice.
    body = b"\x80\x04})" + b"".join(b"\x940h" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))
    return body + b"Ns."


def archive(content: Any = None, *, method: int = zipfile.ZIP_STORED, data: bytes | None = None) -> bytes:
    """An archive like those of `torch.save`, with any pickle and any compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("archive/data.pkl", pickle.dumps(content, protocol=2) if data is None else data)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return out.getvalue()


def too_few_numbers() -> bytes:
    """A tensor of a million numbers whose data hold twelve bytes."""
    out, found = io.BytesIO(), io.BytesIO()
    torch.save({"x": torch.zeros(3)}, out)
    with zipfile.ZipFile(out) as old, zipfile.ZipFile(found, "w") as new:
        for name in old.namelist():
            # The number of elements stands twice: in the storage, and in the shape.
            new.writestr(name, old.read(name).replace(b"K\x03", b"J\x40\x42\x0f\x00"))
    return found.getvalue()


def header(text: bytes, *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


_BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
CHECKPOINT: dict[str, Change] = {
    "manifest of 200,000 brackets": write("manifest.json", "[" * 200_000),
    "manifest, an endless string": write("manifest.json", lambda: '"' + "a" * (32 << 20)),
    "manifest without iteration": manifest(iteration=...),
    "manifest, iteration is text": manifest(iteration="0"),
    "manifest, iteration is true": manifest(iteration=True),
    "manifest, iteration is negative": manifest(iteration=-1),
    "manifest, world size is a list": manifest(world_size=[1]),
    "manifest, content is a list": manifest(content=[]),
    "manifest, step is text": manifest(content=facts(step="0")),
    "manifest, step of another iteration": manifest(content=facts(step=5)),
    "manifest, bad steps are missing": manifest(content=facts(bad_steps=None)),
    "manifest, consumed samples are true": manifest(content=facts(consumed_samples=True)),
    "manifest, a batch of no sequence": manifest(content=facts(global_batch_size=0)),
    "manifest, earlier batches are a number": manifest(content=facts(earlier_batches=7)),
    "manifest, earlier batches are texts": manifest(content=facts(earlier_batches=[["1", 2]])),
    "manifest, files is a list": manifest(files=["common.pt"]),
    "manifest, a file is a number": manifest(files={"common.pt": 3}),
    "manifest, a size is negative": manifest(files={"common.pt": {"size": -1, "sha256": "0" * 64}}),
    "manifest, a size is huge": manifest(files={"common.pt": {"size": 10**300, "sha256": "0" * 64}}),
    "manifest, a hash is a number": manifest(files={"common.pt": {"size": 1, "sha256": 1}}),
    "manifest, a name of 5,000 characters": manifest(files={"x" * 5000: {"size": 1, "sha256": "0" * 64}}),
    "manifest, a name of 1,000 folders": manifest(files={"x/" * 1000 + "x": {"size": 1, "sha256": "0" * 64}}),
    "manifest, name ../x": manifest(files={"../x": {"size": 1, "sha256": "0" * 64}}),
    "manifest, name /etc/passwd": manifest(files={"/etc/passwd": {"size": 1, "sha256": "0" * 64}}),
    "manifest, name with NUL": manifest(files={"a\0b": {"size": 1, "sha256": "0" * 64}}),
    "manifest, name of a folder": manifest(files={"tokenizer": {"size": 4096, "sha256": "0" * 64}}),
    "manifest is null": write("manifest.json", "null"),
    "manifest is NaN": write("manifest.json", "NaN"),
    "manifest, a key twice": write("manifest.json", '{"format": "megavl-checkpoint", "format": "megavl-checkpoint"}'),
    "manifest, version of 5,000 digits": write(
        "manifest.json", '{"format": "megavl-checkpoint", "version": ' + "9" * 5000 + "}"
    ),
    "manifest is a FIFO": special("manifest.json", os.mkfifo),
    "manifest is a socket": special("manifest.json", _socket),
    "manifest is a folder": special("manifest.json", Path.mkdir),
    "manifest is a device": special("manifest.json", lambda path: path.symlink_to("/dev/zero")),
    ".metadata is a FIFO": special(".metadata", os.mkfifo),
    "common.pt is a device": special("common.pt", lambda path: path.symlink_to("/dev/zero")),
    "model.json is a FIFO": special("model.json", os.mkfifo),
    ".metadata, tuples in tuples": forged(write(".metadata", tuples(60))),
    ".metadata, a memo index of 2^31": forged(write(".metadata", b"\x80\x04Nr" + struct.pack("<I", 2**31 - 1) + b".")),
    ".metadata, a long integer": forged(write(".metadata", b"\x80\x04\x8b" + struct.pack("<i", 2**30) + b"\1.")),
    ".metadata, a frame of 2^60": forged(write(".metadata", b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.")),
    ".metadata, frozen sets": forged(write(".metadata", b"\x80\x04(N\x91.")),
    ".metadata, text instructions": forged(write(".metadata", b"(lp0\nI1\naL" + b"9" * 100_000 + b"L\na.")),
    ".metadata, a changed class": forged(
        write(".metadata", b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}U\x01aNs\x86b.")
    ),
    ".metadata, a million empty lists": forged(write(".metadata", lambda: b"\x80\x04(" + b"]" * 3_000_000 + b"t.")),
    ".metadata, a shape of nested tuples": forged(
        write(".metadata", b"\x80\x04\x8c\x05torch\x8c\x04Size\x93" + tuples(30)[3:-3] + b"\x85R.")
    ),
    ".metadata of 1 TB": lambda path: os.truncate(path / ".metadata", 1 << 40),
    "common.pt, deflated": forged(write("common.pt", lambda: archive(["a" * 10**8], method=zipfile.ZIP_DEFLATED))),
    "common.pt, tuples in tuples": forged(write("common.pt", archive(data=tuples(60)))),
    "common.pt, bytes of any length": forged(
        write("common.pt", archive(data=b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."))
    ),
    "common.pt, a storage of any length": forged(
        write("common.pt", archive(data=b"\x80\x02ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R."))
    ),
    "common.pt, fewer numbers than it says": forged(write("common.pt", too_few_numbers())),
    "common.pt is a list": forged(write("common.pt", archive([1]))),
    "common.pt is no archive": forged(write("common.pt", b"x" * 1000)),
    "common.pt is empty": forged(write("common.pt", b"")),
    "model.json, deep": forged(write("model.json", '{"a":' * 900 + "1" + "}" * 900)),
    "model.json is a list": forged(write("model.json", "[]")),
    "model.json, no heads": forged(model_size("num_attention_heads", 0)),
    "model.json, a billion layers": forged(model_size("num_layers", 10**9)),
    "metadata.json, deep": forged(write("metadata.json", "[" * 100_000)),
    "a shard of zeros": forged(shard_bytes(lambda raw: bytes(len(raw)))),
    "a shard, compressed": forged(
        shard_bytes(
            lambda raw: re.sub(rb"(PK\x01\x02.{6})..", lambda entry: entry[1] + b"\x08\0", raw, flags=re.DOTALL)
        )
    ),
    "a shard that names code": forged(shard_bytes(lambda raw: raw.replace(b"FloatStorage", b"load_library"))),
    "manifest without files": manifest(files={}),
    "an unlisted file in tokenizer/": write("tokenizer/merges.txt", "x"),
}
FOLDER: dict[str, Change] = {
    "config.json, deep": write("config.json", "[" * 200_000),
    "config.json of 32 MB": write("config.json", lambda: '{"a": "' + "a" * (32 << 20) + '"}'),
    "config.json, a million values": write("config.json", lambda: "[" + "{}," * 1_000_000 + "{}]"),
    "config.json is a FIFO": special("config.json", os.mkfifo),
    "config.json, infinite size": write("config.json", '{"model_type": "deepseek_vl", "text_config": {"a": 1e999}}'),
    "tokenizer.json, deep": write("tokenizer.json", "[" * 200_000),
    "tokenizer.json of 100 MB": write("tokenizer.json", lambda: "[" + " " * (100 << 20) + "]"),
    "tokenizer.json is a FIFO": special("tokenizer.json", os.mkfifo),
    "tokenizer.json is a link to a device": special("tokenizer.json", lambda path: path.symlink_to("/dev/zero")),
    "tokenizer_config.json, deep": write("tokenizer_config.json", '{"a":' * 200_000),
    "merges.txt is a link outside": special("merges.txt", lambda path: path.symlink_to("/etc/hostname")),
    "merges.txt is a FIFO": special("merges.txt", os.mkfifo),
    "merges.txt of 1 TB": special("merges.txt", lambda path: (path.touch(), os.truncate(path, 1 << 40))),
    "weights, a link outside": special("model.safetensors", lambda path: path.symlink_to("/etc/hostname")),
    "weights, a header of 2^60 bytes": write("model.safetensors", header(b"{}", length=1 << 60)),
    "weights, a header of 90 MB": write("model.safetensors", lambda: header(b"{" + b" " * (90 << 20) + b"}")),
    "weights, a deep header": write("model.safetensors", header(b'{"a":' * 100_000)),
    "generation_config.json is a FIFO": special("generation_config.json", os.mkfifo),
    "generation_config.json, a link to nowhere": special(
        "generation_config.json", lambda path: path.symlink_to("nowhere")
    ),
    "preprocessor_config.json is a device": special(
        "preprocessor_config.json", lambda path: path.symlink_to("/dev/zero")
    ),
    "preprocessor_config.json is a folder": special("preprocessor_config.json", Path.mkdir),
    "adapter_config.json is a socket": special("adapter_config.json", _socket),
    "config.json is a link to nowhere": special("config.json", lambda path: path.symlink_to("nowhere")),
    "weights, a folder": special("model.safetensors", Path.mkdir),
    "index, deep": index("[" * 200_000),
    "index, a FIFO as a shard": index('{"weight_map": {"x": "model.safetensors"}}', shard=os.mkfifo),
    "index, a link outside as a shard": index(
        '{"weight_map": {"x": "model.safetensors"}}', shard=lambda path: path.symlink_to("/etc/hostname")
    ),
}
RECIPE = {
    "deep list": "[" * 20_000,
    "deep mapping": "{a: " * 20_000,
    "aliases": _BOMB,
    "an alias to itself": "a: &a [*a]",
    "an integer of 5,000 digits": "a: " + "9" * 5000,
    "an impossible date": "a: 2026-13-45",
    "10 MB": "#" * (10 << 20),
    "base is a FIFO": "base: fifo",
    "base is a folder": "base: .",
    "base is a device": "base: /dev/zero",
    "base is itself": "base: recipe.yaml",
    "base with NUL": 'base: "\\0"',
}
CASES = [
    *(("inspect", name, 4) for name in CHECKPOINT),
    *(("convert", name, 4) for name in FOLDER),
    *(("plan", name, 2) for name in RECIPE),
]


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Any]]:
    yield []


def _prepare(command: str, name: str, originals: Path, tmp_path: Path) -> list[str]:
    if command == "plan":
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "recipe.yaml").write_text(RECIPE[name])
        return ["plan", str(tmp_path / "recipe.yaml")]
    source = "hf" if command == "convert" else "iter_0000000"
    path = Path(shutil.copytree(originals / source, tmp_path / source))
    (FOLDER if command == "convert" else CHECKPOINT)[name](path)
    if command == "convert":
        return ["convert", "from-hf", str(path), str(tmp_path / "out")]
    return ["inspect", str(path)]


@pytest.mark.parametrize(("command", "name", "code"), CASES, ids=[f"{command}: {name}" for command, name, _ in CASES])
def test_foreign_file_is_refused(
    command: str,
    name: str,
    code: int,
    originals: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    report_table: Callable[..., None],
) -> None:
    arguments = _prepare(command, name, originals, tmp_path)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = main(arguments)
    seconds = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    said = capsys.readouterr()
    report_table(f"| {command} | {name} | {seconds:.2f} | {grown:.0f} | {found} |")
    assert found == code, said
    assert said.err.startswith("error: ") and "Traceback" not in said.err and len(said.err) < 4000
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    assert seconds < SECONDS and grown < MEGABYTES


def test_whole_files_are_accepted(originals: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(originals / "iter_0000000"), "--tensors"]) == 0
    assert main(["convert", "from-hf", str(originals / "hf"), str(tmp_path / "out")]) == 0


def test_older_checkpoint_is_taken(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(originals / "iter_0000000", tmp_path / "iter_0000000")
    for number, name in enumerate(["manifest is null", ".metadata, tuples in tuples", "a shard of zeros"], start=1):
        path = Path(shutil.copytree(originals / "iter_0000000", tmp_path / f"iter_000000{number}"))
        CHECKPOINT[name](path)
        if number > 1:
            manifest(iteration=number)(path)
    os.mkfifo(tmp_path / "latest")
    found = recover(tmp_path, skip_hash=False, require=require_usable)
    assert found.path == tmp_path / "iter_0000000" and len(found.rejected) == 3
    for words in (["inspect"], ["convert", "to-hf", "--format", "native", str(tmp_path / "out")]):
        caplog.clear()
        assert main([*words[:2], str(tmp_path), *words[2:]]) == 0
        assert "iter_0000000" in capsys.readouterr().out
        assert [record.message.count("is taken instead") for record in caplog.records] == [1, 1, 1]


def test_damaged_shard_makes_an_export_take_the_older(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 1):
        path = Path(shutil.copytree(originals / "iter_0000000", tmp_path / f"iter_000000{number}"))
        manifest(iteration=number)(path)
    shard = next(path.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    words = ["--format", "native"]
    assert main(["convert", "to-hf", str(path), str(tmp_path / "new"), *words]) == 4
    assert main(["convert", "to-hf", str(tmp_path), str(tmp_path / "old"), *words]) == 0
    assert f"{tmp_path / 'iter_0000000'} to " in capsys.readouterr().out and not (tmp_path / "new").exists()


PANICS = {
    "opening": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "tokenizing": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    },
}


@pytest.mark.parametrize("part", PANICS.values(), ids=PANICS)
def test_panic_of_the_tokenizer_is_an_error(part: dict[str, Any], tokenizer_dir: Path, tmp_path: Path) -> None:
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | part))
    with pytest.raises(DataError, match="the library gave up"):
        open_tokenizer(tmp_path).encode("a" * 40 + "b")


HOSTILE = "{{ x.__class__ }}"


@pytest.mark.parametrize("fmt", ["native", "original", "llm"])
def test_template_from_outside_is_replaced(fmt: str, originals: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(originals / "hf", tmp_path / "hf"))
    config = json.loads((path / "tokenizer_config.json").read_text())
    templates = [{"name": "default", "template": HOSTILE}]
    _write(path / "tokenizer_config.json", json.dumps({**config, "chat_template": templates, "vocab_file": "../x"}))
    _write(path / "special_tokens_map.json", json.dumps({"eos_token": config["eos_token"], "chat_template": HOSTILE}))
    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json"):
        _write(path / name, json.dumps({"chat_template": HOSTILE}))
    (path / "additional_chat_templates").mkdir()
    _write(path / "additional_chat_templates" / "x.jinja", HOSTILE)
    assert main(["convert", "from-hf", str(path), str(tmp_path / "out")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "out"), str(tmp_path / "export"), "--format", fmt]) == 0
    texts = {file.name: file.read_bytes() for file in (tmp_path / "export").rglob("*") if file.suffix != ".safetensors"}
    assert all(b"__class__" not in text and b"../x" not in text for text in texts.values())
    template = json.loads(texts["tokenizer_config.json"])["chat_template"]
    assert "Assistant:" in template and ("bos_token" in template) == (fmt == "llm")


def test_refusals_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "\x1b[2Jmodel\u202e"
    assert main(["inspect", str(path)]) == 4
    said = capsys.readouterr().err
    assert "␛[2Jmodel[U+202E]" in said and "\x1b" not in said
