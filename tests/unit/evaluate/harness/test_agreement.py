"""lm-evaluation-harness itself: MegaVL in process, and the harness's own client on the exported decoder, agree.

Needs the extra `lm-eval`; run by `make test-clients`.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import json
import math
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from launch.bench.engines.random_models import random_weights
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from megavl.main.cli import main
from tests.unit.evaluate.harness.tasks import write_tasks

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs megavl[lm-eval]; make test-clients runs it")
NAMES = ("local_answers", "local_endings", "local_letters", "local_pages")
Samples = dict[str, dict[int, list[Any]]]


@pytest.fixture(scope="module")
def root(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 96 positions, so that prompts and texts are too long for it."""
    return prepare(tmp_path_factory.mktemp("narrow"), tokenizer_dir=tokenizer_dir, positions=96)


def prepare(folder: Path, *, tokenizer_dir: Path, positions: int) -> Path:
    """A checkpoint, its decoder, and tasks."""
    config: ModelConfig = load_model_config("tiny-siglip", llm={"max_position_embeddings": positions})
    files = {f"tokenizer/{path.name}": path for path in tokenizer_dir.iterdir()}
    write_model_checkpoint(folder / "model", config=config, tensors=random_weights(config, seed=2), files=files)
    assert main(["convert", "to-hf", str(folder / "model"), str(folder / "llm"), "--format", "llm"]) == 0
    write_tasks(folder / "tasks")
    return folder


def command(root: Path, out: Path, *more: str) -> list[str]:
    words = ["evaluate", root / "model", "--harness", "lm_eval", "--tasks", "local_*", "--out", out, "--device", "cpu"]
    return [*map(str, words), "--include-path", str(root / "tasks"), *more]


def samples(out: Path) -> Samples:
    found: Samples = {name: {} for name in NAMES}
    for line in (out / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        found[sample["task"]][sample["doc_id"]] = sample["resps"]
    return found


@pytest.fixture(scope="module")
def ours(root: Path) -> Samples:
    assert main(command(root, root / "ours")) == 0
    return samples(root / "ours")


def theirs(root: Path, *, tasks: tuple[str, ...], **options: Any) -> Samples:
    from lm_eval.models.huggingface import HFLM

    client = HFLM(str(root / "llm"), batch_size=5, device="cpu", dtype="float32", **options)
    return evaluated(client, root, tasks=tasks)


def evaluated(client: Any, root: Path, *, tasks: tuple[str, ...]) -> Samples:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(root / "tasks"), include_defaults=False)
    found = simple_evaluate(client, tasks=list(tasks), task_manager=manager)
    return {name: {one["doc_id"]: one["resps"] for one in found["samples"][name]} for name in tasks}


def values(resps: Any) -> list[Any]:
    """Numbers, marks and texts of a sample, flat."""
    if isinstance(resps, (list, tuple)):
        return [value for part in resps for value in values(part)]
    return [resps]


def compare(found: Samples, expected: Samples) -> float:
    """Largest relative difference of a number; everything else is equal."""
    largest = 0.0
    for name, documents in expected.items():
        assert documents.keys() == found[name].keys()
        for number, resps in documents.items():
            for one, other in zip(values(found[name][number]), values(resps), strict=True):
                if isinstance(other, float):
                    largest = max(largest, abs(one - other) / abs(other))
                else:
                    assert one == other, (name, number)
    return largest


def test_harness_client_on_the_decoder_agrees(root: Path, ours: Samples, report_table: Any) -> None:
    largest = compare(ours, theirs(root, tasks=("local_answers", "local_endings", "local_letters")))
    # The client would count p(BOS | BOS) of every text.
    rolling = compare(ours, theirs(root, tasks=("local_pages",), add_bos_token=False))
    report_table(f"log-likelihoods differ by {largest:.1e} relative, rolling ones by {rolling:.1e}")
    assert 0 < largest < 1e-5
    assert 0 < rolling < 1e-5
    texts = [text for resps in ours["local_answers"].values() for text in values(resps)]
    assert len(set(texts)) > 2
    assert not any("e" in text for text in texts)


