"""Decoding processes that die, stop, run out of memory or are signalled: real ones, and never a wait without end."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from megavl.config.errors import DataError, PeerError
from megavl.config.presets import IMAGE_PRESETS
from megavl.data.image import ImageError, ImageFile
from megavl.data.image_pool import ImagePool

GEOMETRY = IMAGE_PRESETS["tiny-hybrid"]
COUNT = 12
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[ImageFile]:
    """Stored images that take some 20 ms each."""
    path = tmp_path_factory.mktemp("images") / "multimodal-00000.images.bin"
    draw = np.random.default_rng(1)
    files = []
    with open(path, "wb") as stream:
        for _ in range(COUNT):
            picture = Image.fromarray(draw.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize((1600, 1200))
            out = io.BytesIO()
            picture.save(out, "JPEG")
            data = out.getvalue()
            files.append(ImageFile(path=str(path), offset=stream.tell(), size=len(data), crc32=zlib.crc32(data)))
            stream.write(data)
    return files


@pytest.fixture(scope="module")
def expected(images: list[ImageFile]) -> list[np.ndarray]:
    pool = ImagePool(GEOMETRY, workers=0)
    return [pool.submit(image).result() for image in images]


@contextmanager
def running(workers: int = 1, timeout_s: float = 30.0) -> Iterator[ImagePool]:
    pool = ImagePool(GEOMETRY, workers=workers, timeout_s=timeout_s)
    try:
        yield pool
    finally:
        pool.close()
        until(lambda: not pool.pids)


def until(condition: Callable[[], object], *, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


@contextmanager
def every_new_worker(pool: ImagePool, act: Callable[[int], None]) -> Iterator[list[int]]:
    """Do something to each worker as soon as it runs; gives their process ids."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            for pid in pool.pids:
                if pid not in seen:
                    seen.append(pid)
                    act(pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def same(pool: ImagePool, images: list[ImageFile], expected: list[np.ndarray]) -> bool:
    futures = [pool.submit(image) for image in images]
    return all(np.array_equal(future.result(60), canvas) for future, canvas in zip(futures, expected, strict=True))


def test_signals_of_the_scheduler_do_not_reach_it_and_a_kill_costs_nothing(
    images: list[ImageFile], expected: list[np.ndarray], capfd: pytest.CaptureFixture[str]
) -> None:
    with running(workers=2) as pool:
        assert pool.pids == []
        assert same(pool, images * 2, expected * 2)
        before = pool.pids
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            for pid in before:
                os.kill(pid, number)
        assert same(pool, images, expected)
        assert pool.pids == before
        futures = [pool.submit(image) for image in images * 2]
        os.kill(before[0], signal.SIGKILL)
        assert all(np.array_equal(f.result(60), canvas) for f, canvas in zip(futures, expected * 2, strict=True))
        until(lambda: len(pool.pids) == 2)
        assert before[0] not in pool.pids and before[1] in pool.pids
    assert f"image worker {before[0]} was killed by SIGKILL with {images[0].path} at byte" in capfd.readouterr().err


def test_a_silent_worker_is_replaced(
    images: list[ImageFile], expected: list[np.ndarray], capfd: pytest.CaptureFixture[str]
) -> None:
    with running(timeout_s=1.5) as pool:
        assert same(pool, images[:1], expected[:1])
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        assert same(pool, images, expected)
        assert 1.4 < time.monotonic() - began < 15
        assert pool.pids != [pid]
    assert f"image worker {pid} gave no answer for 1.5 s with {images[0].path} at byte 0" in capfd.readouterr().err


def test_workers_that_stay_silent_end_the_run_with_code_7(images: list[ImageFile]) -> None:
    with running(timeout_s=0.7) as pool, every_new_worker(pool, lambda pid: os.kill(pid, signal.SIGSTOP)) as seen:
        began = time.monotonic()
        with pytest.raises(PeerError, match=r"gave no answer for 0\.7 s with .*images\.bin at byte 0") as caught:
            pool.submit(images[0]).result(60)
        assert time.monotonic() - began < 10
        assert str(seen[1]) in str(caught.value) and caught.value.exit_code == 7


def test_an_image_that_takes_too_much_memory_is_given_up_and_named(
    images: list[ImageFile],
    expected: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with running() as pool:
        assert same(pool, images[:1], expected[:1])
        usual = psutil.Process(pool.pids[0]).memory_info().vms
    out = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(out, "PNG")
    path = tmp_path / "large.images.bin"
    path.write_bytes(out.getvalue())
    large = ImageFile(path=str(path), offset=0, size=path.stat().st_size, crc32=zlib.crc32(out.getvalue()))
    # Every worker may have 40 MB more than one that has decoded an image; the large one takes over 100.
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/sh\nulimit -v {(usual + 40_000_000) // 1024}\nexec {sys.executable} "$@"\n')
    limited.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(limited))
    with running() as pool:
        futures = [pool.submit(image) for image in [images[0], large, *images[1:]]]
        with pytest.raises(ImageError, match=rf"{path} at byte 0: 2 decoders died of it, .*code 1") as caught:
            futures.pop(1).result(60)
        assert caught.value.reason == "image_decoder_died"
        # The image that was already under way beside it is not blamed.
        assert all(np.array_equal(f.result(60), canvas) for f, canvas in zip(futures, expected, strict=True))
    printed = capfd.readouterr().err
    assert printed.count(f"out of memory with {path}") == 2 and "Traceback" not in printed


def test_a_worker_that_cannot_start_ends_the_run(images: list[ImageFile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with running() as pool, pytest.raises(PeerError, match="ended with code 1 .*as the one before"):
        pool.submit(images[0]).result(60)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with running() as pool, pytest.raises(PeerError, match="an image worker cannot start"):
        pool.submit(images[0]).result(60)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_a_file_is_named(images: list[ImageFile], tmp_path: Path, workers: int) -> None:
    path = tmp_path / "copy.images.bin"
    data = bytearray(Path(images[0].path).read_bytes())
    data[images[1].offset + 999] ^= 4
    path.write_bytes(data)
    first, second = (
        ImageFile(path=str(path), offset=image.offset, size=image.size, crc32=image.crc32) for image in images[:2]
    )
    with running(workers=workers) as pool:
        assert pool.submit(first).result(60).any()
        with pytest.raises(ImageError, match=rf"{path} at byte {second.offset}: stored bytes damaged"):
            pool.submit(second).result(60)
        path.write_bytes(data[: images[0].size])
        with pytest.raises(DataError, match=rf"{path}: ends before byte"):
            pool.submit(second).result(60)


def test_closing_does_not_wait_for_a_stopped_worker(images: list[ImageFile]) -> None:
    with running() as pool:
        futures = [pool.submit(image) for image in images]
        futures[0].result(60)
        os.kill(pool.pids[0], signal.SIGSTOP)
        began = time.monotonic()
    assert time.monotonic() - began < 5


@pytest.mark.skipif(sys.platform != "linux", reason="a stopped process cannot notice its rank's end by itself")
def test_a_worker_never_outlives_its_rank(images: list[ImageFile]) -> None:
    code = (
        "import sys, time\n"
        "from megavl.config.presets import IMAGE_PRESETS\n"
        "from megavl.data.image import ImageFile\n"
        "from megavl.data.image_pool import ImagePool\n"
        "pool = ImagePool(IMAGE_PRESETS['tiny-hybrid'], workers=1)\n"
        f"pool.submit({images[0]!r}).result(60)\n"
        "print(pool.pids[0], flush=True)\n"
        "time.sleep(60)\n"
    )
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert rank.stdout is not None
    worker = psutil.Process(int(rank.stdout.readline()))
    worker.suspend()
    rank.kill()
    rank.wait()
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
