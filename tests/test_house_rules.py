"""The house rules that a machine can check; CONTRIBUTING.md has them in words."""

from __future__ import annotations

import ast
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import TypeAlias

import pytest

import dgs
from tests.helpers.source_tree import ROOT, Module, imported, modules

PUBLIC_NAMES_OF_DGS = [
    "ClientSecurity",
    "DgsError",
    "DistributedOptimizer",
    "ParameterServer",
    "RetryConfig",
    "ServerConfig",
    "ServerSecurity",
    "StorageConfig",
    "WorkerConfig",
    "serve",
]
"""All that ``import dgs`` offers, sorted; a change here is a change for users: CHANGELOG.md."""

MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 120
MAX_CLASS_LINES = 300
MAX_CONSTRUCTOR_ARGUMENTS = 8

LIBRARY = ("dgs", "moe")
EVERYTHING = ("dgs", "moe", "experiments", "tests")

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
Definition: TypeAlias = Function | ast.ClassDef
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITION = (*FUNCTION, ast.ClassDef)

Rule: TypeAlias = Callable[[Module], Iterator[str]]


def _lines(node: Definition) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _called(node: ast.AST) -> str:
    """Return the dotted name of what a call calls, or of a plain name or attribute."""
    if isinstance(node, ast.Call):
        return _called(node.func)
    if isinstance(node, ast.Attribute):
        return f"{_called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _decorated(node: Definition, *names: str) -> bool:
    return any(_called(d).rpartition(".")[2] in names for d in node.decorator_list)


def _documentable(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[Definition, str]]:
    """Yield the public definitions of a module, and those inside its public classes."""
    for node in body:
        if not isinstance(node, DEFINITION) or node.name.startswith("_"):
            continue
        if _decorated(node, "overload", "override", "setter", "deleter"):
            continue
        yield node, inside + node.name
        if isinstance(node, ast.ClassDef):
            yield from _documentable(node.body, f"{inside}{node.name}.")


def _is_size_kept(module: Module) -> Iterator[str]:
    length = len(module.text.splitlines())
    if length > MAX_MODULE_LINES:
        yield module.at(module.tree, f"module of {length} lines; at most {MAX_MODULE_LINES}")
    longest = MAX_KERNEL_LINES if ".kernels." in module.name else MAX_FUNCTION_LINES
    for node in ast.walk(module.tree):
        if isinstance(node, DEFINITION):
            most = MAX_CLASS_LINES if isinstance(node, ast.ClassDef) else longest
            if _lines(node) > most:
                yield module.at(node, f"{node.name} has {_lines(node)} lines; at most {most}")


def _has_small_constructors(module: Module) -> Iterator[str]:
    for owner in ast.walk(module.tree):
        if not isinstance(owner, ast.ClassDef):
            continue
        for node in owner.body:
            if isinstance(node, FUNCTION) and node.name == "__init__":
                a = node.args
                count = len(a.posonlyargs + a.args + a.kwonlyargs) - 1
                if count > MAX_CONSTRUCTOR_ARGUMENTS:
                    yield module.at(
                        node,
                        f"{owner.name} takes {count} arguments; at most "
                        f"{MAX_CONSTRUCTOR_ARGUMENTS}, then a configuration",
                    )


def _is_annotated(module: Module) -> Iterator[str]:
    methods = {
        id(node)
        for owner in ast.walk(module.tree)
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, FUNCTION) and not _decorated(node, "staticmethod")
    }
    for node in ast.walk(module.tree):
        if not isinstance(node, FUNCTION):
            continue
        a = node.args
        named = (a.posonlyargs + a.args)[1 if id(node) in methods else 0 :] + a.kwonlyargs
        named += [extra for extra in (a.vararg, a.kwarg) if extra is not None]
        bare = [argument.arg for argument in named if argument.annotation is None]
        bare += ["its result"] if node.returns is None else []
        if bare:
            yield module.at(node, f"{node.name} does not annotate {', '.join(bare)}")


def _is_documented(module: Module) -> Iterator[str]:
    if ast.get_docstring(module.tree) is None:
        yield module.at(module.tree, "module without a docstring")
    for node, name in _documentable(module.tree.body):
        if ast.get_docstring(node) is None:
            yield module.at(node, f"{name} has no docstring")


def _lists_its_public_names(module: Module) -> Iterator[str]:
    if any(part.startswith("_") for part in module.name.split(".")):
        return
    for node in module.tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            return
    yield module.at(module.tree, "module without __all__")


