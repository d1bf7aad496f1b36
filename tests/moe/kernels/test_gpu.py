"""The Triton kernels compute what their definitions do."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from moe.kernels import kernels, reference
from moe.permute import RowOrder, pad_to_multiple, row_order

CASES = [
    (torch.float32, 37, 1e-6),
    (torch.float32, 4097, 1e-6),
    (torch.float64, 37, 1e-14),
    (torch.bfloat16, 64, 1e-2),
]
"""Types, widths beside, above and at a block, and tolerances; the interpreter cuts to bfloat16
where a GPU rounds."""


def order_of(tokens: int, choices: int, num_experts: int) -> RowOrder:
    """Return an order with dropped choices and rows of padding."""
    experts = torch.rand(tokens, num_experts).argsort(dim=1)[:, :choices]
    return pad_to_multiple(row_order(experts, torch.rand(tokens, choices) < 0.8, num_experts), 4)


def check(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "width", "tolerance"), CASES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_gathered_and_summed_as_defined(
    gpu: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    tolerance: float,
    weighted: bool,
) -> None:
    order = order_of(5, 2, 3)
    source, position = order.source_N.to(device), order.position_TK.to(device)
    x = torch.randn(5, width, device=device).to(dtype)
    weights = torch.rand(source.numel(), device=device) if weighted else None
    rows = reference.gather_rows(x, source, weights)
    check(gpu.gather_rows(x, source, weights), rows, tolerance)
    check(
        gpu.sum_rows(rows, position, weights),
        reference.sum_rows(rows, position, weights),
        2 * tolerance,
    )


@pytest.mark.parametrize(("dtype", "width", "tolerance"), CASES, ids=str)
def test_rows_are_multiplied_as_defined(
    gpu: ModuleType, device: torch.device, dtype: torch.dtype, width: int, tolerance: float
) -> None:
    source = order_of(5, 2, 3).source_N.to(device)
    x, rows = (torch.randn(n, width, device=device).to(dtype) for n in (5, source.numel()))
    wanted = reference.dot_rows(x, rows, source)
    scale = max(1.0, width**0.5)
    check(gpu.dot_rows(x, rows, source) / scale, wanted / scale, min(tolerance, 1e-5))


@pytest.mark.parametrize(("dtype", "width", "tolerance"), CASES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_activated_as_defined_forwards_and_backwards(
    gpu: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    tolerance: float,
    gated: bool,
    weighted: bool,
) -> None:
    h = torch.randn(3, width * (2 if gated else 1), device=device).to(dtype)
    weights = torch.rand(3, device=device) if weighted else None
    grad = torch.randn(3, width, device=device).to(dtype)
    wanted = reference.activate_rows(h, weights, gated=gated)
    # the exponential's last bits differ between libraries
    tolerance = max(tolerance, 1e-5 if dtype != torch.float64 else 1e-12)
    check(gpu.activate_rows(h, weights, gated=gated), wanted, tolerance)
    found = gpu.activate_rows_back(grad, h, weights, gated=gated)
    defined = reference.activate_rows_back(grad, h, weights, gated=gated)
    check(found[0], defined[0], tolerance)
    if weighted:
        assert defined[1] is not None
        scale = width**0.5
        check(found[1] / scale, defined[1] / scale, 1e-5)
    else:
        assert found[1] is defined[1] is None


def test_rows_without_a_token_are_zero_whatever_memory_holds(
    gpu: ModuleType, device: torch.device
) -> None:
    nothing = torch.full((3,), -1, device=device)
    bad = torch.full((2, 20), torch.nan, device=device)
    weights = torch.full((3,), torch.nan, device=device)
    assert (gpu.gather_rows(bad, nothing, weights) == 0).all()
    assert (gpu.sum_rows(bad, nothing.view(3, 1), weights) == 0).all()
    assert (gpu.dot_rows(bad, bad.repeat(2, 1)[:3], nothing) == 0).all()


def test_no_rows_and_no_tokens_are_nothing_to_do(gpu: ModuleType, device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    x, empty = torch.randn(3, 8, device=device), torch.randn(0, 8, device=device)
    assert gpu.gather_rows(x, none).shape == (0, 8)
    assert torch.equal(gpu.sum_rows(empty, torch.full((3, 2), -1, device=device)), 0 * x)
    assert gpu.sum_rows(empty, none.view(0, 2)).shape == (0, 8)
    assert gpu.dot_rows(x, empty, none).shape == (0,)
    assert gpu.activate_rows(empty).shape == (0, 4)
    assert gpu.activate_rows_back(empty, torch.randn(0, 16, device=device))[0].shape == (0, 16)


def test_rows_may_be_views(gpu: ModuleType, device: torch.device) -> None:
    x = torch.randn(8, 5, device=device).T
    source = torch.tensor([4, -1, 0], device=device)
    assert torch.equal(gpu.gather_rows(x, source), reference.gather_rows(x, source))


def test_a_cpu_has_the_definitions() -> None:
    assert kernels(torch.device("cpu")) is reference


@pytest.mark.gpu
def test_a_gpu_has_the_triton_kernels() -> None:
    assert kernels(torch.device("cuda")).NAME == "triton"