@pytest.mark.parametrize("bos", [None, True])
def test_harness_client_begins_chats_with_one_bos(bos: bool | None, root: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    client = HFLM(str(root / "llm"), device="cpu", dtype="float32", add_bos_token=bos)
    text = client.apply_chat_template([{"role": "user", "content": "Which?"}])
    expected = client.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert expected.count(client.tokenizer.bos_token_id) == 1 and expected[0] == client.tokenizer.bos_token_id
    assert client.tok_encode(text) == client.tok_batch_encode([text])[0][0].tolist() == expected


def test_server_and_library_agree(
    tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Any, report_table: Any
) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from megavl.generate.pretrained import Model
    from megavl.parallel import groups
    from tests.unit.serve.servers import serving

    # Wide enough for all: this client of the harness truncates by other rules.
    root = prepare(tmp_path_factory.mktemp("wide"), tokenizer_dir=tokenizer_dir, positions=2048)
    assert main(command(root, root / "ours")) == 0
    found = samples(root / "ours")
    largest = 0.0
    with serving(root / "model", "--name", "tiny") as server:
        for tasks, bos in ((NAMES[:3], True), (NAMES[3:], False)):
            url = f"{server.address}/v1/completions"
            client = LocalCompletionsAPI(
                base_url=url,
                tokenizer_backend="huggingface",
                model="tiny",
                tokenizer=str(root / "llm"),
                add_bos_token=bos,
                batch_size=4,
            )
            largest = max(largest, compare(found, evaluated(client, root, tasks=tasks)))
    report_table(f"server: {largest:.1e} relative")
    assert 0 < largest < 1e-5
    page = next(doc["page"] for doc in map(json.loads, (root / "tasks" / "docs.jsonl").read_text().splitlines()))
    model = Model.load(root / "model", dtype="float32")
    try:
        bits = -values(found["local_pages"][0])[0] / math.log(2) / len(page.encode())
        assert bits == pytest.approx(model.bits_per_byte(page), rel=1e-6)
    finally:
        groups.stop()


def test_every_layout_gives_the_same_samples(root: Path, ours: Samples, report_table: Any) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "megavl"]
    run = [sys.executable, *words, *command(root, root / "ranks", "--tensor", "2", "--pipeline", "2")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("local_endings") == 1
    largest = compare(samples(root / "ranks"), ours)
    report_table(f"tensor 2 x pipeline 2: {largest:.1e} relative")
    assert largest < 1e-5


def test_report_has_table_figures_and_samples(root: Path, ours: Samples) -> None:
    figures = json.loads((root / "ours" / "report.json").read_text())
    assert set(figures["results"]) == set(NAMES)
    assert "samples" not in figures
    table = (root / "ours" / "report.md").read_text()
    assert all(name in table for name in NAMES)
    assert all(len(documents) == 12 for documents in ours.values())


def test_interrupted_run_goes_on(root: Path, ours: Samples, tmp_path: Path, monkeypatch: Any) -> None:
    from megavl.generate.pretrained import Model

    shutil.copy(root / "ours" / "evaluation.json", tmp_path)
    kept = (root / "ours" / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(kept[:-1]) + kept[-1][:20])
    asked: list[int] = []
    score, answers = Model.score_requests, Model.answers

    def counted(self: Model, requests: Any, **options: Any) -> Any:
        asked.extend(len(request.options) for request in requests)
        return score(self, requests, **options)

    def answered(self: Model, requests: Any, **options: Any) -> Any:
        requests = list(requests)
        asked.extend(1 for _ in requests)
        return answers(self, requests, **options)

    monkeypatch.setattr(Model, "score_requests", counted)
    monkeypatch.setattr(Model, "answers", answered)
    assert main(command(root, tmp_path)) == 0
    assert sum(asked) == 1
    assert compare(samples(tmp_path), ours) < 1e-5


def test_limit_and_examples_are_followed(root: Path, tmp_path: Path, capsys: Any) -> None:
    words = command(root, tmp_path, "--limit", "2", "--num-fewshot", "1", "--json", str(tmp_path / "f.json"))
    words[words.index("local_*")] = "local_letters"
    assert main(words) == 0
    lines = list(map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines()))
    assert [line["doc_id"] for line in lines] == [0, 1]
    assert lines[0]["arguments"][0][0].count("Answer:") == 2
    assert json.loads((tmp_path / "f.json").read_text())["local_letters"]["alias"] == "local_letters"


DAMAGE = {
    "broken": ("task: [", "ScannerError"),
    "absent data": (
        "task: local_bad\ndataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere/x.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_target: '{{page}}'\n",
        "/nowhere/x.jsonl",
    ),
    "template": (
        "task: local_bad\ndataset_path: json\ndataset_kwargs: {data_files: {test: DOCS}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_target: '{{page.nothing.more}}'\ndoc_to_text: ''\n"
        "metric_list: [{metric: bits_per_byte}]\n",
        "has no attribute 'nothing'",
    ),
    "option": (
        "task: local_bad\ndataset_path: json\ndataset_kwargs: {data_files: {test: DOCS}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{page}}'\ndoc_to_target: a\n"
        "generation_kwargs: {until: ['a'], num_beams: 4}\nmetric_list: [{metric: exact_match}]\n",
        "num_beams",
    ),
    "long option": (
        "task: local_bad\ndataset_path: json\ndataset_kwargs: {data_files: {test: DOCS}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{[page, question]}}'\n"
        "doc_to_target: 0\nmetric_list: [{metric: acc}]\n",
        "is longer than 96 tokens; leave its document out of the task",
    ),
    "empty option": (
        "task: local_bad\ndataset_path: json\ndataset_kwargs: {data_files: {test: DOCS}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: ['', 'a']\ndoc_to_target: 0\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n",
        # The harness itself looks at an option's first letter.
        "local_bad: cannot be loaded (IndexError",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_task_ends_with_one_message(damage: str, root: Path, tmp_path: Path, capsys: Any) -> None:
    text, said = DAMAGE[damage]
    (tmp_path / "local_bad.yaml").write_text(text.replace("DOCS", str(root / "tasks" / "docs.jsonl")))
    words = command(root, tmp_path / "out")
    words[words.index("local_*")] = "local_bad"
    words[words.index("--include-path") + 1] = str(tmp_path)
    code, error = main(words), capsys.readouterr().err
    assert code == 2 if damage == "broken" else code == 3, error
    assert error.splitlines()[-1].startswith("error: ")
    assert said in error or damage == "broken"
    assert "Traceback" not in error


def test_unknown_task_is_answered_with_the_nearest(root: Path, tmp_path: Path, capsys: Any) -> None:
    words = command(root, tmp_path)
    words[words.index("local_*")] = "local_ending"
    assert main(words) == 2
    assert "did you mean local_endings" in capsys.readouterr().err


def test_tasks_that_run_code_must_be_allowed(root: Path, tmp_path: Path, capsys: Any) -> None:
    text = (root / "tasks" / "local_answers.yaml").read_text().replace("local_answers", "local_code")
    (tmp_path / "local_code.yaml").write_text(text + "unsafe_code: true\n")
    words = command(root, tmp_path / "out")
    words[words.index("local_*")] = "local_code"
    words[words.index("--include-path") + 1] = str(tmp_path)
    assert main(words) == 3
    assert "--confirm-run-unsafe-code" in capsys.readouterr().err
