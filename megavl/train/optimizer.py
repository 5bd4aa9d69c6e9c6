"""megatron-core's optimizers with torch's AdamW, extended to resume and reshard exactly and to skip bad steps.

megatron-core 0.16.1 cannot resume its distributed optimizer. Its load template needs state that does not exist yet.
All parameters come back with one shared step tensor. Buckets with padding are saved at shifted offsets, after one rank
of each replica has gathered them. Its other optimizers save one step count, under other keys.

The subclasses below repair this and store the same tensors with and without `parallel.distributed_optimizer`. A
text-only step leaves vision weights unchanged. A step whose loss or gradient is not finite changes nothing. The device
decides this, so the host does not wait for the gradient norm.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer

from megavl.checkpoint.boxes import shards_of_range
from megavl.config import recipe as recipes
from megavl.config.errors import CheckpointError
from megavl.config.releases import gradients_for_norm
from megavl.parallel import cpu_runtime
from megavl.train.model_chunks import ModelChunks
from megavl.train.weight_halves import group_in_parts, join_weight, split_weight

VISION_GROUP = "vision"
"""Name of the parameter groups that a text-only step leaves unchanged."""

_STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")

_CLIP_EPS = 1e-6
"""Added to the norm before clipping divides by it, as in torch and megatron-core."""


def build_optimizer(model: ModelChunks, *, optimizer: recipes.OptimizerConfig, bf16: bool) -> Optimizer:
    """AdamW over this rank's trainable weights, or its shard of them, in named groups.

    Args:
        bf16: whether weights are bf16; the optimizer then keeps fp32 master weights.
    """
    settings, halves = model.chunks[0].ddp_config, optimizer.state_precision == "bf16"
    config = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        params_dtype=model.chunks[0].config.params_dtype,
        bf16=bf16,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
        use_precision_aware_optimizer=halves,
        exp_avg_dtype=torch.bfloat16 if halves else torch.float32,
        exp_avg_sq_dtype=torch.bfloat16 if halves else torch.float32,
    )
    # Optimizers of Transformer Engine and Apex need the host to decide about a step; Apex's saves no memory.
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = not halves
    overrides = {**get_standard_config_overrides(config), ParamKey(name="*vision.*"): {"name": VISION_GROUP}}
    chained = get_megatron_optimizer(config, list(model.chunks), config_overrides=overrides)
    if not isinstance(chained, ChainedOptimizer):
        chained = ChainedOptimizer([chained])
    for part in chained.chained_optimizers:
        assert type(part) in _ADOPTED, f"found {type(part).__name__}, which is none of {[*_ADOPTED]}"
        # The subclass adds methods but no state, so changing the class of the built object is enough.
        part.__class__ = HalfStateOptimizer if halves else _ADOPTED[type(part)]
        # One kernel that reads and writes everything once, on the CPU too; megatron-core keeps torch's default.
        for group in () if halves else part.param_groups:
            group["fused"] = True
    chained.__class__ = Optimizer
    return chained


def holds_half_state(chained: ChainedOptimizer) -> bool:
    """Whether its fp32 weights are kept as bf16 weights and the remaining bits."""
    return any(isinstance(part, HalfStateOptimizer) for part in chained.chained_optimizers)


def set_learning_rate(chained: ChainedOptimizer, *, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay in every group; `wd_mult` scales its decay."""
    for group in chained.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]


@contextlib.contextmanager
def without_vision(chained: ChainedOptimizer, *, active: bool) -> Iterator[None]:
    """While `active`, a step leaves vision weights, their moments and their step count unchanged."""
    parts = chained.chained_optimizers
    saved = [part.optimizer.param_groups for part in parts]
    if active:
        for part in parts:
            kept = [group for group in part.optimizer.param_groups if group.get("name") != VISION_GROUP]
            part.optimizer.param_groups = kept
    try:
        yield
    finally:
        for part, groups in zip(parts, saved):
            part.optimizer.param_groups = groups


