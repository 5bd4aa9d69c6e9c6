"""Optimizers of the stand-in for Transformer Engine: AdamW whose moments and fp32 weights take fewer bytes."""

from __future__ import annotations

from typing import Any

import torch

_MOMENTS = ("exp_avg", "exp_avg_sq")
_TYPES = (torch.float32, torch.bfloat16)


def multi_tensor_applier(op: Any, noop_flag: Any, tensor_lists: Any, *args: Any) -> Any:
    """Apply an operation to lists of tensors; MegaVL calls none of them."""
    raise NotImplementedError("the stand-in has no kernels over lists of tensors")


multi_tensor_l2norm = multi_tensor_scale = multi_tensor_applier


class FusedSGD:
    """Only its name is imported."""


class FusedAdam(torch.optim.Optimizer):
    """AdamW on `decoupled_grad`, with moments in bf16 and with fp32 weights as bf16 weights and 16 more bits.

    A group counts its steps in `step`. As in Transformer Engine, all moments of a group are cast to fp32 at once.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        assert not amsgrad and not capturable and bias_correction and adam_w_mode and use_decoupled_grad
        assert master_weights and master_weight_dtype == torch.float32 and store_param_remainders
        assert exp_avg_dtype in _TYPES and exp_avg_sq_dtype in _TYPES
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.types = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        """Zero moments, and a remainder of zero: fp32 weights that equal the bf16 ones."""
        assert store_param_remainders == (param.dtype == torch.bfloat16), "fp32 weights are not in the test"
        state = self.state[param]
        for name in _MOMENTS:
            state[name] = torch.zeros_like(param, dtype=self.types[name])
        state["master_param"] = torch.zeros_like(param, dtype=torch.int16)

    def get_unscaled_state(self, param: torch.Tensor, state_name: str) -> torch.Tensor:
        """A moment in fp32, or the remainder in int16."""
        state = self.state[param][state_name]
        return state if state_name == "master_param" else state.float()

    def set_scaled_state(self, param: torch.Tensor, state_name: str, unscaled_state: torch.Tensor) -> None:
        """The reverse."""
        expected = torch.int16 if state_name == "master_param" else torch.float32
        assert unscaled_state.dtype == expected
        self.state[param][state_name].copy_(unscaled_state)

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        """Update weights and state."""
        assert closure is None and grad_scaler is None
        for group in self.param_groups:
            if not group["params"]:
                continue
            # A gradient that is not finite goes into the weights: the kernel does not look at it.
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int)
            with_gradient = [p for p in group["params"] if getattr(p, "decoupled_grad", None) is not None]
            for param in with_gradient:
                if not self.state[param]:
                    self.initialize_state(param, param.dtype == torch.bfloat16)
            cast = {p: [self.get_unscaled_state(p, name).clone() for name in _MOMENTS] for p in with_gradient}
            for param, moments in cast.items():
                self._update(param, group, *moments)

    def _update(self, param: torch.Tensor, group: Any, first: torch.Tensor, second: torch.Tensor) -> None:
        (beta1, beta2), step, grad = group["betas"], group["step"], param.decoupled_grad.float()  # type: ignore
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        divisor = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        # Before rounding to the nearest bf16, high bits and remainder are those of the fp32 number.
        rest = self.state[param]["master_param"]
        high = param.view(torch.int16).int() - (rest < 0).int()
        master = ((high << 16) | (rest.int() & 0xFFFF)).view(torch.float32)
        update = (first / (1 - beta1**step)) / divisor + group["weight_decay"] * master
        bits = (master - group["lr"] * update).view(torch.int32)
        low = ((bits & 0xFFFF) ^ 0x8000) - 0x8000
        rest.copy_(low.to(torch.int16))
        param.view(torch.int16).copy_(((bits >> 16) + (low < 0).int()).to(torch.int16))
        for name, moment in zip(_MOMENTS, (first, second)):
            self.set_scaled_state(param, name, moment)
