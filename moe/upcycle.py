"""``python -m moe.upcycle``: make a mixture of experts of a dense checkpoint.

Example::

    python -m moe.upcycle --from Llama-3.2-1B --to Llama-8x1B --experts 8 --top-k 2
    python -m moe.upcycle --from Llama-3.2-1B --to granular --method virtual-group \
        --experts 64 --top-k 8 --granularity 8

The same from Python::

    from moe.upcycle import UpcycleConfig, upcycle
    report = upcycle("Llama-3.2-1B", "Llama-8x1B", UpcycleConfig(experts=8, top_k=2))
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from moe.errors import CheckpointError, MoeError, UpcycleError
from moe.upcycling import Options, UpcycleConfig, upcycle
from moe.upcycling.config import DropScope, Method, RouterInit, Routing, Scaling, parse_layers
from moe.upcycling.convert import Progress
from moe.upcycling.report import as_text

__all__ = ["Options", "UpcycleConfig", "main", "upcycle"]

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
TENTHS = 10

EXAMPLE = """
example:
  python -m moe.upcycle --from DENSE_DIR --to MOE_DIR --experts 8 --top-k 2
  python -m moe.upcycle --from DENSE_DIR --to MOE_DIR --experts 64 --top-k 8 \\
      --method virtual-group --granularity 8

exit codes: 0 done, 1 a checkpoint or the disk failed, 2 wrong use, 130 interrupted (the same
command goes on from there)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the arguments, without the program's name; those of the process if None.

    Returns:
        The exit code.

    Raises:
        SystemExit: the arguments are wrong (code 2), or ask for help (code 0).
    """
    args = _parser().parse_args(argv)
    try:
        with _progress(args.to) as progress:
            report = upcycle(
                args.source,
                args.to,
                _config(args),
                args.branches,
                _options(args),
                progress,
            )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        return INTERRUPTED
    except MoeError as error:
        sys.stderr.write(f"error: {error}\n")
        return WRONG_USE if isinstance(error, UpcycleError) else FAILED
    sys.stdout.write(json.dumps(report) + "\n" if args.json else as_text(report))
    return DONE


def _config(args: argparse.Namespace) -> UpcycleConfig:
    return UpcycleConfig(
        experts=args.experts,
        top_k=args.top_k,
        granularity=args.granularity,
        method=args.method,
        scaling=args.scaling,
        routing=args.routing,
        shared_experts=args.shared_experts,
        layers=parse_layers(args.layers),
        router_init=args.router_init,
        router_std=args.router_std,
        fraction=args.fraction,
        drop_scope=args.drop_scope,
        noise_scale=args.noise_scale,
        seed=args.seed,
    )


def _options(args: argparse.Namespace) -> Options:
    text = None
    if args.text is not None:
        try:
            text = Path(args.text).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read the text {args.text}: {error}") from error
    return Options(
        text=text, tokens=args.tokens, measure=not args.no_measure, overwrite=args.overwrite
    )


@contextmanager
def _progress(target: str) -> Iterator[Progress]:
    """Show progress on standard error: a bar on a terminal, a line every tenth elsewhere."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(Path(target).name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total)


def _lines() -> Progress:
    told = 0

    def tell(done: int, total: int, name: str) -> None:
        nonlocal told
        if done * TENTHS // max(total, 1) > told:
            told = done * TENTHS // max(total, 1)
            sys.stderr.write(f"{told * 100 // TENTHS} % of {total / 1e6:.1f} MB written\n")

    return tell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe.upcycle",
        description="Make a mixture of experts of a dense Llama, Mistral or Qwen2 checkpoint.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, help="directory of the dense checkpoint")
    add("--to", required=True, help="directory of the result")
    add("--experts", type=int, required=True, help="routed experts, replicas times shards")
    add("--top-k", type=int, required=True, help="experts of a token")
    add("--granularity", type=int, default=1, help="shards of each dense FFN (1)")
    add("--shared-experts", type=int, default=0, help="how many of them all tokens get (0)")
    add("--method", choices=get_args(Method), default="copy", help="(copy)")
    add("--scaling", choices=get_args(Scaling), default="exact", help="(exact)")
    add("--routing", choices=get_args(Routing), default="topk-softmax", help="(topk-softmax)")
    add("--layers", default="all", help="which become mixtures, such as 0-3,8 (all)")
    add("--router-init", choices=get_args(RouterInit), default="normal", help="(normal)")
    add("--router-std", type=float, default=0.02, help="of a router's first weights (0.02)")
    add("--fraction", type=float, default=0.5, help="drop: part that is drawn anew (0.5)")
    add("--drop-scope", choices=get_args(DropScope), default="neuron", help="drop: (neuron)")
    add("--noise-scale", type=float, default=0.01, help="noise: relative size (0.01)")
    add("--branches", nargs="+", default=[], help="branch-train-mix: other dense checkpoints")
    add("--seed", type=int, default=0, help="decides all that is drawn (0)")
    add("--text", help="file to calibrate and measure on (a paragraph that comes along)")
    add("--tokens", type=int, default=512, help="how many of its tokens (512)")
    add("--no-measure", action="store_true", help="do not compare with the dense model")
    add("--overwrite", action="store_true", help="replace a checkpoint that is there")
    add("--json", action="store_true", help="print the report as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
