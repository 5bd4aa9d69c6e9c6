"""`megavl push FOLDER REPO`: upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import glob
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from megavl.config.errors import CheckpointError, PeerError, UsageError, one_line
from megavl.config.version import VERSION
from megavl.convert.hf_read import is_hf_folder, open_hf_tensors
from megavl.convert.hf_write import EXPORT_FILES
from megavl.convert.model_card import CARD
from megavl.convert.safetensors_out import is_weight_file
from megavl.convert.weight_files import StoredTensors
from megavl.foreign.parsing import JSON_FILE
from megavl.foreign.printing import say, visible
from megavl.foreign.reading import read_limited

_log = logging.getLogger(__name__)
_SENT = {*EXPORT_FILES, CARD, "LICENSE", "LICENSE.md", "LICENSE.txt", "LICENSE-CODE", "LICENSE-MODEL"}
"""Whole names, as a folder may also hold keys and logs with any ending."""
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg")
_SHOWN = re.compile(r"""(?:\]\(|\]:|\bsrc[=:])[ \t]*["'<]?(?:\./)?([^\s"'<>)]+)""")
"""What a card links to: in Markdown, in HTML, or as an example in its header."""
_NO_TOKEN = "no token; run `hf auth login`, or set HF_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of `megavl convert to-hf`")
    parser.add_argument(
        "repo",
        metavar="REPO",
        help="OWNER/NAME; created if it does not exist. model.safetensors, its shards and its index there are "
        "replaced; other files that this folder does not have stay",
    )
    parser.add_argument("--public", action="store_true", help="a new repository can be seen by everyone")
    parser.add_argument("--revision", metavar="BRANCH", help="default: main")
    parser.add_argument("--message", metavar="TEXT", default="Upload model", help="of the commit")


def run(arguments: argparse.Namespace) -> int:
    """Upload; files that the Hub already has are not sent again, so a broken upload goes on when it is repeated."""
    hub, folder, repo = _library(), arguments.folder, arguments.repo
    if repo.count("/") != 1:
        raise UsageError(f"REPO: {repo!r}: give OWNER/NAME")
    _require_text(arguments.revision, option="--revision")
    _require_text(arguments.message, option="--message")
    files = _files(folder)
    if CARD not in files:
        _log.warning("%s: has no %s; `megavl convert to-hf --model-card` writes one", folder, CARD)
    with _hub_errors(hub, repo):
        hub.utils.validate_repo_id(repo)
        token = hub.get_token()
    _require_token(token)
    with _hub_errors(hub, repo):
        api = hub.HfApi(library_name="megavl", library_version=VERSION, token=token)
        url = api.create_repo(repo, private=not arguments.public, exist_ok=True)
        if arguments.revision is not None:
            api.create_branch(repo, branch=arguments.revision, exist_ok=True)
        there = api.list_repo_files(repo, revision=arguments.revision)
    stale = _stale(there, files)
    sent, deleted = ([glob.escape(name) for name in names] for names in (files, stale))
    with _hub_errors(hub, repo):
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=sent,
            delete_patterns=deleted or None,
            revision=arguments.revision,
            commit_message=arguments.message,
        )
    say(f"{len(files)} files of {folder} to {url}: {', '.join(files)}")
    if stale:
        say(f"deleted there, as this model does not have them: {', '.join(stale)}")
    say(f"commit {commit.oid}")
    return 0


def _library() -> Any:
    try:
        import huggingface_hub.errors
    except ImportError as error:
        raise UsageError("push: huggingface_hub is not installed; pip install 'megavl[hub]'") from error
    return huggingface_hub


def _require_text(value: str | None, *, option: str) -> None:
    if value is not None and not value.replace("\n", " ").isprintable():
        raise UsageError(f"{option}: {value!r}: give a text without control characters")


def _require_token(token: str | None) -> None:
    if not token:
        raise UsageError(_NO_TOKEN)
    # The token itself belongs in no message.
    odd = next((char for char in token if not "!" <= char <= "~"), None)
    if odd is not None:
        raise UsageError(f"the token holds {odd!r} (U+{ord(odd):04X}), which no token has; copy it again into HF_TOKEN")


