"""Rows of an evaluation: a JSON line, a line on the terminal for each result, and scalars for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megavl.foreign.printing import visible
from megavl.train.metrics import open_rows
from megavl.train.scalar_events import open_board
from megavl.train.trackers import Trackers


class EvaluationLog:
    """Rank 0's log of the evaluations of a run, `evaluation.jsonl`."""

    def __init__(
        self, run_dir: str | Path, *, start_step: int, tensorboard: bool, trackers: Trackers | None = None
    ) -> None:
        """Set aside rows of steps that will run again.

        Args:
            start_step: step after which the run goes on.
        """
        self.path = Path(run_dir) / "evaluation.jsonl"
        self._trackers = trackers
        # A new run evaluates at step 0.
        first = start_step - (start_step == 0)
        self._rows = open_rows(self.path, step=first)
        rows = self.path.read_bytes().splitlines() if self.path.is_file() else []
        self.last_step = json.loads(rows[-1])["step"] if rows else None
        """Step of the last evaluation of an earlier start."""
        self._board = open_board(Path(run_dir), name="evaluation", start_step=first) if tensorboard else None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one evaluation and print its lines."""
        self._rows.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        for line in lines(row):
            tqdm.write(visible(line, keep=""))
        found = scalars(row)
        if self._board is not None:
            self._board.write(found, step=row["step"])
        if self._trackers is not None:
            self._trackers.write(found, step=row["step"], kind="evaluation")


def lines(row: Mapping[str, Any]) -> Iterator[str]:
    """One line for each task and each modality of each held-out directory."""
    for name, found in row["tasks"].items():
        parts = []
        if "accuracy" in found:
            chance = f"chance {found['chance']:.3f}, n {found['n']}"
            accuracy = _text(found["accuracy"])
            parts.append(f"accuracy {accuracy} +- {_text(found['standard_error'])} ({chance})")
        if "bits_per_byte" in found:
            parts.append(f"bits per byte {_text(found['bits_per_byte'])}")
        yield f"evaluation after step {row['step']}: {name}: {', '.join(parts)}"
    for name, modalities in row["held_out"].items():
        for modality, found in modalities.items():
            bits = f", bits per byte {_text(found['bits_per_byte'])}" if "bits_per_byte" in found else ""
            loss = f"loss {_text(found['loss'])}{bits} ({found['tokens']} tokens)"
            yield f"evaluation after step {row['step']}: {name}, {modality}: {loss}"


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Names and values for TensorBoard and trackers; what is not finite is left out."""
    out: dict[str, float] = {}
    for name, found in row["tasks"].items():
        for key in ("accuracy", "bits_per_byte"):
            if found.get(key) is not None:
                out[f"evaluation/{name}/{key}"] = found[key]
    for name, modalities in row["held_out"].items():
        for modality, found in modalities.items():
            for key in ("loss", "bits_per_byte"):
                if found.get(key) is not None:
                    out[f"evaluation/{name}/{modality}/{key}"] = found[key]
    return out


def _text(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
