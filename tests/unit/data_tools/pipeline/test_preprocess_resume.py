"""The output is the same for any number of workers and array tasks, and after any kill."""

import filecmp
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from backports import zstd
from pyarrow import ipc

from tests.unit.data.corpus_files import arguments, make_corpus, make_tokenizer, run_preprocess

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Records long enough for a dozen shards, and a compressed JSONL and an Arrow file of one shard each."""
    folder = tmp_path_factory.mktemp("corpus")
    text, captions, talks = make_corpus(folder, images=150, texts=150, note="x" * 5000)
    raw = captions.read_bytes()
    (folder / "captions.jsonl.gz").write_bytes(gzip.compress(raw, compresslevel=1))
    (folder / "captions.jsonl.zst").write_bytes(zstd.compress(raw))
    table = pa.Table.from_pylist([json.loads(line) for line in raw.splitlines()])
    with ipc.new_stream(folder / "captions.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    # In the middle, so that kills hit their tasks too.
    return [text, *(folder / f"captions.{kind}" for kind in ("jsonl.gz", "jsonl.zst", "arrow")), captions, talks]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: list[Path], tokenizer: Path) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_preprocess(corpus, tokenizer=tokenizer, output=out) == 0
    return out


def _content(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if "lock" not in file.name)


def _same(first: Path, second: Path) -> bool:
    names = [name for name in _content(first) if (first / name).is_file()]
    return _content(first) == _content(second) and not any(filecmp.cmpfiles(first, second, names, shallow=False)[1:])


def _start(corpus: list[Path], tokenizer: Path, out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "data_tools/preprocess.py", *arguments(corpus, tokenizer=tokenizer, output=out)]
    command[command.index("--workers") + 1] = "2"
    # A file, not a pipe: nobody reads while the run goes on.
    log = open(out.parent / "log", "w")  # noqa: SIM115
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True)


def _wait_for_tasks(process: "subprocess.Popen[str]", out: Path, *, count: int) -> None:
    deadline = time.monotonic() + 1800
    while process.poll() is None and len(list(out.glob("units/[0-9]*[0-9].json"))) < count:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.005)


@pytest.mark.parametrize("order", [(2, 0, 1), (5, 0, 7, 1, 6, 2, 4, 3)], ids=["3 tasks", "8 tasks"])
def test_array_tasks_give_the_same_bytes(
    corpus: list[Path],
    tokenizer: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    order: tuple[int, ...],
) -> None:
    out = tmp_path / "out"
    for task in order:
        more = ["--task", str(task), "--num-tasks", str(len(order))]
        assert not (out / "manifest.json").exists()
        assert run_preprocess(corpus, tokenizer=tokenizer, output=out, more=more) == 0
    assert "wait for others" in capsys.readouterr().out
    assert _same(undisturbed, out)


def test_killed_runs_resume_with_the_same_bytes(
    corpus: list[Path], tokenizer: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for count in (1, 5, 9):
        process = _start(corpus, tokenizer, out)
        _wait_for_tasks(process, out, count=count)
        process.kill()
        process.wait()
        assert not (out / "manifest.json").exists()
    process = _start(corpus, tokenizer, out)
    assert process.wait() == 0
    assert "shards are done already" in (tmp_path / "log").read_text()
    assert _same(undisturbed, out)


def test_work_of_a_dead_worker_is_repeated(
    corpus: list[Path], tokenizer: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = _start(corpus, tokenizer, out)
    _wait_for_tasks(process, out, count=1)
    for child in psutil.Process(process.pid).children():
        if "spawn_main" in " ".join(child.cmdline()):
            os.kill(child.pid, signal.SIGKILL)
            break
    assert process.wait(timeout=1800) == 0
    assert "a worker process died" in (tmp_path / "log").read_text()
    assert _same(undisturbed, out)


def test_workers_of_plain_inputs_are_forked(corpus: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    """One that dies is replaced; those of a killed command end, and do not hold its lock meanwhile."""
    plain = [path for path in corpus if path.suffix == ".jsonl"]
    whole, out, again = (tmp_path / name for name in ("whole", "out", "again"))
    assert run_preprocess(plain, tokenizer=tokenizer, output=whole) == 0
    process = _start(plain, tokenizer, out)
    _wait_for_tasks(process, out, count=1)
    command = psutil.Process(process.pid).cmdline()
    workers = psutil.Process(process.pid).children()
    assert [worker.cmdline() for worker in workers] == [command] * 2
    workers[0].kill()
    assert process.wait(timeout=1800) == 0
    assert "a worker process died" in (tmp_path / "log").read_text()
    assert _same(whole, out)
    process = _start(plain, tokenizer, again)
    _wait_for_tasks(process, again, count=1)
    orphans = psutil.Process(process.pid).children()
    # Suspended, so that they surely still have their files open.
    for orphan in orphans:
        orphan.suspend()
    try:
        process.kill()
        process.wait()
        assert _start(plain, tokenizer, again).wait(timeout=1800) == 0
        assert _same(whole, again)
    finally:
        for orphan in orphans:
            orphan.resume()
    assert len(orphans) == 2 and psutil.wait_procs(orphans, timeout=1800)[1] == []


def test_run_survives_ten_random_kills(corpus: list[Path], tokenizer: Path, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL hits the command or a worker at any time of a run; the next round resumes it."""
    draw = random.Random(7)
    out, kills, rounds = tmp_path / "0", 0, 0
    while kills < 10:
        process = _start(corpus, tokenizer, out)
        parent = draw.random() < 0.5
        made = len(list(out.glob("units/[0-9]*[0-9].json")))
        _wait_for_tasks(process, out, count=made + draw.randint(0, 4))
        time.sleep(draw.uniform(0, 0.15))
        victims = [process.pid] if parent else _workers(process)
        if process.poll() is None and victims:
            os.kill(draw.choice(victims), signal.SIGKILL)
            kills += 1
        if parent and process.wait(timeout=1800) != 0:
            continue
        assert process.wait(timeout=1800) == 0, (tmp_path / "log").read_text()
        assert _same(undisturbed, out), f"after {kills} kills"
        rounds += 1
        out = tmp_path / str(rounds)
    process = _start(corpus, tokenizer, out)
    assert process.wait(timeout=1800) == 0
    assert _same(undisturbed, out)


