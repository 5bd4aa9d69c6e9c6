"""Start and end of the process groups, and this rank's coordinates in them."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from megavl.config.errors import PeerError, UsageError
from megavl.config.library_settings import missing_settings
from megavl.config.recipe import ParallelConfig
from megavl.parallel import cpu_runtime
from megavl.parallel.cpu_binding import bind_to_device

_ABORT_LATER_S = 60
"""Added to NCCL's own timeout, seconds."""
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Switches that reduce (NVLink SHARP) add in no fixed order.
    "NCCL_ALGO": "^NVLS,NVLSTree",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
"""Settings of cuBLAS, NCCL and Transformer Engine, apart from torch's and megatron-core's own switches."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """This rank's coordinates."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the vision encoders and the embedding."""
        return self.pp_rank == 0


def world_size_from_env() -> int:
    """Processes that torchrun, srun or a bare shell started."""
    return _env_int("WORLD_SIZE", 1)


def rank_from_env() -> int:
    """This process's number; 0 without a launcher.

    Raises:
        UsageError: not a number, or one of several SLURM tasks that were not told their ranks.
    """
    # Set for the tasks of an srun step, not for a batch script.
    tasks = _env_int("SLURM_STEP_NUM_TASKS", 1)
    if "RANK" not in os.environ and tasks > 1:
        raise UsageError(
            f"{tasks} SLURM tasks, but RANK is not set; start with launch/*.sh, which sets RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each; in a shell inside of a job, unset "
            "SLURM_STEP_NUM_TASKS first"
        )
    return _env_int("RANK", 0)


def start(parallel: ParallelConfig, *, seed: int) -> Position:
    """Join the world that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe, or a world of one.

    Args:
        parallel: sizes; the caller has checked that they divide the world.
        seed: seed of the tensor-parallel RNG tracker.

    Raises:
        PeerError: the ranks did not find each other within `parallel.timeout_s`.
    """
    cpu_runtime.install()
    prepare_libraries(parallel)
    rank, world = rank_from_env(), world_size_from_env()
    if world > 1 and "MASTER_ADDR" not in os.environ:
        raise UsageError(
            f"WORLD_SIZE is {world}, but MASTER_ADDR is not set; start with torchrun or with launch/*.sh under SLURM"
        )
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        _take_device()
        if parallel.cpu_binding == "auto":
            bind_to_device()
    # NCCL aborts the process when its time is up; the watchdog of a training run acts earlier and says why.
    timeout = datetime.timedelta(seconds=parallel.timeout_s + (_ABORT_LATER_S if on_cuda else 0))
    try:
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group("nccl" if on_cuda else "gloo", rank=rank, world_size=world, timeout=timeout)
        else:
            # A world of one needs no address; a hash store never opens a port.
            store = dist.HashStore()
            backend = "nccl" if on_cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    except ValueError as error:
        raise UsageError(f"MASTER_ADDR, MASTER_PORT, RANK or WORLD_SIZE: {error}") from error
    except (dist.DistError, RuntimeError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        raise PeerError(f"rank {rank} of {world} could not join the others at {address}: {reason}") from error
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        # A fraction is kept to the second: megatron-core makes a `timedelta` of it.
        distributed_timeout_minutes=timeout.total_seconds() / 60,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return position()


def prepare_libraries(parallel: ParallelConfig) -> None:
    """Set torch's switches and the environment of CUDA's libraries; must run before anything touches the device."""
    # megatron-core relies on kernels being issued in order for overlap under sequence parallelism.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        ranks = _env_int("LOCAL_WORLD_SIZE", 1)
        os.environ.update(missing_settings(os.environ, ranks=ranks, cores=os.cpu_count() or 1))
    if parallel.deterministic:
        torch.use_deterministic_algorithms(True)
        for name, value in _DETERMINISTIC.items():
            os.environ.setdefault(name, value)


def _take_device() -> None:
    """Choose this rank's GPU: the only visible one, or the one with its local number."""
    local, ranks, devices = _env_int("LOCAL_RANK", 0), _env_int("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
    if devices == 1 and local > 0 and os.environ.get("CUDA_VISIBLE_DEVICES", "").isdigit():
        local = 0
    if local >= devices:
        raise UsageError(
            f"{ranks} ranks on this machine, but {devices} GPUs; start at most {devices}, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    torch.cuda.set_device(local)


def position() -> Position:
    """Coordinates of this rank in the groups that `start` made."""
    return Position(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
    )


def own_store() -> dist.Store:
    """Another connection to the store through which the ranks met, for a thread: an operation blocks a connection."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined, no-any-return]


def on_any_rank(value: bool) -> bool:
    """Whether some rank says so. Collective."""
    found = torch.tensor(float(value), device=cpu_runtime.device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def stop() -> None:
    """Leave together; without the barrier a gloo process may abort at interpreter exit (measured: 2 of 44 runs)."""
    if dist.is_initialized():
        dist.barrier()
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"environment variable {name}: {text!r} is not a number") from None
