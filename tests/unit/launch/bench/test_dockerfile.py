"""What is read of a Dockerfile and of a .dockerignore, against Docker's own documentation."""

from __future__ import annotations

import pytest

from launch.bench.engines.dockerfile import DockerfileError, Step, expand, kept, steps

TEXT = """# a comment
ARG BASE=debian:bookworm-slim

FROM ${BASE}
run apt-get update \\
 # a comment inside
 && apt-get install \\

      make
CMD ["a b", "--help"]
"""


def test_instructions_are_joined_and_numbered() -> None:
    assert steps(TEXT) == [
        Step(line=2, word="ARG", text="BASE=debian:bookworm-slim"),
        Step(line=4, word="FROM", text="${BASE}"),
        Step(line=5, word="RUN", text="apt-get update && apt-get install make"),
        Step(line=10, word="CMD", text='["a b", "--help"]'),
    ]


def test_both_forms_of_words_are_read() -> None:
    assert steps(TEXT)[-1].words() == ["a b", "--help"]
    assert Step(line=1, word="COPY", text="a 'b c' d/").words() == ["a", "b c", "d/"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM a\nADD x y\n", "line 2: ADD is not read"),
        ("COPY --from=build /a /b\n", "line 1: options and here-documents of COPY"),
        ("RUN <<END\nmake\nEND\n", "line 1: options and here-documents of RUN"),
        ("FROM a\n\nRUN make \\\n", "line 3: the file ends inside"),
    ],
)
def test_what_is_not_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(DockerfileError, match=message):
        steps(text)


def test_variables_are_replaced() -> None:
    assert expand("${A}:$B:$C-", {"A": "1", "B": "2"}) == "1:2:-"


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        ("", ["a.md", "src/a.md", "src/b/c.py", "src/b/c.pyc"]),
        ("*.md", ["src/a.md", "src/b/c.py", "src/b/c.pyc"]),
        ("**/*.md\n\n# kept: none", ["src/b/c.py", "src/b/c.pyc"]),
        ("src", ["a.md"]),
        ("*\n!src/b\n**/*.pyc", ["src/b/c.py"]),
        ("/src/*/c.p?", ["a.md", "src/a.md", "src/b/c.pyc"]),
        ("src/b\n!src/b/c.py", ["a.md", "src/a.md", "src/b/c.py"]),
    ],
)
def test_last_pattern_that_fits_decides(ignore: str, left: list[str]) -> None:
    assert kept(["a.md", "src/a.md", "src/b/c.py", "src/b/c.pyc"], ignore) == left
