"""`megavl push FOLDER REPO`: upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import glob
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from megavl.config.errors import CheckpointError, MegaVLError, PeerError, UsageError, one_line
from megavl.config.version import VERSION
from megavl.convert.hf_read import is_hf_folder, open_hf_tensors
from megavl.convert.model_card import CARD
from megavl.foreign.parsing import JSON_FILE
from megavl.foreign.printing import say
from megavl.foreign.reading import read_limited

_log = logging.getLogger(__name__)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_IMAGES = ("*.png", "*.jpg", "*.jpeg", "*.webp", "*.gif", "*.svg")
_SENT = (*_WEIGHTS, "*.json", "*.jinja", "*.model", "merges.txt", CARD, "LICENSE*", *_IMAGES)
"""Files of an export, its license, and images of its card; a folder may also hold keys and logs."""
_NO_TOKEN = "no token; run `hf auth login`, or set HF_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of `megavl convert to-hf`")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME; created if it does not exist")
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
    if CARD in files:
        _require_readable(folder / CARD)
    else:
        _log.warning("%s: has no %s; `megavl convert to-hf --model-card` writes one", folder, CARD)
    with _hub_errors(hub, repo):
        hub.utils.validate_repo_id(repo)
        api = hub.HfApi(library_name="megavl", library_version=VERSION, token=_token(hub))
        url = api.create_repo(repo, private=not arguments.public, exist_ok=True)
        if arguments.revision is not None:
            api.create_branch(repo, branch=arguments.revision, exist_ok=True)
        stale = _stale(api.list_repo_files(repo, revision=arguments.revision), files)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=[glob.escape(name) for name in stale] or None,
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


def _token(hub: Any) -> str:
    token: str | None = hub.get_token()
    if not token:
        raise UsageError(_NO_TOKEN)
    # The token itself belongs in no message.
    odd = next((char for char in token if not "!" <= char <= "~"), None)
    if odd is not None:
        raise UsageError(f"the token holds {odd!r} (U+{ord(odd):04X}), which no token has; copy it again into HF_TOKEN")
    return token


def _require_readable(card: Path) -> None:
    """The Hub's library reads the card's header."""
    try:
        read_limited(card, limit=JSON_FILE.size).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{card}: no text in UTF-8 ({one_line(error)}); save it as UTF-8, or remove it") from error


def _files(folder: Path) -> list[str]:
    """Names of the files to send: those that an export has. Its weights are opened to see that it is whole."""
    if not folder.is_dir() or not is_hf_folder(folder):
        raise CheckpointError(f"{folder}: no folder with a config.json; give one that `megavl convert to-hf` wrote")
    weights = open_hf_tensors(folder).source
    if not _matches(weights.name, _WEIGHTS):
        raise UsageError(f"{weights}: only weights in safetensors are sent; write them with `megavl convert to-hf`")
    files, left_out = [], []
    for entry in sorted(folder.iterdir()):
        if not _matches(entry.name, _SENT):
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
        _log.warning("%s: left out, as an export has no such files: %s", folder, ", ".join(left_out))
    return files


def _stale(there: Iterable[str], files: Sequence[str]) -> list[str]:
    """Weights of an earlier upload; clients would read a `model.safetensors` before the shards of this one."""
    return sorted(name for name in set(there) - set(files) if "/" not in name and _matches(name, _WEIGHTS))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not name.startswith(".") and any(fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def _hub_errors(hub: Any, repo: str) -> Iterator[None]:
    try:
        yield
    except MegaVLError:
        raise
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
        what = f"{type(error).__name__}: {one_line(error)}"
        raise PeerError(
            f"{repo}: what answered is not understood ({what}); check HF_ENDPOINT and the proxy on the way to the Hub"
        ) from error
    # Such as a header of the card that the Hub does not accept.
    except ValueError as error:
        raise UsageError(f"{repo}: not uploaded ({one_line(error)})") from error
