"""``dgs snapshot``: look at, check, save and repair what a server keeps in its state directory."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from dgs.cli.arguments import SubParsers, add_command
from dgs.cli.console import note, print_json, print_table, say, words_for_bytes
from dgs.cli.model_file import check_writable, write_model
from dgs.cli.snapshot_words import (
    SEGMENT_COLUMNS,
    SNAPSHOT_COLUMNS,
    describe_check,
    describe_listing,
    describe_plan,
    describe_rescued,
    segment_rows,
    snapshot_rows,
    words_for_check,
    words_for_plan,
)
from dgs.errors import ConfigError, StateError
from dgs.inspection import Found, preview, verify
from dgs.listing import look, open_state, steadily
from dgs.rescue import join_shards, rescue
from dgs.storage.disk import FolderDisk
from dgs.storage.repair import Plan, carry_out, plan_repair

__all__ = ["add_parser", "run"]

EXAMPLE = """
dgs snapshot list --state-dir state/
dgs snapshot verify --state-dir state/
dgs snapshot export --state-dir state/ --out model.safetensors
dgs snapshot repair --state-dir state/ --yes
"""


def add_parser(subparsers: SubParsers[argparse.ArgumentParser]) -> None:
    """Add the command to the program."""
    parser = add_command(
        subparsers,
        "snapshot",
        run,
        summary="list, verify, export or repair a server's state directory",
        description=(
            "Look at what 'dgs server --state-dir DIR' keeps: two snapshots, and the log of all\n"
            "requests behind them. Nothing but 'repair --yes' changes anything."
        ),
        example=EXAMPLE,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    _add_list(actions)
    _add_verify(actions)
    _add_export(actions)
    _add_repair(actions)


def run(args: argparse.Namespace) -> int:
    """Carry out the command without an action: show its help."""
    args.parser.error("name an action: list, verify, export or repair")
    return 2


def _add_list(actions: SubParsers[argparse.ArgumentParser]) -> None:
    parser = add_command(
        actions,
        "list",
        _list,
        summary="list snapshots and log",
        description=(
            "List snapshots and pieces of the log, the newest first. A server may use the folder\n"
            "meanwhile. Snapshots are looked at only at first sight; 'verify' reads them whole."
        ),
        example="dgs snapshot list --state-dir state/",
    )
    _add_common(parser)


def _add_verify(actions: SubParsers[argparse.ArgumentParser]) -> None:
    parser = add_command(
        actions,
        "verify",
        _verify,
        summary="read everything and recover it in memory",
        description=(
            "Read all checksums, recover the state in memory as a server would, and, where there\n"
            "are two snapshots, check that the older one with the log gives the newer one bit for\n"
            "bit. Exit code 0: sound, 1: damaged. Needs the memory that the server needs."
        ),
        example="dgs snapshot verify --state-dir state/",
    )
    _add_common(parser)


def _add_export(actions: SubParsers[argparse.ArgumentParser]) -> None:
    parser = add_command(
        actions,
        "export",
        _export,
        summary="write the model to a safetensors file",
        description=(
            "Recover the model, as far as damage allows, and write it to a safetensors file. Of a\n"
            "model that is split over several servers, give --state-dir once for each, or the\n"
            "folder given to 'dgs launch'; of fewer, the tensors that are there whole are written."
        ),
        example="dgs snapshot export --state-dir state/ --out model.safetensors",
    )
    _add_common(parser, several=True)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="safetensors file to write"
    )


def _add_repair(actions: SubParsers[argparse.ArgumentParser]) -> None:
    parser = add_command(
        actions,
        "repair",
        _repair,
        summary="set aside what is damaged, so that a server starts",
        description=(
            "Say what is damaged and what would be lost; with --yes, rename it to 'damaged-...'.\n"
            "Nothing is deleted and nothing sound is changed. A server then starts from what is\n"
            "left, and its workers join again. Exit code 1: damaged, and --yes was not given."
        ),
        example="dgs snapshot repair --state-dir state/ --yes",
    )
    _add_common(parser)
    parser.add_argument("--yes", action="store_true", help="do it, rather than say it")


def _add_common(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    parser.add_argument(
        "--state-dir",
        type=Path,
        required=True,
        metavar="DIR",
        action="append" if several else "store",
        help="folder given to 'dgs server'" + ("; one for each server" if several else ""),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _list(args: argparse.Namespace) -> int:
    with open_state(args.state_dir, lock=False) as disk:
        listing = look(disk)
    if args.json:
        print_json(describe_listing(listing))
        return 0
    print_table(f"snapshots in {args.state_dir}", SNAPSHOT_COLUMNS, snapshot_rows(listing))
    print_table("log", SEGMENT_COLUMNS, segment_rows(listing))
    return 0


def _verify(args: argparse.Namespace) -> int:
    live = ""
    try:
        disk = open_state(args.state_dir, lock=True)
    except StateError as e:
        disk = open_state(args.state_dir, lock=False)  # it may be read, at least
        live = str(e)
    with disk:
        found = steadily(disk, lambda: verify(disk))
    if args.json:
        print_json(describe_check(found, live))
    else:
        if live:
            note(
                f"{live.partition(';')[0]}: it is read as it is at this moment, and a torn end of "
                "the log may be what is just being written"
            )
        for line in words_for_check(found, disk.label):
            say(line)
    return 1 if found.problems else 0


def _export(args: argparse.Namespace) -> int:
    check_writable(args.out)
    folders = [folder for given in args.state_dir for folder in _shards(given)]
    with ExitStack() as stack:
        disks = [stack.enter_context(_open_to_export(folder)) for folder in folders]
        parts = sorted((rescue(disk) for disk in disks), key=lambda part: part.shard)
    model, missing = join_shards(parts)
    metadata = {
        "format": "pt",
        "version": ",".join(str(part.version) for part in parts),
        "run": ",".join(str(part.run) for part in parts),
    }
    write_model(args.out, model, metadata)
    size_bytes = args.out.stat().st_size
    if args.json:
        told = {"out": str(args.out), **metadata, "tensors": len(model), "bytes": size_bytes}
        print_json({**told, "missing": missing, "shards": [describe_rescued(p) for p in parts]})
        return 0
    for part in parts:
        for text in part.notes:
            note(f"{part.label}: {text}")
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        note(
            f"{len(missing)} tensors are not written, as other servers hold them or a part of "
            f"them: {some}. Give the folders of all {parts[0].num_shards} servers"
        )
    say(
        f"wrote {args.out}: {len(model)} tensors, {words_for_bytes(size_bytes)}, version "
        f"{metadata['version']}"
    )
    return 0


def _shards(folder: Path) -> list[Path]:
    """Return a folder, or those in it where `dgs launch` has made them."""
    inner = sorted(folder.glob("shard-*"), key=lambda path: (len(path.name), path.name))
    return inner or [folder]


def _open_to_export(folder: Path) -> FolderDisk:
    try:
        return open_state(folder, lock=True)
    except StateError as e:
        if not isinstance(e.__cause__, BlockingIOError):
            return open_state(folder, lock=False)  # it may be read, at least
        raise ConfigError(f"{e}. 'dgs pull' writes the model of a server that runs") from e


def _repair(args: argparse.Namespace) -> int:
    with open_state(args.state_dir, lock=True) as disk:
        plan = plan_repair(disk)
        if plan.is_empty:
            return _told(args, plan, None, [], "nothing is damaged; nothing was changed")
        found = preview(disk, plan)
        if not args.yes:
            _told(args, plan, found, [], "nothing was changed; add --yes to do this")
            return 1
        aside = carry_out(disk, plan)
    return _told(args, plan, found, aside, f"done; set aside: {', '.join(aside) or 'nothing'}")


def _told(
    args: argparse.Namespace, plan: Plan, found: Found | None, aside: list[str], outcome: str
) -> int:
    """Say what is, or would be, done; return 0."""
    if args.json:
        print_json(describe_plan(plan, found, aside, done=bool(args.yes)))
        return 0
    for line in words_for_plan(plan, found) if found is not None else []:
        say(line)
    say(outcome)
    return 0
