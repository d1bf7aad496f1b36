"""What a training run consists of: data, settings, steps, measurements."""

from __future__ import annotations

__all__: list[str] = []
