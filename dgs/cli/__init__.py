"""The command line: one module a command, each with `add_parser` and `run`."""

from __future__ import annotations

__all__: list[str] = []
