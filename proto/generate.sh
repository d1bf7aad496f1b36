#!/usr/bin/env bash
# Write dgs/_proto again from proto/parameter_server.proto.
#
# The compiler is grpcio-tools 1.72.1, the oldest whose code runs on protobuf 6 and 7: generated
# code runs on the protobuf and grpcio that made it and on newer ones, up to the next major version
# of protobuf, and never on older ones. It wants an older protobuf than the one the library is
# tested with, so it gets a throwaway environment of its own. When the pin moves, move the lower
# bounds of grpcio and protobuf in pyproject.toml with it; tests/test_proto.py compares them.
# (setuptools: that compiler still imports pkg_resources, which newer ones no longer have.)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools"
"$tools/bin/python" -m pip install -q "grpcio-tools==1.72.1" "setuptools<81"

mkdir -p dgs/_proto
# The mapping makes the generated import `from dgs._proto import ...`, with no editing afterwards.
"$tools/bin/python" -W ignore -m grpc_tools.protoc -Idgs/_proto=proto \
  --python_out=. --pyi_out=. --grpc_python_out=. proto/parameter_server.proto
"$tools/bin/python" - > dgs/_proto/SOURCE_SHA256 <<'PY'
import hashlib
import pathlib

print(hashlib.sha256(pathlib.Path("proto/parameter_server.proto").read_bytes()).hexdigest())
PY
