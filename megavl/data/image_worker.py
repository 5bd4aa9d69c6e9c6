"""Decoding of stored images in worker processes: `python -m megavl.data.image_worker`, started by `ImagePool`.

A worker is a plain process with two pipes: it imports neither torch nor the training program, shares no memory, and
ends when its standard input closes, so it never outlives its rank. One request is in flight per worker.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megavl.config.errors import DataError, PeerError
from megavl.config.presets import ImageGeometry
from megavl.data.image import ImageError, ImageFile, canvas, decode_image
from megavl.data.index_file import ReadHandles

_REQUEST = struct.Struct("<I")
_REPLY = struct.Struct("<BI")
_OK, _BAD_IMAGE, _BAD_FILE = 0, 1, 2
_ATTEMPTS = 2
"""A worker that dies is replaced and its image tried once more, then given up."""

Canvas = npt.NDArray[np.uint8]


def load_canvas(image: ImageFile, *, geometry: ImageGeometry, handles: ReadHandles) -> Canvas:
    """Canvas (3, C, C) of a stored image.

    Raises:
        ImageError: the bytes are not those that were written, or do not decode.
        DataError: the file is missing or too short.
    """
    data = handles.read(image.path, offset=image.offset, size=image.size)
    if zlib.crc32(data) != image.crc32:
        raise ImageError("stored bytes damaged (crc32)", "image_damaged")
    return canvas(decode_image(data, max_aspect=float("inf")), geometry=geometry)


class ImagePool:
    """Decodes images in `workers` processes, or in the calling thread when there are none."""

    def __init__(self, geometry: ImageGeometry, *, workers: int, timeout_s: float = 120.0) -> None:
        """Start nothing yet: a process starts with its first image.

        Args:
            geometry: of the canvases.
            workers: processes; 0 decodes when the image is asked for.
            timeout_s: after which a silent worker ends the run.
        """
        self._geometry = geometry
        self._timeout_s = timeout_s
        self._handles = ReadHandles()
        self._local = threading.local()
        self._workers: list[_Worker] = []
        self._closed = False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="images") if workers else None

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [worker.pid for worker in self._workers if worker.alive]

    def submit(self, image: ImageFile) -> Future[Canvas]:
        """Start decoding; errors of `load_canvas` come out of the future."""
        if self._threads is not None:
            return self._threads.submit(self._ask, image)
        future: Future[Canvas] = Future()
        try:
            future.set_result(load_canvas(image, geometry=self._geometry, handles=self._handles))
        except DataError as error:
            future.set_exception(error)
        return future

    def result(self, future: Future[Canvas]) -> Canvas:
        """Wait for a canvas.

        Raises:
            ImageError: this image is damaged.
            PeerError: no answer within the timeout.
        """
        try:
            return future.result(timeout=self._timeout_s)
        except FutureTimeoutError:
            raise PeerError(
                f"image workers {self.pids} gave no answer within {self._timeout_s:g} s; "
                "check the storage of the shards and the memory of this node"
            ) from None

    def close(self) -> None:
        """End the workers."""
        self._closed = True
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.stop()
        self._handles.close()

    def _ask(self, image: ImageFile) -> Canvas:
        for _ in range(_ATTEMPTS):
            worker: _Worker | None = getattr(self._local, "worker", None)
            if worker is None or not worker.alive:
                worker = self._local.worker = _Worker(self._geometry)
                self._workers.append(worker)
            try:
                return worker.ask(image)
            except (EOFError, OSError):
                if self._closed:
                    raise
                worker.stop()
                self._workers.remove(worker)
                print(f"warning: image worker {worker.pid} died; another one takes over", file=sys.stderr, flush=True)
        raise ImageError(f"its decoder died {_ATTEMPTS} times in a row", "image_decoder_died")


class _Worker:
    """Parent's end of one process; used by one thread."""

    def __init__(self, geometry: ImageGeometry) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._side = geometry.canvas_size
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megavl.data.image_worker", json.dumps(asdict(geometry))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, image: ImageFile) -> Canvas:
        assert self._process.stdin is not None and self._process.stdout is not None
        request = json.dumps(asdict(image)).encode("utf-8")
        self._process.stdin.write(_REQUEST.pack(len(request)) + request)
        stream = self._process.stdout
        status, size = _REPLY.unpack(_read_exactly(stream, _REPLY.size))
        if status == _OK:
            pixels = np.empty((3, self._side, self._side), np.uint8)
            _read_into(stream, pixels.data.cast("B"))
            return pixels
        reason, _, message = _read_exactly(stream, size).decode("utf-8").partition(" ")
        raise ImageError(message, reason) if status == _BAD_IMAGE else DataError(message)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def _read_exactly(stream: object, size: int) -> bytes:
    data = bytearray(size)
    _read_into(stream, memoryview(data))
    return bytes(data)


def _read_into(stream: object, view: memoryview) -> None:
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        view = view[count:]


def _serve(geometry: ImageGeometry, *, requests: BinaryIO, replies: BinaryIO) -> None:
    handles = ReadHandles()
    while len(head := requests.read(_REQUEST.size)) == _REQUEST.size:
        image = ImageFile(**json.loads(requests.read(_REQUEST.unpack(head)[0])))
        try:
            payload, status = load_canvas(image, geometry=geometry, handles=handles).tobytes(), _OK
        except ImageError as error:
            payload, status = f"{error.reason} {error}".encode(), _BAD_IMAGE
        except DataError as error:
            payload, status = f"- {error}".encode(), _BAD_FILE
        replies.write(_REPLY.pack(status, len(payload)))
        replies.write(payload)
        replies.flush()


def main() -> None:
    """Answer requests on standard input until it closes."""
    # Schedulers signal every process of a job; the rank decides what that means.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Whatever a library prints must not end up among the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    geometry = ImageGeometry(**{**options, "background": tuple(options["background"])})
    try:
        _serve(geometry, requests=sys.stdin.buffer, replies=replies)
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
