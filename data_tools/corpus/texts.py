"""Collects text from this machine: docstrings of the standard library, and on Debian documentation and licences.

Sources are read as data: Python files are parsed but never imported, and compressed files are read up to a limit.
"""

from __future__ import annotations

import ast
import codecs
import dataclasses
import gzip
import hashlib
import random
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megavl.config.errors import DataError

DEBIAN = Path("/usr/share")
"""Where Debian keeps `doc` and `common-licenses`."""

MAX_READ_BYTES = 65536
"""Bytes read of one documentation file."""
MAX_DOCUMENT_CHARACTERS = 24000
"""A longer document is truncated after a paragraph."""
MIN_DOCUMENT_CHARACTERS = 200
"""A shorter document is dropped."""

MAX_SHARES = {"licence": 0.12, "debian-doc": 0.43}
"""Largest share of the text for each source; docstrings fill the rest."""

PACKAGES = Path(sysconfig.get_paths()["purelib"])
"""Where the packages of the running Python are installed."""

_DOC_NAME = re.compile(r"(copyright|readme|changelog|news|faq)[\w.+-]*", re.IGNORECASE)
_NOT_TEXT = re.compile(r"\.(html?|pdf|ps|png|jpe?g|svg|css|js|xz|bz2|zip)(\.gz)?$", re.IGNORECASE)
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One collected text."""

    source: str
    """Kind and name, such as `debian-doc:bash/README`."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """First line of the docstring of a function in the standard library."""

    name: str
    """Dotted name, such as `shutil.copyfile`."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Collected text, and how much of it came from each kind of source."""

    documents: list[Document]
    summaries: list[Summary]
    sources: dict[str, dict[str, int]]
    """Documents and UTF-8 bytes per kind of source."""


def collect_text(
    *, size: int, seed: int, debian: Path = DEBIAN, library: Path | None = None, packages: Path | None = None
) -> Collection:
    """Collect about `size` bytes of text; the same machine and seed give the same documents in the same order.

    Args:
        size: stop after this many UTF-8 bytes.
        seed: decides the order of files and documents.
        debian: folder with `doc` and `common-licenses`; may be absent.
        library: folder of the standard library; by default that of the running Python.
        packages: folder of installed packages, whose docstrings come last; None reads none.

    Raises:
        DataError: no text is found.
    """
    rng = random.Random(f"text/{seed}")
    library = library or Path(sysconfig.get_paths()["stdlib"])
    summaries: list[Summary] = []
    found: list[Document] = []
    sources: dict[str, dict[str, int]] = {}
    seen: set[bytes] = set()
    streams = {
        "licence": (_read_files(_licences(debian), root=debian / "common-licenses", rng=rng)),
        "debian-doc": (_read_files(_documentation(debian), root=debian / "doc", rng=rng)),
        "python-doc": (_read_docstrings(library, rng=rng, summaries=summaries)),
    }
    if packages is not None:
        # Questions are asked about the standard library only.
        streams["package-doc"] = _read_docstrings(packages, rng=rng, summaries=[])
    with tqdm(total=size, unit="B", unit_scale=True, desc="text", disable=None) as progress:
        for kind, stream in streams.items():
            room = min(size - _bytes(found), int(size * MAX_SHARES.get(kind, 1.0)))
            taken = _take(stream, kind=kind, room=room, seen=seen, progress=progress)
            found += taken
            sources[kind] = {"documents": len(taken), "bytes": _bytes(taken)}
    if not found:
        raise DataError(
            f"{debian}, {library}: no text was found; give the folder of a Debian system with --debian-root"
        )
    rng.shuffle(found)
    return Collection(documents=found, summaries=summaries, sources=sources)


def divide(collection: Collection, *, kept_back: int) -> tuple[Collection, list[Document]]:
    """The collection without its first documents of together about `kept_back` bytes, and these documents.

    Raises:
        DataError: no document would be left.
    """
    size, count = 0, 0
    while size < kept_back and count < len(collection.documents):
        size += _bytes(collection.documents[count : count + 1])
        count += 1
    if count == len(collection.documents):
        raise DataError(f"{kept_back} held-out bytes: only {size} bytes of text were found; ask for less held-out text")
    rest = dataclasses.replace(collection, documents=collection.documents[count:])
    return rest, collection.documents[:count]


