"""The model card of an exported folder, `README.md`, as the Hugging Face Hub shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from megavl.config.identity import model_name
from megavl.config.model import ModelConfig
from megavl.config.version import VERSION
from megavl.convert.run_facts import RunFacts, StageFacts
from megavl.convert.table import Export
from megavl.foreign.printing import visible

CARD = "README.md"
_TAGS: dict[Export, tuple[str, str | None, list[str]]] = {
    "native": ("image-text-to-text", "transformers", ["deepseek_vl", "megavl"]),
    "original": ("image-text-to-text", None, ["deepseek_vl", "multi_modality", "megavl"]),
    "llm": ("text-generation", "transformers", ["llama", "megavl"]),
}
_LIBRARIES = {
    "native": "transformers 4.57 or newer (`AutoModelForImageTextToText`, `AutoProcessor`) and MegaVL",
    "original": "the released `deepseek_vl` client and MegaVL",
    "llm": "any client of LLaMA models, such as transformers (`AutoModelForCausalLM`)",
}
_IMAGE_CODE = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder, or its name on the Hub
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
content = [{"type": "image", "path": "image.png"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
_TEXT_CODE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the Hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
```"""
_COMMANDS = """\
```bash
megavl generate . --image image.png --prompt "What is this?"
megavl serve .    # OpenAI-compatible, with a chat page
```"""
_USE: dict[Export, tuple[str, ...]] = {
    "native": (_IMAGE_CODE, _COMMANDS),
    "original": (_COMMANDS,),
    "llm": (_TEXT_CODE,),
}
_LARGEST_SHARE = 1e6
"""Larger figures are no shares, and whole numbers of any length are not formatted."""
_HARNESS_SHARES = ("acc", "acc_norm", "exact_match")
"""Figures of lm-evaluation-harness that are shares of the questions."""
_SETTINGS = (
    ("sequence length", "data.seq_length"),
    ("sequences per step", "training.global_batch_size"),
    ("learning rate", "optimizer.lr"),
    ("schedule", "optimizer.schedule"),
    ("precision", "training.precision"),
    ("tensor parallel", "parallel.tensor"),
    ("pipeline parallel", "parallel.pipeline"),
    ("seed", "training.seed"),
)


def model_card(
    config: ModelConfig, *, fmt: Export, parameters: int, facts: RunFacts, reports: Mapping[str, Mapping[str, Any]]
) -> str:
    """A Markdown page with the Hub's header; it says nothing that the checkpoint, its runs and the reports do not.

    Args:
        parameters: how many numbers the exported weights hold.
        reports: content of `report.json` files of `megavl evaluate`, by name.
    """
    task, library, tags = _TAGS[fmt]
    header = {"pipeline_tag": task, **({"library_name": library} if library else {}), "tags": tags}
    name = f"{model_name(config)}, the decoder alone" if fmt == "llm" else model_name(config)
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# DeepSeek-VL model ({_cell(name)})",
        f"{parameters:,} parameters, written by MegaVL {VERSION}. This folder is read by {_LIBRARIES[fmt]}.",
        "## Use",
        *_USE[fmt],
        *_training(facts),
        *_data(facts),
        *_evaluation(facts, reports),
    ]
    return "\n\n".join(parts) + "\n"


def _training(facts: RunFacts) -> Iterator[str]:
    yield "## Training"
    if facts.mean:
        yield f"These weights are the mean of {len(facts.mean)} models: {', '.join(map(_cell, facts.mean))}."
    if not facts.stages:
        origin = "" if facts.mean else f" The weights come from {_cell(facts.origin)}."
        yield f"No run of MegaVL is recorded.{origin}"
        return
    if facts.mean:
        yield "This is how the newest of those models that is recorded was trained:"
    rows: list[tuple[str, ...]] = [("", *_stage_names(facts))]
    rows += [
        ("steps", *(f"{stage.step:,}" for stage in facts.stages)),
        ("sequences", *(f"{stage.sequences:,}" for stage in facts.stages)),
        ("tokens, padding included", *(_count(stage.tokens) for stage in facts.stages)),
        ("images", *(_count(stage.images) for stage in facts.stages)),
        ("multimodal steps", *(f"{stage.multimodal_fraction:.0%}" for stage in facts.stages)),
        ("trained parts", *(", ".join(stage.trained) for stage in facts.stages)),
    ]
    rows += [(label, *(_value(stage.setting(key)) for stage in facts.stages)) for label, key in _SETTINGS]
    yield _table(rows)
    yield f"The first of these runs started from {_cell(facts.origin)}."
    if any(stage.tokens is None for stage in facts.stages):
        yield "`?`: the log of that run is not there, or lacks steps."


