"""Imports go one way: from the parts that know little to the parts that know much."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.helpers.source_tree import ROOT, Module, imported, modules

FACADE = "__init__"
LAYERS = (
    ("_proto",),
    ("errors",),
    ("config", "leases", "metrics", "security", "storage"),
    ("space", "view", "cover", "bits"),
    ("select", "quantize", "codec", "frame", "momentum", "messages", "kernels"),
    ("changes", "shard"),
    ("search", "candidates", "tracker", "sparsify"),
    ("joining", "agreement", "session", "registry"),
    ("state",),
    ("server", "dialog", "worker"),
    ("durable", "inspection", "listing", "rescue"),
    ("transport",),
    ("client",),
    ("binding", "checkpoint", "exchange", "optimizer"),
    ("authority", "housekeeping", "serving", "processes", "watchdog"),
    (FACADE,),
    ("demo", "sim"),
    ("cli",),
    ("__main__",),
)
"""Parts of `dgs`, lowest first; a part may import its own layer and those before it."""

MOE_LAYERS = (
    ("errors",),
    ("checks", "disk"),
    ("config", "model_config", "parallel", "kernels"),
    ("router", "capacity", "permute", "places", "norm", "rope", "mapping"),
    ("losses", "dropping", "experts", "dispatch"),
    ("initial", "attention", "feedforward", "ring", "vocabulary"),
    ("layer", "admission"),
    ("block",),
    ("model",),
    ("hf",),
    ("upcycling", "training"),
    (FACADE,),
    ("layout", "upcycle"),
)
"""Parts of `moe`, likewise."""

LAYERS_OF = {"dgs": LAYERS, "moe": MOE_LAYERS}

RESERVED = {
    "grpc": r"dgs\.transport\.(grpc_\w+|options)|dgs\._proto\..*",
    "google.protobuf": r"dgs\.messages|dgs\.transport\.grpc_\w+|dgs\._proto\..*",
    "dgs._proto": (
        r"dgs\.(messages|joining|session|registry|server|client|housekeeping|serving)"
        r"|dgs\.transport\.gate|dgs\.(transport\.grpc_|_proto\.)\w+"
    ),
    "cryptography": r"dgs\.(authority|transport\.certificates)",
    "numba": r"dgs\.kernels\.cpu\w*",
    "triton": r"(dgs|moe)\.kernels\.gpu\w*",
}
"""Who may import what only few may, by patterns of module names."""

TORCH_FREE = (
    "errors",
    "config",
    "storage",
    "space",
    "view",
    "quantize",
    "codec",
    "frame",
    "messages",
)
MOE_MAY_IMPORT = ("dgs", "dgs.optimizer", "dgs.space", "dgs.view")
PACKAGES = ("dgs", "moe")


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _part(name: str) -> str:
    """Return which part of its package a module belongs to."""
    return name.split(".")[1] if "." in name else FACADE


def _rank(name: str) -> int | None:
    """Return the layer of a module, `None` where it has none yet, which has a test of its own."""
    layers = LAYERS_OF[name.partition(".")[0]]
    return next((rank for rank, layer in enumerate(layers) if _part(name) in layer), None)


def _is_upward(importer: str, target: str) -> bool:
    low, high = _rank(importer), _rank(target)
    return low is not None and high is not None and high > low


def _inner_edges(package: str) -> Iterable[tuple[Module, str, str]]:
    """Yield every import of one module of a package by another, with a prepared complaint."""
    for module in modules(package, generated=True):
        for node, target in imported(module):
            if _within(target, package) and target != module.name:
                yield module, target, module.at(node, f"{module.name} imports {target}")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_layer(package: str) -> None:
    known = {part for layer in LAYERS_OF[package] for part in layer}
    strangers = {m.name for m in modules(package, generated=True) if _part(m.name) not in known}
    assert not strangers, f"give each of these a place in its layers: {sorted(strangers)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_lower_layers_do_not_import_higher_ones(package: str) -> None:
    wrong = [
        complaint
        for module, target, complaint in _inner_edges(package)
        if _is_upward(module.name, target)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_do_not_import_each_other_in_circles(package: str) -> None:
    graph: dict[str, set[str]] = {}
    for module, target, _ in _inner_edges(package):
        graph.setdefault(module.name, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circle of imports: " + " -> ".join(error.args[1]))


@pytest.mark.parametrize("library", RESERVED)
def test_libraries_are_imported_only_where_they_belong(library: str) -> None:
    allowed = re.compile(RESERVED[library])
    wrong = [
        module.at(node, f"{module.name} imports {target}")
        for module in modules(*PACKAGES, generated=True)
        for node, target in imported(module)
        if _within(target, library) and not allowed.fullmatch(module.name)
    ]
    assert not wrong, "\n".join(wrong)


def test_dgs_does_not_know_moe() -> None:
    wrong = [
        module.at(node, f"{module.name} imports {target}")
        for module in modules("dgs")
        for node, target in imported(module)
        if _within(target, "moe")
    ]
    assert not wrong, "\n".join(wrong)


def test_moe_uses_only_the_space_and_the_optimizer_of_dgs() -> None:
    wrong = [
        module.at(node, f"{module.name} imports {target}")
        for module in modules("moe")
        for node, target in imported(module)
        if _within(target, "dgs") and target not in MOE_MAY_IMPORT
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("private", "others"),
    [("experiments", ("dgs", "moe")), ("tests", ("dgs", "moe", "experiments"))],
)
def test_what_is_not_shipped_is_not_imported_by_what_is(
    private: str, others: tuple[str, ...]
) -> None:
    wrong = [
        module.at(node, f"{module.name} imports {target}")
        for module in modules(*others)
        for node, target in imported(module)
        if _within(target, private)
    ]
    assert not wrong, "\n".join(wrong)


def _torch_importers(start: str) -> list[str]:
    """Return which modules import torch among one part of `dgs` and all that it imports."""
    by_name = {module.name: module for module in modules("dgs", generated=True)}
    todo = [name for name in by_name if _within(name, f"dgs.{start}")]
    assert todo, f"dgs.{start} does not exist; take it out of TORCH_FREE if it is gone for good"
    seen: set[str] = set()
    found = []
    while todo:
        name = todo.pop()
        if name in seen or name == "dgs" or name not in by_name:
            continue
        seen.add(name)
        targets = imported(by_name[name])
        found += [
            by_name[name].at(n, f"{name} imports {t}") for n, t in targets if _within(t, "torch")
        ]
        todo += [target for _, target in targets]
    return found


@pytest.mark.parametrize("part", TORCH_FREE)
def test_what_needs_no_torch_imports_none(part: str) -> None:
    wrong = _torch_importers(part)
    assert not wrong, "\n".join(wrong)


def test_importing_dgs_loads_no_grpc_and_starts_no_thread() -> None:
    program = (
        "import sys, threading, dgs\n"
        "heavy = {'grpc', 'numba', 'rich'} & set(sys.modules)\n"
        "assert not heavy, f'import dgs loads {heavy}'\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
