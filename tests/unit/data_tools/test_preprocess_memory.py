"""Ten times the input needs no more memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.corpus_files import SENTENCES, arguments, make_tokenizer

ROOT = Path(__file__).parents[3]
# The process reads its own peak: what the system tells a parent includes the parent's memory.
CODE = (
    "import re, sys; from data_tools.preprocess import main\n"
    "code = main(sys.argv[1:])\n"
    "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
    "sys.exit(code)"
)


@pytest.mark.slow
def test_memory_does_not_grow_with_input(tmp_path: Path, report_table: Any) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    block = "".join(json.dumps({"text": " ".join(SENTENCES)[: 40 + n % 300]}) + "\n" for n in range(5000))
    peaks = []
    for copies in (1, 10):
        path = tmp_path / "t.jsonl"
        path.write_text(block * copies, encoding="utf-8")
        out = tmp_path / str(copies)
        command = [sys.executable, "-c", CODE, *arguments([path], tokenizer=tokenizer, output=out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    small, large = peaks
    report_table(f"peak of 5,000 records {small:.0f} MiB, of 50,000 {large:.0f} MiB: {large / small:.2f} (limit 1.2)")
    assert large <= 1.2 * small
