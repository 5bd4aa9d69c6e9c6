"""Text is found on any machine, is read as data only, has no duplicates, and its size is limited."""

import gzip

import pytest

from data_tools.corpus.texts import MAX_DOCUMENT_CHARACTERS, collect_text, divide
from megavl.config.errors import DataError

PARAGRAPH = "The quick brown fox jumps over the lazy dog, again and again, until the paragraph is long enough. " * 3


def numbered(start, count):
    return "\n\n".join(f"{PARAGRAPH} Number {index}." for index in range(start, start + count))


@pytest.fixture
def machine(tmp_path):
    """A folder like Debian's /usr/share and one like Python's library."""
    doc, licences, library = (tmp_path / name for name in ("share/doc", "share/common-licenses", "library"))
    for folder in (doc / "bash", doc / "odd", licences, library / "json", library / "site-packages/evil"):
        folder.mkdir(parents=True)
    (doc / "bash/README").write_text(numbered(0, 3))
    (doc / "bash/changelog.gz").write_bytes(gzip.compress(numbered(10, 3).encode()))
    (doc / "bash/copyright").write_text(numbered(0, 3))  # the same as README
    (doc / "odd/README.latin1").write_bytes(numbered(20, 3).encode() + b"\xe9\xe8")
    (doc / "odd/README.binary").write_bytes(numbered(30, 3).encode() + b"\0\1\2")
    (doc / "odd/changelog.Debian.gz").write_bytes(gzip.compress(numbered(40, 3).encode())[:-30] + b"broken")
    (doc / "odd/README.bomb.gz").write_bytes(gzip.compress(b"".join(b"%d\n\n" % i for i in range(200_000))))
    (doc / "odd/picture.png").write_text(numbered(50, 3))
    (doc / "odd/README.link").symlink_to(doc / "bash/README")
    (licences / "GPL-9").write_text(numbered(60, 3))
    (library / "json/tool.py").write_text(
        f'"""A module.\n\n{PARAGRAPH}"""\nraise SystemExit("executed")\n'
        'def load(path):\n    """Read what the path holds."""\n'
    )
    (library / "broken.py").write_text("def (:\n")
    (library / "site-packages/evil/mod.py").write_text(f'"""{numbered(70, 3)}"""')
    return tmp_path


def test_sources_are_read_as_data(machine):
    found = collect_text(size=10**6, seed=0, debian=machine / "share", library=machine / "library")
    names = {document.source for document in found.documents}
    assert {"licence:GPL-9", "debian-doc:bash/changelog.gz", "python-doc:json/tool.py"} <= names
    assert len(names & {"debian-doc:bash/README", "debian-doc:bash/copyright"}) == 1, "duplicates were kept"
    assert not any(name.startswith(("debian-doc:odd/README.latin1", "debian-doc:odd/README.binary")) for name in names)
    assert not any("picture" in name or "link" in name or "evil" in name or "broken" in name for name in names)
    assert all(len(document.text) <= MAX_DOCUMENT_CHARACTERS for document in found.documents)
    assert [(summary.name, summary.text) for summary in found.summaries] == [
        ("json.tool.load", "Read what the path holds.")
    ]
    assert sum(source["documents"] for source in found.sources.values()) == len(found.documents)


def test_packages_give_text_but_no_questions(machine):
    found = collect_text(
        size=10**6, seed=0, debian=machine / "share", library=machine / "json", packages=machine / "library"
    )
    names = {document.source for document in found.documents}
    assert "package-doc:json/tool.py" in names and found.summaries == []


def test_held_out_documents_are_set_apart(machine):
    whole = collect_text(size=10**6, seed=0, debian=machine / "share", library=machine / "library")
    rest, kept = divide(whole, kept_back=1)
    assert kept == whole.documents[:1] and rest.documents == whole.documents[1:]
    assert divide(whole, kept_back=0) == (whole, [])
    with pytest.raises(DataError, match="ask for less held-out text"):
        divide(whole, kept_back=10**6)


def test_the_order_depends_on_the_seed_alone(machine):
    def order(seed):
        found = collect_text(size=10**6, seed=seed, debian=machine / "share", library=machine / "library")
        return [document.source for document in found.documents]

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(5)}) > 1


def test_the_standard_library_alone_is_enough(tmp_path):
    found = collect_text(size=100_000, seed=0, debian=tmp_path / "absent")
    assert (
        100_000
        <= sum(len(document.text.encode()) for document in found.documents)
        <= 100_000 + MAX_DOCUMENT_CHARACTERS * 4
    )
    assert all(document.source.startswith("python-doc:") for document in found.documents)


def test_no_text_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"absent.*no text was found.*--debian-root"):
        collect_text(size=1000, seed=0, debian=tmp_path / "absent", library=tmp_path)
