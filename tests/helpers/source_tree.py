"""The project's own source, parsed: what the tests of the house rules look at."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["ROOT", "Module", "imported", "modules"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Module:
    """One parsed file of the project."""

    name: str
    """Dotted name, such as ``dgs.transport.base``; that of a package is the folder's."""

    path: Path
    """Where the file is."""

    text: str
    """What is in it."""

    tree: ast.Module
    """The same, parsed."""

    def at(self, node: ast.AST, message: str) -> str:
        """Return a complaint about one place, in the form that editors jump to."""
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {message}"


@cache
def _parse(path: Path) -> Module:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    text = path.read_text(encoding="utf-8")
    return Module(name, path, text, ast.parse(text, filename=str(path)))


def modules(*folders: str, generated: bool = False) -> list[Module]:
    """Return every module under the named top-level folders, in the order of their paths.

    Args:
        folders: such as ``"dgs"``; each has to hold at least one module.
        generated: whether ``dgs/_proto`` counts.
    """
    found = []
    for folder in folders:
        paths = sorted((ROOT / folder).rglob("*.py"))
        assert paths, f"there is no Python file under {folder}/"
        found += [p for p in paths if generated or "_proto" not in p.relative_to(ROOT).parts]
    return [_parse(path) for path in found]


def imported(module: Module) -> list[tuple[ast.stmt, str]]:
    """Return every import of a module, wherever it stands in the file, as dotted names.

    ``from a import b`` counts as ``a.b`` where that is a module of this project, and as ``a``
    where `b` is something inside it. Imports under ``TYPE_CHECKING`` and inside functions count.
    """
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = _source(module, node)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.append((node, inner if _is_module(inner) else source))
    return found


def _source(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.name.split(".")
    drop = node.level - (module.path.name == "__init__.py")
    base = package[: len(package) - drop]
    return ".".join([*base, node.module] if node.module else base)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
