"""Looks for the first images before a run starts: where none is found, the image root is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from data_tools.pipeline.image_source import ImageSource, is_inside_record, open_image_source
from data_tools.pipeline.job import Job, Task
from data_tools.readers.files import entries
from data_tools.readers.formats import read_record
from data_tools.readers.record import Picture, RecordError, parse_json
from megavl.config.errors import UsageError
from megavl.data.table import ReadHandles

_PATHS = 100
"""Paths that are looked for."""
_REFERENCES = 1000
"""Images of all kinds among which they are searched."""
_RECORDS = 1000
"""Records of each input in which they are searched."""
_BYTES = 16 << 20
"""And the bytes of these records."""
_SHOWN = 3


def check_first_images(job: Job, tasks: Sequence[Task]) -> None:
    """Check that one of the first images that are named by path can be read: a root holds it, and no link leads out.

    Addresses without a file do not count, nor do images that a record can do without. Where records also hold images
    themselves, a few paths without a file do not end the run.

    Args:
        job: the run.
        tasks: its tasks, in order.

    Raises:
        UsageError: there are such images, and none of them can be read.
    """
    missing: list[str] = []
    linked: dict[str, str] = {}
    roots: dict[str, None] = {}
    inline = False
    handles = ReadHandles(limit=4)
    try:
        for source, picture in islice(_first_pictures(job, tasks, handles=handles), _REFERENCES):
            inline = inline or is_inside_record(picture)
            if path := source.path_of(picture):
                if target := source.leads_out(path):
                    linked[path] = target
                elif source.holds(path):
                    return
                missing.append(path)
                roots |= dict.fromkeys(source.roots)
            if len(missing) == _PATHS:
                break
    finally:
        handles.close()
    if not missing or (len(missing) < _PATHS and inline):
        return
    if linked:
        path, target = next(iter(linked.items()))
        raise UsageError(
            f"--image-root {' '.join(roots)}: none of the first {len(missing)} images can be read, because symbolic "
            f"links lead out of it, such as {path[:200]} to {target}; allow them with --follow-links, or add the "
            "folder that they lead to"
        )
    shown = ", ".join(dict.fromkeys(path[:200] for path in missing[:_SHOWN]))
    raise UsageError(
        f"--image-root {' '.join(roots)}: holds none of the first {len(missing)} images ({shown}); give the folders "
        "that these paths start from"
    )


def _first_pictures(job: Job, tasks: Sequence[Task], *, handles: ReadHandles) -> Iterator[tuple[ImageSource, Picture]]:
    for number, item in enumerate(job.inputs):
        if item.only == "text":
            continue
        read = 0
        source = open_image_source(job, item, handles=handles)
        own = (task for task in tasks if task.input == number)
        for entry in islice((entry for task in own for entry in entries(task.split)), _RECORDS):
            content = entry.content
            if isinstance(content, RecordError):
                continue
            if (read := read + entry.size) > _BYTES:
                break
            try:
                raw = parse_json(content) if isinstance(content, bytes) else content
                record = read_record(raw, format=item.only, columns=dict(job.columns), ignore=job.ignore)
            except RecordError:
                continue
            yield from ((source, picture) for picture in record.pictures if not picture.optional)