def _workers(process: "subprocess.Popen[str]") -> list[int]:
    try:
        children = psutil.Process(process.pid).children()
        return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def test_finished_run_is_redone_only_on_demand(
    corpus: list[Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run: Callable[..., int] = lambda *more: run_preprocess(corpus[:1], tokenizer=tokenizer, output=out, more=more)  # noqa: E731
    assert run() == 0
    shard = out / "text-00000.tokens.bin"
    before = shard.stat().st_mtime_ns
    assert run() == 0
    assert shard.stat().st_mtime_ns == before
    shard.unlink()
    assert run() == 0 and shard.exists(), "a shard that lost a file is made again"
    before = shard.stat().st_mtime_ns
    assert run("--no-resume") == 0
    assert shard.stat().st_mtime_ns != before
    capsys.readouterr()
    assert run("--template", "none") == 2
    message = capsys.readouterr().err
    assert "was started with other settings or inputs (inputs)" in message and "--no-resume" in message
    assert run("--template", "none", "--no-resume") == 0


def test_edited_input_is_read_again(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Size and ends of the input are unchanged; only the shard of the edited split is made again."""
    (source,) = make_corpus(tmp_path / "in", images=1, texts=150, note="x" * 5000)[:1]
    out, anew = tmp_path / "out", tmp_path / "anew"
    assert run_preprocess([source], tokenizer=tokenizer, output=out) == 0
    os.utime(source)
    capsys.readouterr()
    assert run_preprocess([source], tokenizer=tokenizer, output=out) == 0
    tasks = len(list(out.glob("units/[0-9]*[0-9].json")))
    assert tasks > 2 and f"{tasks} of {tasks} shards are done already" in capsys.readouterr().out, "touched only"
    content = bytearray(source.read_bytes())
    index = content.index(b"red", len(content) // 2)
    content[index : index + 3] = b"RED"
    source.write_bytes(content)
    assert run_preprocess([source], tokenizer=tokenizer, output=out) == 0
    assert f"{tasks - 1} of {tasks} shards are done already" in capsys.readouterr().out
    assert run_preprocess([source], tokenizer=tokenizer, output=anew) == 0
    assert _same(anew, out)


def test_second_run_into_one_output_stops(corpus: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _start(corpus, tokenizer, out)
    _wait_for_tasks(process, out, count=1)
    # Stopped, so that it surely still holds its lock.
    process.send_signal(signal.SIGSTOP)
    try:
        assert run_preprocess(corpus, tokenizer=tokenizer, output=out) == 2
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait() == 0


def test_foreign_folder_is_refused(
    corpus: list[Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.json").write_text("{}")
    assert run_preprocess(corpus, tokenizer=tokenizer, output=tmp_path, more=["--no-resume"]) == 2
    assert "holds 'thesis.json', which preprocessing did not write" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.json"]
