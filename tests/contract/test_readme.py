"""Commands in READMEs and guides exist: make targets, scripts, and subcommands of `megavl`."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

from megavl.main.cli import main

ROOT = Path(__file__).resolve().parents[2]
READMES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "launch" / "TUTORIAL.md",
        *(path for top in ("megavl", "data_tools", "launch", "tests") for path in (ROOT / top).rglob("README.md")),
    ]
)


def commands(readme: Path) -> list[list[str]]:
    """Words of every command in the file's fenced bash blocks: comments, settings and prompts taken away."""
    found = []
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||[|;]", line.removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0], re.DOTALL):
                    words.pop(0)
                if words:
                    found.append(words)
    return found


ALL = [(readme, words) for readme in READMES for words in commands(readme)]


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def help_of(subcommand: tuple[str, ...]) -> str:
    """What `megavl SUBCOMMAND --help` prints; in this process, since megavl has many subcommands."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        main([*subcommand, "--help"])
    assert ended.value.code in (0, None), f"megavl {' '.join(subcommand)} has no help"
    return printed.getvalue()


def check(words: list[str]) -> None:
    program, *rest = words
    program = re.sub(r"^(\S*/)?python3?$", "python", program.removeprefix(".venv/bin/"))
    if program == "make":
        targets = [word for word in rest if not word.startswith("-") and "=" not in word]
        assert set(targets) <= make_targets()
    elif program == "megavl" or (program == "python" and rest[:2] == ["-m", "megavl"]):
        check_megavl(rest if program == "megavl" else rest[2:])
    elif program in ("torchrun", "srun"):
        assert "megavl" in rest
        check_megavl(rest[rest.index("megavl") + 1 :])
    elif program in ("python", "bash", "sbatch", "source", ".") and rest and not rest[0].startswith("-"):
        assert (ROOT / rest[0]).is_file() or rest[0] == ".venv/bin/activate", f"{rest[0]} does not exist"
    elif "/" in program:
        assert (ROOT / program).is_file(), f"{program} does not exist"


def check_megavl(rest: list[str]) -> None:
    assert rest and re.fullmatch(r"[a-z]+", rest[0]), "megavl is shown without a subcommand"
    depth = 2 if rest[0] in ("convert", "rate") else 1
    shown = help_of(tuple(rest[:depth]))
    options = {word.partition("=")[0] for word in rest if word.startswith("--")}
    unknown = {option for option in options if not re.search(rf"{re.escape(option)}\b", shown)}
    assert not unknown, f"megavl {rest[0]} has no {sorted(unknown)}"


@pytest.mark.parametrize(
    ("readme", "words"),
    ALL,
    ids=[f"{readme.relative_to(ROOT)}:{shlex.join(words)[:60]}" for readme, words in ALL],
)
def test_command_exists(readme: Path, words: list[str]) -> None:
    check(words)


def test_root_readme_shows_the_commands_that_ci_runs() -> None:
    shown = {shlex.join(words) for words in commands(ROOT / "README.md")}
    ci = {line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")}
    assert ci == {"make check", "make test"}
    assert ci | {"make demo", "make quick"} <= shown


def test_root_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_relative_links_lead_somewhere() -> None:
    broken = []
    for readme in [*READMES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", readme.read_text()):
            if "://" not in target and not (readme.parent / target).exists():
                broken.append(f"{readme.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_make_target_is_explained() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    explained = set(re.findall(r"^make (\S+)", shown, re.MULTILINE))
    assert explained == make_targets()
    assert {"setup", "demo", "quick", "test", "test-all", "check", "bench", "golden", "clean", "help"} <= explained
