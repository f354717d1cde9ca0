"""The pass over one device's tokens: its loops, and the gradient of a chunk.

Where a block's logits are whole, its share of the loss is known and its gradient is
taken right there, in the forward pass: from hidden states that is 6·N·D·V flops where
recomputing costs 8, and the logits exist a few tokens at a time. `jax.vjp`
differentiates the block, so that a bias, a soft-cap or the temperature cannot be
forgotten.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ava_jax.kernel.blocks import (
    fold,
    is_one_block,
    join_rows,
    split_rows,
    transform,
)
from ava_jax.kernel.passes import Objective, Operands, Pass, Sums
from ava_jax.kernel.product import differentiable, lay_by_columns, replaced
from ava_jax.reduce import as_float, float_dtype


def local_sums(objectives: tuple[Objective, ...], begun: Pass) -> Sums:
    """Computes one device's sums, without a gradient."""
    fold_rows = functools.partial(fold, on_cpu=begun.on_cpu)
    operands, sizes = begun.operands, begun.sizes
    kernel, bias = operands.kernel, operands.bias
    totals: Sums = {}
    for objective, source, inputs, active in _groups(objectives, operands):

        def of_block(sums, z, inputs, objective=objective):
            own = begun.evaluate(objective, z, inputs, bias, operands.shared)
            return _merge(sums, own)

        def of_chunk(sums, h, given, of_block=of_block):
            inputs, active = given
            h = _masked(h, active)
            if not begun.on_cpu:
                return of_block(sums, begun.logits(h), inputs)
            z = begun.project(h)
            z, inputs = jax.tree.map(lambda x: x[None], (z, inputs))
            return fold_rows(of_block, sums, z, inputs, sizes.block)

        sums = _no_sums(begun, objective, source, inputs)
        if kernel is None:
            sums = fold_rows(of_block, sums, source, inputs, sizes.block)
        else:
            # Without a gradient, nothing but a block has to exist.
            size = sizes.chunk if begun.on_cpu else sizes.block
            sums = fold_rows(of_chunk, sums, source, (inputs, active), size)
        totals = _merge(totals, sums)
    return totals


def local_gradients(
    objectives: tuple[Objective, ...], begun: Pass, needed: Any, wanted: Sums
) -> tuple[Sums, Operands]:
    """Computes one device's sums and the gradient of `Σ wanted · sums`.

    Args:
      objectives: one per source.
      begun: the arrays, and how the pass goes.
      needed: for each of the operands whether its gradient is; a tree like theirs.
      wanted: the cotangents of the sums.

    Returns:
      The sums, and the gradient with None where it is not needed.
    """
    operands = begun.operands
    whole = (
        _only(needed.bias, operands.bias),
        _only(needed.shared, operands.shared),
    )
    d_kernel, d_whole = _zeros((_only(needed.kernel, operands.kernel), whole))
    totals: Sums = {}
    d_sources, d_inputs = [], []
    groups = _groups(objectives, operands)
    for (objective, source, inputs, active), *needs in zip(
        groups, needed.sources, needed.inputs, strict=True
    ):
        needs = _Needs(*needs, kernel=bool(needed.kernel))
        own = begun.differentiating(objective, inputs)
        of_block = functools.partial(
            _block_gradient, own, objective, needs, whole, wanted
        )
        carry = (_no_sums(own, objective, source, inputs), d_whole), d_kernel
        group = (source, inputs, active)
        carry, d_source, d_input = _group_gradient(own, needs, of_block, carry, group)
        (sums, d_whole), d_kernel = carry
        totals = _merge(totals, sums)
        d_sources.append(d_source)
        d_inputs.append(d_input)
    d_bias, d_shared = d_whole
    return totals, Operands(
        sources=tuple(d_sources),
        inputs=tuple(d_inputs),
        active=(None,) * len(d_sources),
        rows=None,
        shared=d_shared,
        kernel=d_kernel,
        bias=d_bias,
    )