class Optimizer(ChainedOptimizer):
    """megatron-core's chained optimizer, with a step that copies no number to the host."""

    @torch.no_grad()
    def step(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip to `clip_grad` and update; if loss or gradient is not finite, nothing changes.

        megatron-core would write NaN into every weight, because a NaN norm passes its clipping.

        Args:
            loss: loss of the global batch, equal on all ranks.

        Returns:
            Norm of the gradients over all ranks before clipping, in their dtype, and whether weights changed; both of
            shape () on the device.
        """
        self.prepare_grads()
        norm = self._norm()
        updated = norm.isfinite() & loss.isfinite()
        most = self.config.clip_grad
        divisor = ((norm + _CLIP_EPS) / most).clamp(min=1.0).float() if most else None
        # All of them decide alike.
        if all(part.prepare_update(divisor, updated=updated) for part in self.chained_optimizers):
            self.step_with_ready_grads()
        return norm, updated

    def _norm(self) -> torch.Tensor:
        parts = self.chained_optimizers
        gradients = [gradient.detach() for part in parts for gradient in gradients_for_norm(part)]
        # For an empty list torch returns a tensor on the CPU.
        dtype = torch.promote_types(self.config.params_dtype, torch.float32)
        gradients = gradients or [torch.zeros(1, dtype=dtype, device=cpu_runtime.device())]
        total = torch.nn.utils.get_total_norm(gradients).square()
        group = self.get_grad_stats_parallel_group()
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        return total.sqrt()


class _Resumable(MegatronOptimizer):
    """Common to both kinds of optimizer; it comes before megatron-core's class in the bases."""

    def state_dict(self) -> dict[str, Any]:
        """Everything except tensors: hyper-parameters and step counts of the groups, equal on all ranks."""
        groups = self.optimizer.param_groups
        plain = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        # A rank may hold no shard of a group. It still needs the right step, since it may write the common file.
        steps = torch.zeros(len(groups), dtype=torch.int64, device=cpu_runtime.device())
        for index, group in enumerate(groups):
            steps[index] = self._step_count(group)
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)
        for index, group in enumerate(plain):
            group["step"] = int(steps[index])
        return {"optimizer": {"param_groups": plain}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore step counts and, if present, fp32 weights and moments; hyper-parameters stay those of the recipe.

        Raises:
            CheckpointError: the groups are not this run's.
        """
        self._allocate()
        saved = state_dict["optimizer"]["param_groups"]
        groups = self.optimizer.param_groups
        identity = [(g.get("name"), g["wd_mult"]) for g in groups]
        if identity != [(g.get("name"), g["wd_mult"]) for g in saved]:
            raise CheckpointError(
                f"optimizer groups of the checkpoint {[(g.get('name'), g['wd_mult']) for g in saved]} are not this "
                f"run's {identity}: other weights train now; start a fresh run with checkpoint.init"
            )
        for group, old in zip(groups, saved):
            self._set_step_count(group, old["step"])
        if "param_state" in state_dict:
            self._load_tensors(state_dict["param_state"])

    def prepare_update(self, divisor: torch.Tensor | None, *, updated: torch.Tensor) -> bool:
        """Tell the next update what to divide gradients by, and whether to change anything.

        Args:
            divisor: fp32 (); None for 1.
            updated: bool (), on the device.

        Returns:
            Whether to call it.
        """
        # torch's fused kernel divides gradients by `grad_scale`, does nothing if `found_inf` is 1, and wants fp32.
        self.optimizer.grad_scale = divisor
        self.optimizer.found_inf = (~updated).float()
        return True

    def _step_count(self, group: dict[str, Any]) -> int:
        states = [self.optimizer.state[parameter] for parameter in group["params"]]
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    def _set_step_count(self, group: dict[str, Any], count: int) -> None:
        group["step"] = count
        for parameter in group["params"]:
            # Each needs its own tensor: torch's AdamW advances a shared one once per parameter.
            self.optimizer.state[parameter]["step"] = torch.tensor(float(count), device=parameter.device)

    def _allocate(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)

    @abstractmethod
    def _load_tensors(self, tensors: dict[int, dict[str, torch.Tensor]]) -> None:
        """Copy master weights and moments; keys are the weights' indices in this rank's groups."""


class ReshardableDistributedOptimizer(_Resumable, DistributedOptimizer):
    """Each data-parallel rank updates its shard; files fit any tensor, pipeline and data-parallel size."""

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """State for dist_checkpointing; a fresh optimizer first allocates its moments.

        Each rank gives the shard that it updates. megatron-core would gather the shards of all ranks in host memory.
        """
        self._allocate()
        weights, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        sharded = {id(weight.data): weight for weight in nested_values(weights)}
        tensors: dict[int, dict[str, Any]] = {}
        for index, weight in enumerate(self.model_param_group_index_map):
            whole, start = sharded[id(weight)], self._get_model_param_range_map(weight)["param"].start
            state = self._get_main_param_and_optimizer_states(weight)
            tensors[index] = {
                key: shards_of_range(whole, state[key].detach(), start=start, key=f"optimizer.state.{key}.{whole.key}")
                for key in _STATE_KEYS
            }
        return {**self.state_dict(), "param_state": tensors, "param_state_sharding_type": "fully_reshardable"}

    def _load_tensors(self, tensors: dict[int, dict[str, Any]]) -> None:
        for index, weight in enumerate(self.model_param_group_index_map):
            loaded = {key: torch.cat([part.flatten() for part in tensors[index][key]]) for key in _STATE_KEYS}
            self._set_main_param_and_optimizer_states(weight, loaded)

    def _set_main_param_and_optimizer_states(self, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        target = {"param": main, **self.optimizer.state[main]}
        for key in _STATE_KEYS:  # never `step`, which is not in the file
            target[key].copy_(tensors[key])


class HalfStateOptimizer(ReshardableDistributedOptimizer):
    """Transformer Engine's AdamW with half the state: bf16 moments, and the 16 bits that bf16 weights lack of fp32.

    Files hold the same fp32 weights and moments as without it.
    """

    def prepare_update(self, divisor: torch.Tensor | None, *, updated: torch.Tensor) -> bool:
        """As elsewhere, but the host waits for the decision, which the kernel does not read."""
        if not bool(updated):
            return False
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        if divisor is not None and weights:
            torch._foreach_div_([weight.decoupled_grad for weight in weights], divisor)
        return True

    def step_with_ready_grads(self) -> bool:
        """Update a few weights at a time: Transformer Engine casts all moments of a group to fp32 at once."""
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [part for group in groups for part in group_in_parts(group)]
        try:
            done: bool = super().step_with_ready_grads()
        finally:
            self.optimizer.param_groups = groups
        for group in groups:
            group["step"] = self._step_count(group) + 1
        return done

    def _step_count(self, group: dict[str, Any]) -> int:
        return int(group.get("step", 0))

    def _set_step_count(self, group: dict[str, Any], count: int) -> None:
        group["step"] = count

    def _allocate(self) -> None:
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                if not self.optimizer.state[weight]:
                    self.optimizer.initialize_state(weight, True)

    def _get_main_param_and_optimizer_states(self, model_param: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = self._shard_of(model_param)
        get = self.optimizer.get_unscaled_state
        # On the host: a device whose memory this state was chosen for cannot hold all of it in fp32.
        moments = {key: get(weight, key).cpu() for key in ("exp_avg", "exp_avg_sq")}
        return {"param": join_weight(weight, get(weight, "master_param")).cpu(), **moments}

    def _set_main_param_and_optimizer_states(self, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        weight = self._shard_of(model_param)
        put = self.optimizer.set_scaled_state
        for key in ("exp_avg", "exp_avg_sq"):
            put(weight, key, tensors[key].to(weight.device))
        rounded, rest = split_weight(tensors["param"].to(weight.device))
        weight.copy_(rounded)
        put(weight, "master_param", rest)

    def _shard_of(self, model_param: torch.Tensor) -> torch.Tensor:
        group, order = self.model_param_group_index_map[model_param]
        found: torch.Tensor = self.optimizer.param_groups[group]["params"][order]
        return found


class _Whole(_Resumable):
    """Every data-parallel rank updates all its weights; the tensors of a file are the distributed optimizer's."""

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """State for dist_checkpointing; a fresh optimizer first allocates its moments."""
        self._allocate()
        indices = {main: index for index, main in enumerate(self.get_parameters())}
        tensors: dict[int, dict[str, Any]] = {}
        weights, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        for weight in nested_values(weights):
            main = getattr(weight.data, "main_param", weight.data)
            if main in indices:
                tensors[indices[main]] = {
                    key: make_sharded_optimizer_tensor(weight, tensor, prefix=f"optimizer.state.{key}")
                    for key, tensor in self._tensors(main).items()
                }
        assert len(tensors) == len(indices), "a trained weight is not in the model's state"
        return {**self.state_dict(), "param_state": tensors, "param_state_sharding_type": "fully_reshardable"}

    def _load_tensors(self, tensors: dict[int, dict[str, torch.Tensor]]) -> None:
        for index, main in enumerate(self.get_parameters()):
            for key, tensor in self._tensors(main).items():
                tensor.copy_(tensors[index][key])

    def _tensors(self, main: torch.Tensor) -> dict[str, torch.Tensor]:
        state = {"param": main.detach(), **self.optimizer.state[main]}
        return {key: state[key] for key in _STATE_KEYS}


class WholeFP32Optimizer(_Whole, FP32Optimizer):
    """`_Whole` for fp32 weights."""


class WholeBF16Optimizer(_Whole, Float16OptimizerWithFloat16Params):
    """`_Whole` for bf16 weights with fp32 master weights."""


_ADOPTED = {
    DistributedOptimizer: ReshardableDistributedOptimizer,
    FP32Optimizer: WholeFP32Optimizer,
    Float16OptimizerWithFloat16Params: WholeBF16Optimizer,
}
