"""`megavl push FOLDER REPO`: upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import glob
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megavl.config.errors import CheckpointError, PeerError, UsageError, one_line
from megavl.config.version import VERSION
from megavl.convert.hf_read import is_hf_folder, open_hf_tensors
from megavl.convert.model_card import CARD
from megavl.foreign.printing import say

_log = logging.getLogger(__name__)


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
    files = _files(folder)
    if CARD not in files:
        _log.warning("%s: has no %s; `megavl convert to-hf --model-card` writes one", folder, CARD)
    with _hub_errors(hub, repo):
        api = hub.HfApi(library_name="megavl", library_version=VERSION)
        url = api.create_repo(repo, private=not arguments.public, exist_ok=True)
        if arguments.revision is not None:
            api.create_branch(repo, branch=arguments.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in files],
            revision=arguments.revision,
            commit_message=arguments.message,
        )
    say(f"{len(files)} files of {folder} to {url}", f"commit {commit.oid}")
    return 0


def _library() -> Any:
    try:
        import huggingface_hub.errors
    except ImportError as error:
        raise UsageError("push: huggingface_hub is not installed; pip install 'megavl[hub]'") from error
    return huggingface_hub


def _files(folder: Path) -> list[str]:
    """Names of the files of an export, whose weights are opened to see that it is whole."""
    if not folder.is_dir() or not is_hf_folder(folder):
        raise CheckpointError(f"{folder}: no folder with a config.json; give one that `megavl convert to-hf` wrote")
    open_hf_tensors(folder)
    entries = sorted(folder.iterdir())
    for entry in entries:
        # A link could carry a file from anywhere on this machine into a public place.
        if entry.is_symlink():
            raise UsageError(f"{entry}: a link; replace it by its file before you push")
        if not entry.is_file():
            _log.warning("%s: not a file, left out", entry)
    return [entry.name for entry in entries if entry.is_file()]


@contextmanager
def _hub_errors(hub: Any, repo: str) -> Iterator[None]:
    try:
        yield
    except hub.errors.HFValidationError as error:
        raise UsageError(f"REPO: {one_line(error)}") from error
    except hub.errors.LocalTokenNotFoundError as error:
        raise UsageError(f"{repo}: no token; run `hf auth login`, or set HF_TOKEN") from error
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
