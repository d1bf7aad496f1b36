"""One suite for all momentum rules, and what each of them adds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dgs.errors import ConfigError
from dgs.momentum import DGC, MomentumRule, NoMemory, Residual, SAMomentum, has_momentum, make_rule

SIZE = 12
RULES: dict[str, Callable[[], MomentumRule]] = {
    "none": NoMemory,
    "residual": lambda: Residual(SIZE),
    "samomentum": lambda: SAMomentum(SIZE, 0.5),
    "dgc": lambda: DGC(SIZE, 0.5),
}
A, B = slice(0, 5), slice(5, SIZE)


def accumulate(rule: MomentumRule, part: slice, progress: torch.Tensor) -> torch.Tensor:
    """Take in progress and return the candidates."""
    return rule.fold(part, progress, torch.zeros_like(progress)).finish()


@pytest.mark.parametrize("name", RULES)
class TestEveryRule:
    """What the exchange relies on, whatever the rule."""

    def test_the_first_progress_is_the_candidate_and_is_not_modified(self, name: str) -> None:
        rule, progress = RULES[name](), torch.randn(5)
        kept = progress.clone()
        assert torch.equal(accumulate(rule, A, progress), kept)
        assert torch.equal(progress, kept)

    def test_parts_do_not_touch_each_other(self, name: str) -> None:
        rule = RULES[name]()
        accumulate(rule, A, torch.ones(5))
        assert torch.equal(accumulate(rule, B, torch.full((7,), 2.0)), torch.full((7,), 2.0))

    def test_what_is_not_sent_waits(self, name: str) -> None:
        rule = RULES[name]()
        accumulate(rule, A, torch.arange(5.0))
        waiting = rule.waiting(A)
        if name == "none":
            assert waiting is None
        else:
            assert torch.equal(waiting, torch.arange(5.0))

    def test_the_state_is_live_and_restores_the_rule(self, name: str) -> None:
        rule, again = RULES[name](), RULES[name]()
        accumulate(rule, B, torch.randn(7))
        rule.settle(torch.tensor([6]), torch.tensor([0.25]))
        for key, tensor in again.state().items():
            tensor.copy_(rule.state()[key])
        progress = torch.randn(7)
        assert torch.equal(accumulate(rule, B, progress), accumulate(again, B, progress))

    def test_it_lives_on_the_cpu_unless_told_otherwise(self, name: str) -> None:
        with torch.device("meta"):
            rule = make_rule(name, SIZE, 0.5)
        assert all(t.device.type == "cpu" for t in rule.state().values())
        there = make_rule(name, SIZE, 0.5, torch.device("meta"))
        assert all(t.device.type == "meta" for t in there.state().values())

    def test_it_is_built_from_its_name(self, name: str) -> None:
        assert type(make_rule(name, SIZE, 0.5)) is type(RULES[name]())


@pytest.mark.parametrize("name", ["residual", "samomentum", "dgc"])
def test_rounding_errors_of_what_was_sent_are_kept(name: str) -> None:
    rule = RULES[name]()
    accumulate(rule, A, torch.tensor([4.0, 1.0, 0.0, 0.0, 0.0]))
    rule.settle(torch.tensor([0]), torch.tensor([3.5]))  # 4.0 was rounded to 3.5
    momentum = 0.5 * 3.5 if name == "samomentum" else 0.0
    assert rule.waiting(A).tolist() == [0.5 + momentum, 1.0, 0.0, 0.0, 0.0]


def test_samomentum_decays_only_what_was_sent() -> None:
    rule = SAMomentum(3, 0.5)
    accumulate(rule, slice(0, 3), torch.tensor([8.0, 2.0, 1.0]))
    rule.settle(torch.tensor([0]), torch.tensor([8.0]))
    assert accumulate(rule, slice(0, 3), torch.ones(3)).tolist() == [5.0, 3.0, 2.0]


def test_dgc_corrects_momentum_and_masks_the_velocity_of_what_was_sent() -> None:
    rule = DGC(2, 0.5)
    whole = slice(0, 2)
    assert accumulate(rule, whole, torch.tensor([4.0, 2.0])).tolist() == [4.0, 2.0]
    assert accumulate(rule, whole, torch.zeros(2)).tolist() == [6.0, 3.0]  # + m * velocity
    rule.settle(torch.tensor([0]), torch.tensor([6.0]))
    assert accumulate(rule, whole, torch.zeros(2)).tolist() == [0.0, 3.5]


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match="rule='adam'"):
        make_rule("adam", 3, 0.5)  # type: ignore[arg-type]
    assert [r for r in RULES if has_momentum(r)] == ["samomentum", "dgc"]
