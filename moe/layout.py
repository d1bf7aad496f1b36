"""``python -m moe.layout``: show both mappings of a world before anything is started on it.

Example::

    python -m moe.layout --world 64 --tp 2 --cp 1 --pp 2 --ep 8 --etp 1
    python -m moe.layout --world 4096 --tp 4 --pp 8 --ep 16 --experts 64 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from moe.errors import LayoutError
from moe.parallel.dims import AXES, ORDERS, ParallelDims

__all__ = ["describe", "main", "table"]

EXPERT_AXES = ("etp", "ep", "edp", "pp")
DONE, WRONG_USE = 0, 2
MOST_RANKS_LISTED = 64
LONGEST_GROUP = 8
LONGEST_LINE = 64

EXAMPLE = """
example:
  python -m moe.layout --world 64 --tp 2 --pp 2 --ep 8
  python -m moe.layout --world 4096 --tp 4 --pp 8 --ep 16 --json

exit codes: 0 done, 2 the mapping is not legal or the arguments are wrong
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the arguments, without the program's name; those of the process if None.

    Returns:
        0, or 2 when the mapping is not legal, with what is wrong and the remedy on standard error.

    Raises:
        SystemExit: the arguments are wrong (code 2), or ask for help (code 0).
    """
    args = _parser().parse_args(argv)
    try:
        dims = ParallelDims(
            world=args.world,
            tp=args.tp,
            cp=args.cp,
            pp=args.pp,
            ep=args.ep,
            etp=args.etp,
            order=args.order,
        )
        if args.experts is not None:
            dims.local_experts(args.experts)
    except LayoutError as error:
        sys.stderr.write(f"error: {error}\n")
        return WRONG_USE
    if args.json:
        sys.stdout.write(json.dumps(describe(dims, args.experts)) + "\n")
    else:
        sys.stdout.write(table(dims, args.experts, with_ranks=args.ranks))
    return DONE


def describe(dims: ParallelDims, num_experts: int | None = None) -> dict[str, Any]:
    """Return the mapping as values of JSON: sizes, and every group of every axis.

    Args:
        dims: a legal mapping.
        num_experts: also tells how many each rank holds.

    Example:
        >>> describe(ParallelDims(world=2, ep=2))["groups"]["ep"]
        [[0, 1]]
    """
    described: dict[str, Any] = {
        "world": dims.world,
        "order": dims.order,
        "sizes": {axis: getattr(dims, axis) for axis in AXES},
        "groups": {axis: dims.groups(axis) for axis in AXES},
    }
    if num_experts is not None:
        described["experts"] = num_experts
        described["experts_per_rank"] = dims.local_experts(num_experts)
    return described


def table(dims: ParallelDims, num_experts: int | None = None, *, with_ranks: bool = False) -> str:
    """Return the mapping as text for people.

    Args:
        dims: a legal mapping.
        num_experts: also tells how many each rank holds.
        with_ranks: list the place of every rank even in a large world.
    """
    lines = [_headline(dims), ""]
    for title, axes in (("attention", AXES[:4]), ("experts", EXPERT_AXES)):
        lines += [title, *_columns(_axis_rows(dims, axes)), ""]
    if num_experts is not None:
        each = dims.local_experts(num_experts)
        lines += [f"{num_experts} experts, {each} on each ep rank", ""]
    if with_ranks or dims.world <= MOST_RANKS_LISTED:
        lines += ["ranks", *_columns(_rank_rows(dims)), ""]
    else:
        lines += [f"the places of the {dims.world} ranks are listed by --ranks and --json", ""]
    return "\n".join(lines[:-1]) + "\n"


def _headline(dims: ParallelDims) -> str:
    views = zip(("attention", "experts"), ORDERS[dims.order], strict=True)
    told = [f"{title} {_product(dims, reversed(view))}" for title, view in views]
    return f"world {dims.world} = {' = '.join(told)}"


def _product(dims: ParallelDims, axes: Iterator[str]) -> str:
    return " x ".join(f"{axis}{getattr(dims, axis)}" for axis in axes)


def _axis_rows(dims: ParallelDims, axes: Sequence[str]) -> Iterator[list[str]]:
    """Yield the header and one row for each axis of a view."""
    yield ["axis", "size", "groups", "members"]
    for axis in axes:
        groups = dims.groups(axis)
        yield [axis, str(len(groups[0])), str(len(groups)), _members(groups)]


def _members(groups: list[list[int]]) -> str:
    """Return the first groups as text, as many as go on a line."""
    shown = ""
    for number, group in enumerate(groups):
        inside = group if len(group) <= LONGEST_GROUP else [*group[:2], "..", group[-1]]
        text = f"[{','.join(map(str, inside))}]"
        if number and len(shown) + len(text) > LONGEST_LINE:
            return shown + " ..."
        shown += " " * bool(number) + text
    return shown


def _rank_rows(dims: ParallelDims) -> Iterator[list[str]]:
    """Yield the header and one row for each rank."""
    attention, experts = ORDERS[dims.order]
    yield ["rank", *attention, "|", *(axis for axis in experts if axis != "pp")]
    for rank in range(dims.world):
        own = dims.coordinates(rank)
        yield [
            str(rank),
            *(str(own[axis]) for axis in attention),
            "|",
            *(str(own[axis]) for axis in experts if axis != "pp"),
        ]


def _columns(rows: Iterator[list[str]]) -> list[str]:
    """Align rows, numbers to the right; the last column may have any length."""
    listed = list(rows)
    widths = [max(len(row[i]) for row in listed) for i in range(len(listed[0]) - 1)]
    return ["  " + "  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in listed]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe.layout",
        description="Show which ranks work together under a mapping, or why it is not legal.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--world", type=int, required=True, help="number of ranks")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel, attention (1)")
    parser.add_argument("--cp", type=int, default=1, help="context parallel, attention (1)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages, both mappings (1)")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel (1)")
    parser.add_argument("--etp", type=int, default=1, help="tensor parallel, experts (1)")
    parser.add_argument("--experts", type=int, help="check that so many experts can be shared out")
    parser.add_argument(
        "--order",
        choices=sorted(ORDERS),
        default="pp-outermost",
        help="order of the ranks (pp-outermost); listing-1 is that of the paper",
    )
    parser.add_argument("--ranks", action="store_true", help="list every rank of a large world")
    parser.add_argument("--json", action="store_true", help="print JSON: sizes and all groups")
    return parser


if __name__ == "__main__":
    sys.exit(main())