def _group_gradient(begun: Pass, needs, of_block, carry, group):
    """Iterates over the tokens of one objective.

    Returns:
      The carry and the projection's gradient, then those of the source and the inputs.
    """
    sizes = begun.sizes
    (carry, d_kernel), (source, inputs, active) = carry, group
    iterate = functools.partial(transform, on_cpu=begun.on_cpu)
    if begun.operands.kernel is None:
        carry, d_source, d_inputs = iterate(
            of_block,
            carry,
            source,
            inputs,
            sizes.block,
            makes_successors=needs.logits,
        )
        return (carry, d_kernel), d_source, d_inputs
    of_chunk = functools.partial(_chunk_gradient, begun, needs, of_block)
    (carry, d_kernel, _), d_source, d_inputs = iterate(
        of_chunk,
        (carry, d_kernel, _buffer(begun, needs, source)),
        source,
        (inputs, active),
        sizes.chunk,
        makes_successors=needs.source,
    )
    return (carry, d_kernel), d_source, d_inputs


class _Needs(NamedTuple):
    """What of a group of rows has a gradient.

    Attributes:
      source: hidden states, or logits.
      inputs: a pytree of bools.
      kernel: the projection.
    """

    source: bool
    inputs: Any
    kernel: bool

    @property
    def logits(self) -> bool:
        """Whether the logits have one."""
        return self.source or self.kernel


def _groups(objectives, operands: Operands):
    """Lists each objective with its source, its inputs and its active tokens."""
    arrays = operands.sources, operands.inputs, operands.active
    return list(zip(objectives, *arrays, strict=True))


def _masked(h, active):
    """Hidden states with zeros for tokens that do not count, whatever they hold."""
    return jnp.where(active[..., None], h, jnp.zeros_like(h))


def _no_sums(begun: Pass, objective, source, inputs) -> Sums:
    """What the sums begin with: zeros, or nothing where one block is all there is."""
    operands, sizes = begun.operands, begun.sizes
    visited = [sizes.block] if operands.kernel is None else [sizes.chunk, sizes.block]
    if all(is_one_block(source, size) for size in visited):
        return {}

    def one_token(source, inputs):
        block, inputs = jax.tree.map(lambda x: x[0, :, :1], (source, inputs))
        if operands.kernel is not None:
            block = begun.logits(block)
        return begun.evaluate(objective, block, inputs, operands.bias, operands.shared)

    return _zeros(jax.eval_shape(one_token, source, inputs))


def _block_gradient(begun: Pass, objective, needs: _Needs, whole, wanted, *block):
    """The gradient of one block of logits: the carry, dz and what the inputs get."""
    carry, z, inputs = block
    sums, d_whole = carry

    def evaluate(given, whole, floats):
        bias, shared = _refill(whole, (begun.operands.bias, begun.operands.shared))
        inputs_again = _refill(floats, inputs)
        logits = replaced(z, given)
        block_sums = begun.evaluate(objective, logits, inputs_again, bias, shared)
        return {k: v for k, v in block_sums.items() if k in wanted}, block_sums

    of_interest, pull, block_sums = jax.vjp(
        evaluate,
        differentiable(z) if needs.logits else None,
        whole,
        _only(needs.inputs, inputs),
        has_aux=True,
    )
    dz, of_whole, d_inputs = pull({k: wanted[k] for k in of_interest})
    d_whole = jax.tree.map(lambda total, g: total + as_float(g), d_whole, of_whole)
    return (_merge(sums, block_sums), d_whole), dz, d_inputs