def _shown(card: Path) -> set[str]:
    """Targets of the links in a card. The Hub's library reads its header, so it must be text."""
    if not card.is_file():
        return set()
    try:
        return set(map(unquote, _SHOWN.findall(read_limited(card, limit=JSON_FILE.size).decode("utf-8"))))
    except (OSError, ValueError) as error:
        raise UsageError(f"{card}: no text in UTF-8 ({one_line(error)}); save it as UTF-8, or remove it") from error


def _files(folder: Path) -> list[str]:
    """Names of the files to send: those that an export has. Its weights are opened to see that it is whole."""
    if not folder.is_dir() or not is_hf_folder(folder):
        raise CheckpointError(f"{folder}: no folder with a config.json; give one that `megavl convert to-hf` wrote")
    _require_usual_names(open_hf_tensors(folder), folder)
    files, left_out, shown = [], [], _shown(folder / CARD)
    for entry in sorted(folder.iterdir()):
        image = entry.name in shown and entry.suffix.lower() in _IMAGES and not entry.name.startswith(".")
        if not (image or entry.name in _SENT or is_weight_file(entry.name)):
            left_out.append(entry.name)
        # A link could carry a file from anywhere on this machine into a public place.
        elif entry.is_symlink():
            raise UsageError(f"{entry}: a link; replace it by its file before you push")
        elif not entry.is_file():
            _log.warning("%s: not a file, left out", entry)
        elif not entry.name.isprintable():
            raise UsageError(f"{entry}: the Hub cannot have a file of this name; rename it")
        else:
            files.append(entry.name)
    if left_out:
        _log.warning(
            "%s: left out, as an export has no such files and %s shows no such images: %s",
            folder,
            CARD,
            visible(", ".join(left_out), keep=""),
        )
    return files


def _require_usual_names(tensors: StoredTensors, folder: Path) -> None:
    """Weights of other names would be left out."""
    for path in sorted({tensors.source, *(Path(tensors.locate(name)) for name in tensors)}):
        if path.parent != folder or not is_weight_file(path.name):
            raise UsageError(
                f"{path}: only weights in safetensors are sent, under the names that an export gives them "
                "(model.safetensors); write them with `megavl convert to-hf`"
            )


def _stale(there: Iterable[str], files: Sequence[str]) -> list[str]:
    """Weights of an earlier upload; clients would read a `model.safetensors` before the shards of this one."""
    return sorted(name for name in set(there) - set(files) if is_weight_file(name))


@contextmanager
def _hub_errors(hub: Any, repo: str) -> Iterator[None]:
    """Errors of calls of the Hub's library; what is ours stays outside, so that its bugs are not taken for answers."""
    try:
        yield
    except hub.errors.HFValidationError as error:
        raise UsageError(f"REPO: {one_line(error)}") from error
    except hub.errors.LocalTokenNotFoundError as error:
        raise UsageError(_NO_TOKEN) from error
    except hub.errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 500)
        if status < 500 and status != 429:
            raise UsageError(
                f"{repo}: the Hub refused it ({one_line(error)}); check the name, and that the token "
                "(`hf auth login` or HF_TOKEN) may write there"
            ) from error
        raise PeerError(f"{repo}: the Hub failed ({one_line(error)}); repeat the command to go on") from error
    # The HTTP library below is another in each major release; its errors have one base class.
    except (OSError, RuntimeError, hub.errors.HTTPError) as error:
        raise PeerError(f"{repo}: the upload broke off ({one_line(error)}); repeat the command to go on") from error
    except (AttributeError, KeyError, TypeError, JSONDecodeError) as error:
        what = f"huggingface_hub {hub.__version__}, {type(error).__name__}: {one_line(error)}"
        raise PeerError(
            f"{repo}: what answered is not understood ({what}); check HF_ENDPOINT and the proxy on the way to the Hub, "
            "or try another release of huggingface_hub"
        ) from error
    # Such as a header of the card that the Hub does not accept.
    except ValueError as error:
        raise UsageError(f"{repo}: not uploaded ({one_line(error)})") from error
