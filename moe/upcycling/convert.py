"""A whole conversion, from directory to directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.errors import CheckpointError, MoeError, UpcycleError
from moe.upcycling.config import UpcycleConfig
from moe.upcycling.making import Maker
from moe.upcycling.measure import calibrate, compare, has_transformers, observe, tokenize
from moe.upcycling.output import Output, as_shards, claim
from moe.upcycling.plan import Plan, make_plan
from moe.upcycling.report import make_report
from moe.upcycling.source import DenseCheckpoint, open_dense
from moe.upcycling.target import mixture_layers

__all__ = ["REPORT", "TEXT", "Options", "Progress", "upcycle"]

REPORT = "upcycle_report.json"
SHARD_BYTES = 5_000_000_000
MEMORY_SHARE = 0.6
WRITER = 1
"""Counts up when the same settings come to give other bytes: no file of both is mixed."""

TEXT = (
    "The first condition of understanding a foreign country is to smell it. A river does not ask "
    "where the sea is; it follows the slope of the land, and when there is none, it waits. In the "
    "year 1824 a young engineer asked how much work can be had from a fire, and found that it "
    "depends on two temperatures alone. def area(r): return 3.14159 * r ** 2. Dear Sir, thank you "
    "for your letter of 12 March; we regret that the parts you ordered have not arrived yet. Take "
    "two eggs, a cup of flour and a little salt, and stir until the dough is smooth. If x is even, "
    "then so is x squared, and the other way round.\n"
)
"""What is measured on when no text is given."""

Progress = Callable[[int, int, str], None]
"""Told the bytes that are written, those of the whole, and what was written last."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a conversion is carried out, as opposed to what it makes."""

    text: str | None = None
    """Calibrated and measured on; None: `TEXT`."""

    tokens: int = 512
    """How many tokens of it are used at most."""

    measure: bool = True
    """Whether the result is compared with the dense model; loads one after the other in float32."""

    overwrite: bool = False
    """Whether a checkpoint that is there is replaced."""

    shard_bytes: int = SHARD_BYTES
    """Most bytes of one file of weights."""


def upcycle(
    source: str | Path,
    target: str | Path,
    config: UpcycleConfig,
    branches: Sequence[str | Path] = (),
    options: Options | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a mixture of experts of a dense checkpoint.

    The target appears whole or not at all. What was interrupted goes on when the same conversion
    is started again; what failed leaves nothing behind.

    Args:
        source: directory of a Llama, Mistral or Qwen2 model with safetensors.
        target: directory of the result.
        config: what becomes of each dense FFN.
        branches: other dense checkpoints, for ``branch-train-mix``.
        options: how it is carried out.
        progress: told after each tensor.

    Returns:
        The report, which is also saved in the target as upcycle_report.json.

    Raises:
        UpcycleError: the settings do not fit the model or each other, or the target exists.
        CheckpointError: the source is damaged or contradicts itself, or the disk fails.

    Example:
        >>> upcycle("no-such-model", "result", UpcycleConfig(8, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        moe.errors.CheckpointError: no-such-model is not a directory; give one with config.json...
    """
    options = options or Options()
    paths = [Path(source), *map(Path, branches)]
    target = Path(os.path.abspath(target))
    if any(path.resolve() == target.resolve() for path in paths):
        raise UpcycleError(f"{target} is also a source; give another directory")
    sources = [open_dense(path) for path in paths]
    plan = make_plan(config, sources)
    skipped, ids = _tokens(plan, sources[0], options)
    with claim(target, options.overwrite) as partial:
        output = Output(partial, target, _fingerprint(plan, sources, options))
        try:
            _refuse_full_disk(partial, plan)
            maker = _maker(plan, sources, ids)
            _write(output, plan, maker, options, progress)
            output.carry_over(sources[0].path)
        except (MoeError, OSError) as error:
            output.discard()
            if isinstance(error, OSError):
                raise CheckpointError(f"cannot write {target}: {error}") from error
            raise
        masses = {layer: found.mass for layer, found in maker.measured.items()}
        measured = None if skipped else _measure(sources[0], partial, plan, ids)
        report = make_report(plan, sources[0], measured, skipped, masses)
        output.write_json(REPORT, report)
        output.publish()
    return report


def _needs_calibration(config: UpcycleConfig) -> bool:
    return config.router_init == "centroid" or (
        config.scaling == "calibrated" and config.routing == "softmax-topk"
    )


def _tokens(
    plan: Plan, source: DenseCheckpoint, options: Options
) -> tuple[str | None, Tensor | None]:
    """Return why nothing is measured, or None; and the tokens, where they are needed."""
    skipped = None if options.measure else "it was not asked for"
    needed = sum(piece.bytes // piece.dtype.itemsize * 4 for piece in plan.pieces)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    calibrated = _needs_calibration(plan.config)
    if not has_transformers():
        if calibrated:
            raise UpcycleError(
                "calibrated scaling and centroids run the dense model, which needs transformers; "
                "install dgs[hf]"
            )
        skipped = skipped or "transformers is not installed"
    elif needed > MEMORY_SHARE * physical:
        skipped = skipped or f"in float32 the result takes {needed / 1e9:.0f} GB of memory"
    if skipped and not calibrated:
        return skipped, None
    text = TEXT if options.text is None else options.text
    vocab = int(source.config.fields["vocab_size"])
    return skipped, tokenize(source.path, text, vocab, options.tokens)


def _maker(plan: Plan, sources: Sequence[DenseCheckpoint], ids: Tensor | None) -> Maker:
    if not _needs_calibration(plan.config) or ids is None:
        return Maker(plan, sources)
    layers = mixture_layers(plan.config, sources[0].config)
    return Maker(plan, sources, calibrate(sources[0].path, ids, plan.config, layers))


def _write(
    output: Output, plan: Plan, maker: Maker, options: Options, progress: Progress | None
) -> None:
    written = 0

    def done(count: int, name: str) -> None:
        nonlocal written
        written += count
        if progress is not None:
            progress(written, plan.bytes, name)

    output.write_shards(as_shards(plan.pieces, options.shard_bytes), maker.make, done)
    output.write_json("config.json", plan.target_config)


def _measure(
    source: DenseCheckpoint, partial: Path, plan: Plan, ids: Tensor | None
) -> dict[str, Any] | None:
    if ids is None:
        return None
    dtype = plan.pieces[-1].dtype
    dense = observe(source.path, ids)
    half = dtype if dtype.itemsize < 4 else None
    return compare(dense, observe(partial, ids), plan.config, half)


def _refuse_full_disk(partial: Path, plan: Plan) -> None:
    there = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    free = shutil.disk_usage(partial).free
    if plan.bytes - there > free:
        raise CheckpointError(
            f"{partial.parent} has {free / 1e9:.1f} GB left, and the result takes "
            f"{plan.bytes / 1e9:.1f} GB; make room or give another directory"
        )


def _fingerprint(plan: Plan, sources: Sequence[DenseCheckpoint], options: Options) -> str:
    """Return a text that is the same for two conversions only if they write the same bytes."""
    files = [
        [
            str(s.path.resolve()),
            name,
            (s.path / name).stat().st_size,
            (s.path / name).stat().st_mtime_ns,
        ]
        for s in sources
        for name in sorted({stored.file for stored in s.tensors.values()})
    ]
    told = [WRITER, asdict(plan.config), plan.target_config, files]
    told += [options.text, options.tokens, options.shard_bytes]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
