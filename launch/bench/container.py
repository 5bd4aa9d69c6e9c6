"""`launch/Dockerfile` without Docker: its steps in a bare Debian root, then `megavl --help` and `make demo`.

Makes the root with debootstrap and runs each step of the last commit's Dockerfile in it, on that commit's files. The
report `launch/bench/results/container_<processor>_<YYYYMM>.md` says what ran, how long, and what the demo printed.

    python -m launch.bench.container --work DIR

Needs root, debootstrap and 8 GB in DIR, where it makes `root` and removes it again. Mounts, processes and `/dev/shm`,
which has Docker's 64 MB, are of a namespace that ends with each step. The network is this machine's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.bench.engines.dockerfile import DockerfileError, Step, expand, kept, steps
from launch.bench.programs import ROOT, git
from launch.bench.report import machine, report_path, table, table_row, write_report

DOCKERFILE = "launch/Dockerfile"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEBIAN = re.compile(r"debian:(?P<suite>[a-z]+)(-slim)?")
# Runs in namespaces of its own: the new root is $1, and what is shared read-only with this machine comes up to `--`.
ENTER = """
set -e
new=$1; shift
mount --make-rprivate /
mount -t proc proc "$new/proc"
mount --rbind /dev "$new/dev"
mount --make-rslave "$new/dev"
mount -t tmpfs -o size=64m,mode=1777 shm "$new/dev/shm"
mount --rbind /sys "$new/sys"
mount --make-rslave "$new/sys"
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$new$1"; else mkdir -p "$new${1%/*}"; touch "$new$1"; fi
  mount --bind "$1" "$new$1"
  mount -o remount,bind,ro "$new$1"
  shift
done
shift
exec chroot "$@"
"""


@dataclass(kw_only=True)
class Image:
    """What the steps have made so far."""

    root: Path
    context: Path
    log: Path
    build_args: dict[str, str]
    shared: list[str]
    """Files and folders of this machine that are mounted read-only, at the same path."""
    trust: Path | None = None
    """Certificates that replace the root's, where the network of this machine has an authority of its own."""
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    user: str = "root"
    folder: str = "/"
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def take(self, step: Step) -> None:
        """Run one step as `docker build` does."""
        {
            "ARG": self._arg,
            "CMD": lambda step: setattr(self, "command", step.words()),
            "COPY": self._copy,
            "ENTRYPOINT": lambda step: setattr(self, "entry", step.words()),
            "ENV": self._env,
            "FROM": self._from,
            "RUN": lambda step: self.run(["/bin/sh", "-c", step.text], variables=self.arguments),
            "USER": lambda step: setattr(self, "user", expand(step.text, self.environment)),
            "WORKDIR": self._workdir,
        }[step.word](step)

    def run(self, words: list[str], *, variables: dict[str, str] | None = None) -> str:
        """Output of a program in the root, as the image's user; `variables` are added to the image's environment.

        Raises:
            SystemExit: it failed; the log has what it printed.
        """
        settings = {**(variables or {}), **self.environment, "HOME": self._home()}
        inside = ["/usr/bin/env", "--ignore-environment", f"--chdir={self.folder}"]
        inside += [f"{name}={value}" for name, value in settings.items()] + words
        chroot = [f"--userspec={self._ids()}", "--groups=", str(self.root), *inside]
        namespaces = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child=KILL"]
        certificates = self.root / "etc/ssl/certs/ca-certificates.crt"
        if self.trust and certificates.exists():
            shutil.copyfile(self.trust, certificates)
        begin = self.log.stat().st_size
        with self.log.open("ab") as log:
            command = [*namespaces, "sh", "-c", ENTER, "sh", str(self.root), *self.shared, "--", *chroot]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        with self.log.open("rb") as log:
            log.seek(begin)
            said = log.read().decode(errors="replace")
        if done.returncode:
            raise SystemExit(f"error: {shlex.join(words)} ended with {done.returncode}; {self.log}: {said[-2000:]}")
        return said

    def _ids(self) -> str:
        """User and group by number; chroot would look names up in this machine's files."""
        name, _, group = self.user.partition(":")
        entry = self._entry(name)
        return f"{entry[2]}:{group or entry[3]}" if entry else f"{name}:{group or 0}"

    def _home(self) -> str:
        entry = self._entry(self.user.partition(":")[0])
        return entry[5] if entry else "/"

    def _entry(self, name: str) -> list[str] | None:
        rows = [line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines()]
        return next((row for row in rows if name in (row[0], row[2])), None)

    def _arg(self, step: Step) -> None:
        name, _, default = step.text.partition("=")
        self.arguments[name] = self.build_args.get(name, expand(default.strip("\"'"), self._variables()))

    def _variables(self) -> dict[str, str]:
        return {**self.arguments, **self.environment}

    def _from(self, step: Step) -> None:
        base = expand(step.text, self.arguments)
        debian = DEBIAN.fullmatch(base)
        if debian is None:
            raise DockerfileError(f"line {step.line}: {base} cannot be made here, only debian:SUITE and -slim")
        with self.log.open("ab") as log:
            command = ["debootstrap", "--variant=minbase", debian["suite"], str(self.root)]
            subprocess.run(command, stdout=log, stderr=log, check=True)
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", self.root / "etc" / name)
        self.arguments.clear()

    def _env(self, step: Step) -> None:
        given = (word.partition("=") for word in shlex.split(step.text))
        self.environment |= {name: expand(value, self._variables()) for name, _, value in given}

    def _workdir(self, step: Step) -> None:
        self.folder = os.path.join(self.folder, expand(step.text, self._variables()))
        self._inside(self.folder).mkdir(parents=True, exist_ok=True)

    def _inside(self, path: str) -> Path:
        return self.root / os.path.join(self.folder, path).lstrip("/")

    def _copy(self, step: Step) -> None:
        *sources, target = step.words()
        into = self._inside(target)
        for source in (self.context / name for name in sources):
            if source.is_dir():
                shutil.copytree(source, into, dirs_exist_ok=True)
            else:
                into.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, into)


def main() -> int:
    """Run the steps and the demo, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with 8 GB; keeps log.txt")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as of docker build")
    parser.add_argument(
        "--share", action="append", default=[], metavar="PATH", help="mounted read-only, such as a package index"
    )
    parser.add_argument(
        "--trust", type=Path, metavar="FILE", help="certificates that replace the root's, once it has some"
    )
    arguments = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        parser.error("this needs root and debootstrap (apt-get install debootstrap)")
    work: Path = arguments.work.resolve()
    root, context = work / "root", work / "context"
    for folder in (root, context):
        if folder.exists():
            parser.error(f"{folder} exists; choose another --work, or remove it")
    try:
        given = build_arguments(arguments.build_arg, steps((ROOT / DOCKERFILE).read_text(encoding="utf-8")))
    except DockerfileError as error:
        parser.error(str(error))
    commit = git("rev-parse", "HEAD")
    if not commit:
        parser.error("this needs a git checkout, whose last commit is built")
    work.mkdir(parents=True, exist_ok=True)
    (work / "log.txt").write_bytes(b"")
    try:
        check_out(commit, context)
        image = Image(
            root=root,
            context=context,
            log=work / "log.txt",
            build_args=given,
            shared=arguments.share,
            trust=arguments.trust,
        )
        digest = hashlib.sha256((context / DOCKERFILE).read_bytes()).hexdigest()
        rows = build(image)
        tail = run_image(image, rows)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(context, ignore_errors=True)
    write_report(report_path("container"), report(commit, digest=digest, rows=rows, tail=tail, words=shown(arguments)))
    return 0


def shown(arguments: argparse.Namespace) -> list[str]:
    """The command line without paths of this machine."""
    words = ["--work", "DIR", *(word for text in arguments.build_arg for word in ("--build-arg", text))]
    words += [word for _ in arguments.share for word in ("--share", "PATH")]
    return [*words, *(["--trust", "FILE"] if arguments.trust else [])]


def build_arguments(texts: Sequence[str], found: Iterable[Step]) -> dict[str, str]:
    """Values of `--build-arg` by name.

    Raises:
        DockerfileError: no NAME=VALUE, or a name that no ARG has.
    """
    known = [step.text.partition("=")[0] for step in found if step.word == "ARG"]
    for text in texts:
        if text.partition("=")[0] not in known or "=" not in text:
            raise DockerfileError(f"--build-arg {text}: give NAME=VALUE with a name of {', '.join(known)}")
    return dict(text.split("=", 1) for text in texts)


def check_out(commit: str, folder: Path) -> None:
    """Put a commit's files into a folder, less those that its .dockerignore leaves out."""
    listed = git("ls-tree", "-r", "-z", "--name-only", commit).split("\0")
    wanted = kept(filter(None, listed), git("show", f"{commit}:.dockerignore"))
    folder.mkdir(parents=True)
    command = ["git", "-c", "safe.directory=*", "archive", commit, "--", *wanted]
    archive = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=True)
    if archive.wait():
        raise SystemExit("error: git archive failed")


def build(image: Image) -> list[str]:
    """Rows of the report, one a step."""
    rows = []
    for step in steps((image.context / DOCKERFILE).read_text(encoding="utf-8")):
        began = time.monotonic()
        print(f"line {step.line}: {step.word} {step.text[:100]}", flush=True)
        image.take(step)
        size = subprocess.run(["du", "-sm", str(image.root)], capture_output=True, text=True, check=False).stdout
        shown = step.text.replace("|", "\\|")
        rows.append(
            table_row(step.line, f"`{step.word} {shown}`", f"{time.monotonic() - began:.0f}", (size or "0").split()[0])
        )
    return rows


def run_image(image: Image, rows: list[str]) -> list[str]:
    """Run the entry point as `docker run IMAGE` does, then `make demo`; the demo's table."""
    for words in ([*image.entry, *image.command], ["make", "demo"]):
        began = time.monotonic()
        print(f"run: {shlex.join(words)}", flush=True)
        said = image.run(words)
        rows.append(table_row("run", f"`{shlex.join(words)}` as {image.user}", f"{time.monotonic() - began:.0f}", ""))
    lines = said.splitlines()
    first = max(number for number, line in enumerate(lines) if line.startswith("layout "))
    return lines[first:]


def report(commit: str, *, digest: str, rows: list[str], tail: list[str], words: list[str]) -> list[str]:
    """The lines of the report."""
    return [
        "# The Dockerfile's steps in a bare Debian root",
        "",
        f"Every step of `{DOCKERFILE}` at commit {commit[:12]} ended with code 0, and so did two programs after them. "
        f"The file's sha256 is {digest}. The root came from `debootstrap "
        "--variant=minbase`, the context from the commit's files and its `.dockerignore`. Docker itself did not run.",
        "",
        f"    python -m launch.bench.container {shlex.join(words)}",
        "",
        f"{machine()}; other programs may have used it meanwhile. `/dev/shm` had 64 MB, as in a container of Docker. "
        "`--share` mounts this machine's package indexes read-only, and `--trust` adds the authority of its network.",
        *table("| line | step | seconds | MB so far |", rows),
        "",
        "The demo ended with:",
        "",
        *(f"    {line}" for line in tail),
    ]


if __name__ == "__main__":
    sys.exit(main())
