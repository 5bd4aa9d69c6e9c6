"""Process groups keep to the timeout of the recipe, and libraries to the settings of the environment."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megavl.config.recipe import ParallelConfig
from megavl.parallel import groups


@pytest.mark.parametrize("seconds", [7, 30, 90])
def test_every_group_has_the_timeout_to_the_second(seconds: int) -> None:
    groups.start(ParallelConfig(timeout_s=seconds), seed=1)
    try:
        made = [
            dist.group.WORLD,
            mpu.get_tensor_model_parallel_group(),
            mpu.get_pipeline_model_parallel_group(),
            mpu.get_data_parallel_group(with_context_parallel=True),
            mpu.get_model_parallel_group(),
        ]
        found = [group._get_backend(torch.device("cpu")).options._timeout for group in made]
    finally:
        groups.stop()
    assert found == [datetime.timedelta(seconds=seconds)] * len(made)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU groups alone share a device")
def test_groups_share_one_network_device() -> None:
    """Each device has a file descriptor for events, and a thread that wakes up 100 times a second."""
    groups.start(ParallelConfig(), seed=1)
    try:
        before = event_files()
        more = [dist.new_group([0], timeout=datetime.timedelta(seconds=9)) for _ in range(5)]
        assert event_files() == before > 0
        value = torch.ones(3)
        for group in more:
            dist.all_reduce(value, group=group)
            assert group._get_backend(torch.device("cpu")).options._timeout == datetime.timedelta(seconds=9)
        assert value.tolist() == [1, 1, 1]
    finally:
        groups.stop()


def event_files() -> int:
    """Descriptors on which this process waits for events."""
    return [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()].count(
        "anon_inode:[eventpoll]"
    )


@pytest.mark.parametrize("kept", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_settings_of_libraries_can_be_overridden(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"LOCAL_WORLD_SIZE": "4", kept: "max_split_size_mb:64", "TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}
    monkeypatch.setattr(os, "environ", dict(environment))
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    groups.prepare_libraries(ParallelConfig())
    environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    assert os.environ == environment, "without a device, only what megatron-core asks for anywhere"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    groups.prepare_libraries(ParallelConfig())
    assert os.environ == environment | {"TORCHINDUCTOR_COMPILE_THREADS": "24"}


def test_gradient_buckets_grow_with_the_replicas() -> None:
    assert [ParallelConfig().bucket(ranks=ranks) for ranks in (1, 40, 512)] == [40_000_000, 40_000_000, 512_000_000]
    assert ParallelConfig(bucket_size=7).bucket(ranks=512) == 7