def _bytes(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _take(
    stream: Iterator[tuple[str, str]], *, kind: str, room: int, seen: set[bytes], progress: tqdm[None]
) -> list[Document]:
    """Clean documents from (name, text) pairs until they fill `room` bytes."""
    taken: list[Document] = []
    for name, raw in stream:
        if room <= 0:
            break
        text = _clean(raw, seen=seen)
        if len(text) >= MIN_DOCUMENT_CHARACTERS:
            taken.append(Document(source=f"{kind}:{name}", text=text))
            room -= len(text.encode())
            progress.update(len(text.encode()))
    return taken


def _clean(raw: str, *, seen: set[bytes]) -> str:
    """The paragraphs that are not in `seen`, up to the maximum length of a document."""
    raw = raw.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    if _CONTROL.search(raw):
        return ""
    kept: list[str] = []
    length = 0
    for paragraph in re.split(r"\n\s*\n", raw):
        paragraph = "\n".join(line.rstrip() for line in paragraph.split("\n")).strip("\n")
        key = hashlib.sha256(" ".join(paragraph.split()).lower().encode()).digest()
        if not paragraph or key in seen:
            continue
        length += len(paragraph) + 2
        if length > MAX_DOCUMENT_CHARACTERS:
            break
        seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept)


def _licences(debian: Path) -> list[Path]:
    folder = debian / "common-licenses"
    return sorted(path for path in folder.glob("*") if path.is_file() and not path.is_symlink())


def _documentation(debian: Path) -> list[Path]:
    return sorted(
        path
        for path in (debian / "doc").rglob("*")
        if _DOC_NAME.fullmatch(path.name)
        and not _NOT_TEXT.search(path.name)
        and path.is_file()
        and not path.is_symlink()
    )


def _read_files(paths: list[Path], *, root: Path, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Name and beginning of each readable UTF-8 file, in random order."""
    rng.shuffle(paths)
    for path in paths:
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                head = file.read(MAX_READ_BYTES)
            # An incremental decoder refuses other encodings, but accepts a character truncated by the limit.
            text = codecs.getincrementaldecoder("utf-8")().decode(head)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError):
            continue
        yield path.relative_to(root).as_posix(), text


def _read_docstrings(library: Path, *, rng: random.Random, summaries: list[Summary]) -> Iterator[tuple[str, str]]:
    """Name and docstrings of each module, in random order; also appends to `summaries`."""
    paths = sorted(
        path for path in library.rglob("*.py") if not _NOT_LIBRARY.intersection(path.relative_to(library).parts)
    )
    rng.shuffle(paths)
    for path in paths:
        name = path.relative_to(library).with_suffix("").as_posix()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        module = name.replace("/", ".").removesuffix(".__init__")
        entries = list(_walk(tree, name=module))
        if not any(part.startswith("_") for part in module.split(".")):
            summaries += _summaries(entries)
        yield f"{name}.py", "\n\n".join(f"{title}\n\n{doc}" for title, doc, _ in entries)


def _walk(node: ast.Module | ast.ClassDef, *, name: str) -> Iterator[tuple[str, str, bool]]:
    """Title, docstring and whether it is a public function, of a module or class and everything inside it."""
    doc = ast.get_docstring(node)
    if doc:
        yield name, doc, False
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, name=f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(child)
            if doc:
                arguments = ", ".join(argument.arg for argument in child.args.args)
                public = isinstance(node, ast.Module) and not child.name.startswith("_")
                yield f"{name}.{child.name}({arguments})", doc, public


def _summaries(entries: list[tuple[str, str, bool]]) -> Iterator[Summary]:
    """Docstring first lines of public functions, if they are one plain sentence."""
    names = Counter(title.partition("(")[0] for title, _, _ in entries)
    for title, doc, public in entries:
        line = doc.split("\n\n")[0].strip()
        name = title.partition("(")[0]
        if public and names[name] == 1 and 20 <= len(line) <= 100 and line.endswith(".") and "\n" not in line:
            yield Summary(name=name, text=line)
