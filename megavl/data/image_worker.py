"""A process that decodes stored images: `python -m megavl.data.image_worker`, started by `ImagePool`.

It imports neither torch nor the training program. Requests come in on standard input. Canvases go out through memory
shared with the rank, and replies through standard output. It ends when its standard input closes.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import struct
import sys
import zlib
from typing import BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from megavl.config.errors import DataError
from megavl.config.presets import ImageGeometry
from megavl.data.image import OUT_OF_MEMORY, ImageError, ImageFile, canvas, decode_image
from megavl.data.table import ReadHandles
from megavl.foreign.printing import say

Canvas = npt.NDArray[np.uint8]

SLOTS = 2
"""Canvases of shared memory per worker: while the rank takes one out, the next image is being decoded."""
REQUEST = struct.Struct("<I")
"""Length of the JSON that follows."""
REPLY = struct.Struct("<BI")
"""Outcome of the request, and the length of the text that follows."""
READY, OK, BAD_IMAGE, BAD_FILE = range(4)
_PR_SET_PDEATHSIG = 1


def load_canvas(
    image: ImageFile, *, geometry: ImageGeometry, handles: ReadHandles, out: Canvas | None = None
) -> Canvas:
    """Canvas (3, C, C) of a stored image, in `out` where given.

    Raises:
        ImageError: the bytes are not those that were written, or do not decode.
        DataError: the file is missing or too short.
    """
    data = handles.read(image.path, offset=image.offset, size=image.size)
    try:
        if zlib.crc32(data) != image.crc32:
            raise ImageError("stored bytes damaged (crc32)", "image_damaged")
        return canvas(decode_image(data, max_aspect=float("inf")), geometry=geometry, out=out)
    except ImageError as error:
        raise ImageError(f"{location_of(image)}: {error}", error.reason) from error


def location_of(image: ImageFile) -> str:
    """File and offset of a stored image, for messages."""
    return f"{image.path} at byte {image.offset}"


def map_canvases(memory: int, *, side: int) -> Canvas:
    """The canvases (SLOTS, 3, C, C) in the shared memory of a file descriptor."""
    shape = (SLOTS, 3, side, side)
    return np.frombuffer(mmap.mmap(memory, int(np.prod(shape))), np.uint8).reshape(shape)


def _serve(geometry: ImageGeometry, *, canvases: Canvas, requests: BinaryIO, replies: BinaryIO) -> None:
    handles = ReadHandles()
    replies.write(REPLY.pack(READY, 0))
    replies.flush()
    number = 0
    while len(head := requests.read(REQUEST.size)) == REQUEST.size:
        image = ImageFile(**json.loads(requests.read(REQUEST.unpack(head)[0])))
        try:
            load_canvas(image, geometry=geometry, handles=handles, out=canvases[number % SLOTS])
            status, text = OK, b""
        except ImageError as error:
            if error.reason == OUT_OF_MEMORY:
                _end_without_memory(image)
            status, text = BAD_IMAGE, f"{error.reason} {error}".encode()
        except DataError as error:
            status, text = BAD_FILE, f"- {error}".encode()
        except MemoryError:
            _end_without_memory(image)
        replies.write(REPLY.pack(status, len(text)) + text)
        replies.flush()
        number += 1


def _end_without_memory(image: ImageFile) -> NoReturn:
    # A fresh process has more memory; the image is given up only when that one fails too.
    say(f"image worker {os.getpid()}: out of memory with {location_of(image)}", to_errors=True)
    os._exit(1)


def main() -> None:
    """Answer requests on standard input until it closes; arguments: geometry as JSON, descriptor of the memory."""
    # Schedulers signal every process of a job; the rank decides what that means.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # A stopped worker would not notice that its rank has been killed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Whatever a library prints must not end up among the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    fields = json.loads(sys.argv[1])
    geometry = ImageGeometry(**{**fields, "background": tuple(fields["background"])})
    canvases = map_canvases(int(sys.argv[2]), side=geometry.canvas_size)
    try:
        _serve(geometry, canvases=canvases, requests=sys.stdin.buffer, replies=replies)
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
