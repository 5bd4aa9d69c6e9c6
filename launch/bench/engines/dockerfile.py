"""Reads a Dockerfile of the few kinds of instruction that launch/Dockerfile has, and a .dockerignore.

Meanings: https://docs.docker.com/reference/dockerfile and https://docs.docker.com/build/concepts/context. What is not
read here is refused, so nothing is skipped without a word.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

KNOWN = ("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR")
_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)\}|(?P<plain>\w+))")
_ODD_VARIABLE = re.compile(r"\\\$|\$\{(?!\w+\})")


class DockerfileError(ValueError):
    """A line that cannot be read here."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One instruction."""

    line: int
    """Of its first word, from 1."""
    word: str
    """In capitals."""
    text: str
    """Everything after the word, lines joined."""

    def words(self) -> list[str]:
        """The text as a list, from JSON's form or by blanks."""
        if self.text.startswith("["):
            return [str(word) for word in json.loads(self.text)]
        return shlex.split(self.text)


def steps(text: str) -> list[Step]:
    """Instructions of a Dockerfile.

    Raises:
        DockerfileError: an instruction, an option or a form that is not read here.
    """
    found: list[Step] = []
    parts: list[str] = []
    start = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or (parts and not line.strip()):
            continue
        if not parts and not line.strip():
            continue
        start = start if parts else number
        goes_on = line.rstrip().endswith("\\")
        parts.append(line.rstrip().removesuffix("\\").strip())
        if not goes_on:
            found.append(_step(" ".join(filter(None, parts)), line=start))
            parts = []
    if parts:
        raise DockerfileError(f"line {start}: the file ends inside of an instruction")
    stages = [step for step in found if step.word == "FROM"]
    if len(stages) > 1:
        raise DockerfileError(f"line {stages[1].line}: a second FROM is not read here")
    return found


def _step(text: str, *, line: int) -> Step:
    word, _, rest = text.partition(" ")
    step = Step(line=line, word=word.upper(), text=rest.strip())
    if step.word not in KNOWN:
        raise DockerfileError(f"line {line}: {word} is not read here; known are {', '.join(KNOWN)}")
    if step.text.startswith("--") or "<<" in step.text:
        raise DockerfileError(f"line {line}: options and here-documents of {step.word} are not read here: {step.text}")
    if odd := _odd(step):
        raise DockerfileError(f"line {line}: {word} {odd} is not read here: {step.text}")
    return step


def _odd(step: Step) -> str:
    """What of a known instruction would be misread; empty where nothing is."""
    is_list = step.text.startswith("[")
    if step.word in ("CMD", "ENTRYPOINT"):
        return "" if is_list else "without a list in JSON's form"
    if step.word == "RUN":
        return "with a list instead of a shell's line" if is_list else ""
    if _ODD_VARIABLE.search(step.text):
        return "with other variables than $NAME and ${NAME}"
    words = step.words()
    if step.word in ("ARG", "ENV") and not all("=" in word for word in words):
        return "without NAME=VALUE"
    if step.word == "COPY":
        if "$" in step.text:
            return "with variables"
        return "" if words[-1] in (".", "./") or words[-1].endswith("/") else "to a name that does not end with /"
    return "" if step.word == "ENV" or len(words) == 1 else "with several words"


def expand(text: str, variables: Mapping[str, str]) -> str:
    """A text with `$NAME` and `${NAME}` replaced, by nothing where a variable has no value."""
    return _VARIABLE.sub(lambda match: variables.get(match["braced"] or match["plain"], ""), text)


def kept(paths: Iterable[str], ignore: str) -> list[str]:
    """Those files of a build context that a .dockerignore leaves in it.

    Args:
        paths: relative to the context, with `/`.
        ignore: content of the file; the last pattern that fits a path or a folder above it decides.
    """
    patterns = [line.strip() for line in ignore.splitlines() if line.strip() and not line.startswith("#")]
    rules = [(_pattern(line.removeprefix("!").strip("/")), line.startswith("!")) for line in patterns]
    return [path for path in paths if _stays(path, rules)]


def _stays(path: str, rules: list[tuple[re.Pattern[str], bool]]) -> bool:
    parts = path.split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    stays = True
    for pattern, stays_if in rules:
        if any(pattern.fullmatch(name) for name in above):
            stays = stays_if
    return stays


def _pattern(text: str) -> re.Pattern[str]:
    tokens = re.split(r"(\*\*/|\*\*|\*|\?)", text)
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meanings.get(token, re.escape(token)) for token in tokens))
