"""How an optimizer begins, is saved and ends; and what it says when it is misused."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer

import dgs
from dgs.errors import ConfigError, ModelMismatchError, NonFiniteError
from dgs.transport.local import LocalTransport
from tests.helpers.training import Batches, flat, make_model, sgd, train_step, wrap


class Watched(LocalTransport):
    """A server's transport that remembers whether it was closed."""

    def __init__(self, server: dgs.ParameterServer) -> None:
        super().__init__(server)
        self.closed = False

    def close(self) -> None:
        self.closed = True
        super().close()


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_refused_join_closes_the_connections(num_shards: int) -> None:
    servers = [dgs.ParameterServer() for _ in range(num_shards)]
    first = wrap(make_model(), servers, worker="first")
    other = torch.nn.Linear(3, 2)
    transports = [Watched(s) for s in servers]
    with pytest.raises(ModelMismatchError):
        wrap(other, transports, worker="second")
    assert all(t.closed for t in transports)
    assert not any(p.grad_fn for p in other.parameters())
    first.close()


def test_a_refused_join_leaves_the_inner_optimizer_usable() -> None:
    server = dgs.ParameterServer()
    first = wrap(torch.nn.Linear(3, 2), server)
    model, data = make_model(dtype=torch.bfloat16), Batches()
    inner = torch.optim.Adagrad(model.parameters(), lr=0.1)
    with pytest.raises(ModelMismatchError):
        wrap(model, server, lambda _: inner)
    before = flat(model)
    train_step(model, inner, data)
    assert not torch.equal(flat(model), before)
    first.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_closed_optimizer_refuses_to_step_before_the_parameters_move(overlap: bool) -> None:
    model = make_model()
    opt = wrap(model, dgs.ParameterServer(), overlap=overlap)
    train_step(model, opt, Batches())
    state = opt.state_dict()
    opt.close()
    opt.close()
    before, steps = flat(model), opt.stats.steps
    with pytest.raises(ConfigError, match="this optimizer is closed"):
        train_step(model, opt, Batches())
    with pytest.raises(ConfigError, match="this optimizer is closed"):
        opt.load_state_dict(state)
    assert torch.equal(flat(model), before)
    assert opt.stats.steps == steps
    assert opt.state_dict()["dgs"]["steps"] == steps  # saving is still possible


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda o: torch.save(o, io.BytesIO()), lambda o: o.__getstate__()],
    ids=["deepcopy", "copy", "pickle", "state"],
)
def test_copies_are_refused_with_a_remedy(duplicate: Callable[[Any], Any]) -> None:
    opt = wrap(make_model(), dgs.ParameterServer())
    with pytest.raises(TypeError, match=r"holds open connections .* save its state_dict\(\)"):
        duplicate(opt)
    opt.close()


def test_state_dict_hooks_run_and_may_change_the_state() -> None:
    model = make_model()
    opt = wrap(model, dgs.ParameterServer(), worker="w")
    calls: list[str] = []

    def note(_: Optimizer) -> None:
        calls.append("before saving")

    def tag(_: Optimizer, state: dict[str, Any]) -> None:
        calls.append("after saving")
        state["note"] = "kept"

    def replace(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "replaced": True}

    opt.register_state_dict_pre_hook(note)
    opt.register_state_dict_post_hook(tag)
    opt.register_state_dict_post_hook(replace)
    train_step(model, opt, Batches())
    state = opt.state_dict()
    assert calls == ["before saving", "after saving"]
    assert (state["note"], state["replaced"]) == ("kept", True)
    assert "dgs" in state
    opt.close()


def test_load_state_dict_hooks_run_and_do_not_touch_what_was_given() -> None:
    server, model = dgs.ParameterServer(), make_model()
    opt = wrap(model, server, worker="w")
    train_step(model, opt, Batches())
    state = opt.state_dict()
    opt.close(leave=False)
    again = wrap(model, server, worker="w")
    steps: list[int] = []

    def unpack(_: Optimizer, wrapped: dict[str, Any]) -> dict[str, Any]:
        assert again.stats.steps == 0
        return wrapped.pop("outer")

    again.register_load_state_dict_pre_hook(unpack)
    again.register_load_state_dict_post_hook(lambda _: steps.append(again.stats.steps))
    wrapped = {"outer": state}
    again.load_state_dict(wrapped)
    assert steps == [1]
    assert wrapped.keys() == {"outer"}
    assert again.stats.rejoins == 0
    again.close()


