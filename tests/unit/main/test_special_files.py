"""A FIFO, a socket, a device or a folder in place of a file is refused at once, by every command that opens a name."""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_tools import preprocess
from megavl.main.cli import main
from tests.unit.convert import public_models
from tests.unit.main.test_foreign_files import _socket
from tests.unit.main.test_foreign_files import originals as originals

NAME = "spe\ncial\x1b[2J"
"""A terminal would obey it, and the line feed would hide what stands before it."""
SECONDS = 300
"""Far more than any case takes; what waits for a writer would wait without end."""
KINDS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a socket": _socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
}
RECIPE = "launch/recipes/tiny/stage2.yaml"
ONE = {"id": "1", "prompt": "?", "images": [NAME], "choices": ["a", "b"], "answer": 0}
INIT = ["convert", "init", "{new}", "--preset", "tiny-hybrid"]
MEGAVL: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "recipe to train": (["train", "{special}"], (2,)),
    "recipe to plan": (["plan", "{special}"], (2,)),
    "calibration": (["plan", RECIPE, "--calibration", "{special}"], (2,)),
    "calibration to extend": (["plan", RECIPE, "--calibrate", "{special}"], (2,)),
    "checkpoint to inspect": (["inspect", "{special}"], (4,)),
    "checkpoint to export": (["convert", "to-hf", "{special}", "{new}", "--format", "native"], (4,)),
    "folder to import": (["convert", "from-hf", "{special}", "{new}"], (4,)),
    "language model": ([*INIT, "--llm", "{special}", "--siglip", "{siglip}", "--sam", "{sam}"], (4,)),
    "SigLIP": ([*INIT, "--llm", "{llm}", "--siglip", "{special}", "--sam", "{sam}"], (4,)),
    "SAM": ([*INIT, "--llm", "{llm}", "--siglip", "{siglip}", "--sam", "{special}"], (4,)),
    "first model to verify": (["convert", "verify", "{special}", "{model}"], (4,)),
    "second model to verify": (["convert", "verify", "{model}", "{special}"], (4,)),
    "model to ask": (["generate", "{special}", "--prompt", "?"], (4,)),
    "image": (["generate", "{model}", "--prompt", "?", "--image", "{special}"], (3,)),
    "prompts": (["generate", "{model}", "--prompts", "{special}"], (3,)),
    "image of a prompt": (["generate", "{model}", "--prompts", "{prompts}"], (3,)),
    "model to talk with": (["chat", "{special}"], (4,)),
    "task": (["evaluate", "{model}", "{special}"], (3,)),
    "model to evaluate": (["evaluate", "{special}", "{text}"], (4,)),
    "image of a question": (["evaluate", "{model}", "{task}"], (3,)),
    "benchmark": (["evaluate", "{model}", "--benchmark", "mmbench={special}"], (2, 3)),
    "folder of an evaluation": (["evaluate", "{model}", "{text}", "--out", "{special}"], (2,)),
}
PREPARE = ["preprocess", "--output", "{new}", "--workers", "1"]
WHOLE = ["--input", "{lines}", "--tokenizer", "{tokenizer}"]
TOOLS: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "input": ([*PREPARE, "--input", "{special}", "--tokenizer", "{tokenizer}"], (2, 3)),
    "tokenizer": ([*PREPARE, "--input", "{lines}", "--tokenizer", "{special}"], (2, 3)),
    "image root": ([*PREPARE, *WHOLE, "--image-root", "{special}"], (2, 3)),
    "image map": ([*PREPARE, *WHOLE, "--image-map", "{special}"], (2, 3)),
    "dataset to verify": (["verify", "{special}"], (2, 3)),
    "dataset to view": (["view", "{special}"], (2, 3)),
    "recipe to draw": (["draw_schedule", "{special}", "--output", "{new}.svg"], (2,)),
    "tree of categories": (["taxonomy", "list", "--taxonomy", "{special}"], (2,)),
    "records to tag": (["taxonomy", "tag", "--input", "{special}", "--output", "{new}"], (2, 3)),
    "rules of categories": (
        ["taxonomy", "tag", "--input", "{lines}", "--rules", "{special}", "--output", "{new}"],
        (2,),
    ),
    "names of categories": (
        ["taxonomy", "tag", "--input", "{lines}", "--names", "{special}", "--output", "{new}"],
        (2,),
    ),
    "weights of categories": (
        ["taxonomy", "sample", "--input", "{lines}", "--count", "1", "--weights", "{special}", "--output", "{new}"],
        (2,),
    ),
}


