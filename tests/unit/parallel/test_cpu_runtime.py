"""CUDA names work on the CPU in forward and backward, and each process sees it the same way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megavl.parallel import cpu_runtime

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the runtime is inert where CUDA is present")


@pytest.fixture(autouse=True)
def installed() -> None:
    cpu_runtime.install()
    cpu_runtime.install()


def test_cuda_device_names_mean_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.arange(3, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).cuda().device.type == cpu_runtime.device().type == "cpu"


def test_names_work_in_recomputed_forward() -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        return x * torch.full((1,), 3.0, device="cuda")

    x = torch.ones(4, requires_grad=True)
    checkpoint(block, x, use_reentrant=True).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [3.0] * 4


def test_random_state_is_the_cpus() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


def test_bf16_products_round_once() -> None:
    cpu_runtime.prepare_products(torch.float32)
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 70), (50, 70), (50,)))
    cpu_runtime.prepare_products(torch.bfloat16)
    pairs = (
        (x @ weight.t(), x.float() @ weight.float().t()),
        (F.linear(x, weight, bias), F.linear(x.float(), weight.float(), bias.float())),
        (torch.addmm(bias, x, weight.t(), beta=2, alpha=3), 2 * bias.float() + 3 * (x.float() @ weight.float().t())),
        (torch.bmm(x[None], weight.t()[None]), (x.float() @ weight.float().t())[None]),
    )
    for found, exact in pairs:
        assert found.dtype == torch.bfloat16
        # Half of the last place; sums in another order may tip a tie.
        assert ((found.float() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-5).all()
    y = x.clone().requires_grad_()
    F.linear(y, weight).backward(torch.ones(3, 50).bfloat16())
    assert y.grad is not None and y.grad.dtype == torch.bfloat16
    assert torch.equal(x.float() @ weight.float().t(), F.linear(x.float(), weight.float()))