@pytest.mark.parametrize("wrapped_by", ["nothing", "scheduler", "two schedulers", "scaler"])
def test_the_warning_of_double_momentum_points_at_the_users_line(wrapped_by: str) -> None:
    model = make_model()
    opt = wrap(
        model,
        dgs.ParameterServer(),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    )
    if "scheduler" in wrapped_by:
        torch.optim.lr_scheduler.StepLR(opt, step_size=2)
    if wrapped_by == "two schedulers":
        torch.optim.lr_scheduler.StepLR(opt, step_size=3)
    Batches().loss(model).backward()
    scaler = torch.amp.GradScaler("cpu", enabled=wrapped_by == "scaler", init_scale=1.0)
    scaler.scale(torch.zeros(1))
    line = inspect.currentframe().f_lineno + 2
    with pytest.warns(UserWarning, match="momentum of its own") as caught:
        scaler.step(opt) if wrapped_by == "scaler" else opt.step()
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]
    opt.close()


@pytest.mark.parametrize("inner", [None, "SGD", torch.nn.Linear(2, 2), Optimizer])
def test_what_is_no_optimizer_is_refused_by_its_type(inner: Any) -> None:
    with pytest.raises(ConfigError, match=rf"is a {type(inner).__name__}; give a torch.optim"):
        dgs.DistributedOptimizer(
            inner, named_parameters=make_model().named_parameters(), server=dgs.ParameterServer()
        )


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda s: {"dgs": {}}, "it lacks state, param_groups"),
        (lambda s: {**s, "dgs": {}}, "its 'dgs' part lacks round_steps, worker"),
        (lambda s: {**s, "dgs": 3}, "its 'dgs' part lacks round_steps, worker"),
        (lambda s: {**s, "dgs": {**s["dgs"], "worker_state": {}}}, "lacks base, buffers"),
        (lambda s: {k: v for k, v in s.items() if k != "dgs"}, "not the state of a dgs"),
    ],
    ids=["nothing", "no exchange", "a number", "no worker", "the inner one's"],
)
def test_incomplete_states_are_refused_by_what_they_lack_and_change_nothing(
    change: Callable[[dict[str, Any]], dict[str, Any]], missing: str
) -> None:
    model = make_model()
    opt = wrap(model, dgs.ParameterServer())
    train_step(model, opt, Batches())
    before = flat(model)
    with pytest.raises(ConfigError, match=missing):
        opt.load_state_dict(change(opt.state_dict()))
    assert torch.equal(flat(model), before)
    train_step(model, opt, Batches())
    opt.close()


def test_a_name_from_the_environment_is_checked_like_any_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DGS_WORKER", "w" * 200)
    with pytest.raises(ConfigError, match="at most 128 characters"):
        wrap(make_model(), dgs.ParameterServer())
    monkeypatch.setenv("DGS_WORKER", "from-outside")
    opt = wrap(make_model(), dgs.ParameterServer())
    assert opt.state_dict()["dgs"]["worker"] == "from-outside"
    opt.close()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_server_refuses_a_given_model_that_is_not_finite(bad: float) -> None:
    model = make_model()
    init = {n: p.detach().numpy().astype(np.float64) for n, p in model.named_parameters()}
    init["2.weight"][1, 5] = bad
    before = flat(model)
    with pytest.raises(ConfigError, match=r"in tensor '2\.weight'"):
        wrap(model, dgs.ParameterServer(init=init))
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("selection", ["exact", "tracked"])
def test_nan_that_waits_is_found_and_named(selection: str) -> None:
    model = make_model()
    opt = wrap(model, dgs.ParameterServer(), sgd, selection=selection, dense_below=8)
    data = Batches()
    for _ in range(3):
        train_step(model, opt, data)
    worker = opt._exchanger._worker
    worker._rule.waiting(worker.ranges[2])[7] = torch.nan
    with pytest.raises(NonFiniteError, match=r"velocity of tensor '2\.weight'"):
        train_step(model, opt, data)
    opt.close()
