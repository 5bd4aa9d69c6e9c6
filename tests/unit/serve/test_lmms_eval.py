"""lmms-eval as a client of `megavl serve`: one of its own tasks on local questions, against `megavl evaluate` on them.

`make test-clients` makes the environment of lmms-eval and runs this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megavl.main.cli import main
from tests.clients import interpreter, run
from tests.unit.evaluate.benchmarks.published import stored
from tests.unit.generate import models
from tests.unit.serve.servers import serving

PRESET = "tiny-siglip"
TOKENS = 24
KIND = "Regular Text Recognition"

# The functions are those of lmms-eval's own task; only the data are local.
FUNCTIONS = "from lmms_eval.tasks.ocrbench.utils import *\n"
TASK = """\
task: local_ocrbench
dataset_path: parquet
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.ocrbench_doc_to_visual
doc_to_text: !function utils.ocrbench_doc_to_text
doc_to_target: answer
process_results: !function utils.ocrbench_process_results
generation_kwargs: {max_new_tokens: TOKENS, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}
metric_list:
  - {metric: ocrbench_accuracy, aggregation: !function utils.ocrbench_aggregate_accuracy, higher_is_better: true}
lmms_eval_specific_kwargs: {default: {pre_prompt: "", post_prompt: ""}}
"""


@pytest.fixture
def python() -> str:
    return interpreter("MEGAVL_LMMS_EVAL", "lmms-eval")


def write_questions(path: Path) -> Path:
    """OCRBench as it is published, on pictures of our own. Right texts are letters, which some answers contain."""
    rows = [
        {
            "dataset": "IIIT5K",
            "question": f"which letters, in line {number}?",
            "question_type": KIND,
            "answer": [letter],
        }
        for number, letter in enumerate("qlzoxdku")
    ]
    rows = [{**row, "image": stored(number)} for number, row in enumerate(rows)]
    text = {"dtype": "string", "_type": "Value"}
    features = dict.fromkeys(("dataset", "question", "question_type"), text)
    info = {
        "info": {"features": {**features, "answer": {"feature": text, "_type": "List"}, "image": {"_type": "Image"}}}
    }
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(info)})
    parquet.write_table(table, str(path))
    return path


def by_lmms_eval(python: str, address: str, task: Path, out: Path) -> tuple[float, list[str]]:
    """The figure that lmms-eval reports, and the answers that it got, in the order of the questions."""
    offline = {"HF_HOME": str(out / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    arguments = f"model=tiny,base_url={address}/v1,api_key=none,timeout=600"
    words = ["--model", "openai", "--model_args", arguments, "--tasks", "local_ocrbench", "--include_path", str(task)]
    # Without DEBUG it ends with 0 also after an error.
    words += ["--verbosity", "DEBUG", "--output_path", str(out), "--log_samples"]
    run([python, "-m", "lmms_eval", *words], cwd=task, **offline)
    (results,), (samples,) = out.rglob("*_results.json"), out.rglob("*_samples_local_ocrbench.jsonl")
    figures = json.loads(results.read_text())["results"]["local_ocrbench"]
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return figures["ocrbench_accuracy,none"], [line["filtered_resps"] for line in lines]


def test_lmms_eval_reports_what_evaluate_reports(
    python: str, tokenizer_dir: Path, tmp_path: Path, report_table: Any
) -> None:
    folder = models.write_folder(
        PRESET, tmp_path / "tiny", tokenizer=tokenizer_dir, fmt="native", seed=models.TALKATIVE[PRESET]
    )
    task = tmp_path / "task"
    task.mkdir()
    file = write_questions(tmp_path / "ocrbench.parquet")
    (task / "utils.py").write_text(FUNCTIONS)
    (task / "local_ocrbench.yaml").write_text(
        TASK.replace("FILE", json.dumps(str(file))).replace("TOKENS", str(TOKENS))
    )
    words = ["--benchmark", f"ocrbench={file}", "--max-new-tokens", str(TOKENS), "--device", "cpu"]
    assert main(["evaluate", str(folder), *words, "--out", str(tmp_path / "ours")]) == 0
    ours = json.loads((tmp_path / "ours" / "report.json").read_text())["benchmarks"]["ocrbench"]
    answers = [json.loads(line) for line in (tmp_path / "ours" / "answers.jsonl").read_text().splitlines()]
    with serving(folder) as server:
        theirs, texts = by_lmms_eval(python, server.address, task, tmp_path / "theirs")
    expected = {line["question"]: line["answer"] for line in answers}
    assert texts == [expected[f"which letters, in line {number}?"] for number in range(8)]
    assert len(set(texts)) > 4
    # lmms-eval divides the right answers by the thousand questions of the whole benchmark.
    right = round(theirs * 1000)
    report_table(f"lmms-eval: {right} of 8 answers right, {len(set(texts))} different texts equal")
    assert 0 < right < 8
    assert ours["n"] == 8 and ours["score"] == right / 8
