"""Measures what the device reaches without a model: large matrix products, and a copy. Prints one JSON line.

python -m launch.bench.engines.step_ceiling [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192), (4096, 2048, 11264), (4096, 4096, 22016))
"""Rows, inner and columns: squares, and the two decoders' gate-and-up projections over 4096 tokens."""
CPU_PRODUCTS = ((256, 256, 256), (512, 128, 704))
COPY_BYTES = 4 * 2**30
CPU_COPY_BYTES = 64 * 2**20


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, help="threads on a CPU; default: torch's own")
    arguments = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    if arguments.threads and not on_cuda:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if on_cuda else "cpu")
    shapes = PRODUCTS if on_cuda else CPU_PRODUCTS
    found: dict[str, Any] = {
        "cuda": on_cuda,
        "device": torch.cuda.get_device_name() if on_cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_cuda else None,
        "threads": None if on_cuda else torch.get_num_threads(),
        "cuda_version": torch.version.cuda,
        "products": {},
        "flops_per_s": {},
    }
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        rates = {
            " x ".join(map(str, shape)): product(shape, dtype, device, repeats=arguments.repeats) for shape in shapes
        }
        found["products"][precision] = rates
        found["flops_per_s"][precision] = max(rates.values())
    found["copy_bytes_per_s"] = copy(COPY_BYTES if on_cuda else CPU_COPY_BYTES, device, repeats=arguments.repeats)
    print(json.dumps(found))
    return 0


def product(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, *, repeats: int) -> float:
    """FLOP/s of a matrix product."""
    rows, inner, columns = shape
    one, other = (
        torch.randn(rows, inner, device=device, dtype=dtype),
        torch.randn(inner, columns, device=device, dtype=dtype),
    )
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return 2 * rows * inner * columns / best(lambda: torch.mm(one, other, out=out), repeats=repeats)


def copy(size: int, device: torch.device, *, repeats: int) -> float:
    """Bytes read and written per second when the device copies its own memory."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / best(lambda: target.copy_(source), repeats=repeats)


def best(run: Callable[[], Any], *, repeats: int) -> float:
    """Seconds of the fastest repeat, after three that warm up."""
    on_cuda = torch.cuda.is_available()
    times: list[Any] = []
    for _ in range(3 + repeats):
        if on_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            times.append((begin, end))
        else:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    if on_cuda:
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) / 1000 for begin, end in times]
    return min(times[3:])


if __name__ == "__main__":
    sys.exit(main())
