"""Process groups keep to the timeout of the recipe."""

from __future__ import annotations

import datetime

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