def _documents_its_settings(module: Module) -> Iterator[str]:
    if module.path.name != "config.py":
        return
    for owner in module.tree.body:
        if not isinstance(owner, ast.ClassDef) or not _decorated(owner, "dataclass"):
            continue
        for node, below in zip(owner.body, [*owner.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and not (
                isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                field = ast.unparse(node.target)
                yield module.at(node, f"{owner.name}.{field} has no docstring underneath")


CONTAINERS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
CONTAINER_TYPES = {
    "list",
    "dict",
    "set",
    "bytearray",
    "defaultdict",
    "deque",
    "Counter",
    "OrderedDict",
    "WeakKeyDictionary",
    "WeakValueDictionary",
    "WeakSet",
    "itertools.count",
}


def _outside_functions(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run when a module is imported, those of classes left out."""
    for node in body:
        yield node
        if not isinstance(node, DEFINITION):
            for name in ("body", "orelse", "finalbody"):
                yield from _outside_functions(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from _outside_functions(handler.body)


def _keeps_no_global_state(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global):
            yield module.at(node, f"global {', '.join(node.names)}")
    for stmt in _outside_functions(module.tree.body):
        if not isinstance(stmt, ast.Assign | ast.AnnAssign) or stmt.value is None:
            continue
        mutable = isinstance(stmt.value, CONTAINERS) or (
            isinstance(stmt.value, ast.Call)
            and bool(
                {_called(stmt.value), _called(stmt.value).rpartition(".")[2]} & CONTAINER_TYPES
            )
        )
        targets = stmt.targets if isinstance(stmt, ast.Assign) else [stmt.target]
        for name in (t.id for t in targets if isinstance(t, ast.Name)):
            if mutable and name != "__all__" and not name.isupper():
                yield module.at(stmt, f"{name} is mutable and global")


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "builtins.eval", "builtins.exec"}


def _runs_nothing_it_reads(module: Module) -> Iterator[str]:
    for stmt, name in imported(module):
        if name.partition(".")[0] in UNSAFE_MODULES:
            yield module.at(stmt, f"imports {name}")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            if any(alias.name == "load" for alias in node.names):
                yield module.at(node, "imports torch.load")
        elif isinstance(node, ast.Call):
            if _called(node) in UNSAFE_CALLS:
                yield module.at(node, f"calls {_called(node)}")
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not off:
                    yield module.at(node, "allows pickles")


def _is_ascii(module: Module) -> Iterator[str]:
    for number, line in enumerate(module.text.splitlines(), start=1):
        if not line.isascii():
            found = next(character for character in line if not character.isascii())
            place = module.path.relative_to(ROOT)
            yield f"{place}:{number}: U+{ord(found):04X} is not ASCII"


def _does_not_sleep(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            sleeps = node.module == "time" and any(alias.name == "sleep" for alias in node.names)
        else:
            sleeps = isinstance(node, ast.Call) and _called(node) in {"time.sleep", "asyncio.sleep"}
        if sleeps:
            yield module.at(node, "sleeps; wait for the event itself, with a bound")


RULES: list[tuple[str, Rule, tuple[str, ...]]] = [
    ("sizes are kept", _is_size_kept, EVERYTHING),
    ("constructors are small", _has_small_constructors, EVERYTHING),
    ("functions are annotated", _is_annotated, EVERYTHING),
    ("what is public is documented", _is_documented, LIBRARY),
    ("modules list their public names", _lists_its_public_names, LIBRARY),
    ("settings are documented", _documents_its_settings, LIBRARY),
    ("there is no global state", _keeps_no_global_state, LIBRARY),
    ("nothing that is read is run", _runs_nothing_it_reads, LIBRARY),
    ("code is ASCII", _is_ascii, EVERYTHING),
    ("tests do not sleep", _does_not_sleep, ("tests",)),
]


@pytest.mark.parametrize(
    ("rule", "folders"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES]
)
def test_rule_is_kept(rule: Rule, folders: tuple[str, ...]) -> None:
    broken = [complaint for module in modules(*folders) for complaint in rule(module)]
    assert not broken, "\n".join(broken)


BREACHES: list[tuple[Rule, str]] = [
    (_is_size_kept, "x = 1\n" * (MAX_MODULE_LINES + 1)),
    (_is_size_kept, "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (_is_size_kept, "class A:\n" + "    x = 1\n" * MAX_CLASS_LINES),
    (
        _has_small_constructors,
        "class A:\n    def __init__(self, a, b, c, d, e, *, f, g, h, i): ...",
    ),
    (_is_annotated, "def f(a) -> None: ..."),
    (_is_annotated, "def f(*a) -> None: ..."),
    (_is_annotated, "class A:\n    def f(self): ..."),
    (_is_annotated, "class A:\n    @staticmethod\n    def f(a) -> None: ..."),
    (_is_documented, "x = 1"),
    (_is_documented, "'''Said.'''\nclass A:\n    '''Said.'''\n    def f(self) -> None: ..."),
    (_lists_its_public_names, "'''Said.'''"),
    (_documents_its_settings, "@dataclass(frozen=True)\nclass A:\n    a: int = 1\n    b: int = 2"),
    (_keeps_no_global_state, "def f():\n    global x"),
    (_keeps_no_global_state, "if True:\n    cache: dict[str, int] = {}"),
    (_keeps_no_global_state, "cache = collections.defaultdict(int)"),
    (_runs_nothing_it_reads, "def f():\n    import pickle"),
    (_runs_nothing_it_reads, "from torch import load"),
    (_runs_nothing_it_reads, "torch.load(path, weights_only=True)"),
    (_runs_nothing_it_reads, "np.load(path, allow_pickle=flag)"),
    (_runs_nothing_it_reads, "eval(text)"),
    (_is_ascii, "x = '\u03b7'"),
    (_does_not_sleep, "time.sleep(1)"),
    (_does_not_sleep, "from time import sleep"),
]


@pytest.mark.parametrize(("rule", "text"), BREACHES, ids=[str(i) for i in range(len(BREACHES))])
def test_breach_of_a_rule_is_found(rule: Rule, text: str) -> None:
    path = ROOT / "dgs" / "config.py"
    assert list(rule(Module("dgs.config", path, text, ast.parse(text))))


def test_public_names_are_the_frozen_ones() -> None:
    assert sorted(dgs.__all__) == PUBLIC_NAMES_OF_DGS
    missing = [name for name in dgs.__all__ if not hasattr(dgs, name)]
    assert not missing, f"dgs.__all__ names what dgs does not have: {missing}"


def test_every_folder_of_tests_is_a_package() -> None:
    # without this, `import dgs` inside a test may find tests/dgs
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    folders |= {parent for f in folders for parent in f.parents if ROOT / "tests" in parent.parents}
    bare = [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()]
    assert not bare, f"add an empty __init__.py to: {', '.join(sorted(bare))}"


def test_packages_declare_their_types() -> None:
    assert all((ROOT / package / "py.typed").is_file() for package in LIBRARY)


SKIPPED_FOLDERS = {"build", "dist", "shared"}
TEXT_SUFFIXES = {"", ".md", ".py", ".pyi", ".sh", ".toml", ".txt", ".proto", ".json", ".csv"}
REVEALING = re.compile(r"\b(issue|ticket) #?\d|\btask #\d|(?<![\w.])/(work|root)/", re.IGNORECASE)


def _texts() -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):
        hidden = {f for f in folders if f.startswith((".", "__")) and f != ".ci"}
        eggs = {f for f in folders if f.endswith(".egg-info")}
        folders[:] = sorted(set(folders) - hidden - eggs - SKIPPED_FOLDERS)
        yield from (Path(folder) / f for f in files if Path(f).suffix in TEXT_SUFFIXES)


def test_nothing_written_reveals_where_or_on_whose_order_it_was_written() -> None:
    revealing = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in _texts()
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1)
        if REVEALING.search(line)
    ]
    assert not revealing, "\n".join(revealing)


def test_dependencies_are_what_the_library_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=!~;\[ ]", d)[0].lower() for d in project["dependencies"]}
    names = {
        ("google.protobuf" if target.startswith("google.protobuf") else target.partition(".")[0])
        for module in modules(*LIBRARY, generated=True)
        for _, target in imported(module)
    }
    names -= {*sys.stdlib_module_names, *LIBRARY}
    owners = {**packages_distributions(), "google.protobuf": ["protobuf"]}
    used = {owners.get(name, [name])[0].lower() for name in names}
    # what an extra brings may be imported, by functions that say so when it is missing
    extras = {d for e in project["optional-dependencies"].values() for d in e}
    used -= extras
    assert used == declared, (
        f"imported, not declared: {sorted(used - declared)}; "
        f"declared, never imported: {sorted(declared - used)}"
    )
