"""What the commands write: colours and tables on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = [
    "error",
    "is_terminal",
    "labelled",
    "note",
    "print_json",
    "print_table",
    "say",
    "table",
    "words_for_bytes",
    "words_for_seconds",
]

COLOURS = (36, 33, 35, 32, 34, 31)
"""Terminal codes of the colours that tell labels apart."""


def is_terminal(stream: IO[str] | None = None) -> bool:
    """Return whether a stream shows colours and moving output.

    Args:
        stream: standard output if None.

    Note:
        ``NO_COLOR`` and ``TERM=dumb`` make a terminal count as none.
    """
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return (stream or sys.stdout).isatty() and not plain


def say(text: str) -> None:
    """Write one line to standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Tell the user something on standard error, where it does not mix with a command's output."""
    with contextlib.suppress(BrokenPipeError):  # nobody listens: no reason to fail
        sys.stderr.write(f"dgs: {text}\n")
        sys.stderr.flush()


def error(text: str) -> None:
    """Tell the user what failed, on standard error."""
    label = "\x1b[31merror:\x1b[0m" if is_terminal(sys.stderr) else "error:"
    note(f"{label} {text}")


def print_json(value: Any) -> None:
    """Write a value to standard output as JSON, in one line."""
    say(json.dumps(value))


def labelled(label: str, text: str, *, colour: bool) -> str:
    """Put a label before a line.

    Args:
        label: such as ``worker 2``; its last number picks the colour.
        text: the line.
        colour: whether to colour the label.

    Example:
        >>> labelled("worker 2", "loss 0.5", colour=False)
        '[worker 2] loss 0.5'
    """
    if not colour:
        return f"[{label}] {text}"
    number = label.rpartition(" ")[2]
    code = COLOURS[int(number) % len(COLOURS)] if number.isdigit() else COLOURS[0]
    bold = "1;" if label.startswith("server") else ""
    return f"\x1b[{bold}{code}m[{label}]\x1b[0m {text}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Make a table for a terminal; the first column is text, all others are aligned right."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table: framed on a terminal, else a title and one line of aligned columns per row."""
    if is_terminal():
        Console(markup=False, highlight=False).print(table(title, columns, rows))
        return
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    say(title)
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        say("  ".join([first, *rest]))


def words_for_bytes(count: int) -> str:
    """Write a number of bytes with a decimal unit.

    Example:
        >>> words_for_bytes(999), words_for_bytes(1_500_000)
        ('999 B', '1.5 MB')
    """
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def words_for_seconds(seconds: float) -> str:
    """Write a span of time in its two largest units.

    Example:
        >>> words_for_seconds(59.4), words_for_seconds(3_700)
        ('59 s', '1 h 1 min')
    """
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m} min"
    return f"{m} min {s} s" if minutes else f"{s} s"