def _data(facts: RunFacts) -> Iterator[str]:
    rows = [
        (
            name,
            share.name,
            "-" if stage.multimodal_fraction == 1 else f"{share.text:.1%}",
            "-" if stage.multimodal_fraction == 0 else f"{share.multimodal:.1%}",
        )
        for name, stage in zip(_stage_names(facts), facts.stages, strict=True)
        for share in stage.shares
    ]
    if rows:
        yield "## Data"
        yield "Share of each source in the text and in the multimodal sequences, by the weights of the recipe."
        yield _table([("run", "source", "text", "multimodal"), *rows])


def _evaluation(facts: RunFacts, reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    rows = [row for name, report in reports.items() for row in report_rows(name, report)]
    stages = zip(_stage_names(facts), facts.stages, strict=True)
    during = [row for name, stage in stages for row in _rows_during(stage, name=name)]
    if not rows and not during:
        return
    yield "## Evaluation"
    if rows:
        yield _table([("report", "task", "score", "chance", "questions"), *rows])
    if during:
        yield "Measured while the model trained:"
        yield _table([("run and step", "measure", "value", "chance", "questions"), *during])


def report_rows(name: str, report: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Report, task, score, chance and questions of each result in a `report.json`; nothing if it is no report."""
    if "accuracy" in report:
        yield name, "questions", _share(report["accuracy"]), _share(report.get("chance")), _value(report.get("n"))
    for task, figures in _mappings(report.get("benchmarks")):
        yield name, task, _share(figures.get("score")), _share(figures.get("chance")), _value(figures.get("n"))
    yield from _harness_rows(name, report)
    written, text = report.get("written"), report.get("text")
    if isinstance(written, Mapping):
        yield name, "free-form answers, exact", _share(written.get("exact")), "-", _value(written.get("n"))
    if isinstance(text, Mapping):
        yield name, "bits per byte", _value(text.get("bits_per_byte")), "-", _value(text.get("n"))


def _harness_rows(name: str, report: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of `--harness lm_eval`, whose figures are called `METRIC,FILTER`, such as `acc_norm,none`."""
    counts = dict(_mappings(report.get("n-samples")))
    for task, figures in _mappings(report.get("results")):
        for key, value in figures.items():
            metric, comma, chosen = str(key).partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            label = f"{task}, {metric}" + (f" ({chosen})" if chosen != "none" else "")
            shown = _share(value) if metric in _HARNESS_SHARES else _value(value)
            yield name, label, shown, "-", _value(counts.get(task, {}).get("effective"))


def _rows_during(stage: StageFacts, *, name: str) -> Iterator[tuple[str, ...]]:
    at = f"{name}, {_value(stage.evaluation.get('step'))}"
    for task, figures in _mappings(stage.evaluation.get("tasks")):
        if figures.get("accuracy") is not None:
            chance = _share(figures.get("chance"))
            yield at, f"accuracy on {task}", _share(figures["accuracy"]), chance, _value(figures.get("n"))
        if figures.get("bits_per_byte") is not None:
            yield at, f"bits per byte of {task}", _value(figures["bits_per_byte"]), "-", "-"
    for source, modalities in _mappings(stage.evaluation.get("held_out")):
        for modality, figures in _mappings(modalities):
            for measure in ("loss", "bits_per_byte"):
                if figures.get(measure) is not None:
                    label = f"{measure.replace('_', ' ')} of {source}, {modality}"
                    yield at, label, _value(figures[measure]), "-", "-"


def _mappings(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, figures in value.items() if isinstance(value, Mapping) else ():
        if isinstance(figures, Mapping):
            yield str(name), figures


def _stage_names(facts: RunFacts) -> list[str]:
    """A name for each run; several runs of one stage are numbered."""
    names = [f"stage {_value(stage.setting('training.stage'))}" for stage in facts.stages]
    return [
        name if names.count(name) == 1 else f"{name}, run {names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(_row(row) for row in (head, ["---"] * len(head), *body))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text that neither ends a cell nor becomes markup; names come from files of others."""
    shown = visible(text, keep="")
    # A colon or an at sign makes an address, which becomes a link; an ampersand a character, dollars a formula.
    for mark in ("\\", "|", "<", "`", "[", "*", "~", "&", "$", ":", "@"):
        shown = shown.replace(mark, f"\\{mark}")
    shown = re.sub(r"\bwww\.", lambda found: f"{found[0][:-1]}\\.", shown, flags=re.IGNORECASE)
    # Between letters an underscore means nothing.
    return re.sub(r"(?<![^\W_])_+|_+(?![^\W_])", lambda run: "\\_" * len(run[0]), shown)


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, (int, float)) and abs(value) <= _LARGEST_SHARE else "-"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
