"""launch/architecture.svg is what launch/draw_architecture.py draws today, and a phone can show it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_picture_is_up_to_date(root: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    script = root / "launch" / "draw_architecture.py"
    subprocess.run([sys.executable, script, "--output", drawn], check=True, timeout=1800)
    committed = (root / "launch" / "architecture.svg").read_text()
    assert committed == drawn.read_text(), "run `python launch/draw_architecture.py` and commit the picture"


def test_picture_is_readable_on_a_phone(root: Path) -> None:
    picture = (root / "launch" / "architecture.svg").read_text()
    width = re.search(r'viewBox="0 0 (\d+) ', picture)
    assert width and int(width.group(1)) <= 480
    assert min(map(int, re.findall(r"font-size[:=]\"?(\d+)", picture))) >= 14