def _buffer(begun: Pass, needs: _Needs, source) -> Array | None:
    """The buffer for a chunk's gradient of the logits; None where a block is one."""
    kernel, sizes = begun.operands.kernel, begun.sizes
    if kernel is None or begun.on_cpu or not needs.logits:
        return None
    batch, length = source.shape[1:3]
    chunk = min(sizes.chunk, length)
    block = min(sizes.block, chunk)
    if block == chunk:
        return None
    shape = (-(-chunk // block), batch * block, kernel.shape[1])
    return lax.empty(shape, source.dtype)


def _chunk_gradient(begun: Pass, needs: _Needs, of_block, carry, h, given):
    """The gradient of one chunk of hidden states."""
    kernel, sizes = begun.operands.kernel, begun.sizes
    (carry, d_kernel, buffer), (inputs, active) = carry, given
    h = _masked(h, active)
    if begun.on_cpu:
        carry, dz, d_inputs = _at_once(begun, needs, of_block, carry, h, inputs)
        rows = h
    else:
        carry, rows, dz, d_inputs = _by_blocks(
            begun, of_block, (carry, buffer), h, inputs
        )
        buffer = None if buffer is None else dz
    dh = None
    if needs.source:
        dh = jnp.einsum(
            "...v,dv->...d", dz, kernel, preferred_element_type=float_dtype()
        )
        if begun.kernel.axis is not None:
            dh = lax.psum(dh, begun.kernel.axis)
        dh = dh.astype(h.dtype)
        if not begun.on_cpu:
            dh = dh.reshape(*dh.shape[:1], h.shape[0], -1, h.shape[-1])
            dh = join_rows(dh, h.shape, dh.shape[2])
    if needs.kernel:
        d_kernel = _add_product(d_kernel, rows, dz, sizes.parts)
    return (carry, d_kernel, buffer), dh, d_inputs


def _at_once(begun: Pass, needs: _Needs, of_block, carry, h, inputs):
    """Makes the logits of a chunk, then their gradient a block at a time.

    Returns:
      The carry, the logits' gradient [B, C, V], and the inputs'.
    """
    z = begun.project(h)
    z, inputs = jax.tree.map(lambda x: x[None], (z, inputs))
    carry, dz, d_inputs = transform(
        of_block,
        carry,
        z,
        inputs,
        begun.sizes.block,
        makes_successors=needs.logits,
        on_cpu=True,
    )
    dz = None if dz is None else dz[0].astype(h.dtype)
    return carry, dz, jax.tree.map(lambda x: x[0], d_inputs)


def _by_blocks(begun: Pass, of_block, carry, h, inputs):
    """Makes a block of logits and their gradient at a time.

    Only the gradient exists for a whole chunk, once, in the operands' dtype.

    Returns:
      The carry, the hidden states and their logits' gradient by blocks of one token
      after the other, [n, B·c, ·], and the inputs' gradient.
    """
    size = min(begun.sizes.block, h.shape[1])
    parts = split_rows((h, inputs), h.shape, size)

    def step(state, item):
        carry, written = state
        index, h, inputs = item
        carry, dz, d_inputs = of_block(carry, begun.logits(h), inputs)
        if dz is not None:
            dz = dz.reshape(-1, dz.shape[-1]).astype(h.dtype)
            dz = (lay_by_columns(dz) if begun.by_columns else dz)[None]
            if written is not None:
                dz = lax.dynamic_update_slice_in_dim(written, dz, index, 0)
        return (carry, dz), d_inputs

    if parts[0].shape[0] == 1:
        first = jax.tree.map(lambda x: x[0], parts)
        (carry, dz), d_inputs = step(carry, (0, *first))
        d_inputs = jax.tree.map(lambda x: x[None], d_inputs)
    else:
        index = jnp.arange(parts[0].shape[0], dtype=jnp.int32)
        (carry, dz), d_inputs = lax.scan(step, carry, (index, *parts))
    if parts[0].shape[0] > 1 or not begun.may_round:
        # Otherwise both products would make it again out of the logits.
        dz = lax.optimization_barrier(dz)
    rows = parts[0].reshape(len(parts[0]), -1, h.shape[-1])
    return carry, rows, dz, join_rows(d_inputs, h.shape, size)


def _add_product(d_kernel, h, dz, parts: int):
    """Adds hᵀ·dz, by parts of D so that little exists besides the sum."""
    width = h.shape[-1] // parts if h.shape[-1] % parts == 0 else h.shape[-1]

    def product(part):
        # Not reshaped to one axis: XLA could not share that among devices.
        tokens = tuple(range(dz.ndim - 1))
        over_tokens = ((tokens, tokens), ((), ()))
        return lax.dot_general(
            part, dz, over_tokens, preferred_element_type=float_dtype()
        )

    if width == h.shape[-1]:
        return d_kernel + product(h)

    def add_part(i, total):
        part = lax.dynamic_slice_in_dim(h, i * width, width, h.ndim - 1)
        old = lax.dynamic_slice_in_dim(total, i * width, width, 0)
        new = old + product(part)
        return lax.dynamic_update_slice_in_dim(total, new, i * width, 0)

    return lax.fori_loop(0, h.shape[-1] // width, add_part, d_kernel)


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, float_dtype()), tree)


def _merge(a: Sums, b: Sums) -> Sums:
    return a | {k: a[k] + v if k in a else v for k, v in b.items()}


def _only(needed, tree):
    """The tree with None in place of every array whose gradient is not needed."""
    return jax.tree.map(lambda is_needed, x: x if is_needed else None, needed, tree)


def _refill(floats, tree):
    """Puts the arrays of `tree` where `floats` has None."""
    return jax.tree.map(
        lambda f, x: x if f is None else f, floats, tree, is_leaf=lambda x: x is None
    )