@contextmanager
def bounded() -> Iterator[None]:
    """Interrupt what waits."""

    def stop(*_: object) -> None:
        raise AssertionError("the command waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def files(originals: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the commands are given beside the special file, by name."""
    folder = tmp_path_factory.mktemp("files")
    public = public_models.build(folder / "public", tokenizer_dir)
    (folder / "text.jsonl").write_text('{"id": "1", "text": "some words to read"}\n')
    (folder / "lines.jsonl").write_text('{"text": "some words to learn"}\n')
    return {
        "llm": public.llm_paths["bin"],
        "siglip": public.siglip_paths["timm"],
        "sam": public.sam_paths["segment-anything"],
        "model": originals / "iter_0000000",
        "tokenizer": tokenizer_dir,
        "text": folder / "text.jsonl",
        "lines": folder / "lines.jsonl",
    }


def given(words: list[str], folder: Path, files: dict[str, Path]) -> list[str]:
    """The arguments, with paths in place of names."""
    (folder / "task.jsonl").write_text(json.dumps(ONE))
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "?", "images": [NAME]}))
    own = {name: folder / f"{name}.jsonl" for name in ("task", "prompts")}
    own |= {"special": folder / NAME, "new": folder / "new"}
    return [word.format(**files, **own) for word in words]


def check_refused(code: int, codes: tuple[int, ...], said: str) -> None:
    assert code in codes, (code, said)
    assert "error: " in said and "spe␊cial␛[2J" in said and "Traceback" not in said, said
    assert "\x1b" not in said and "spe\n" not in said


def cases(names: Iterable[str], *, all_kinds: set[str]) -> list[tuple[str, str]]:
    """Every name with a FIFO, which is the worst, and a few with all kinds."""
    return [(name, kind) for name in names for kind in KINDS if kind == "a FIFO" or name in all_kinds]


@pytest.mark.parametrize(("name", "kind"), cases(MEGAVL, all_kinds={"image", "prompts", "recipe to plan"}))
def test_megavl_refuses_a_special_file(
    name: str, kind: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, codes = MEGAVL[name]
    KINDS[kind](tmp_path / NAME)
    with bounded():
        code = main(given(words, tmp_path, files))
    check_refused(code, codes, capsys.readouterr().err)


@pytest.mark.parametrize(("name", "kind"), cases(TOOLS, all_kinds={"tokenizer", "image map", "rules of categories"}))
def test_data_tools_refuse_a_special_file(
    name: str, kind: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, codes = TOOLS[name]
    KINDS[kind](tmp_path / NAME)
    module = importlib.import_module(f"data_tools.{words[0]}")
    with bounded():
        try:
            code = module.main(given(words[1:], tmp_path, files))
        except SystemExit as error:
            code = int(error.code or 0)
    check_refused(code, codes, capsys.readouterr().err)


def test_special_files_of_an_input_folder_are_left(files: dict[str, Path], tmp_path: Path) -> None:
    """Each of these names is opened to see what it holds."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(files["lines"].read_bytes())
    for name in ("b.arrow", "c.parquet.gzip", "d.pq", "e.txt"):
        os.mkfifo(folder / name)
    with bounded():
        words = [*PREPARE[1:], "--input", str(folder), "--tokenizer", "{tokenizer}", "--dry-run"]
        assert preprocess.main(given(words, tmp_path, files)) == 0
