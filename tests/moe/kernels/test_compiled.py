"""The Triton kernels compile for real GPUs, which takes none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

ROWS, INDEX, WEIGHTS = "*bf16", "*i64", "*fp32"
KERNELS: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    (
        "_gather",
        {"x": ROWS, "source": INDEX, "weights": WEIGHTS, "rows": ROWS},
        {"WEIGHTED": True},
    ),
    (
        "_sum",
        {"rows": ROWS, "position": INDEX, "weights": WEIGHTS, "x": ROWS},
        {"CHOICES": 8, "WEIGHTED": True},
    ),
    ("_dot", {"x": ROWS, "rows": ROWS, "source": INDEX, "dots": WEIGHTS}, {}),
    ("_activate", {"h": ROWS, "weights": WEIGHTS, "a": ROWS}, {"WEIGHTED": True, "GATED": True}),
    (
        "_activate_back",
        {"grad": ROWS, "h": ROWS, "weights": WEIGHTS, "grad_h": ROWS, "grad_weights": WEIGHTS},
        {"WEIGHTED": True, "GATED": True},
    ),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the compiled kernels")
@pytest.mark.parametrize(
    ("name", "pointers", "constants"), KERNELS, ids=[kernel[0] for kernel in KERNELS]
)
def test_the_kernels_compile_for_a_gpu(
    name: str,
    pointers: dict[str, str],
    constants: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe.kernels import gpu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    options = gpu._tile(14336)
    constants = {**constants, "BLOCK": options.pop("BLOCK")}
    signature = {**pointers, "width": "i32", **dict.fromkeys(constants, "constexpr")}
    kernel = getattr(gpu, name)
    ordered = {argument: signature[argument] for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=ordered, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert ".target sm_90" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
