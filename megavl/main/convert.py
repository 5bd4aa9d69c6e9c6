"""`megavl convert {from-hf,to-hf,init,average,verify}`: Hugging Face folders to checkpoints and back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megavl.checkpoint.reader import newest_checkpoints
from megavl.config.adaptor import ADAPTORS
from megavl.config.chat import IMAGE_TOKEN
from megavl.config.errors import CheckpointError, DataError, UsageError, one_line
from megavl.config.identity import model_changes
from megavl.config.load import load_model_config as load_preset
from megavl.config.presets import MODELS
from megavl.convert.average import average
from megavl.convert.checkpoint_files import export_checkpoint, open_unused, require_own_directory, write_checkpoint
from megavl.convert.hf_read import canonical_tensors, open_hf_tensors, read_config, read_unused
from megavl.convert.model_card import report_rows
from megavl.convert.open_weights import WeightSource, find_weights
from megavl.convert.origins import ORIGINS, mean_origins
from megavl.convert.start_weights import StartWeights, start_weights
from megavl.convert.table import EXPORTS
from megavl.convert.tokenizer_files import fitting_tokenizer, tokenizer_paths, with_image_token
from megavl.convert.verify import compare
from megavl.data.same_tokenizer import difference
from megavl.data.tokenizer import open_tokenizer, tokenizer_in
from megavl.files.durable import replace_durably, storage_errors
from megavl.files.model_folders import hub_snapshot
from megavl.foreign.parsing import LARGE_JSON_FILE, read_json
from megavl.foreign.printing import say
from megavl.main.bounds import require_at_least
from megavl.main.device import choose_device
from megavl.main.progress import counted
from megavl.weights.dtypes import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    load = actions.add_parser("from-hf", help="Hugging Face folder (either format) to a MegaVL checkpoint")
    load.add_argument("source", metavar="SRC", type=Path)
    load.add_argument("out", metavar="OUT", type=Path, help="directory of checkpoints; iter_0000000 is made in it")
    save = actions.add_parser("to-hf", help="MegaVL checkpoint to a Hugging Face folder")
    save.add_argument("source", metavar="CKPT", type=Path)
    save.add_argument("out", metavar="OUT", type=Path)
    save.add_argument(
        "--format",
        choices=EXPORTS,
        required=True,
        help="native: transformers' own classes; original: the release's; llm: the decoder alone, as LLaMA",
    )
    save.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    save.add_argument(
        "--model-card", action="store_true", help="write README.md: how the model was trained, on what, and its results"
    )
    save.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="with --model-card: report.json of `megavl evaluate --out`, also with --harness; may be repeated",
    )
    init = actions.add_parser("init", help="start weights: a language model, SigLIP and SAM to a MegaVL checkpoint")
    init.add_argument("out", metavar="OUT", type=Path, help="directory of checkpoints; iter_0000000 is made in it")
    init.add_argument("--llm", metavar="DIR", type=Path, required=True, help="DeepSeek-LLM, as transformers stores it")
    init.add_argument("--siglip", metavar="DIR|FILE", type=Path, required=True, help="timm, open_clip or transformers")
    init.add_argument("--sam", metavar="DIR|FILE", type=Path, help="segment-anything or transformers; not for 1b")
    init.add_argument("--preset", choices=MODELS, required=True, help="sizes that all three must have")
    init.add_argument("--adaptor", choices=ADAPTORS, help="another adaptor than the preset's, as in model.adaptor.kind")
    init.add_argument("--adaptor-depth", metavar="N", type=int, help="its linear layers in sequence")
    init.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="one type for all tensors; default: bfloat16, what training computes in; float32 loses nothing",
    )
    init.add_argument("--seed", type=int, default=0, help="of the tensors that no source has; default: 0")
    mean = actions.add_parser("average", help="mean of the weights of several models to a MegaVL checkpoint")
    mean.add_argument(
        "sources", metavar="A", type=Path, nargs="+", help="checkpoints or Hugging Face folders of one model"
    )
    mean.add_argument("out", metavar="OUT", type=Path, help="directory of checkpoints; iter_0000000 is made in it")
    mean.add_argument(
        "--newest",
        metavar="N",
        type=int,
        help="A is one directory of checkpoints, such as a run's: average its newest N good ones",
    )
    check = actions.add_parser(
        "verify", help="compare the weights of two models, or the logits of an export with those of transformers"
    )
    check.add_argument("source", metavar="A", type=Path, help="checkpoint or Hugging Face folder in either format")
    check.add_argument("out", metavar="B", type=Path, nargs="?", help="the model to compare with A")
    check.add_argument(
        "--against",
        choices=("transformers",),
        help="compare logits on text and images, in fp32 on the CPU: MegaVL opens A, transformers opens B (default: "
        "A), a folder in the format native or llm; needs the extra `hf`",
    )
    check.add_argument("--json", metavar="FILE", type=Path, help="with --against: write the result there too")


def run(arguments: argparse.Namespace) -> int:
    """Run one action."""
    actions = {"from-hf": _from_hf, "to-hf": _to_hf, "init": _init, "average": _average, "verify": _verify}
    if arguments.action in ("from-hf", "init", "average"):
        require_own_directory(arguments.out)
    try:
        return actions[arguments.action](arguments)
    except DataError as error:
        # A tokenizer is data elsewhere; here it is a part of the model.
        raise CheckpointError(str(error)) from error


def _from_hf(arguments: argparse.Namespace) -> int:
    source = hub_snapshot(arguments.source)
    config, fmt = read_config(source)
    fitting_tokenizer(source, config)
    tensors = open_hf_tensors(source)
    weights = canonical_tensors(tensors, config=config, fmt=fmt)
    files: dict[str, bytes | Path] = {f"tokenizer/{p.name}": p for p in tokenizer_paths(source)}
    unused = read_unused(tensors, config=config, fmt=fmt)
    progress = partial(counted, what="from-hf")
    out = write_checkpoint(arguments.out, config=config, tensors=weights, unused=unused, files=files, progress=progress)
    say(f"{source} ({fmt} format, {config.preset} sizes): {len(weights)} tensors to {out}")
    return 0


def _init(arguments: argparse.Namespace) -> int:
    asked = {"kind": arguments.adaptor, "depth": arguments.adaptor_depth}
    adaptor = {key: value for key, value in asked.items() if value is not None}
    config = load_preset(arguments.preset, adaptor=adaptor)
    llm = hub_snapshot(arguments.llm)
    weights = start_weights(
        config,
        llm=llm,
        siglip=hub_snapshot(arguments.siglip),
        sam=hub_snapshot(arguments.sam) if arguments.sam else None,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    tokenizer, added = with_image_token(llm, image_id=config.image_token_id)
    files: dict[str, bytes | Path] = {f"tokenizer/{name}": content for name, content in tokenizer.items()}
    files[ORIGINS] = json.dumps(weights.origins(), indent=1).encode()
    out = write_checkpoint(
        arguments.out,
        config=config,
        tensors=weights.tensors,
        unused=weights.unused,
        files=files,
        progress=partial(counted, what="init"),
    )
    _report(weights, out=out, added=added)
    return 0


def _report(weights: StartWeights, *, out: Path, added: bool) -> None:
    for line in weights.table():
        say(line)
    left_out = ", ".join(f"{source.left_out} of {name}" for name, source in weights.sources.items() if source.left_out)
    kept = f"{len(weights.unused)} unused tensors kept for the original format" if weights.unused else ""
    for line in filter(None, (kept, left_out and f"left out: {left_out} (text tower, mask decoder and the like)")):
        say(line)
    if added:
        say(
            f"{IMAGE_TOKEN} was not in the tokenizer and got id {weights.config.image_token_id}: prepare data and "
            f"train with {out / 'tokenizer'}"
        )
    say(f"{out}: {weights.dtype}; {ORIGINS} in it names the origin of every tensor")


def _to_hf(arguments: argparse.Namespace) -> int:
    if arguments.report and not arguments.model_card:
        raise UsageError("to-hf: --report: needs --model-card")
    source, out = export_checkpoint(
        arguments.source,
        arguments.out,
        fmt=arguments.format,
        dtype=arguments.dtype,
        progress=partial(counted, what="to-hf"),
        card_reports=_read_reports(arguments.report) if arguments.model_card else None,
    )
    say(f"{source} to {out} ({arguments.format} format)")
    return 0


def _read_reports(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    reports = {}
    for name, path in zip(_report_names(paths), paths, strict=True):
        try:
            report = read_json(path, limit=LARGE_JSON_FILE)
        except (OSError, ValueError) as error:
            raise UsageError(f"--report {path}: not readable ({one_line(error)})") from error
        if not isinstance(report, dict) or not any(report_rows(name, report)):
            raise UsageError(f"--report {path}: not a report; give report.json of `megavl evaluate --out`")
        reports[name] = report
    return reports


def _report_names(paths: Sequence[Path]) -> list[str]:
    """The folder of each report, with as many folders above it as tell them apart."""
    names = [path.parent.name or path.name for path in paths]
    folders = [path.absolute().parts[1:-1] for path in paths]
    if len(set(folders)) < len(paths):
        folders = [path.absolute().parts[1:] for path in paths]
    depth = 1
    while len(set(names)) < len(names) and depth < max(map(len, folders)):
        depth += 1
        names = ["/".join(parts[-depth:]) for parts in folders]
    if len(set(names)) < len(names):
        raise UsageError(f"--report {next(name for name in names if names.count(name) > 1)}: given twice")
    return names


def _average(arguments: argparse.Namespace) -> int:
    require_at_least(2, arguments, "newest")
    paths = arguments.sources
    if arguments.newest is not None:
        if len(paths) != 1:
            raise UsageError(
                f"average: --newest {arguments.newest}: needs one directory of checkpoints, not {len(paths)}"
            )
        paths = newest_checkpoints(paths[0], count=arguments.newest)
    models = [find_weights(path) for path in paths]
    tensors = average(models)
    first = models[0]
    _require_one_tokenizer(models)
    files: dict[str, bytes | Path] = {f"tokenizer/{path.name}": path for path in _tokenizer_files(first)}
    files[ORIGINS] = json.dumps(mean_origins([model.path for model in models], tensors), indent=1).encode()
    progress = partial(counted, what="average")
    out = write_checkpoint(
        arguments.out,
        config=first.config,
        tensors=tensors,
        unused=open_unused(first.path),
        files=files,
        progress=progress,
    )
    say(f"mean of {len(models)} models, {len(tensors)} tensors, to {out}:", *(f"  {model.path}" for model in models))
    return 0


def _require_one_tokenizer(models: Sequence[WeightSource]) -> None:
    first, *others = (open_tokenizer(tokenizer_in(model.tokenizer)) for model in models)
    for model, tokenizer in zip(models[1:], others, strict=True):
        if (found := difference(first, tokenizer)) is not None:
            raise UsageError(
                f"{model.path}: its tokenizer differs from that of {models[0].path} ({found}); only checkpoints of one "
                "model can be averaged"
            )


def _tokenizer_files(model: WeightSource) -> tuple[Path, ...]:
    if model.tokenizer == model.path:
        return tokenizer_paths(model.path)
    return tuple(sorted(model.tokenizer.iterdir()))  # all verified; a SentencePiece model has any name


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.against:
        return _verify_against_transformers(arguments)
    if arguments.json is not None:
        raise UsageError("verify: --json: needs --against transformers")
    if arguments.out is None:
        raise UsageError("verify: give two models, A and B, or add --against transformers")
    with torch.no_grad():
        models = [find_weights(path) for path in (arguments.source, arguments.out)]
        result = compare(*(model.tensors for model in models))
    say(*result.summary().splitlines())
    # Equal weights with other heads or another rotary base are another model.
    differences, labels = model_changes(*(model.config for model in models))
    for change in (*differences, *(label for label in labels if label.key != "model.preset")):
        say(f"  {change.key}: {change.old} and {change.new}")
    return 0 if result.identical and not differences else 4


def _verify_against_transformers(arguments: argparse.Namespace) -> int:
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UsageError(f"verify: --json: {arguments.json.absolute().parent} is no directory; create it first")
    choose_device("cpu")
    # Imports megatron-core, which the other actions do without.
    from megavl.generate.against_transformers import compare as compare_logits

    result = compare_logits(arguments.source, arguments.out or arguments.source)
    say(*result.summary().splitlines())
    if arguments.json is not None:
        with storage_errors(f"writing {arguments.json}"):
            replace_durably(arguments.json, (json.dumps(result.report()) + "\n").encode())
    return 0 if result.within_tolerance else 4
