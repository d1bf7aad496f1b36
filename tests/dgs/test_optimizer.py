"""The wrapper is a real optimizer: whatever a training loop does with one works."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dgs
from dgs.errors import ConfigError
from tests.helpers.training import (
    Batches,
    MakeOptimizer,
    flat,
    full_loss,
    make_model,
    server_loss,
    sgd,
    train_in_turns,
    train_step,
    wrap,
)


class Unseen(Optimizer):
    """An optimizer that the library knows nothing of: normalised steps with a decaying average."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.05, keep: float = 0.8) -> None:
        super().__init__(params, {"lr": lr, "keep": keep})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.mul_(group["keep"]).add_(p.grad, alpha=1 - group["keep"])
                    p.sub_(average / (average.norm() + 1e-6), alpha=group["lr"])
        return loss


INNER: dict[str, MakeOptimizer] = {
    "SGD": sgd,
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "Unseen": lambda m: Unseen(m.parameters()),
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("inner", INNER)
def test_any_inner_optimizer_trains_the_servers_model(
    inner: str, local_steps: int, overlap: bool
) -> None:
    server = dgs.ParameterServer()
    models = [make_model() for _ in range(3)]
    before = full_loss(models[0])
    settings = {"momentum": 0.3, "local_steps": local_steps, "overlap": overlap}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # AdamW at H = 1; has a test of its own
        opts = [
            wrap(m, server, INNER[inner], worker=f"w{i}", **settings) for i, m in enumerate(models)
        ]
        train_in_turns(opts, models, 60)
    assert server_loss(opts[0]) < 0.75 * before
    assert [o.stats.steps for o in opts] == [60] * 3
    for opt in opts:
        opt.close()


def test_it_is_an_optimizer_and_shares_groups_and_state_with_the_inner_one() -> None:
    model = make_model()
    opt = wrap(model, dgs.ParameterServer(), INNER["AdamW"], local_steps=2)
    assert isinstance(opt, Optimizer)
    assert opt.param_groups is opt.inner.param_groups
    train_step(model, opt, Batches())
    assert opt.state is opt.inner.state
    assert len(opt.state) == len(list(model.parameters()))
    opt.close()


def test_one_worker_at_density_one_equals_the_inner_optimizer_alone() -> None:
    # one worker is never stale, so what remains of the exchange must be nothing at all
    alone, together = make_model(), make_model()
    inner = sgd(alone)
    opt = wrap(together, dgs.ParameterServer(), rule="none", density=1.0, download_density=1.0)
    ours, theirs = Batches(), Batches()
    for _ in range(50):
        train_step(alone, inner, theirs)
        train_step(together, opt, ours)
    torch.testing.assert_close(flat(together), flat(alone), rtol=1e-5, atol=1e-6)
    opt.close()


def test_at_density_one_workers_in_turns_are_sequential_asgd_bit_for_bit() -> None:
    server = dgs.ParameterServer()
    models = [make_model() for _ in range(3)]
    stale = [make_model() for _ in range(3)]
    settings = {"rule": "none", "density": 1.0, "download_density": 1.0}
    opts = [wrap(m, server, worker=f"w{i}", **settings) for i, m in enumerate(models)]
    inners = [sgd(m) for m in stale]
    theta = [p.detach().clone() for p in stale[0].parameters()]
    ours, theirs = ([Batches(i) for i in range(3)] for _ in range(2))
    schedule = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    for k in schedule:
        train_step(models[k], opts[k], ours[k])
        copies = [p.detach().clone() for p in stale[k].parameters()]
        train_step(stale[k], inners[k], theirs[k])
        with torch.no_grad():  # the server takes the stale copy's step, the worker its new model
            for t, copy, p in zip(theta, copies, stale[k].parameters(), strict=True):
                t -= copy - p
                p.copy_(t)
        assert torch.equal(flat(models[k]), flat(stale[k]))
    for opt in opts:
        opt.close()


def test_groups_keep_their_own_learning_rate() -> None:
    model = make_model()
    layers = [list(model[0].parameters()), list(model[2].parameters())]

    def inner(_: nn.Module) -> Optimizer:
        return torch.optim.SGD([{"params": layers[0], "lr": 0.0}, {"params": layers[1]}], lr=0.125)

    opt = wrap(model, dgs.ParameterServer(), inner, density=1.0, download_density=1.0)
    first, second = (p[0].detach().clone() for p in layers)
    train_step(model, opt, Batches())
    assert torch.equal(layers[0][0], first)
    assert not torch.equal(layers[1][0], second)
    opt.close()


def test_schedulers_set_the_inner_optimizers_learning_rate() -> None:
    model = make_model()
    opt = wrap(model, dgs.ParameterServer())
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
    rates = []
    for _ in range(5):
        train_step(model, opt, Batches())
        rates.append(opt.inner.param_groups[0]["lr"])
        scheduler.step()
    assert rates == [0.125, 0.125, 0.0625, 0.0625, 0.03125]
    opt.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closures_are_evaluated_and_their_loss_is_returned(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    opt = wrap(
        model,
        dgs.ParameterServer(),
        lambda m: torch.optim.LBFGS(m.parameters(), lr=0.5, max_iter=4),
        density=1.0,
        download_density=1.0,
    )
    calls = [0]

    def closure() -> Tensor:
        calls[0] += 1
        opt.zero_grad()
        loss = Batches(3).loss(model)
        loss.backward()
        return loss

    losses = [float(opt.step(closure).detach()) for _ in range(5)]
    assert calls[0] > 5
    assert losses[-1] < 0.7 * losses[0]
    opt.close()


def test_clipped_gradients_bound_what_is_sent() -> None:
    model = make_model()
    opt = wrap(model, dgs.ParameterServer(), rule="none", density=1.0, download_density=1.0)
    before = flat(model)
    Batches().loss(model).mul(1000).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    opt.step()
    assert (flat(model) - before).norm() == pytest.approx(0.125 * 0.25, rel=1e-4)
    opt.close()


def test_grad_scaler_skips_overflowed_steps_and_unscales_the_others() -> None:
    plain, scaled = make_model(), make_model()
    settings = {"rule": "none", "density": 1.0, "download_density": 1.0}
    opts = [wrap(m, dgs.ParameterServer(), **settings) for m in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ours, theirs = Batches(), Batches()
    train_step(plain, opts[0], theirs)
    scaler.scale(ours.loss(scaled)).backward()
    scaler.unscale_(opts[1])
    scaler.step(opts[1])
    scaler.update()
    torch.testing.assert_close(flat(scaled), flat(plain))
    opts[1].zero_grad()
    before = flat(scaled)
    (scaler.scale(ours.loss(scaled)) * torch.inf).backward()
    scaler.step(opts[1])
    scaler.update()
    assert torch.equal(flat(scaled), before)
    assert opts[1].stats.exchanges == 1
    for opt in opts:
        opt.close()


def test_low_precision_parameters_accumulate_in_float32() -> None:
    model = make_model(dtype=torch.bfloat16)
    opt = wrap(model, dgs.ParameterServer(), density=1.0, download_density=1.0, rule="none")
    weight = model[0].weight
    start = weight.detach().float().clone()
    for _ in range(64):  # each step is far below bfloat16's resolution of the weights
        opt.zero_grad()
        weight.grad = torch.full_like(weight, 2.0**-12)
        opt.step()
    moved = start - opt.pull_model()["0.weight"]
    torch.testing.assert_close(
        moved, torch.full_like(moved, 64 * 0.125 * 2.0**-12), rtol=0, atol=1e-6
    )
    assert torch.equal(weight.detach(), opt.pull_model()["0.weight"].bfloat16())
    opt.close()


@pytest.mark.parametrize("inner", ["SGD", "AdamW"])
def test_low_precision_models_train(inner: str) -> None:
    model = make_model(dtype=torch.bfloat16)
    before = full_loss(model)
    opt = wrap(model, dgs.ParameterServer(), INNER[inner], momentum=0.0)
    train_in_turns([opt], [model], 100)
    assert server_loss(opt) < 0.75 * before
    opt.close()


def test_frozen_parameters_stay_and_are_part_of_the_model() -> None:
    server = dgs.ParameterServer()
    model = make_model()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    opt = wrap(
        model,
        server,
        lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1),
    )
    train_in_turns([opt], [model], 20)
    assert torch.equal(opt.pull_model()["0.weight"], frozen)
    other = make_model(seed=5)
    second = wrap(other, server, worker="second")
    assert torch.equal(other[0].weight, frozen)
    opt.close()
    second.close()


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.out = nn.Linear(4, 8, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Predict the next token."""
        return self.out(self.embed(x))


@pytest.mark.parametrize("listed", ["once", "by both names"])
def test_tied_weights_are_exchanged_once(listed: str) -> None:
    model, server = Tied(), dgs.ParameterServer()
    duplicates = listed == "by both names"
    opt = dgs.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(remove_duplicate=not duplicates),
        server=server,
        density=1.0,
        download_density=1.0,
    )
    assert server.space is not None
    assert server.space.size == 32
    tokens = torch.arange(8)
    nn.functional.cross_entropy(model(tokens), tokens).backward()
    opt.step()
    pulled = opt.pull_model()
    assert torch.equal(pulled["embed.weight"], model.out.weight)
    if duplicates:
        Tied().load_state_dict(pulled)
    opt.close()


def test_parameters_without_a_gradient_this_step_still_send_what_waits() -> None:
    model = make_model()
    opt = wrap(model, dgs.ParameterServer(), density=0.25, download_density=1.0, momentum=0.0)
    train_step(model, opt, Batches())
    before = flat(model)
    opt.zero_grad()
    opt.step()
    assert not torch.equal(flat(model), before)
    opt.close()


def test_scalars_and_empty_tensors_take_part() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.nothing = nn.Parameter(torch.zeros(0, 3))
            self.weight = nn.Parameter(torch.ones(5))

    model, server = Odd(), dgs.ParameterServer()
    opt = wrap(model, server, momentum=0.0)
    ((model.scale * model.weight).sum() + model.nothing.sum()).backward()
    opt.step()
    pulled = opt.pull_model()
    assert pulled["scale"].shape == ()
    assert pulled["scale"] == 2.0 - 0.125 * 5
    assert pulled["nothing"].shape == (0, 3)
    opt.close()


def test_float_buffers_are_averaged_by_the_server() -> None:
    def with_norm() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    server = dgs.ParameterServer()
    models = [with_norm() for _ in range(2)]
    opts = [wrap(m, server, worker=f"w{i}") for i, m in enumerate(models)]
    means: list[Tensor] = []
    for model, opt, data in zip(models, opts, [Batches(0), Batches(1)], strict=True):
        opt.zero_grad()
        data.loss(model).backward()
        means.append(model[1].running_mean.clone())
        opt.step()
    expected = torch.zeros(4)
    for mean in means:  # the server's running mean over its two workers
        expected = expected + (mean - expected) / 2
    assert torch.equal(opts[0].pull_model()["1.running_mean"], expected)
    assert torch.equal(models[1][1].running_mean, expected)
    assert "1.num_batches_tracked" not in opts[0].pull_model()
    assert int(models[0][1].num_batches_tracked) == 1
    with_norm().load_state_dict(opts[0].pull_model())
    for opt in opts:
        opt.close()


def test_local_buffers_stay_local() -> None:
    model = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    opt = wrap(model, dgs.ParameterServer(), buffers="local")
    Batches().loss(model).backward()
    mean = model[1].running_mean.clone()
    opt.step()
    assert torch.equal(model[1].running_mean, mean)
    assert "1.running_mean" not in opt.pull_model()
    opt.close()


def test_local_steps_exchange_once_per_round_and_send_the_whole_round() -> None:
    model, alone = make_model(), make_model()
    opt = wrap(
        model, dgs.ParameterServer(), rule="none", density=1.0, download_density=1.0, local_steps=4
    )
    inner = sgd(alone)
    ours, theirs = Batches(), Batches()
    for step in range(12):
        train_step(model, opt, ours)
        train_step(alone, inner, theirs)
        assert opt.stats.exchanges == (step + 1) // 4
    torch.testing.assert_close(flat(model), flat(alone), rtol=1e-5, atol=1e-6)
    opt.close()


def test_overlap_gives_the_same_model_one_round_later() -> None:
    # with one worker at density 1 nothing is stale: overlapping must not lose or repeat progress
    model, alone = make_model(), make_model()
    opt = wrap(
        model, dgs.ParameterServer(), rule="none", density=1.0, download_density=1.0, overlap=True
    )
    inner = sgd(alone)
    ours, theirs = Batches(), Batches()
    for _ in range(30):
        train_step(model, opt, ours)
        train_step(alone, inner, theirs)
    torch.testing.assert_close(flat(model), flat(alone), rtol=1e-5, atol=1e-5)
    opt.close()
    assert opt.stats.exchanges == 30


@pytest.mark.parametrize("overlap", [False, True])
def test_the_compensated_view_equals_the_base_at_density_one_without_momentum(
    overlap: bool,
) -> None:
    models = [make_model(), make_model()]
    settings = {"momentum": 0.0, "density": 1.0, "download_density": 1.0, "overlap": overlap}
    opts = [
        wrap(m, dgs.ParameterServer(), view=view, **settings)
        for m, view in zip(models, ["base", "compensated"], strict=True)
    ]
    data = [Batches(), Batches()]
    for _ in range(20):
        for model, opt, batches in zip(models, opts, data, strict=True):
            train_step(model, opt, batches)
        torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-6, atol=1e-6)
    for opt in opts:
        opt.close()


def test_the_compensated_view_is_the_base_less_what_waits() -> None:
    model = make_model()
    opt = wrap(model, dgs.ParameterServer(), view="compensated", momentum=0.5)
    for _ in range(5):
        train_step(model, opt, Batches())
    worker = opt._exchanger._worker
    velocity = worker._rule.state()["velocity"]
    assert velocity.abs().sum() > 0
    assert torch.equal(flat(model), worker.base - velocity)
    opt.close()


def test_an_inner_momentum_is_warned_of_once_and_works() -> None:
    model = make_model()
    opt = wrap(
        model,
        dgs.ParameterServer(),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    )
    with pytest.warns(UserWarning, match="SGD has momentum of its own"):
        train_step(model, opt, Batches())
    for _ in range(2):  # a second warning would be an error
        train_step(model, opt, Batches())
    opt.close()


def test_two_optimizers_in_one_process_do_not_meet() -> None:
    models = [make_model(1), make_model(2)]
    opts = [wrap(m, dgs.ParameterServer()) for m in models]
    before = flat(models[1])
    train_step(models[0], opts[0], Batches())
    assert torch.equal(flat(models[1]), before)
    train_in_turns(opts, models, 5)
    assert [o.stats.version for o in opts] == [6, 5]
    for opt in opts:
        opt.close()


def test_groups_added_later_must_have_been_named() -> None:
    model = make_model()
    opt = wrap(model, dgs.ParameterServer(), lambda m: torch.optim.SGD(m[0].parameters(), lr=0.1))
    opt.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    assert [g["lr"] for g in opt.inner.param_groups] == [0.1, 0.5]
    with pytest.raises(ConfigError, match=r"shape \[9\] that is not in named_parameters"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(9))]})
    assert len(opt.param_groups) == 2
    opt.close()


def test_every_other_worker_starts_from_the_first_ones_model() -> None:
    server = dgs.ParameterServer()
    first, second = make_model(1), make_model(2)
    opts = [wrap(first, server, worker="first"), wrap(second, server, worker="second")]
    assert torch.equal(flat(second), flat(first))
    assert torch.equal(flat(first), flat(make_model(1)))
    for opt in opts:
        opt.close()


def test_a_worker_that_joins_later_gets_the_model_of_that_moment() -> None:
    server = dgs.ParameterServer()
    early, late = make_model(1), make_model(2)
    opt = wrap(early, server, worker="early")
    train_in_turns([opt], [early], 10)
    second = wrap(late, server, worker="late")
    pulled = opt.pull_model()
    for name, p in late.named_parameters():
        assert torch.equal(p, pulled[name])
    train_step(late, second, Batches())
    for o in (opt, second):
        o.close()


def test_tracked_selection_sends_about_the_density_and_trains() -> None:
    server = dgs.ParameterServer()
    models = [make_model() for _ in range(2)]
    before = full_loss(models[0])
    opts = [wrap(m, server, selection="tracked", worker=f"w{i}") for i, m in enumerate(models)]
    train_in_turns(opts, models, 60)
    assert server_loss(opts[0]) < 0.75 * before
    for opt in opts:
        opt.close()
