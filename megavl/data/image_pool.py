"""Decodes images in worker processes: a queue of images, and one thread per process that bounds its silence."""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megavl.config.errors import DataError, PeerError
from megavl.config.presets import ImageGeometry
from megavl.data.image import ImageError, ImageFile
from megavl.data.image_worker import (
    BAD_IMAGE,
    OK,
    READY,
    REPLY,
    REQUEST,
    SLOTS,
    Canvas,
    load_canvas,
    location_of,
    map_canvases,
)
from megavl.data.table import ReadHandles
from megavl.foreign.printing import say

_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
"""By default glibc returns the memory of each picture to the system and requests it again, which costs as much as
decoding."""
_ATTEMPTS = 2
"""Workers that may be lost with one image before it is given up; each lost worker is replaced."""


@dataclass(kw_only=True)
class _Job:
    image: ImageFile
    future: Future[Canvas]
    lost: int = 0
    """Workers that were lost with this image."""


class ImagePool:
    """Decodes images in `workers` processes, or in the calling thread when there are none."""

    def __init__(self, geometry: ImageGeometry, *, workers: int, timeout_s: float = 120.0) -> None:
        """Start nothing yet: a process starts with its first image.

        Args:
            geometry: of the canvases.
            workers: processes; 0 decodes when the image is asked for.
            timeout_s: seconds of silence after which a worker counts as lost.
        """
        self._geometry = geometry
        self._handles = ReadHandles()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lanes = [_Lane(geometry, jobs=self._jobs, timeout_s=timeout_s) for _ in range(workers)]

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [pid for lane in self._lanes if (pid := lane.pid) is not None]

    def submit(self, image: ImageFile) -> Future[Canvas]:
        """Start decoding. The future's canvas is an array of its own; its errors:

        ImageError: this image is damaged, or workers died of it.
        DataError: the file is missing or too short.
        PeerError: workers cannot start, or give no answer.
        """
        future: Future[Canvas] = Future()
        if self._lanes:
            self._jobs.put(_Job(image=image, future=future))
            for lane in self._lanes:
                lane.start_once()
            return future
        try:
            future.set_result(load_canvas(image, geometry=self._geometry, handles=self._handles))
        except DataError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """End the workers."""
        for lane in self._lanes:
            lane.stop()
        self._handles.close()


class _Lost(Exception):
    """The worker is gone or silent; `silent` says which."""

    def __init__(self, how: str, *, silent: bool = False) -> None:
        super().__init__(how)
        self.silent = silent


class _Lane(threading.Thread):
    """Keeps one worker busy with up to `SLOTS` images, and replaces it when it is lost."""

    def __init__(self, geometry: ImageGeometry, *, jobs: queue.SimpleQueue[_Job | None], timeout_s: float) -> None:
        # A daemon: the interpreter must be able to end while a worker is silent.
        super().__init__(name="image lane", daemon=True)
        self._geometry, self._jobs, self._timeout_s = geometry, jobs, timeout_s
        self._worker: _Worker | None = None
        self._flight: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def pid(self) -> int | None:
        worker = self._worker
        return worker.pid if worker is not None and worker.alive else None

    def start_once(self) -> None:
        if not self.is_alive() and not self._closed:
            self.start()

    def stop(self) -> None:
        with self._lock:
            self._closed = True
            if self._worker is not None:
                self._worker.stop()
        self._jobs.put(None)

    def run(self) -> None:
        while self._take():
            job = self._flight[0]
            try:
                self._connect()
                job.future.set_result(self._running().receive(self._timeout_s))
            except _Lost as lost:
                if self._closed:
                    break
                self._replace(lost)
                continue
            except Exception as error:  # the rank waits for this future, so it must get every error
                job.future.set_exception(error)
            self._flight.popleft()
        for job in self._flight:
            job.future.cancel()

    def _take(self) -> bool:
        """Fill up the images in flight; False when the pool is closed."""
        while len(self._flight) < SLOTS and not self._closed:
            try:
                job = self._jobs.get(block=not self._flight)
            except queue.Empty:
                break
            if job is None:
                return False
            if job.future.set_running_or_notify_cancel():
                self._flight.append(job)
        return not self._closed

    def _connect(self) -> None:
        """Have a worker, and send it every image in flight."""
        if self._worker is None:
            with self._lock:
                if self._closed:
                    raise _Lost("closed")
                self._worker = _Worker(self._geometry)
            self._worker.greet(self._timeout_s)
        for job in list(self._flight)[self._worker.asked - self._worker.answered :]:
            self._worker.ask(job.image)

    def _running(self) -> _Worker:
        assert self._worker is not None
        return self._worker

    def _replace(self, lost: _Lost) -> None:
        worker, job = self._running(), self._flight[0]
        worker.stop()
        self._worker = None
        job.lost += 1
        what = f"image worker {worker.pid} {str(lost) or worker.end()} with {location_of(job.image)}"
        if job.lost < _ATTEMPTS:
            say(f"warning: {what}; another one takes over", to_errors=True)
            return
        self._flight.popleft()
        if not worker.greeted or lost.silent:
            job.future.set_exception(
                PeerError(f"{what}, as the one before; check the memory of this node and the storage of the shards")
            )
        else:
            job.future.set_exception(
                ImageError(
                    f"{location_of(job.image)}: {_ATTEMPTS} decoders died of it, the last one {worker.end()}",
                    "image_decoder_died",
                )
            )


