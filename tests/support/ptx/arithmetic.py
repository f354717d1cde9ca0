"""What instructions compute, for the 32 lanes of a warp at once."""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

LANES = 32
BFLOAT16 = np.dtype(jnp.bfloat16)
TYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{kind}{bits}": f"uint{bits}" for kind in "bu" for bits in (16, 32, 64)},
    **{f"s{bits}": f"int{bits}" for bits in (16, 32, 64)},
    "f32": np.float32,
}
TYPES = {name: np.dtype(kind) for name, kind in TYPES.items()}


def constant(text: str, kind: np.dtype) -> np.ndarray:
    """Returns a number for every lane."""
    if text.startswith("0f"):
        bits = np.full(LANES, int(text[2:], 16), np.uint32)
        return bits.view(kind)
    size = 8 * kind.itemsize
    value = int(text, 0)
    if kind == np.bool_:
        return np.full(LANES, bool(value))
    assert kind.kind in "iu", f"{text} as {kind}"
    return np.full(LANES, value % 2**size, f"uint{size}").view(kind)


def _fma(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _fma_down(a, b, c):
    """Rounds towards minus infinity."""
    exact = a.astype(np.float64) * b + c
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def _exp2(x):
    """That of the hardware, which has no subnormal results."""
    found = np.exp2(x)
    return np.where(found < np.finfo(np.float32).tiny, np.float32(0), found)


def _saturate(x):
    return np.nan_to_num(np.clip(x, np.float32(0), np.float32(1)), nan=0.0)


def _bits(x, start, length):
    """Extracts bits; those of a signed number are extended by the last one."""
    size = 8 * x.dtype.itemsize
    (first,), (count,) = set(start.tolist()), set(length.tolist())
    shift = x.dtype.type(size - count)
    return (x << x.dtype.type(size - count - first)) >> shift


def _wide(a, b):
    kind = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(kind) * b.astype(kind)


def _high(a, b):
    size = 8 * a.dtype.itemsize
    found = [int(x) * int(y) >> size for x, y in zip(a, b, strict=True)]
    return np.asarray(found, a.dtype)


def _shift(shift: Callable[..., Any]):
    def shifted(x, by):
        size = 8 * x.dtype.itemsize
        # A right shift of a negative number leaves -1.
        limit = size - 1 if x.dtype.kind == "i" else size
        by = np.minimum(by.astype(np.int64), limit)
        found = shift(x, np.minimum(by, size - 1).astype(x.dtype))
        return np.where(by == size, x.dtype.type(0), found)

    return shifted


COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    # Also true if one of them is no number.
    "neu": np.not_equal,
}

# By name, without the modifiers that change nothing here.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mul.lo": np.multiply,
    "mul.wide": _wide,
    "mul.hi": _high,
    "mad.lo": lambda a, b, c: a * b + c,
    "min": np.minimum,
    "max": np.maximum,
    "max.NaN": np.maximum,
    "neg": np.negative,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "bfe": _bits,
    "fma.rn": _fma,
    "fma.rm": _fma_down,
    "add.rn": np.add,
    "mul.rn": np.multiply,
    "ex2.approx.ftz": _exp2,
    "rcp.approx": np.reciprocal,
    "mov": lambda a: a,
    "cvta.to.global": lambda a: a,
    "cvta.param": lambda a: a,
}


def convert(name: str, *operands: np.ndarray) -> np.ndarray:
    """Computes `cvt`.

    Args:
      name: with its modifiers.
      *operands: two for a pair of bfloat16, of which the first is the upper one.
    """
    found = re.fullmatch(r"cvt((?:\.[a-z]+)*)\.(\w+)\.\w+", name)
    assert found, "an unknown instruction"
    modifiers, to = found.groups()
    if to == "bf16x2":
        high, low = (x.astype(BFLOAT16).view(np.uint16) for x in operands)
        return high.astype(np.uint32) << np.uint32(16) | low
    (x,) = operands
    return _saturate(x) if modifiers == ".sat" else x.astype(TYPES[to])
