"""What is read of a Dockerfile and of a .dockerignore, against Docker's own documentation."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from launch.bench.container import Image, build_arguments, shown
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
        ('FROM a\nRUN ["make", "all"]\n', "line 2: RUN with a list"),
        ("FROM a\nCMD make all\n", "line 2: CMD without a list"),
        ("FROM a\nFROM b\n", "line 2: a second FROM"),
        ("FROM a AS b\n", "line 1: FROM with several words"),
        ("ARG A=${B:-c}\n", "line 1: ARG with other variables"),
        ("ARG A\n", "line 1: ARG without NAME=VALUE"),
        ("ARG A=1 B=2\n", "line 1: ARG with several words"),
        ("ENV key value\n", "line 1: ENV without NAME=VALUE"),
        ("COPY a b\n", "line 1: COPY to a name"),
        ("COPY $A b/\n", "line 1: COPY with variables"),
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


IMAGE = """ARG BASE=a
ARG EXTRA="b c"
ENV HOME_OF=/opt/${BASE} OTHER=$EXTRA
WORKDIR /opt
WORKDIR ${BASE}
COPY a.md b/c.md docs/
COPY . .
USER 7:8
ENTRYPOINT ["megavl"]
CMD ["--help"]
"""


def test_an_image_is_made_of_its_steps(tmp_path: Path) -> None:
    context = tmp_path / "context"
    (context / "b").mkdir(parents=True)
    for name in ("a.md", "b/c.md"):
        (context / name).write_text(name)
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    given = build_arguments(["BASE=x=y"], steps(IMAGE))
    image = Image(root=tmp_path / "root", context=context, log=tmp_path / "log", build_args=given, shared=[])
    for step in steps(IMAGE):
        image.take(step)
    assert image.environment["HOME_OF"] == "/opt/x=y" and image.environment["OTHER"] == "b c"
    assert (image.folder, image.user, image._ids()) == ("/opt/x=y", "7:8", "7:8")
    assert [*image.entry, *image.command] == ["megavl", "--help"]
    made = sorted(str(path.relative_to(image.root / "opt/x=y")) for path in image.root.rglob("*.md"))
    assert made == ["a.md", "b/c.md", "docs/a.md", "docs/c.md"]


@pytest.mark.parametrize("text", ["OTHER=1", "BASE"])
def test_an_unknown_build_argument_is_refused(text: str) -> None:
    with pytest.raises(DockerfileError, match="with a name of BASE, EXTRA"):
        build_arguments([text], steps(IMAGE))


def test_the_shown_command_has_no_paths_of_the_machine() -> None:
    given = argparse.Namespace(work="/a", build_arg=["EXTRAS=hf"], share=["/b", "/c"], trust="/d")
    assert " ".join(shown(given)) == "--work DIR --build-arg EXTRAS=hf --share PATH --share PATH --trust FILE"
