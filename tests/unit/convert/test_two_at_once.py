"""Of two conversions into one output, the second is refused while the first goes on, and nothing is mixed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import threading
from pathlib import Path

import pytest

from megavl.convert import checkpoint_files, hf_write
from megavl.main.cli import main
from tests.unit.convert import public_models


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def hf(sources, tokenizer_dir, tmp_path):
    folder = Path(shutil.copytree(sources["tiny-siglip"], tmp_path / "hf"))
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, folder)
    return folder


def command(name: str, hf: Path, tokenizer_dir: Path, folder: Path) -> list[str]:
    if name == "from-hf":
        return ["convert", name, str(hf), "OUT"]
    if name == "to-hf":
        assert main(["convert", "from-hf", str(hf), str(folder / "model")]) == 0
        return ["convert", name, str(folder / "model"), "OUT", "--format", "native"]
    public = public_models.build(folder / "public", tokenizer_dir)
    sources = ["--llm", public.llm_paths["bin"], "--siglip", public.siglip_paths["timm"], "--preset", "tiny-siglip"]
    return ["convert", name, *map(str, sources), "OUT"]


def first_waits(monkeypatch: pytest.MonkeyPatch, *, then: threading.Event) -> threading.Event:
    """Make the next conversion wait before its last tensor; returns what is set when it waits."""
    reached, taken = threading.Event(), []

    def slowed(tensors):
        last = list(tensors)[-1]
        if taken:
            return tensors
        taken.append(last)

        def load():
            reached.set()
            assert then.wait(1800)
            return tensors[last].load()

        return {**tensors, last: dataclasses.replace(tensors[last], load=load)}

    write, export = checkpoint_files.write_checkpoint, hf_write.write_hf
    monkeypatch.setattr(
        "megavl.main.convert.write_checkpoint", lambda *a, tensors, **k: write(*a, tensors=slowed(tensors), **k)
    )
    monkeypatch.setattr(checkpoint_files, "write_hf", lambda *a, tensors, **k: export(*a, tensors=slowed(tensors), **k))
    return reached


@pytest.mark.parametrize("name", ["from-hf", "init", "to-hf"])
def test_second_conversion_is_refused(name, hf, tokenizer_dir, tmp_path, monkeypatch, capsys):
    words = command(name, hf, tokenizer_dir, tmp_path)
    alone, shared = ([str(tmp_path / out) if word == "OUT" else word for word in words] for out in ("alone", "shared"))
    assert main(alone) == 0
    go_on = threading.Event()
    waits = first_waits(monkeypatch, then=go_on)
    codes: list[int] = []
    first = threading.Thread(target=lambda: codes.append(main(shared)))
    first.start()
    assert waits.wait(1800)
    capsys.readouterr()
    assert main(shared) == 2
    said = capsys.readouterr().err
    assert f"is in use by another process (host {os.uname().nodename}, pid {os.getpid()}" in said, said
    assert "Traceback" not in said and str(tmp_path) in said
    go_on.set()
    first.join(1800)
    assert codes == [0]
    found, expected = content(tmp_path / "shared"), content(tmp_path / "alone")
    # The manifest of a checkpoint holds nothing of the run, so all files must agree.
    assert found == expected and not list(tmp_path.rglob("owner-*")) and not list(tmp_path.glob(".shared*"))


def test_output_filled_meanwhile_is_left_alone(hf, tokenizer_dir, tmp_path, monkeypatch, capsys):
    words = ["convert", "to-hf", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "native"]
    assert main(["convert", "from-hf", str(hf), str(tmp_path / "model")]) == 0

    def fill(*arguments, **options):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "mine").write_text("x")
        return real(*arguments, **options)

    real = hf_write.write_safetensors
    monkeypatch.setattr(hf_write, "write_safetensors", fill)
    assert main(words) == 2 and "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert not list(tmp_path.glob(".out*"))
