"""The service's definition: documented throughout, and the generated code belongs to it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib

from tests.helpers.source_tree import ROOT

PROTO = ROOT / "proto" / "parameter_server.proto"
GENERATED = ROOT / "dgs" / "_proto"

DECLARATION = re.compile(
    r"(?P<kind>service|message|enum|rpc)\s+(?P<name>\w+)"
    r"|(?:repeated\s+|optional\s+)?[\w.]+\s+(?P<field>\w+)\s*=\s*\d+"
    r"|(?P<value>[A-Z][A-Z0-9_]*)\s*=\s*(?!0\b)\d+"
)
"""What needs a comment; the zero of an enumeration only says that nothing was said."""


def _undocumented(lines: list[str]) -> list[str]:
    missing = []
    for number, line in enumerate(lines):
        declared = DECLARATION.match(line.strip())
        if declared is None or line.strip().startswith("syntax"):
            continue
        above = lines[number - 1].strip() if number else ""
        if "//" not in line and not above.startswith("//"):
            name = declared["name"] or declared["field"] or declared["value"]
            missing.append(f"{PROTO.relative_to(ROOT)}:{number + 1}: {name} has no comment")
    return missing


def test_generated_code_belongs_to_the_definition() -> None:
    recorded = (GENERATED / "SOURCE_SHA256").read_text().strip()
    actual = hashlib.sha256(PROTO.read_bytes()).hexdigest()
    assert recorded == actual, "proto/parameter_server.proto has changed; run: make proto"


def test_every_message_field_and_rpc_has_a_comment() -> None:
    missing = _undocumented(PROTO.read_text().splitlines())
    assert not missing, "\n".join(missing)


def test_a_missing_comment_is_found() -> None:
    lines = ["message A {", "  // said", "  bytes b = 1;", "  C c = 2;", "  rpc D(E) returns (F);"]
    found = [complaint.split(": ")[1].split()[0] for complaint in _undocumented(lines)]
    assert found == ["A", "c", "D"]


def test_generated_code_imports_without_a_warning() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import dgs._proto.parameter_server_pb2_grpc"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


def test_lower_bounds_are_the_versions_stamped_into_the_generated_code() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    messages = (GENERATED / "parameter_server_pb2.py").read_text()
    service = (GENERATED / "parameter_server_pb2_grpc.py").read_text()
    protobuf = re.search(r"Protobuf Python Version: (\d+)\.([\d.]+)", messages)
    grpc = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", service)
    assert protobuf is not None
    assert grpc is not None
    major, rest = protobuf.groups()
    assert f"protobuf>={major}.{rest},<{int(major) + 2}" in project["dependencies"]
    assert f"grpcio>={grpc[1]}" in project["dependencies"]


def test_the_folder_of_the_definition_is_no_package() -> None:
    # other projects install a top-level package of that name
    assert not list((ROOT / "proto").rglob("*.py"))
