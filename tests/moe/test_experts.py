"""The grouped path equals the plain loop; experts without a token get zeros, never nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from moe.config import Activation, ExpertConfig
from moe.errors import LayoutError, RoutingError
from moe.experts import Experts, SharedExpert, can_group, shard_experts

KINDS: tuple[Activation, ...] = ("swiglu", "squared_relu")
COUNTS = ([3, 2, 1, 4], [0, 5, 0, 5], [0, 0, 0, 10], [10, 0, 0, 0], [0, 0, 0, 0])


def gradients(
    experts: Experts, how: str, x: Tensor, counts: list[int] | Tensor, weights: Tensor | None
) -> list[Tensor]:
    """Return the output and every gradient of a weighted sum of it."""
    run = experts.loop if how == "loop" else experts
    x = x.detach().requires_grad_()
    p = None if weights is None else weights.detach().requires_grad_()
    y = run(x, counts, p)
    head = torch.linspace(0.5, 1.5, y.numel(), device=y.device).view_as(y).to(y.dtype)
    inputs = [x, *experts.parameters()] + ([] if p is None else [p])
    return [y, *torch.autograd.grad((y * head).sum(), inputs)]


def make(kind: Activation, dtype: torch.dtype = torch.float32, **more: int) -> Experts:
    config = ExpertConfig(16, 8, kind)
    return Experts(config, 4, dtype=dtype, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
def test_grouped_equals_loop_in_output_and_all_gradients(
    kind: Activation, counts: list[int], weighted: bool, dtype: torch.dtype, tolerance: float
) -> None:
    experts = make(kind, dtype)
    x = torch.randn(sum(counts), 16).to(dtype)
    weights = torch.rand(sum(counts)) if weighted else None
    assert can_group(x, experts.w_in_LDG, experts.w_out_LFD) == (sum(counts) > 0)
    pairs = zip(
        gradients(experts, "grouped", x, counts, weights),
        gradients(experts, "loop", x, counts, weights),
        strict=True,
    )
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["grouped", "loop"])
def test_experts_without_a_token_get_zero_gradients_and_never_none(
    kind: Activation, how: str
) -> None:
    experts = make(kind)
    for counts in ([0, 6, 0, 0], [0, 0, 0, 0]):
        experts.zero_grad(set_to_none=True)
        x = torch.randn(sum(counts), 16, requires_grad=True)
        y = (experts.loop if how == "loop" else experts)(x, counts)
        assert y.shape == (sum(counts), 16)
        y.sum().backward()
        assert x.grad is not None
        for weight in experts.parameters():
            assert weight.grad is not None
            for expert, count in enumerate(counts):
                assert bool((weight.grad[expert] == 0).all()) == (count == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_run_through_its_own_expert(kind: Activation) -> None:
    experts, x = make(kind), torch.randn(6, 16)
    y = experts(x, [1, 0, 3, 2])
    for row, expert in enumerate([0, 2, 2, 2, 3, 3]):
        h = x[row] @ experts.w_in_LDG[expert]
        act = functional.relu(h) ** 2
        if kind == "swiglu":  # gate first, up second
            act = functional.silu(h[:8]) * h[8:]
        torch.testing.assert_close(y[row], act @ experts.w_out_LFD[expert])


def test_weights_before_the_second_projection_are_weights_of_the_output() -> None:
    experts, x, weights = make("swiglu"), torch.randn(10, 16), torch.rand(10)
    counts = [3, 2, 1, 4]
    inside, outside = experts(x, counts, weights), experts(x, counts) * weights.unsqueeze(1)
    torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize("counts", [torch.tensor([1, 0, 3, 2]), [1, 0, 3, 2], (1, 0, 3, 2)])
def test_counts_may_be_a_tensor_or_a_sequence(counts: Tensor | list[int]) -> None:
    experts, x = make("swiglu"), torch.randn(6, 16)
    torch.testing.assert_close(experts(x, counts), experts.loop(x, counts))


@pytest.mark.parametrize("how", ["grouped", "loop"])
@pytest.mark.parametrize("counts", [[1, 2, 3], [1, 2, 3, 1], [1, 2, 3, 1, 0]])
def test_counts_that_are_not_those_of_the_rows_are_refused(how: str, counts: list[int]) -> None:
    experts, x = make("swiglu"), torch.randn(6, 16)
    with pytest.raises(RoutingError, match=r"for 4 experts and 6 rows"):
        (experts.loop if how == "loop" else experts)(x, counts)


def test_a_sum_of_the_output_has_a_gradient() -> None:
    # its gradient is expanded from one number, which the grouped kernel does not take
    experts, x = make("swiglu"), torch.randn(6, 16, requires_grad=True)
    experts(x, [1, 0, 3, 2]).sum().backward()
    assert x.grad is not None


ODD = [
    ("float64", 16, 8, torch.float64),
    ("hidden of 5", 5, 8, torch.float32),
    ("inner of 3", 16, 3, torch.float32),
    ("hidden of 20 in bfloat16", 20, 8, torch.bfloat16),
]


@pytest.mark.parametrize(
    ("hidden", "inner", "dtype"), [case[1:] for case in ODD], ids=[case[0] for case in ODD]
)
def test_what_the_grouped_kernel_does_not_take_is_run_by_the_loop(
    hidden: int, inner: int, dtype: torch.dtype
) -> None:
    experts = Experts(ExpertConfig(hidden, inner), 3, dtype=dtype)
    x = torch.randn(5, hidden, dtype=dtype, requires_grad=True)
    assert not can_group(x, experts.w_in_LDG, experts.w_out_LFD)
    y = experts(x, [2, 0, 3])
    assert torch.equal(y, experts.loop(x, [2, 0, 3]))
    y.sum().backward()
    assert all(weight.grad is not None for weight in experts.parameters())


def test_rows_that_do_not_begin_at_sixteen_bytes_are_run_by_the_loop() -> None:
    experts = make("swiglu")
    for x in (torch.randn(6 * 16 + 1)[1:].view(6, 16), torch.randn(16, 6).T):
        assert not can_group(x, experts.w_in_LDG)
        torch.testing.assert_close(
            experts(x, [6, 0, 0, 0]), experts(x.contiguous().clone(), [6, 0, 0, 0])
        )


def test_gradients_pass_the_numerical_check() -> None:
    experts = Experts(ExpertConfig(3, 2), 2, dtype=torch.float64)
    x, p = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda rows, weights, *_: experts(rows, [1, 3], weights),
        (x.requires_grad_(), p.requires_grad_(), *experts.parameters()),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4), (1, 8)])
def test_shards_sum_to_the_whole_and_their_gradients_are_its_slices(
    kind: Activation, ep: int, etp: int
) -> None:
    whole, counts = make(kind), [3, 0, 2, 4]
    x, weights = torch.randn(9, 16), torch.rand(9)
    y = whole(x, counts, weights)
    y.square().sum().backward()
    local = 4 // ep
    outputs = []
    for rank in range(ep):
        mine = range(rank * local, (rank + 1) * local)
        rows = slice(sum(counts[: mine.start]), sum(counts[: mine.stop]))
        shards = [Experts(whole.config, local, etp_size=etp, etp_index=i) for i in range(etp)]
        for shard in shards:
            shard.load_full(whole.state_dict(), first_expert=mine.start)
        parts = [s(x[rows], counts[mine.start : mine.stop], weights[rows]) for s in shards]
        outputs.append(torch.stack(parts).sum(dim=0))
        outputs[-1].square().sum().backward()
        for index, shard in enumerate(shards):
            for name, weight in shard.named_parameters():
                full = dict(whole.named_parameters())[name].grad
                wanted = shard_experts(full, name, whole.config, mine, etp, index)
                torch.testing.assert_close(weight.grad, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(outputs), y)


def test_a_slice_of_gate_and_up_is_gate_first_and_up_second() -> None:
    config = ExpertConfig(hidden=1, intermediate=4)
    full = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0]]])
    halves = [shard_experts(full, "w_in_LDG", config, range(1), 2, i) for i in range(2)]
    assert [h.flatten().tolist() for h in halves] == [[1, 2, 10, 20], [3, 4, 30, 40]]


def test_an_inner_width_that_does_not_divide_is_refused_with_the_nearest() -> None:
    with pytest.raises(LayoutError, match=r"width of 12 does not divide over etp=5.* 10 or 15"):
        Experts(ExpertConfig(8, 12), 2, etp_size=5)
    with pytest.raises(LayoutError, match="etp_index=2"):
        Experts(ExpertConfig(8, 12), 2, etp_size=2, etp_index=2)
    with pytest.raises(LayoutError, match="0 experts"):
        Experts(ExpertConfig(8, 12), 0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.sampled_from(KINDS))
def test_any_counts_give_what_the_loop_gives(counts: list[int], kind: Activation) -> None:
    experts = Experts(ExpertConfig(8, 4, kind), len(counts))
    x, p = torch.randn(sum(counts), 8), torch.rand(sum(counts))
    found = gradients(experts, "grouped", x, counts, p)
    torch.testing.assert_close(found, gradients(experts, "loop", x, counts, p))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", [False, True])
def test_the_shared_expert_is_a_plain_network_with_or_without_a_gate(
    kind: Activation, gate: bool
) -> None:
    shared = SharedExpert(ExpertConfig(16, 8, kind, shared=4, shared_gate=gate))
    x = torch.randn(5, 16)
    h = x @ shared.w_in_DG
    act = functional.silu(h[:, :4]) * h[:, 4:] if kind == "swiglu" else functional.relu(h) ** 2
    wanted = act @ shared.w_out_FD
    if gate:
        assert shared.gate_D is not None
        wanted = wanted * torch.sigmoid((x * shared.gate_D).sum(dim=1, keepdim=True))
    torch.testing.assert_close(shared(x), wanted)
    shared(torch.zeros(0, 16)).sum().backward()
    assert len(list(shared.parameters())) == 2 + gate
    assert all((w.grad == 0).all() for w in shared.parameters())


def test_a_shared_expert_without_a_width_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"ExpertConfig\.shared"):
        SharedExpert(ExpertConfig(16, 8))


@pytest.fixture
def _any_order() -> Iterator[None]:
    """Let cuBLAS choose, which otherwise wants a variable set before the process starts."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.gpu
@pytest.mark.usefixtures("_any_order")
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_equals_loop_on_a_gpu(counts: list[int]) -> None:
    experts = make("swiglu", torch.bfloat16).cuda()
    x = torch.randn(sum(counts), 16, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(sum(counts), device="cuda")
    assert can_group(x, experts.w_in_LDG, experts.w_out_LFD) == (sum(counts) > 0)
    on_gpu = torch.tensor(counts, device="cuda")
    for found, wanted in zip(
        gradients(experts, "grouped", x, on_gpu, weights),
        gradients(experts, "loop", x, counts, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("width", [16, 6])
def test_autocast_decides_on_the_type_whatever_kernel_runs(rows: int, width: int) -> None:
    experts = Experts(ExpertConfig(width, 16), 2)
    x = torch.randn(rows, width, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, looped = experts(x, [rows, 0]), experts.loop(x, [rows, 0])
    assert y.dtype is looped.dtype is torch.bfloat16
    torch.testing.assert_close(y, looped)
    y.sum().backward()
    assert x.grad.dtype is experts.w_in_LDG.grad.dtype is torch.float32
    assert experts(x, [rows, 0]).dtype is torch.float32
    exact = experts.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert exact(x.double(), [rows, 0]).dtype is torch.float64
