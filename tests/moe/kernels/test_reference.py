"""The definitions of the kernels against torch's own operations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moe.kernels import reference


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_activations_are_those_of_autograd(gated: bool, weighted: bool) -> None:
    h = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True) if weighted else None
    if gated:
        gate, up = h.chunk(2, dim=1)
        plain = functional.silu(gate) * up
    else:
        plain = functional.relu(h) ** 2
    wanted = plain if weights is None else plain * weights[:, None]
    grad = torch.randn(wanted.shape, dtype=torch.float64)
    inputs = (h,) if weights is None else (h, weights)
    expected = torch.autograd.grad(wanted, inputs, grad)
    with torch.no_grad():
        torch.testing.assert_close(reference.activate_rows(h, weights, gated=gated), wanted)
        found = reference.activate_rows_back(grad, h, weights, gated=gated)
    torch.testing.assert_close(found[0], expected[0])
    if weighted:
        torch.testing.assert_close(found[1], expected[1])
    else:
        assert found[1] is None


def test_activations_of_half_precision_are_rounded_once() -> None:
    h, weights = torch.randn(64, 32).bfloat16(), torch.rand(64)
    exact = reference.activate_rows(h.double(), weights.double())
    assert torch.equal(reference.activate_rows(h, weights), exact.bfloat16())
