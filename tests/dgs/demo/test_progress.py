"""The demonstration's progress: a bar on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dgs.demo.progress import Bar, Lines, make_watcher


def test_lines_come_every_few_seconds_only() -> None:
    now = 0.0
    said: list[str] = []
    lines = Lines(said.append, clock=lambda: now)
    lines.begin("DGS", 100)
    for version in range(40):
        now = 0.25 * version
        lines.update(version, 2.0)
    lines.end()
    assert said == [
        "DGS: starting the processes",
        "DGS: 12 of 100 updates, median staleness 2",
        "DGS: 24 of 100 updates, median staleness 2",
        "DGS: 36 of 100 updates, median staleness 2",
        "DGS: ended after 39 of 100 updates",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_terminal_gets_a_bar_and_anything_else_lines(terminal: bool) -> None:
    stream = io.StringIO()
    watcher = make_watcher(Console(file=stream, force_terminal=terminal, width=100))
    assert isinstance(watcher, Bar if terminal else Lines)
    watcher.begin("DGS [1 %]", 10)
    watcher.update(10, 1.0)
    watcher.end()
    watcher.end()
    watcher.note("evaluating")
    assert "DGS [1 %]" in stream.getvalue()
    assert ("10/10" if terminal else "10 of 10") in stream.getvalue()
    assert "evaluating" in stream.getvalue()
