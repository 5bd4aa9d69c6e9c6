"""`megavl judge A.jsonl B.jsonl --endpoint URL --judge NAME [--out DIR]`: which of two models answers better."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megavl.config.errors import PeerError, UsageError
from megavl.config.evaluation import KEY_VARIABLE
from megavl.foreign.printing import say
from megavl.main.bounds import require_at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    for name in ("a", "b"):
        parser.add_argument(
            name,
            metavar=f"{name.upper()}.jsonl",
            type=Path,
            help='answers of a model: lines of {"id", "question", "answer", "images", "category"}, as written by '
            "`megavl evaluate --out` and `megavl generate --prompts`",
        )
    parser.add_argument("--endpoint", metavar="URL", required=True, help="OpenAI-compatible, such as http://host/v1")
    parser.add_argument("--judge", metavar="NAME", required=True, help="model at the endpoint that judges")
    parser.add_argument(
        "--key-variable",
        metavar="NAME",
        default=KEY_VARIABLE,
        help="environment variable with the endpoint's key (default: %(default)s)",
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="keep verdicts there and go on from them; write report.{json,md,svg}"
    )
    parser.add_argument("--workers", metavar="N", type=int, default=4, help="requests at a time (default: %(default)s)")
    parser.add_argument(
        "--attempts", metavar="N", type=int, default=5, help="requests for one verdict (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=120.0, help="seconds for one request (default: %(default)s)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the bootstrap (default: %(default)s)")


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """--questions, --names, --no-images and --limit, for commands that read answers of models."""
    parser.add_argument(
        "--questions",
        metavar="FILE",
        type=Path,
        help="JSONL with question, images and category of answers that lack them",
    )
    parser.add_argument("--names", metavar="A,B", help="names of the models; default: those of the files")
    parser.add_argument("--no-images", action="store_true", help="show questions without their images")
    parser.add_argument(
        "--image-root",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="images may be in this folder too, besides those of the files and the working folder; may be repeated",
    )
    parser.add_argument("--limit", metavar="N", type=int, help="take the first N questions only")


def names_of(paths: list[Path], given: str | None) -> list[str]:
    """A name for each file of answers: by --names, else the file's, or its folder's where files are called alike.

    Raises:
        UsageError: another number of names than of files, or the same name twice.
    """
    if given is None:
        stems = [path.stem for path in paths]
        names = stems if len(set(stems)) == len(stems) else [path.absolute().parent.name for path in paths]
    else:
        names = [name.strip() for name in given.split(",")]
    if len(names) != len(paths) or len(set(names)) < len(names) or not all(names):
        raise UsageError(f"--names: {', '.join(names)}: give {len(paths)} different names, such as --names ours,theirs")
    return names


def run(arguments: argparse.Namespace) -> int:
    """Ask, count, and write the report; 0, or 7 if the endpoint gave no verdict at all."""
    from tqdm import tqdm

    from megavl.evaluate.endpoint import Endpoint
    from megavl.evaluate.judge.answers import read_compared
    from megavl.evaluate.judge.bars import bars, table
    from megavl.evaluate.judge.compare import identity, judge_answers, report
    from megavl.evaluate.ledger import Ledger, read_answers
    from megavl.evaluate.out_folder import take_folder, write_files

    require_at_least(1, arguments, "workers", "attempts", "limit")
    if not 0 < arguments.timeout < float("inf"):
        raise UsageError(f"--timeout: {arguments.timeout} must be a positive number of seconds")
    require_at_least(0, arguments, "seed")
    paths = [arguments.a, arguments.b]
    names = names_of(paths, arguments.names)
    endpoint = Endpoint(
        arguments.endpoint,
        arguments.judge,
        key_variable=arguments.key_variable,
        attempts=arguments.attempts,
        timeout_s=arguments.timeout,
    )
    questions = read_compared(
        paths,
        questions=arguments.questions,
        with_images=not arguments.no_images,
        limit=arguments.limit,
        image_roots=arguments.image_root,
    )
    with ExitStack() as held:
        ledger = Ledger()
        if arguments.out is not None:
            held.enter_context(take_folder(arguments.out))
            path = arguments.out / "verdicts.jsonl"
            known = read_answers(path, identity=identity(questions, judge=arguments.judge, url=endpoint.url))
            ledger = Ledger(known, path=path)
        with tqdm(total=2 * len(questions), unit="verdict", disable=None) as bar:
            judged = judge_answers(questions, endpoint, ledger=ledger, workers=arguments.workers, progress=bar.update)
        about: dict[str, Any] = {
            "models": names,
            "judge": arguments.judge,
            "endpoint": endpoint.url,
            "seed": arguments.seed,
        }
        found = report(judged, about=about, seed=arguments.seed)
        if arguments.out is not None:
            title = f"# {names[0]} against {names[1]}, judged by {arguments.judge}"
            page = f"{title}\n\n{table(found)}\n\n![bars](report.svg)\n"
            files = {
                "report.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
                "report.md": page,
                "report.svg": bars(found),
            }
            write_files(arguments.out, files)
    say(*table(found).splitlines())
    errors = found["errors"]
    if errors:
        again = "; run the same command again to ask for these only" if arguments.out is not None else ""
        say(f"{len(errors)} of {2 * len(questions)} verdicts are missing, the last: {errors[-1]['error'][:300]}{again}")
    if not found["all"]["n"]:
        raise PeerError(f"--endpoint: {endpoint.url}: no question got a verdict; {errors[0]['error'][:300]}")
    return 0
