"""Iterating over the tokens of rows, a block of each row at a time.

The rows are never padded or copied: if the blocks do not divide the row, all blocks
after the first start earlier. The first then overlaps with the second, and the inputs
of the tokens they share are zeros in the first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

Carry = TypeVar("Carry")


def fold(
    body: Callable[[Carry, Array, Any], Carry],
    carry: Carry,
    source: Float[Array, "G B S X"],
    inputs: Any,
    size: int,
    *,
    on_cpu: bool = False,
) -> Carry:
    """Folds `body(carry, block, inputs)` over the blocks.

    Args:
      body: called with a block [B, C, X] and its inputs [B, C, ...].
      carry: the initial carry.
      source: the array to iterate over.
      inputs: a pytree of [G, B, S, ...] arrays; a block sees zeros at the tokens that
        the next block repeats.
      size: C; the whole row if that is shorter.
      on_cpu: slices 16-bit floats as integers, because XLA:CPU would convert the whole
        source for every slice of it, and slices a block only once, because XLA:CPU
        would repeat that for every use of it.

    Returns:
      The last carry.
    """
    blocks = _blocks_of(source, size)
    if blocks.is_whole:
        return body(carry, source[0], _first(inputs))
    bits = _as_bits(source) if on_cpu else source

    def step(carry, item):
        offset, inputs = item
        block = blocks.read(bits, offset, source.dtype, once=on_cpu)
        return body(carry, block, inputs), None

    return lax.scan(step, carry, (blocks.offsets(), _split(blocks, inputs)))[0]


def is_one_block(source: Float[Array, "G B S X"], size: int) -> bool:
    """Returns whether a single block covers the whole source."""
    return _blocks_of(source, size).is_whole


def transform(
    body: Callable[[Carry, Array, Any], tuple[Carry, Array | None, Any]],
    carry: Carry,
    source: Float[Array, "G B S X"],
    inputs: Any,
    size: int,
    *,
    writes_blocks: bool = True,
    on_cpu: bool = False,
) -> tuple[Carry, Float[Array, "G B S X"] | None, Any]:
    """Folds as `fold` does, and maps every block to a new one.

    Args:
      body: returns the carry, a new block of the same shape, and outputs [B, C, ...].
      carry: as for `fold`.
      source: as for `fold`.
      inputs: as for `fold`.
      size: as for `fold`.
      writes_blocks: `False` if the body returns None instead of a new block.
      on_cpu: as for `fold`.

    Returns:
      The last carry, the new blocks [G, B, S, X], and the outputs [G, B, S, ...].
    """
    blocks = _blocks_of(source, size)
    if blocks.is_whole:
        carry, new, outputs = body(carry, source[0], _first(inputs))
        return carry, *jax.tree.map(lambda x: x[None], (new, outputs))
    bits = _as_bits(source) if on_cpu else source

    def step(state, item):
        carry, written = state
        offset, inputs = item
        block = blocks.read(bits, offset, source.dtype, once=on_cpu)
        carry, new, outputs = body(carry, block, inputs)
        if new is not None:
            written = blocks.write(written, offset, new)
        return (carry, written), outputs

    items = (blocks.offsets(), _split(blocks, inputs))
    start = (carry, lax.empty(bits.shape, bits.dtype) if writes_blocks else None)
    (carry, written), outputs = lax.scan(step, start, items)
    new = None if written is None else _from_bits(written, source.dtype)
    return carry, new, jax.tree.map(blocks.join, outputs)


def split_rows(tree: Any, shape: tuple[int, ...], size: int) -> Any:
    """Splits arrays [B, S, ...] into blocks [n, B, C, ...] with C = size.

    Args:
      tree: a pytree of arrays.
      shape: starts with B, S.
      size: as for `fold`.

    Returns:
      The blocks; tokens of two blocks are zeros in the first.
    """
    blocks = _Blocks(1, shape[0], shape[1], min(size, shape[1]))
    return jax.tree.map(lambda x: blocks.split(x[None]), tree)


def join_rows(tree: Any, shape: tuple[int, ...], size: int) -> Any:
    """Joins the blocks of `split_rows` to arrays [B, S, ...]."""
    blocks = _Blocks(1, shape[0], shape[1], min(size, shape[1]))
    return jax.tree.map(lambda x: blocks.join(x)[0], tree)


class _Offset(NamedTuple):
    """The position of a block."""

    group: Int[Array, "..."]
    start: Int[Array, "..."]


class _Blocks(NamedTuple):
    """The blocks of [G, B, S, ...] arrays."""

    groups: int
    batch: int
    length: int
    size: int

    @property
    def num_blocks(self) -> int:
        return -(-self.length // self.size)

    @property
    def is_whole(self) -> bool:
        return self.groups == 1 and self.num_blocks == 1

    @property
    def overlap(self) -> int:
        return self.num_blocks * self.size - self.length

    def offsets(self) -> _Offset:
        """Returns the offsets in the order of iteration, stacked."""
        index = jnp.arange(self.groups * self.num_blocks, dtype=jnp.int32)
        group, block = index // self.num_blocks, index % self.num_blocks
        start = jnp.maximum(block * self.size - self.overlap, 0)
        return _Offset(group, start)

    def read(self, bits, offset: _Offset, dtype, *, once: bool) -> Array:
        shape = (1, self.batch, self.size, bits.shape[3])
        block = lax.dynamic_slice(bits, self._start(offset), shape)[0]
        block = _from_bits(block, dtype)
        return lax.optimization_barrier(block) if once else block

    def write(self, bits, offset: _Offset, new) -> Array:
        """Writes a block; the next block overwrites the tokens they share."""
        new = new if bits.dtype == new.dtype else _as_bits(new)
        return lax.dynamic_update_slice(bits, new[None], self._start(offset))

    @staticmethod
    def _start(offset: _Offset):
        zero = jnp.zeros_like(offset.start)
        return (offset.group, zero, offset.start, zero)

    def split(self, x: Shaped[Array, "G B S *n"]) -> Shaped[Array, "n B C *n"]:
        if self.overlap:
            kept = self.size - self.overlap
            gap = jnp.zeros((*x.shape[:2], self.overlap, *x.shape[3:]), x.dtype)
            x = jnp.concatenate([x[:, :, :kept], gap, x[:, :, kept:]], axis=2)
        x = x.reshape(*x.shape[:2], self.num_blocks, self.size, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(-1, self.batch, self.size, *x.shape[4:])

    def join(self, x: Shaped[Array, "n B C *n"]) -> Shaped[Array, "G B S *n"]:
        x = x.reshape(self.groups, self.num_blocks, *x.shape[1:])
        x = jnp.moveaxis(x, 1, 2).reshape(self.groups, self.batch, -1, *x.shape[4:])
        kept = self.size - self.overlap
        if not self.overlap:
            return x
        return jnp.concatenate([x[:, :, :kept], x[:, :, self.size :]], axis=2)


def _blocks_of(source, size) -> _Blocks:
    groups, batch, length = source.shape[:3]
    return _Blocks(groups, batch, length, min(size, length))


def _split(blocks: _Blocks, inputs):
    return jax.tree.map(blocks.split, inputs)


def _as_bits(x):
    return lax.bitcast_convert_type(x, "uint16") if x.dtype.itemsize == 2 else x


def _from_bits(bits, dtype):
    return bits if bits.dtype == dtype else lax.bitcast_convert_type(bits, dtype)


def _first(inputs):
    return jax.tree.map(lambda x: x[0], inputs)
