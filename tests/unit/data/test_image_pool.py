"""Real decoding processes that die, stop, run out of memory or are signalled; the rank always gets an answer.

Machines are shared, so no worker that makes progress is ever timed: only one that the test has stopped.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
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
from megavl.data.image_pool import ImagePool, _Worker

PATIENCE = 600.0
"""Seconds after which a test gives up."""
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
def running(workers: int = 1, timeout_s: float = PATIENCE) -> Iterator[ImagePool]:
    pool = ImagePool(GEOMETRY, workers=workers, timeout_s=timeout_s)
    try:
        yield pool
    finally:
        pool.close()
        until(lambda: not pool.pids)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def same(pool: ImagePool, images: list[ImageFile], expected: list[np.ndarray]) -> bool:
    futures = [pool.submit(image) for image in images]
    return all(
        np.array_equal(future.result(PATIENCE), canvas) for future, canvas in zip(futures, expected, strict=True)
    )


def test_signals_are_ignored_and_a_kill_costs_nothing(
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
        assert all(np.array_equal(f.result(PATIENCE), canvas) for f, canvas in zip(futures, expected * 2, strict=True))
        until(lambda: len(pool.pids) == 2)
        assert before[0] not in pool.pids and before[1] in pool.pids
    assert f"image worker {before[0]} was killed by SIGKILL with {images[0].path} at byte" in capfd.readouterr().err


def test_a_silent_worker_is_replaced(
    images: list[ImageFile],
    expected: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    stopped: list[int] = []
    reply = _Worker._reply
    monkeypatch.setattr(
        _Worker, "_reply", lambda self, limit: reply(self, 0.5 if self.pid in stopped else PATIENCE), raising=True
    )
    with running() as pool:
        assert same(pool, images[:1], expected[:1])
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)
        assert same(pool, images, expected)
        assert pool.pids != [pid]
    assert f"image worker {pid} gave no answer for 0.5 s with {images[0].path} at byte 0" in capfd.readouterr().err


def test_workers_that_stay_silent_end_the_run(
    images: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nkill -STOP $$\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    with running(timeout_s=0.5) as pool:
        with pytest.raises(PeerError, match=r"gave no answer for 0\.5 s with .*images\.bin at byte 0") as caught:
            pool.submit(images[0]).result(PATIENCE)
        assert "as the one before" in str(caught.value) and caught.value.exit_code == 7


def test_an_image_that_exhausts_memory_is_named(
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
            futures.pop(1).result(PATIENCE)
        assert caught.value.reason == "image_decoder_died"
        # The image that was already under way beside it is not blamed.
        assert all(np.array_equal(f.result(PATIENCE), canvas) for f, canvas in zip(futures, expected, strict=True))
    printed = capfd.readouterr().err
    assert printed.count(f"out of memory with {path}") == 2 and "Traceback" not in printed


def test_a_worker_that_cannot_start_ends_the_run(images: list[ImageFile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with running() as pool, pytest.raises(PeerError, match="ended with code 1 .*as the one before"):
        pool.submit(images[0]).result(PATIENCE)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with running() as pool, pytest.raises(PeerError, match="an image worker cannot start"):
        pool.submit(images[0]).result(PATIENCE)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named(images: list[ImageFile], tmp_path: Path, workers: int) -> None:
    path = tmp_path / "copy.images.bin"
    data = bytearray(Path(images[0].path).read_bytes())
    data[images[1].offset + 999] ^= 4
    path.write_bytes(data)
    first, second = (
        ImageFile(path=str(path), offset=image.offset, size=image.size, crc32=image.crc32) for image in images[:2]
    )
    with running(workers=workers) as pool:
        assert pool.submit(first).result(PATIENCE).any()
        with pytest.raises(ImageError, match=rf"{path} at byte {second.offset}: stored bytes damaged"):
            pool.submit(second).result(PATIENCE)
        path.write_bytes(data[: images[0].size])
        with pytest.raises(DataError, match=rf"{path}: ends before byte"):
            pool.submit(second).result(PATIENCE)


def test_closing_does_not_wait_for_a_stopped_worker(images: list[ImageFile]) -> None:
    with running() as pool:
        futures = [pool.submit(image) for image in images]
        futures[0].result(PATIENCE)
        os.kill(pool.pids[0], signal.SIGSTOP)
        began = time.monotonic()
    assert time.monotonic() - began < PATIENCE / 2


@pytest.mark.skipif(sys.platform != "linux", reason="a stopped process cannot notice its rank's end by itself")
def test_a_worker_never_outlives_its_rank(images: list[ImageFile]) -> None:
    code = (
        "import sys, time\n"
        "from megavl.config.presets import IMAGE_PRESETS\n"
        "from megavl.data.image import ImageFile\n"
        "from megavl.data.image_pool import ImagePool\n"
        "pool = ImagePool(IMAGE_PRESETS['tiny-hybrid'], workers=1, timeout_s=600)\n"
        f"pool.submit({images[0]!r}).result(600)\n"
        "print(pool.pids[0], flush=True)\n"
        "time.sleep(600)\n"
    )
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert rank.stdout is not None
    worker = psutil.Process(int(rank.stdout.readline()))
    worker.suspend()
    rank.kill()
    rank.wait()
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
