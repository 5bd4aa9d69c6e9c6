"""`make demo`: the whole product on a small scale, from raw data to answers about held-out images.

Builds a corpus, preprocesses it, and trains the three stages of a tiny hybrid model under TP 2 x PP 2. One stage is
killed with `kill -9` and resumed. Then exports to both Hugging Face formats, compares with transformers, and asks
questions about images that training never saw. Every step is a command that a user could type; each is printed before
it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = "launch/recipes/tiny"
SEQ_LENGTH = 512
IMAGES_PER_SEQUENCE = 15
STAGES = {
    "stage1": ["captions.jsonl"],
    "stage2": ["text.jsonl", "captions.jsonl", "conversations.json"],
    "stage3": ["conversations.json"],
}
"""Inputs of each stage, from the corpus."""
SHOWN_STAGE = "stage2"
"""The stage whose data the demo shows as a page; it has text and images."""
KILLED_STAGE, STEPS_BEYOND_SAVE = "stage2", 5
EVALUATED_STAGE = "stage3"
EVALUATION = ("evaluation.interval=50", "evaluation.at_start=true")
"""The stage whose progress is measured on the held-out questions while it trains."""
RANKS = 4
LEAST_ACCURACY, MOST_BLIND_GAIN, MOST_DIFFERENCE = 0.8, 0.1, 1e-5
"""Limits of the demo: held-out questions right, gain over chance with another image, difference from transformers."""


class DemoFailed(Exception):
    """A step of the demo ended badly."""


def main() -> int:
    """Run the demo and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="made anew (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    began, out = time.monotonic(), arguments.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        _build_data(out, seed=arguments.seed)
        stages, resume_bitwise = _train(out)
        summary = {
            "layout": _layout(out / "stage3"),
            "stages": stages,
            "evaluation": _evaluation_curve(out / EVALUATED_STAGE),
            "resume_bitwise": resume_bitwise,
            **_export(out),
            "accuracy": _evaluate(out),
        }
    except DemoFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary["seconds"] = round(time.monotonic() - began, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _print_table(summary, path=out / "summary.json")
    missed = _missed_limits(summary)
    for line in missed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if missed else 0


def _missed_limits(summary: dict[str, Any]) -> list[str]:
    accuracy, difference = summary["accuracy"], summary["hf_max_rel_diff"]
    image, blind, most = accuracy["image"], accuracy["blind"], accuracy["chance"] + MOST_BLIND_GAIN
    checks = {
        f"accuracy with the image {image:.3f} is below {LEAST_ACCURACY}": image >= LEAST_ACCURACY,
        f"accuracy with another image {blind:.3f} is above {most:.3f}": blind <= most,
        f"transformers' logits differ by {difference:.1e}, the limit is {MOST_DIFFERENCE:.0e}": (
            difference <= MOST_DIFFERENCE
        ),
        "losses after the resume differ from those before the kill": summary["resume_bitwise"],
    }
    return [text for text, kept in checks.items() if not kept]


def _layout(run: Path) -> dict[str, int]:
    parallel = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["parallel"]
    tensor, pipeline = parallel["tensor"], parallel["pipeline"]
    return {"tp": tensor, "pp": pipeline, "dp": RANKS // (tensor * pipeline)}


def _build_data(out: Path, *, seed: int) -> None:
    _python("data_tools/build_corpus.py", "demo", "--output", out / "corpus", "--seed", seed)
    for stage, names in STAGES.items():
        _python(
            *("data_tools/preprocess.py", "--input", *(out / "corpus" / name for name in names)),
            *("--output", out / "data" / stage, "--tokenizer", out / "corpus/tokenizer"),
            *("--image-preset", "tiny-hybrid", "--seq-length", SEQ_LENGTH),
            *("--max-images-per-sequence", IMAGES_PER_SEQUENCE, "--system-prompt", ""),
        )
    _python("data_tools/view.py", out / "data" / SHOWN_STAGE, "--html", out / "view.html")


def _train(out: Path) -> tuple[list[dict[str, Any]], bool]:
    rows, resume_bitwise, before = [], False, None
    for stage in STAGES:
        command = _training_command(out, stage, init=before)
        if stage == KILLED_STAGE:
            _run_and_kill(command, run=out / stage)
        _run(command)
        if stage == KILLED_STAGE:
            resume_bitwise = _same_losses(out / stage)
        rows.append(_stage_row(out / stage))
        before = out / stage / "checkpoints"
    return rows, resume_bitwise


def _training_command(out: Path, stage: str, *, init: Path | None) -> list[str]:
    return _words(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS),
        *("-m", "megavl", "train"),
        f"{RECIPES}/{stage}.yaml",
        f"data.sources=[{{path: {out}/data/{stage}}}]",
        f"data.tokenizer={out}/corpus/tokenizer",
        f"run.dir={out}/{stage}",
        *([f"checkpoint.init={init}"] if init else []),
        *(EVALUATION if stage == EVALUATED_STAGE else ()),
        *([f"evaluation.tasks=[{out}/corpus/eval.jsonl]"] if stage == EVALUATED_STAGE else []),
    )


def _run_and_kill(command: list[str], *, run: Path) -> None:
    """Start training and kill every process of it with SIGKILL a few steps after its first save."""
    print(f"$ {shlex.join(command)}   # killed with -9 after the first save", flush=True)
    process = subprocess.Popen(command, start_new_session=True, env=_environment())
    saved = None
    try:
        while process.poll() is None:
            time.sleep(0.2)
            done = len(_metrics(run / "metrics.jsonl"))
            if saved is None and list((run / "checkpoints").glob("iter_*[0-9]/manifest.json")):
                saved = done
            if saved is not None and done >= saved + STEPS_BEYOND_SAVE:
                break
    finally:
        if process.poll() is None:
            _kill_session(process.pid)
    code = process.wait()
    if code >= 0:
        raise DemoFailed(f"training ended with code {code} before it could be killed; its message is above")
    print(f"killed with SIGKILL after step {len(_metrics(run / 'metrics.jsonl'))}; starting again", flush=True)


def _kill_session(leader: int) -> None:
    """Kill the launcher and its workers, which torchrun puts into sessions of their own."""
    children = _descendants(leader)
    for pid in (leader, *children):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _descendants(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _same_losses(run: Path) -> bool:
    """Whether the steps that ran twice, before the kill and after the resume, had bitwise the same loss."""
    first = {row["step"]: row["loss"] for row in _metrics(run / "metrics.discarded.jsonl")}
    second = {row["step"]: row["loss"] for row in _metrics(run / "metrics.jsonl")}
    print(f"steps that ran twice: {sorted(first)}", flush=True)
    return bool(first) and all(second[step] == loss for step, loss in first.items())


def _stage_row(run: Path) -> dict[str, Any]:
    rows = _metrics(run / "metrics.jsonl")
    seconds = sum(row["step_time_s"] for row in rows)
    tail = rows[-10:]
    return {
        "name": run.name,
        "steps": len(rows),
        "first_loss": rows[0]["loss"],
        "last_loss": sum(row["loss"] for row in tail) / len(tail),
        "tokens_per_s": round(sum(row["tokens"] for row in rows) / seconds, 1),
    }


def _evaluation_curve(run: Path) -> list[dict[str, Any]]:
    """Accuracy on the held-out questions after each evaluation, and in how many steps' time it was found."""
    rows = _metrics(run / "evaluation.jsonl")
    step_s = statistics.median(row["step_time_s"] for row in _metrics(run / "metrics.jsonl"))
    return [
        {
            "step": row["step"],
            "accuracy": row["tasks"]["eval"]["accuracy"],
            "time_in_steps": round(row["seconds"] / step_s, 1),
        }
        for row in rows
    ]


def _export(out: Path) -> dict[str, Any]:
    checkpoint, native, original = out / "stage3/checkpoints", out / "hf_native", out / "hf_original"
    _megavl("convert", "to-hf", checkpoint, native, "--format", "native")
    _megavl("convert", "to-hf", checkpoint, original, "--format", "original")
    _megavl("convert", "verify", native, original)
    report = out / "hf_parity.json"
    _megavl("convert", "verify", checkpoint, native, "--against", "transformers", "--json", report)
    difference = json.loads(report.read_text(encoding="utf-8"))["max_rel_diff"]
    return {"hf_native": str(native), "hf_original": str(original), "hf_max_rel_diff": difference}


def _evaluate(out: Path) -> dict[str, Any]:
    checkpoint, task, report = out / "stage3/checkpoints", out / "corpus/eval.jsonl", out / "accuracy.json"
    _megavl("evaluate", checkpoint, task, "--blind", "--json", report)
    found = json.loads(report.read_text(encoding="utf-8"))
    question = json.loads(task.read_text(encoding="utf-8").splitlines()[0])
    image = task.parent / question["images"][0]
    _megavl("generate", checkpoint, "--image", image, "--prompt", question["prompt"])
    print(f"expected: {question['choices'][question['answer']]}", flush=True)
    return {"image": found["accuracy"], "blind": found["blind"], "chance": found["chance"], "n": found["n"]}


def _print_table(summary: dict[str, Any], *, path: Path) -> None:
    layout, accuracy = summary["layout"], summary["accuracy"]
    lines = [
        f"layout      tensor {layout['tp']} x pipeline {layout['pp']} x data {layout['dp']}",
        *(
            f"{row['name']:<11} {row['steps']:>4} steps  loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}  "
            f"{row['tokens_per_s']:,.0f} tokens/s"
            for row in summary["stages"]
        ),
        f"evaluation  {EVALUATED_STAGE}, questions right after a step: "
        + ", ".join(f"{row['step']}: {row['accuracy']:.1%}" for row in summary["evaluation"])
        + f"; each in the time of {statistics.median(row['time_in_steps'] for row in summary['evaluation']):.1f} steps",
        f"data        {path.parent / 'view.html'} shows sequences of {SHOWN_STAGE}",
        f"resume      after kill -9: {'bitwise the same losses' if summary['resume_bitwise'] else 'DIFFERENT LOSSES'}",
        f"export      {summary['hf_native']}, {summary['hf_original']}",
        f"parity      logits of transformers differ by at most {summary['hf_max_rel_diff']:.1e} (relative)",
        f"questions   {accuracy['n']} on held-out images: {accuracy['image']:.1%} right, with another image "
        f"{accuracy['blind']:.1%}, chance {accuracy['chance']:.1%}",
        f"time        {summary['seconds']:.0f} s; {path}",
        f"next        source .venv/bin/activate && megavl chat {summary['hf_native']}",
    ]
    print("\n" + "\n".join(lines), flush=True)


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # A kill may leave the last line incomplete.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _megavl(*words: Any) -> None:
    _python("-m", "megavl", *words)


def _python(*words: Any) -> None:
    _run(_words(sys.executable, *words))


def _words(*words: Any) -> list[str]:
    return [str(word) for word in words]


def _environment() -> dict[str, str]:
    """One thread per process, as the ranks share the cores; GPUs only where every rank can have one.

    Without GPUs nothing is compiled, so torch's compiler is not imported, which saves 40% of a rank's start.
    """
    gpus = b""
    if shutil.which("nvidia-smi"):
        gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout
    enough = len(gpus.splitlines()) >= RANKS
    return {**os.environ, "OMP_NUM_THREADS": "1"} | (
        {} if enough else {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    )


def _run(command: Sequence[str]) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    code = subprocess.run(command, check=False, env=_environment()).returncode
    if code:
        raise DemoFailed(f"the command above ended with code {code}")


if __name__ == "__main__":
    sys.exit(main())
