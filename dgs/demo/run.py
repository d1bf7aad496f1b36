"""Start a server and workers for each method, follow them, and evaluate the server's model."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path

import torch

from dgs.client import pull_model, server_status
from dgs.config import RetryConfig
from dgs.demo.data import Images
from dgs.demo.models import num_parameters
from dgs.demo.plan import Method, Plan
from dgs.demo.progress import Watcher
from dgs.demo.report import Outcome, ServerCounts, WorkerCounts, outcome
from dgs.demo.train import evaluate, load_images, make_model
from dgs.errors import DgsError, ServerUnavailableError
from dgs.processes import Command, ProcessGroup, start_servers
from dgs.security import WITHIN_THE_MACHINE, ClientSecurity
from dgs.transport.base import Transport
from dgs.transport.connect import connect

__all__ = ["ChildFailedError", "run_demo", "run_method"]

POLL_S = 0.25
"""Seconds between two looks at the server's status."""

STATUS_S = 5.0
"""Seconds that the server may take to answer, busy as it is."""

PULL_S = 60.0
"""Seconds that fetching the model may take."""

STOP_S = 1.5
"""Seconds that the processes get to end when the run is given up."""

TAIL_LINES = 40
"""Last lines kept of each process's output, for the case that it fails."""


class ChildFailedError(DgsError, RuntimeError):
    """A process of the demonstration ended too early; the text has its last lines of output."""


class _Output:
    """The last lines that each process wrote."""

    def __init__(self) -> None:
        self._lines: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=TAIL_LINES))

    def take(self, label: str, text: str) -> None:
        self._lines[label].append(text)

    def of(self, label: str) -> str:
        return "\n".join(f"  {line}" for line in self._lines[label]) or "  (no output)"


def run_demo(plan: Plan, watcher: Watcher) -> tuple[int, list[Outcome]]:
    """Run all methods of a plan, one after the other.

    Returns:
        The number of parameters of the model, and one outcome per method.

    Raises:
        ConfigError: the images cannot be loaded; no process was started.
        ChildFailedError: a process failed; the others have been ended.
    """
    images = load_images(plan.task.name, plan.data_dir)
    parameters = num_parameters(make_model(plan.task.name))
    return parameters, [run_method(plan, m, images, parameters, watcher) for m in plan.methods]


def run_method(
    plan: Plan, method: Method, images: Images, parameters: int, watcher: Watcher
) -> Outcome:
    """Train with one method and a server of its own, and evaluate what the server then holds."""
    cpu_before_s = os.times().children_user
    with tempfile.TemporaryDirectory(prefix="dgs-demo-") as name:
        files = [Path(name) / f"worker-{rank}.json" for rank in range(plan.workers)]
        server, model = _train(plan, method, files, watcher)
        workers: list[WorkerCounts] = [json.loads(f.read_text("utf-8")) for f in files]
    cpu_s = os.times().children_user - cpu_before_s
    watcher.note(f"{method.name}: evaluating the server's model on {len(images.test)} images")
    device = torch.device(plan.device)
    network = make_model(plan.task.name)
    network.load_state_dict(model)
    accuracy, test_loss = evaluate(network.to(device), images.to(device))
    return outcome(
        method.name,
        parameters,
        server,
        workers,
        accuracy=accuracy,
        test_loss=test_loss,
        cpu_s=cpu_s,
    )


def _train(
    plan: Plan, method: Method, files: Sequence[Path], watcher: Watcher
) -> tuple[ServerCounts, dict[str, torch.Tensor]]:
    """Run the processes to their end; return the server's counts and its model."""
    output = _Output()
    watcher.begin(method.name, plan.workers * plan.steps)
    with contextlib.ExitStack() as stack:
        stack.callback(watcher.end)
        group = stack.enter_context(ProcessGroup(output.take))
        stack.callback(group.stop, STOP_S)  # also on Ctrl-C, which must not take long
        [address] = start_servers(group, 1)
        [transport] = connect(address, RetryConfig(), security=ClientSecurity())
        stack.callback(transport.close)
        for rank, file in enumerate(files):
            group.start(_worker(plan, method, rank, file, address))
        _follow(group, transport, plan.workers, output, watcher)
        counts = _status(transport)
        watcher.update(counts.version, counts.staleness_p50)
        pulled = pull_model([transport], timeout_s=PULL_S)
        return counts, {n: torch.from_numpy(v) for n, v in pulled.items()}


def _worker(plan: Plan, method: Method, rank: int, file: Path, address: str) -> Command:
    argv = [sys.executable, "-m", "dgs.demo.train", *plan.arguments(method, file)]
    env = {
        **WITHIN_THE_MACHINE,
        "DGS_SERVER": address,
        "DGS_WORKER": f"worker-{rank}",
        "DGS_RANK": str(rank),
        "DGS_NUM_WORKERS": str(plan.workers),
        "OMP_NUM_THREADS": "1",
    }
    return Command(f"worker {rank}", argv, env)


def _follow(
    group: ProcessGroup, transport: Transport, workers: int, output: _Output, watcher: Watcher
) -> None:
    """Wait until all workers have ended well, showing the server's status meanwhile."""
    done = 0
    while done < workers:
        for label, code in group.wait_any(POLL_S):
            if code != 0 or not label.startswith("worker"):
                raise ChildFailedError(
                    f"{label} ended with code {code}; its output:\n{output.of(label)}"
                )
            done += 1
        with contextlib.suppress(ServerUnavailableError):  # if it ended, the group says so next
            counts = _status(transport)
            watcher.update(counts.version, counts.staleness_p50)


def _status(transport: Transport) -> ServerCounts:
    status = server_status(transport, timeout_s=STATUS_S)
    return ServerCounts(
        version=status.version,
        bytes_up=status.bytes_up,
        bytes_down=status.bytes_down,
        staleness_p50=status.staleness_p50,
        staleness_p99=status.staleness_p99,
    )
