"""The helper that starts worlds of ranks: what it returns, and that it never hangs."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist

from tests.helpers.worlds import PATIENCE_S, World

pytestmark = pytest.mark.dist


def _sum_of_ranks(factor: int) -> int:
    told = torch.tensor(dist.get_rank() * factor)
    dist.all_reduce(told)
    return int(told)


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def _end_one() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait(PATIENCE_S)


def _wait_for_ever() -> None:
    threading.Event().wait(PATIENCE_S)


def test_a_world_serves_many_calls_and_ends_itself_when_a_rank_fails() -> None:
    with World(2, restarts=True) as world:
        assert world.run(_sum_of_ranks, 10) == [10, 10]
        with pytest.raises(AssertionError, match="the reason") as failure:
            world.run(_fail_on_one)
        assert "ranks [0] did not answer" in str(failure.value)
        assert world.run(_sum_of_ranks, 3) == [3, 3], "it was started afresh"
        world.restarts = False
        with pytest.raises(AssertionError, match="rank 0: ended"):
            world.run(_end_one)


def test_a_world_that_does_not_answer_is_ended() -> None:
    with World(1) as world:
        world.patience_s = 0.1
        with pytest.raises(AssertionError, match=r"ranks \[0\] did not answer"):
            world.run(_wait_for_ever)
