"""`megavl rate {page,report}`: people rate the answers of several models without knowing whose they are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megavl.config.errors import DataError, UsageError
from megavl.foreign.printing import say
from megavl.main.bounds import require_at_least
from megavl.main.judge import add_input_arguments, names_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    page = actions.add_parser("page", help="a blind rating page: one HTML file, which works without a network")
    page.add_argument(
        "answers", metavar="ANSWERS.jsonl", type=Path, nargs="+", help="one file for each model, as for judge"
    )
    page.add_argument("--out", metavar="PAGE.html", type=Path, required=True, help="PAGE.key.json is written beside it")
    page.add_argument("--seed", metavar="N", type=int, default=0, help="of the order of answers (default: %(default)s)")
    add_input_arguments(page)
    report = actions.add_parser("report", help="mean ratings by model and category, with a radar")
    report.add_argument("key", metavar="PAGE.key.json", type=Path, help="written by `megavl rate page`")
    report.add_argument("ratings", metavar="RATINGS.json", type=Path, nargs="+", help="what people saved on the page")
    report.add_argument("--out", metavar="DIR", type=Path, help="write report.{json,md,svg} there")
    report.add_argument("--seed", metavar="N", type=int, default=0, help="of the bootstrap (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run one action; 0."""
    if not 0 <= arguments.seed < 2**63:
        raise UsageError(f"--seed: {arguments.seed} is out of range; give a number from 0 to 2^63 - 1")
    return {"page": _page, "report": _report}[arguments.action](arguments)


def _page(arguments: argparse.Namespace) -> int:
    from megavl.evaluate.judge.answers import read_compared
    from megavl.evaluate.out_folder import write_files
    from megavl.evaluate.people.page import rating_page

    require_at_least(1, arguments, "limit")
    out = arguments.out
    key = out.with_suffix(".key.json")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out: {out} is no name of a page; give one such as rating.html")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out: {out.parent} is no directory; create it first")
    # With another key beside it, ratings that people gave already could not be read any more.
    taken = next((path for path in (key, out) if path.exists()), None)
    if taken is not None:
        raise UsageError(f"--out: {taken} exists; give another name, or remove it if nobody rated that page")
    names = names_of(arguments.answers, arguments.names)
    questions = read_compared(
        arguments.answers,
        questions=arguments.questions,
        with_images=not arguments.no_images,
        limit=arguments.limit,
        image_roots=arguments.image_root,
    )
    made = rating_page(questions, models=names, seed=arguments.seed)
    write_files(out.parent, {key.name: json.dumps(made.key, indent=1, ensure_ascii=False) + "\n", out.name: made.html})
    size = out.stat().st_size / (1 << 20)
    say(f"{out}: {len(questions)} questions, {len(names)} answers each, {size:.1f} MiB; give it to people")
    say(f"{key}: says whose answers they are; keep it for `megavl rate report`")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from megavl.evaluate.out_folder import make_folder, write_files
    from megavl.evaluate.people.radar import radar
    from megavl.evaluate.people.ratings import figures, read_key, read_ratings, table

    key = read_key(arguments.key)
    people = [read_ratings(path, key=key) for path in arguments.ratings]
    if not any(one.found for one in people):
        raise DataError(f"{arguments.ratings[0]}: no question is rated completely; give ratings of at least one")
    found = figures(people, key=key, seed=arguments.seed)
    say(*table(found).splitlines())
    incomplete = sum(one.incomplete for one in people)
    if incomplete or found["not_rated"]:
        say(f"left out: {incomplete} incomplete ratings of a question; nobody rated {found['not_rated']} questions")
    if arguments.out is not None:
        folder = make_folder(arguments.out)
        files = {
            "report.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
            "report.md": f"# Ratings by people\n\n{table(found)}\n\n![radar](report.svg)\n",
            "report.svg": radar(found),
        }
        write_files(folder, files)
    return 0
