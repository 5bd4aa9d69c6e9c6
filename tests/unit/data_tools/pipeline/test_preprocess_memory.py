"""Memory of preprocessing: ten times the input needs no more, one long document at most twice as much."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.corpus_files import SENTENCES, arguments, make_tokenizer, write_jsonl

ROOT = Path(__file__).parents[4]
# The process reads its own peak: what the system tells a parent includes the parent's memory.
CODE = (
    "import re, sys; from data_tools.preprocess import main\n"
    "code = main(sys.argv[1:])\n"
    "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
    "sys.exit(code)"
)


def _peak(path: Path, *, tokenizer: Path) -> float:
    """Peak memory of preprocessing a file, MiB."""
    command = [sys.executable, "-c", CODE, *arguments([path], tokenizer=tokenizer, output=path.with_suffix(".out"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_input(tmp_path: Path, report_table: Any) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    block = "".join(json.dumps({"text": " ".join(SENTENCES)[: 40 + n % 300]}) + "\n" for n in range(5000))
    peaks = []
    for copies in (1, 10):
        path = tmp_path / f"{copies}.jsonl"
        path.write_text(block * copies, encoding="utf-8")
        peaks.append(_peak(path, tokenizer=tokenizer))
    small, large = peaks
    report_table(f"peak of 5,000 records {small:.0f} MiB, of 50,000 {large:.0f} MiB: {large / small:.2f} (limit 1.2)")
    assert large <= 1.2 * small


@pytest.mark.slow
def test_one_long_document_takes_twice_the_memory(tmp_path: Path, report_table: Any) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    text = "".join(f"{number} {SENTENCES[number % 5]}\n" for number in range(120_000))[:10_000_000]
    whole = write_jsonl(tmp_path / "whole.jsonl", [{"text": text}])
    parts = write_jsonl(tmp_path / "parts.jsonl", [{"text": text[at : at + 2000]} for at in range(0, len(text), 2000)])
    one, many = (_peak(path, tokenizer=tokenizer) for path in (whole, parts))
    report_table(f"peak of one 10 MB document {one:.0f} MiB, of 5,000 records {many:.0f} MiB (limit: twice)")
    assert one <= 2 * many


@pytest.mark.slow
def test_a_document_of_64_mb_takes_600_mb_at_most(tmp_path: Path, report_table: Any) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    text = "".join(f"{number} {SENTENCES[number % 5]}\n" for number in range(760_000))[:64_000_000]
    peak = _peak(write_jsonl(tmp_path / "whole.jsonl", [{"text": text}]), tokenizer=tokenizer)
    report_table(f"peak of one 64 MB document {peak:.0f} MiB (limit 572, which are 600 MB)")
    assert peak <= 572
