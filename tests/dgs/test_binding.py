"""The user's tensors behind the exchange: masters, and the optimizer state that belongs to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dgs
from dgs.binding import Binding
from tests.helpers.training import Batches, flat, make_model, sgd, train_step, wrap

MakeInner = Callable[[Iterable[Tensor]], Optimizer]

INNER: dict[str, MakeInner] = {
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=2),
}


def closure_of(model: nn.Module, opt: Optimizer, seed: int) -> Callable[[], Tensor]:
    """Evaluate always the same batch."""

    def evaluate() -> Tensor:
        opt.zero_grad()
        loss = Batches(seed).loss(model)
        loss.backward()
        return loss

    return evaluate


def in_float32(model: nn.Module) -> nn.Sequential:
    """Build the same network with the same values in float32."""
    other = make_model()
    other.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    return other


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "Adagrad"),
        (torch.bfloat16, "SGD"),
        (torch.bfloat16, "AdamW"),
        (torch.bfloat16, "Adafactor"),
        (torch.float16, "SGD"),  # the others divide by what float16 rounds to zero
    ],
)
def test_state_from_before_wrapping_goes_on_as_float32_state_of_the_master(
    dtype: torch.dtype, name: str, steps_before: int
) -> None:
    model = make_model(dtype=dtype)
    inner = INNER[name](model.parameters())
    for seed in range(steps_before):
        closure_of(model, inner, seed)()
        inner.step()
    reference = in_float32(model)
    expected = INNER[name](reference.parameters())
    expected.load_state_dict(copy.deepcopy(inner.state_dict()))
    binding = Binding(inner, model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.float()
        binding.step(None)
        expected.step()
    assert np.array_equal(binding.read_model(), flat(reference).numpy())
    assert torch.equal(flat(model), flat(reference).to(dtype).float())


def test_the_history_of_a_closure_optimizer_goes_on_in_float32() -> None:
    model = make_model(dtype=torch.bfloat16)
    inner = INNER["LBFGS"](model.parameters())
    for _ in range(3):
        inner.step(closure_of(model, inner, 3))
    (state,) = inner.state.values()
    before = [d.float() for d in state["old_dirs"]]
    assert before
    binding = Binding(inner, model.named_parameters())
    with binding.masters_in_place():
        kept = inner.state_dict()["state"][0]["old_dirs"]
    assert all(d.dtype == torch.float32 for d in kept)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    loss = float(binding.step(closure_of(model, inner, 3)).detach())
    after = float(closure_of(model, inner, 3)().detach())
    assert after < loss


def test_state_that_is_no_low_precision_tensor_is_left_as_it_is() -> None:
    class Odd(Optimizer):
        """Keeps all sorts of things."""

        def step(self, closure: Any = None) -> Any:
            """Do nothing."""

    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    inner = Odd([param], {})
    kept = {"double": torch.ones(3, dtype=torch.float64), "count": 7, "codes": torch.ones(3).byte()}
    inner.state[param] = {**kept, "nested": [torch.ones(2, dtype=torch.float16), None]}
    binding = Binding(inner, [("p", param)])
    binding.step(None)
    (state,) = inner.state.values()
    assert param not in inner.state
    assert all(state[k] is kept[k] for k in kept)
    assert state["nested"][0].dtype == torch.float32
    assert state["nested"][1] is None


def test_looking_up_the_state_of_a_parameter_does_not_lose_the_masters() -> None:
    model = make_model(dtype=torch.bfloat16)
    inner = INNER["AdamW"](model.parameters())
    binding = Binding(inner, model.named_parameters())
    for seed in range(2):
        closure_of(model, inner, seed)()
        assert inner.state[model[0].weight] == {}  # made by looking, as it is a defaultdict
        binding.step(None)
    assert len(inner.state) == len(list(model.parameters()))
    assert {int(s["step"]) for s in inner.state.values()} == {2}


def test_groups_added_to_a_low_precision_run_bring_their_state() -> None:
    class Eager(torch.optim.Adagrad):
        """Makes state for every group that is added, in the parameter's precision."""

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            """Add the group and its state."""
            super().add_param_group(param_group)
            if self.state:  # the base class's constructor adds the first groups
                for p in self.param_groups[-1]["params"]:
                    self.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}

    model = make_model(dtype=torch.bfloat16)
    opt = wrap(
        model, dgs.ParameterServer(), lambda _: Eager(model[0].parameters(), lr=0.1), momentum=0.0
    )
    data = Batches()
    train_step(model, opt, data)
    opt.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
    before = flat(model[2])
    train_step(model, opt, data)
    assert not torch.equal(flat(model[2]), before)
    assert {s["sum"].dtype for s in opt.state.values()} == {torch.float32}
    assert len(opt.state) == 4
    opt.close()


@pytest.mark.filterwarnings("ignore:.* has momentum of its own")
@pytest.mark.parametrize("name", ["Adagrad", "SGD", "AdamW", "Adafactor"])
def test_a_resumed_low_precision_run_with_earlier_state_goes_on_bit_for_bit(name: str) -> None:
    def run(interrupted: bool) -> tuple[Tensor, dict[str, Tensor]]:
        server, data = dgs.ParameterServer(run=1), Batches()
        model = make_model(dtype=torch.bfloat16)
        inner = INNER[name](model.parameters())
        train_step(model, inner, data)
        opt = wrap(model, server, lambda _: inner, worker="w")
        for step in range(6):
            if interrupted and step in (0, 3):  # before the first step, and later
                state = opt.state_dict()
                opt.close(leave=False)
                model = make_model(seed=9, dtype=torch.bfloat16)
                opt = wrap(model, server, lambda m: INNER[name](m.parameters()), worker="w")
                opt.load_state_dict(state)
                assert opt.stats.rejoins == 0
            train_step(model, opt, data)
        pulled = opt.pull_model()
        opt.close()
        return flat(model), pulled

    (calm, server), (stormy, again) = run(False), run(True)
    assert torch.equal(stormy, calm)
    assert all(torch.equal(server[k], again[k]) for k in server)


def test_the_defaults_of_torch_do_not_reach_the_exchange() -> None:
    server, data = dgs.ParameterServer(), Batches()
    model = make_model()
    settings = {"selection": "tracked", "dense_below": 8, "momentum": 0.5}
    inner = sgd(model)
    default = torch.get_default_dtype()
    with torch.device("meta"):  # what torch.set_default_device sets, for a while
        torch.set_default_dtype(torch.float64)
        try:
            opt = wrap(model, server, lambda _: inner, **settings)
        finally:
            torch.set_default_dtype(default)
    for _ in range(4):
        opt.zero_grad()
        data.loss(model).backward()
        with torch.device("meta"):
            opt.step()
            state, pulled = opt.state_dict(), opt.pull_model()
    assert {t.device.type for t in [*pulled.values(), *state["dgs"]["local"]]} == {"cpu"}
    opt.close(leave=False)
    with torch.device("meta"):
        again = wrap(model, server, lambda _: inner, **settings)
        again.load_state_dict(state)
    assert again.stats.rejoins == 0
    again.close()


def test_low_precision_parameters_are_bound_whatever_the_default_device() -> None:
    model = make_model(dtype=torch.bfloat16)
    inner = INNER["SGD"](model.parameters())
    closure_of(model, inner, 0)()
    with torch.device("meta"):
        binding = Binding(inner, model.named_parameters())
        assert binding.read_model().dtype == np.float32
        assert binding.read_buffers().shape == (0,)
        binding.step(None)
    assert binding.local(0).device.type == "cpu"
