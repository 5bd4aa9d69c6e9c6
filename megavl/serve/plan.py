"""What happens in one turn of the engine, as rank 0 decides and tells the other ranks.

Plans travel as JSON and pixels over gloo, so that ranks that wait for work leave their GPUs idle.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megavl.config.recipe import ParallelConfig
from megavl.data.tokenizer import Tokenizer
from megavl.generate.decode import Request
from megavl.generate.sampling import Sampling
from megavl.generate.stop import StopTexts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One turn."""

    start: Sequence[tuple[int, Request]] = ()
    """Prompts that join, with their numbers."""
    drop: frozenset[int] = field(default_factory=frozenset)
    """Numbers of answers that nobody wants any more."""
    end: int | None = None
    """Exit code with which the server ends."""


class PlanChannel:
    """From rank 0 to all others. Every rank makes it, after the process groups have started."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer` reads stop texts."""
        self._tokenizer = tokenizer
        self.alone = dist.get_world_size() == 1
        timeout = datetime.timedelta(seconds=ParallelConfig().timeout_s)
        self._group = None if self.alone else dist.new_group(backend="gloo", timeout=timeout)

    def send(self, plan: Plan) -> None:
        """Tell the other ranks; on rank 0 only."""
        if self.alone:
            return
        if not plan.start and not plan.drop and plan.end is None:
            self._broadcast(torch.zeros(1, dtype=torch.int64))
            return
        text = json.dumps(_to_json(plan)).encode()
        self._broadcast(torch.tensor([len(text)]))
        self._broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        for _, request in plan.start:
            if request.images is not None and len(request.images):
                self._broadcast(request.images)

    def receive(self) -> Plan:
        """The next plan of rank 0; on the other ranks."""
        size = int(self._broadcast(torch.zeros(1, dtype=torch.int64)))
        if not size:
            return Plan()
        content = json.loads(self._broadcast(torch.zeros(size, dtype=torch.uint8)).numpy().tobytes())
        return Plan(
            start=[(row["number"], self._request(row)) for row in content["start"]],
            drop=frozenset(content["drop"]),
            end=content["end"],
        )

    def _request(self, row: dict[str, Any]) -> Request:
        shape = row["images"]
        images = None if shape is None else torch.zeros(shape, dtype=torch.uint8)
        if images is not None and len(images):
            self._broadcast(images)
        return Request(
            ids=row["ids"],
            images=images,
            max_new_tokens=row["max_new_tokens"],
            sampling=Sampling(**row["sampling"]),
            stop=StopTexts(row["stop"], self._tokenizer) if row["stop"] else None,
            alternatives=row["alternatives"],
            score_prompt=row["score_prompt"],
        )

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.broadcast(tensor, src=0, group=self._group)
        return tensor


def _to_json(plan: Plan) -> dict[str, Any]:
    rows = [
        {
            "number": number,
            "ids": list(request.ids),
            "images": None if request.images is None else list(request.images.shape),
            "max_new_tokens": request.max_new_tokens,
            "sampling": dataclasses.asdict(request.sampling),
            "stop": list(request.stop.texts) if request.stop else [],
            "alternatives": request.alternatives,
            "score_prompt": request.score_prompt,
        }
        for number, request in plan.start
    ]
    return {"start": rows, "drop": sorted(plan.drop), "end": plan.end}
