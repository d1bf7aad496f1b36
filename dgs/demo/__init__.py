"""The demonstration behind ``dgs demo``: one server and several workers on this machine.

`data` and `models` are what is trained, `train` is the worker's script, `run` starts the processes
and follows them, `report` turns what they counted into a table.
"""

from __future__ import annotations

__all__: list[str] = []
