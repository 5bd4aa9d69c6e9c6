"""Use-case categories of fine-tuning data: `python data_tools/taxonomy.py {list,tag,report,sample}`.

The categories are those of the paper (taxonomy.yaml) or of a file in the same form.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.categories.coverage import cover, svg, table
from data_tools.categories.records import TaggedRecord, moved, new_file, read_records
from data_tools.categories.sampling import check_supply, choose, order, read_weights
from data_tools.categories.tagging import Tagger, read_names, read_rules
from data_tools.categories.tree import PAPER, Taxonomy, read_taxonomy, within
from data_tools.corpus.options import Parser, whole
from data_tools.corpus.output import write_line
from megavl.config.errors import DataError, MegaVLError
from megavl.foreign.printing import say, say_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 usage, 3 data, 5 storage)."""
    try:
        options = _parser().parse_args(arguments)
        taxonomy = read_taxonomy(options.taxonomy)
        {"list": _list, "tag": _tag, "report": _report, "sample": _sample}[options.command](options, taxonomy)
    except MegaVLError as error:
        say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        say("stopped; nothing was written", to_errors=True)
        return 130
    return 0


def _list(options: argparse.Namespace, taxonomy: Taxonomy) -> None:
    shown = [category for category in taxonomy.categories.values() if category.level <= options.depth]
    for category in shown:
        about = f" - {category.about}" if category.about else ""
        say(f"{'  ' * (category.level - 1)}{category.id}: {category.name}{about}")


def _tag(options: argparse.Namespace, taxonomy: Taxonomy) -> None:
    tagger = _tagger(options, taxonomy)
    counts: Counter[str] = Counter()
    root = options.image_root or options.output.parent
    with new_file(options.output, force=options.force) as file:
        for record, category in _tagged(options, tagger):
            if category is None and options.untagged == "fail":
                raise DataError(f"{record.where}: has no {options.field} and matches no rule")
            if category is None and options.untagged == "drop":
                continue
            content = moved(record, root=root)
            if category is not None:
                counts[category] += 1
                content = {**content, "category": category}
            write_line(file, content)
    origin = tagger.origin
    for line in table(cover(counts, untagged=origin["none"], taxonomy=taxonomy), depth=1):
        say(line)
    say(f"{options.output}: {origin['field']} by field, {origin['rule']} by rule, {origin['none']} without")


def _report(options: argparse.Namespace, taxonomy: Taxonomy) -> None:
    counts = Counter(category or "" for _, category in _tagged(options, _tagger(options, taxonomy)))
    coverage = cover(counts, untagged=counts.pop("", 0), taxonomy=taxonomy)
    for line in table(coverage, depth=options.depth):
        say(line)
    for path, content in (
        (options.json, json.dumps(coverage.to_dict(), indent=1) + "\n"),
        (options.svg, svg(coverage, depth=options.depth)),
    ):
        if path is not None:
            with new_file(path, force=options.force) as file:
                file.write(content)


def _sample(options: argparse.Namespace, taxonomy: Taxonomy) -> None:
    shares = read_weights(options.weights, taxonomy=taxonomy)
    categories = list(order(shares, count=options.count))
    wanted = Counter(categories)
    found: dict[str, list[int]] = {id: [] for id in shares}
    for number, (_, category) in enumerate(_tagged(options, _tagger(options, taxonomy))):
        for id in shares:
            if category is not None and within(category, id):
                found[id].append(number)
    check_supply(wanted, {id: len(members) for id, members in found.items()}, repeat=options.repeat)
    chosen = {
        id: iter([members[n] for n in choose(len(members), count=wanted[id], seed=options.seed, category=id)])
        for id, members in found.items()
    }
    numbers = [next(chosen[id]) for id in categories]
    with new_file(options.output, force=options.force) as file, tempfile.TemporaryFile() as kept:
        _copy(options, _tagger(options, taxonomy), numbers, kept=kept, file=file)
    for id, share in shares.items():
        say(f"{id}: {wanted[id]} of {len(found[id])} records ({100 * float(share):.1f}%)")
    say(f"{options.output}: {len(numbers)} records, seed {options.seed}")


def _copy(options: argparse.Namespace, tagger: Tagger, numbers: list[int], *, kept: Any, file: Any) -> None:
    """Write the chosen records in their order; they pass through a temporary file, not through memory."""
    root = options.image_root or options.output.parent
    wanted = set(numbers)
    spans: dict[int, tuple[int, int]] = {}
    for number, (record, category) in enumerate(_tagged(options, tagger)):
        if number in wanted:
            line = (json.dumps({**moved(record, root=root), "category": category}, ensure_ascii=False) + "\n").encode()
            spans[number] = (kept.tell(), len(line))
            kept.write(line)
    if len(spans) != len(wanted):
        raise DataError("--input: was changed during the run; start again")
    for number in numbers:
        start, size = spans[number]
        kept.seek(start)
        file.write(kept.read(size).decode())


def _tagged(options: argparse.Namespace, tagger: Tagger) -> Iterator[tuple[TaggedRecord, str | None]]:
    """Every record of the inputs with its category."""
    for record in tqdm(read_records(options.input), unit="record", desc=options.command, disable=None):
        yield record, tagger.tag(record)


def _tagger(options: argparse.Namespace, taxonomy: Taxonomy) -> Tagger:
    return Tagger(
        taxonomy=taxonomy,
        key=options.field,
        names=read_names(options.names, taxonomy=taxonomy) if options.names else {},
        rules=read_rules(options.rules, taxonomy=taxonomy) if options.rules else (),
    )


def _parser() -> Parser:
    parser = Parser(prog="taxonomy.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--taxonomy", type=Path, default=PAPER, help="YAML tree of categories (the paper's)")
    depth = Parser(add_help=False)
    depth.add_argument("--depth", type=whole(1, 9), default=3, help="levels shown (3)")
    reading = Parser(add_help=False)
    reading.add_argument("--input", type=Path, nargs="+", required=True, help="JSONL files or JSON arrays of records")
    reading.add_argument("--field", default="category", help="key that may hold a record's category (category)")
    reading.add_argument("--names", type=Path, help="YAML: your name of a category to its id")
    reading.add_argument("--rules", type=Path, help="YAML: id to words, for records without a category")
    writing = Parser(add_help=False)
    writing.add_argument("--output", type=Path, required=True, help="JSONL file to make")
    writing.add_argument("--image-root", type=Path, help="folder that image paths start from (the output's)")
    force = Parser(add_help=False)
    force.add_argument("--force", action="store_true", help="replace existing files")

    commands.add_parser("list", parents=[common, depth], help="show all categories")
    tag = commands.add_parser("tag", parents=[common, reading, writing, force], help="write records with categories")
    tag.add_argument(
        "--untagged",
        choices=("keep", "drop", "fail"),
        default="keep",
        help="those without a category (keep)",
    )
    report = commands.add_parser("report", parents=[common, reading, depth, force], help="count records by category")
    report.add_argument("--json", type=Path, help="also as JSON")
    report.add_argument("--svg", type=Path, help="also as a bar chart")
    sample = commands.add_parser("sample", parents=[common, reading, writing, force], help="draw records by weight")
    sample.add_argument("--weights", type=Path, required=True, help="YAML: id to weight, for all below it too")
    sample.add_argument("--count", type=whole(1, 10**9), required=True, help="records to write")
    sample.add_argument("--seed", type=whole(0, 2**63), default=0, help="seed of the choice (0)")
    sample.add_argument("--repeat", action="store_true", help="use records again in a category that has too few")
    return parser


if __name__ == "__main__":
    sys.exit(main())
