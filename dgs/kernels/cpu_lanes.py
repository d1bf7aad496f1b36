"""Sixty-four float32 at a time: the few vector operations that the CPU kernels are made of.

Each mask operation works on 64 consecutive entries and returns one bit per entry that is at or
above a bound in magnitude, as the bits of its float32 compare. They are spelled in LLVM's vector
instructions because the compiler does not find them in a loop of Python; every CPU that LLVM knows
can run them, in registers as wide as it has.

Note:
    numba caches what calls these and does not notice changes in here: after an edit, delete
    ``dgs/kernels/__pycache__``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from numba import njit, types
from numba.core.cgutils import ir
from numba.extending import intrinsic as _intrinsic

__all__ = [
    "LANES",
    "accumulate_mask",
    "add_mask",
    "at_least_mask",
    "bits_of",
    "difference_mask",
    "jit",
    "ones",
    "trailing_zeros",
    "word_at",
]

LANES: Final = 64
"""Entries per mask."""

_SIGN_LESS: Final = 0x7FFFFFFF
_WORD: Final = ir.IntType(32)
_FLOATS: Final = ir.VectorType(ir.FloatType(), LANES)
_WORDS: Final = ir.VectorType(_WORD, LANES)

intrinsic: Any = _intrinsic  # what it makes has another signature than what it is given

Signature = tuple[Any, Callable[..., Any]]


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function on its first call, without the GIL, and keep it on disk where possible."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder to keep it in can be written
        return njit(nogil=True, error_model="numpy")(function)


def _lanes(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Return a pointer to the 64 entries of an array from `at` on."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), _FLOATS.as_pointer())


def _at_least(builder: Any, values: Any, bound: Any) -> Any:
    magnitude = builder.and_(
        builder.bitcast(values, _WORDS), ir.Constant(_WORDS, [_SIGN_LESS] * LANES)
    )
    nothing = ir.Constant(_WORDS, ir.Undefined)
    first = builder.insert_element(nothing, bound, ir.Constant(_WORD, 0))
    bounds = builder.shuffle_vector(first, nothing, ir.Constant(_WORDS, [0] * LANES))
    return builder.bitcast(builder.icmp_unsigned(">=", magnitude, bounds), ir.IntType(64))


@intrinsic
def accumulate_mask(
    typing: Any, velocity: Any, base: Any, local: Any, at: Any, bound: Any
) -> Signature:
    """Compute ``velocity += base - local`` on 64 entries; return the mask of the new velocity."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        velocity_at, base_at, local_at = (
            _lanes(context, builder, signature.args[i], args[i], args[3]) for i in range(3)
        )
        progress = builder.fsub(builder.load(base_at, align=4), builder.load(local_at, align=4))
        after = builder.fadd(builder.load(velocity_at, align=4), progress)
        builder.store(after, velocity_at, align=4)
        return _at_least(builder, after, args[4])

    return types.uint64(velocity, base, local, types.intp, types.uint32), generate


@intrinsic
def add_mask(typing: Any, velocity: Any, progress: Any, at: Any, bound: Any) -> Signature:
    """Compute ``velocity += progress`` on 64 entries; return the mask of the new velocity."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        velocity_at, progress_at = (
            _lanes(context, builder, signature.args[i], args[i], args[2]) for i in range(2)
        )
        after = builder.fadd(builder.load(velocity_at, align=4), builder.load(progress_at, align=4))
        builder.store(after, velocity_at, align=4)
        return _at_least(builder, after, args[3])

    return types.uint64(velocity, progress, types.intp, types.uint32), generate


@intrinsic
def difference_mask(typing: Any, left: Any, right: Any, at: Any, bound: Any) -> Signature:
    """Return the mask of ``left - right`` on 64 entries."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left_at, right_at = (
            _lanes(context, builder, signature.args[i], args[i], args[2]) for i in range(2)
        )
        values = builder.fsub(builder.load(left_at, align=4), builder.load(right_at, align=4))
        return _at_least(builder, values, args[3])

    return types.uint64(left, right, types.intp, types.uint32), generate


@intrinsic
def at_least_mask(typing: Any, values: Any, at: Any, bound: Any) -> Signature:
    """Return the mask of 64 entries."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values_at = _lanes(context, builder, signature.args[0], args[0], args[1])
        return _at_least(builder, builder.load(values_at, align=4), args[2])

    return types.uint64(values, types.intp, types.uint32), generate


@intrinsic
def trailing_zeros(typing: Any, word: Any) -> Signature:
    """Return the position of the lowest one of a word, 64 if it has none."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@intrinsic
def ones(typing: Any, word: Any) -> Signature:
    """Return the number of ones of a word."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


@intrinsic
def bits_of(typing: Any, value: Any) -> Signature:
    """Return the bits of a float32's magnitude, which compare as the magnitude does."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.and_(builder.bitcast(args[0], _WORD), ir.Constant(_WORD, _SIGN_LESS))

    return types.uint32(types.float32), generate


@intrinsic
def word_at(typing: Any, data: Any, at: Any) -> Signature:
    """Return eight bytes as a little-endian word; the caller sees to it that they are there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(start, [args[1]]), ir.IntType(64).as_pointer())
        return builder.load(place, align=1)

    return types.uint64(data, types.intp), generate
