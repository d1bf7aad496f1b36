"""Children of a group are heard, told, and never outlive it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from dgs.errors import ConfigError, ServerUnavailableError
from dgs.processes import Command, ProcessGroup, start_servers
from dgs.watchdog import end_groups, read_groups
from tests.helpers.processes import PATIENCE_S, Spoken, has_ended

pytestmark = pytest.mark.dist

WAIT = "import time; time.sleep(60)"
WITH_CHILD = (
    "import subprocess, sys\n"
    f"child = subprocess.Popen([sys.executable, '-c', {WAIT!r}])\n"
    "print(child.pid, flush=True)\n"
    "child.wait()\n"
)
DEAF = (
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('ready', flush=True)\n"
    "time.sleep(60)\n"
)


class Heard:
    """What children said, and a wait for as many lines as a test needs."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self._more = threading.Condition()

    def __call__(self, label: str, text: str) -> None:
        with self._more:
            self.lines.append((label, text))
            self._more.notify_all()

    def wait_for(self, count: int) -> list[tuple[str, str]]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.lines) >= count, PATIENCE_S)
            return list(self.lines)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def group(heard: Heard) -> Iterator[ProcessGroup]:
    with ProcessGroup(heard) as group:
        yield group


def python(label: str, program: str, **env: str) -> Command:
    return Command(label, [sys.executable, "-c", program], env)


def test_every_line_of_both_outputs_is_heard_under_its_label(
    group: ProcessGroup, heard: Heard
) -> None:
    program = (
        "import os, sys\n"
        "os.write(1, b'out\\n')\n"
        "os.write(2, b'err\\r\\n')\n"
        "os.write(1, b'10%\\r90%\\n\\xff\\n\\n')\n"
        "os.write(1, os.environb[b'DGS_TOLD'])\n"
    )
    group.start(python("a", program, DGS_TOLD="no end of line"))
    assert group.wait_any(PATIENCE_S) == [("a", 0)]
    expected = ["out", "err", "90%", "\ufffd", "", "no end of line"]
    assert heard.lines == [("a", text) for text in expected]


def test_ends_are_told_once_with_their_codes(group: ProcessGroup) -> None:
    group.start(python("code", "import sys; sys.exit(3)"))
    assert group.wait_any(PATIENCE_S) == [("code", 3)]
    group.start(python("signal", "import os; os.kill(os.getpid(), 9)"))
    assert group.wait_any(PATIENCE_S) == [("signal", -9)]
    assert group.exited() == []
    assert (group.running, group.returncode("code"), group.returncode("signal")) == ([], 3, -9)


def test_leaving_the_group_ends_children_and_what_they_started(heard: Heard) -> None:
    with ProcessGroup(heard) as group:
        group.start(python("parent", WITH_CHILD))
        grandchild = int(heard.wait_for(1)[0][1])
    assert group.returncode("parent") == -signal.SIGTERM
    assert has_ended(grandchild)


def test_what_a_child_leaves_behind_ends_with_it(group: ProcessGroup, heard: Heard) -> None:
    group.start(python("parent", WITH_CHILD.replace("child.wait()", "")))
    assert group.wait_any(PATIENCE_S) == [("parent", 0)]
    assert has_ended(int(heard.lines[0][1]))


def test_child_deaf_to_sigterm_is_killed(group: ProcessGroup, heard: Heard) -> None:
    group.start(python("deaf", DEAF))
    heard.wait_for(1)
    group.stop(grace_s=0.1)
    assert group.exited() == [("deaf", -signal.SIGKILL)]


def test_interrupt_reaches_only_whom_it_is_meant_for(group: ProcessGroup, heard: Heard) -> None:
    program = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    raise SystemExit(9) from None\n"
    )
    group.start(python("a", program))
    group.start(python("b", program))
    heard.wait_for(2)
    group.interrupt(["a"])
    assert group.wait_any(PATIENCE_S) == [("a", 9)]
    assert group.running == ["b"]
    group.interrupt()
    assert group.wait_any(PATIENCE_S) == [("b", 9)]


def test_waiting_ends_when_woken_and_when_time_is_over(group: ProcessGroup) -> None:
    group.start(python("a", WAIT))
    group.wake()
    assert group.wait_any(PATIENCE_S) == []
    assert group.wait_any(0.01) == []


def test_listener_that_fails_is_told_of_and_does_not_block_the_child() -> None:
    def refuse(label: str, text: str) -> None:
        raise BrokenPipeError("nobody reads")

    program = "for _ in range(100_000): print('more than a pipe holds')"
    with ProcessGroup(refuse) as group:
        group.start(python("a", program))
        with pytest.raises(BrokenPipeError, match="nobody reads"):
            group.wait_any(PATIENCE_S)
        group.stop(PATIENCE_S, [])
    assert group.returncode("a") is not None


def test_wrong_commands_are_named(group: ProcessGroup) -> None:
    with pytest.raises(ConfigError, match=r"'no-such-program' \(a\): No such file"):
        group.start(Command("a", ["no-such-program"]))
    group.start(python("b", WAIT))
    with pytest.raises(ConfigError, match="'b' runs already"):
        group.start(python("b", WAIT))


def test_children_end_when_their_parent_is_killed() -> None:
    program = WITH_CHILD.replace("print(", "import os; print(os.getpid(), ")
    launcher = (
        "import sys\n"
        "from dgs.processes import Command, ProcessGroup\n"
        "with ProcessGroup(lambda label, text: print(label, text, flush=True)) as group:\n"
        f"    group.start(Command('child', [sys.executable, '-c', {program!r}]))\n"
        "    group.wait_any(60.0)\n"
    )
    with Spoken(sys.executable, "-c", launcher) as parent:
        _, child, grandchild = parent.line_with("child ").split()
        os.kill(parent.process.pid, signal.SIGKILL)
        assert has_ended(int(child))
        assert has_ended(int(grandchild))


def test_watchdog_follows_the_lines_and_kills_who_does_not_end() -> None:
    assert read_groups(["+1\n", "+2\n", "-1\n", "-7\n"]) == {2}
    with Spoken(sys.executable, "-c", "import os; os.setsid()\n" + DEAF) as deaf:
        deaf.line_with("ready")
        end_groups([deaf.process.pid], grace_s=0.1)
        assert deaf.ends_with() == -signal.SIGKILL


def test_server_that_does_not_start_is_told_of_with_its_words(group: ProcessGroup) -> None:
    with pytest.raises(
        ServerUnavailableError, match=r"(?s)server 0 ended with code 2.*--no-such-option"
    ):
        start_servers(group, 1, arguments=["--no-such-option"])