class _Worker:
    """One process; used by one thread, apart from `stop`."""

    def __init__(self, geometry: ImageGeometry) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        memory = _shared_memory(SLOTS * 3 * geometry.canvas_size**2)
        try:
            self._canvases = map_canvases(memory, side=geometry.canvas_size)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "megavl.data.image_worker"),
                    *(json.dumps(asdict(geometry)), str(memory)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=(memory,),
                env={**_KEEP_MEMORY, **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )
        except OSError as error:
            raise PeerError(
                f"an image worker cannot start ({error.strerror}); check the memory and process limits of this node"
            ) from error
        finally:
            os.close(memory)
        self.pid = self._process.pid
        self.asked = self.answered = 0
        self.greeted = False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> str:
        """How it ended; only after `stop`."""
        code = self._process.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def greet(self, timeout_s: float) -> None:
        """Wait until it runs."""
        status, _ = self._reply(timeout_s)
        assert status == READY
        self.greeted = True

    def ask(self, image: ImageFile) -> None:
        request = json.dumps(asdict(image)).encode("utf-8")
        assert self._process.stdin is not None
        try:
            # Far below the size of a pipe, so this does not wait.
            self._process.stdin.write(REQUEST.pack(len(request)) + request)
        except OSError:
            raise _Lost("") from None
        self.asked += 1

    def receive(self, timeout_s: float) -> Canvas:
        """The canvas of the oldest unanswered request."""
        status, text = self._reply(timeout_s)
        slot = self.answered % SLOTS
        self.answered += 1
        if status == OK:
            return np.array(self._canvases[slot])
        reason, _, message = text.decode("utf-8").partition(" ")
        raise ImageError(message, reason) if status == BAD_IMAGE else DataError(message)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _reply(self, timeout_s: float) -> tuple[int, bytes]:
        deadline = time.monotonic() + timeout_s
        status, size = REPLY.unpack(self._read(REPLY.size, deadline, timeout_s))
        return status, self._read(size, deadline, timeout_s)

    def _read(self, size: int, deadline: float, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        poll, data = select.poll(), b""
        poll.register(self._process.stdout, select.POLLIN)
        while len(data) < size:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _Lost(f"gave no answer for {timeout_s:g} s", silent=True)
            part = self._process.stdout.read(size - len(data))
            if not part:
                raise _Lost("")
            data += part
        return data


def _shared_memory(size: int) -> int:
    """File descriptor of memory that ends with its last user."""
    if hasattr(os, "memfd_create"):
        # Not in /dev/shm, which containers keep small.
        memory = os.memfd_create("megavl-canvases", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, size)
    return memory
