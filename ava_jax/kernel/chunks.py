"""The pass over one device's tokens: its loops, and the gradient of a chunk.

A block has the logits of its tokens over the whole vocabulary, so its gradient is
computed together with its loss, in the forward pass. From hidden states that takes
6·N·D·V flops, where recomputing the logits would take 8, and logits exist for a few
tokens at a time. `jax.vjp` differentiates the block, so that no path (bias, soft-cap,
temperature) can be left out.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ava_jax.kernel.blocks import (
    fold,
    is_one_block,
    join_rows,
    split_rows,
    transform,
)
from ava_jax.kernel.head_gradient import HeadGradient
from ava_jax.kernel.passes import (
    Objective,
    Operands,
    Pass,
    Sums,
    TokenFunction,
    only,
    refill,
)
from ava_jax.kernel.product import (
    differentiable,
    lay_by_columns,
    replaced,
    row_major,
)
from ava_jax.kernel.unmasked import fold_unmasked, zero_masked
from ava_jax.reduce import as_float, float_dtype, float_zeros


def local_sums(objectives: tuple[Objective, ...], pass_: Pass) -> Sums:
    """Computes one device's sums, without a gradient."""
    fold_rows = functools.partial(fold, on_cpu=pass_.on_cpu)
    visit = functools.partial(fold_unmasked, is_open=pass_.on_gpu)
    operands = pass_.operands
    kernel, bias = operands.kernel, operands.bias
    totals: Sums = {}
    for objective, source, inputs, active in _groups(objectives, operands):
        own = pass_.summing(objective, inputs)
        sizes = own.sizes

        def of_block(sums, z, inputs, objective=objective, own=own):
            more = own.evaluate(objective, z, inputs, bias, operands.shared)
            return _merge(sums, more)

        def of_chunk(sums, h, inputs, of_block=of_block, own=own):
            if not own.on_cpu:
                return of_block(sums, own.logits(h), inputs), None
            z = own.project(h)
            z, inputs = jax.tree.map(lambda x: x[None], (z, inputs))
            return fold_rows(of_block, sums, z, inputs, own.sizes.block), None

        sums = _no_sums(own, objective, source, inputs)
        if own.is_reference:
            body, *kept = _differentiable(own, of_block, source, inputs, active)
            sums = fold_rows(body, sums, kept[0], kept[1], sizes.block)
        elif kernel is None:
            sums = fold_rows(of_block, sums, source, inputs, sizes.block)
        else:
            assert active is not None  # given with a kernel
            # Without a gradient, no array larger than a block is needed.
            size = sizes.chunk if pass_.on_cpu else sizes.block
            sums, _ = visit(of_chunk, sums, source, inputs, active, size)
        totals = _merge(totals, sums)
    return totals


def local_gradients(
    objectives: tuple[Objective, ...], pass_: Pass, needed: Any, wanted: Sums
) -> tuple[Sums, Operands]:
    """Computes one device's sums and the gradient of `Σ wanted · sums`.

    Args:
      objectives: one per source.
      pass_: the arrays and the static options.
      needed: for each operand, whether its gradient is needed; a tree like theirs.
      wanted: the cotangents of the sums.

    Returns:
      The sums, and the gradient, with None where it is not needed.
    """
    operands = pass_.operands
    bias = only(needed.bias, operands.bias)
    # Where the kernel makes the logits, it adds the bias to them itself.
    is_own = pass_.sample is not None
    whole = (None if is_own else bias, only(needed.shared, operands.shared))
    d_whole = float_zeros(whole)
    d_head = HeadGradient.empty(
        only(needed.kernel, operands.kernel),
        bias if is_own else None,
        on_gpu=pass_.on_gpu,
    )
    totals: Sums = {}
    d_sources, d_inputs = [], []
    groups = _groups(objectives, operands)
    for (objective, source, inputs, active), *needs in zip(
        groups, needed.sources, needed.inputs, strict=True
    ):
        of_bias = d_head.bias is not None
        needs = _Needs(*needs, kernel=bool(needed.kernel), bias=of_bias)
        own = pass_.differentiating(objective, inputs)
        of_block = functools.partial(
            _block_gradient, own, objective, needs, whole, wanted
        )
        carry = (_no_sums(own, objective, source, inputs), d_whole), d_head
        group = (source, inputs, active)
        carry, d_source, d_input = _group_gradient(own, needs, of_block, carry, group)
        (sums, d_whole), d_head = carry
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
        kernel=None if d_head.kernel is None else d_head.kernel.value,
        bias=d_head.bias if is_own else d_bias,
    )


def local_values(function: TokenFunction, pass_: Pass) -> dict[str, Array]:
    """Computes a function's values of one device's tokens, without a gradient.

    Returns:
      The values, [G, B, S]; 0 for masked tokens, where they are computed from hidden
      states.
    """
    operands = pass_.operands
    (source,), (inputs,) = operands.sources, operands.inputs
    pass_ = pass_.summing(function, inputs)
    sizes = pass_.sizes
    (active,) = operands.active
    in_blocks = functools.partial(
        transform, size=sizes.block, writes_blocks=False, on_cpu=pass_.on_cpu
    )

    def values_of(z, inputs):
        return pass_.evaluate(function, z, inputs, operands.bias, operands.shared)

    def of_block(nothing, z, inputs):
        return nothing, None, values_of(z, inputs)

    if pass_.is_reference:
        body, *kept = _differentiable(pass_, of_block, source, inputs, active)
        return in_blocks(body, (), *kept)[2]
    if operands.kernel is None:
        return in_blocks(of_block, (), source, inputs)[2]
    assert active is not None  # given with a kernel

    def of_chunk(nothing, h, inputs):
        if not pass_.on_cpu:
            return nothing, values_of(pass_.logits(h), inputs)
        z, inputs = jax.tree.map(lambda x: x[None], (pass_.project(h), inputs))
        values = in_blocks(of_block, nothing, z, inputs)[2]
        return nothing, jax.tree.map(lambda x: x[0], values)

    size = sizes.chunk if pass_.on_cpu else sizes.block
    one = jax.ShapeDtypeStruct(active.shape, float_dtype())
    like = dict.fromkeys(function.names, one)
    visit = functools.partial(fold_unmasked, is_open=pass_.on_gpu)
    return visit(of_chunk, (), source, inputs, active, size, like)[1]


def _group_gradient(pass_: Pass, needs, of_block, carry, group):
    """Computes the gradient of one objective, iterating over its tokens.

    Returns:
      The carry and the projection's gradient, then the gradients of the source and of
      the inputs.
    """
    sizes = pass_.sizes
    (carry, d_head), (source, inputs, active) = carry, group
    if pass_.operands.kernel is None:
        carry, d_source, d_inputs = transform(
            of_block,
            carry,
            source,
            inputs,
            sizes.block,
            writes_blocks=needs.logits,
            on_cpu=pass_.on_cpu,
        )
        return (carry, d_head), d_source, d_inputs
    of_chunk = functools.partial(_chunk_gradient, pass_, needs, of_block)
    # A first chunk that is visited apart has a buffer of its own, and leaves one.
    is_apart = d_head.is_shapeless
    buffer = None if is_apart else _buffer(pass_, needs, source[0], sizes.block)
    (carry, d_head, _), (d_source, d_inputs) = fold_unmasked(
        of_chunk,
        (carry, d_head, buffer),
        source,
        inputs,
        active,
        sizes.chunk,
        like=(only(needs.source, source), only(needs.inputs, inputs)),
        is_open=pass_.on_gpu,
        first_apart=is_apart,
    )
    return (carry, d_head), d_source, d_inputs


def _differentiable(pass_: Pass, of_block, source, inputs, active):
    """Returns what the reference folds, so that JAX can differentiate it in any mode.

    Returns:
      A body whose logits are made again for a gradient; and the tokens, zeros where
      they are masked.
    """
    if pass_.operands.kernel is None:
        return jax.checkpoint(of_block), source, inputs

    def of_hidden(carry, h, inputs):
        return of_block(carry, pass_.project(h), inputs)

    kept = jax.tree.map(lambda x: zero_masked(active, x), (source, inputs))
    return jax.checkpoint(of_hidden), *kept


class _Needs(NamedTuple):
    """Which gradients of one objective are needed.

    Attributes:
      source: hidden states, or logits.
      inputs: a pytree of bools.
      kernel: the projection.
      bias: its bias, as the sum of the logits' gradient.
    """

    source: bool
    inputs: Any
    kernel: bool
    bias: bool

    @property
    def logits(self) -> bool:
        """Whether the gradient of the logits is needed."""
        return self.source or self.kernel or self.bias


def _groups(objectives, operands: Operands):
    """Lists each objective with its source, its inputs and its active tokens."""
    arrays = operands.sources, operands.inputs, operands.active
    return list(zip(objectives, *arrays, strict=True))


def _no_sums(pass_: Pass, objective, source, inputs) -> Sums:
    """Returns the initial sums: zeros, or nothing if there is a single block."""
    operands, sizes = pass_.operands, pass_.sizes
    visited = [sizes.block] if operands.kernel is None else [sizes.chunk, sizes.block]
    if all(is_one_block(source, size) for size in visited):
        return {}

    def one_token(source, inputs):
        block, inputs = jax.tree.map(lambda x: x[0, :, :1], (source, inputs))
        if operands.kernel is not None:
            block = pass_.logits(block)
        return pass_.evaluate(objective, block, inputs, operands.bias, operands.shared)

    return float_zeros(jax.eval_shape(one_token, source, inputs))


def _block_gradient(pass_: Pass, objective, needs: _Needs, whole, wanted, *block):
    """Computes the gradient of one block: the carry, dz, and that of the inputs."""
    carry, z, inputs = block
    sums, d_whole = carry

    def evaluate(given, whole, floats):
        bias, shared = refill(whole, (pass_.operands.bias, pass_.operands.shared))
        inputs_again = refill(floats, inputs)
        logits = replaced(z, given)
        block_sums = pass_.evaluate(objective, logits, inputs_again, bias, shared)
        return {k: v for k, v in block_sums.items() if k in wanted}, block_sums

    of_interest, pull, block_sums = jax.vjp(
        evaluate,
        differentiable(z) if needs.logits else None,
        whole,
        only(needs.inputs, inputs),
        has_aux=True,
    )
    dz, of_whole, d_inputs = pull({k: wanted[k] for k in of_interest})
    d_whole = jax.tree.map(lambda total, g: total + as_float(g), d_whole, of_whole)
    return (_merge(sums, block_sums), d_whole), dz, d_inputs


def _buffer(
    pass_: Pass, needs: _Needs, h: Float[Array, "B S D"], block: int
) -> Array | None:
    """Allocates a chunk's gradient of the logits; None if a chunk is one block."""
    kernel = pass_.operands.kernel
    if kernel is None or pass_.on_cpu or not needs.logits:
        return None
    batch, length = h.shape[:2]
    chunk = min(pass_.sizes.chunk, length)
    block = min(block, chunk)
    if block == chunk:
        return None
    shape = (-(-chunk // block), batch * block, kernel.shape[1])
    return lax.empty(shape, h.dtype)


def _chunk_gradient(pass_: Pass, needs: _Needs, of_block, carry, h, inputs):
    """Computes the gradient of one chunk of hidden states."""
    kernel = pass_.operands.kernel
    carry, d_head, buffer = carry
    if pass_.on_cpu:
        carry, dz, d_inputs = _at_once(pass_, needs, of_block, carry, h, inputs)
        rows = h
    else:
        later, size = buffer, pass_.sizes.block
        if d_head.is_shapeless:
            later = _buffer(pass_, needs, h, size)
            size = pass_.sizes.first
            buffer = _buffer(pass_, needs, h, size)
        carry, rows, dz, d_inputs = _by_blocks(
            pass_, of_block, (carry, buffer), h, inputs, size
        )
        buffer = later
        if dz is not None and buffer is not None and buffer.size == dz.size:
            buffer = dz.reshape(buffer.shape)
    dh = None
    if needs.source:
        dh = jnp.einsum(
            "...v,dv->...d",
            dz,
            kernel,
            precision=pass_.kernel.precision,
            preferred_element_type=float_dtype(),
        )
        if pass_.kernel.axis is not None:
            dh = lax.psum(dh, pass_.kernel.axis)
        dh = dh.astype(h.dtype)
        if not pass_.on_cpu:
            dh = dh.reshape(*dh.shape[:1], h.shape[0], -1, h.shape[-1])
            dh = join_rows(dh, h.shape, dh.shape[2])
    if dz is not None:
        d_head = d_head.plus(pass_, rows, dz)
    return (carry, d_head, buffer), (dh, d_inputs)


def _at_once(pass_: Pass, needs: _Needs, of_block, carry, h, inputs):
    """Computes the logits of a chunk, then their gradient a block at a time.

    Returns:
      The carry, the logits' gradient [B, C, V], and the inputs'.
    """
    z = pass_.project(h)
    z, inputs = jax.tree.map(lambda x: x[None], (z, inputs))
    carry, dz, d_inputs = transform(
        of_block,
        carry,
        z,
        inputs,
        pass_.sizes.block,
        writes_blocks=needs.logits,
        on_cpu=True,
    )
    dz = None if dz is None else dz[0].astype(h.dtype)
    return carry, dz, jax.tree.map(lambda x: x[0], d_inputs)


def _by_blocks(pass_: Pass, of_block, carry, h, inputs, size: int):
    """Computes the logits and their gradient a block at a time.

    Only the gradient exists for a whole chunk, in the operands' dtype.

    Returns:
      The carry, the hidden states and the logits' gradient in flattened blocks
      [n, B·c, ·], and the inputs' gradient.
    """
    size = min(size, h.shape[1])
    parts = split_rows((h, inputs), h.shape, size)

    def step(state, item):
        carry, written = state
        index, h, inputs = item
        carry, dz, d_inputs = of_block(carry, pass_.logits(h), inputs)
        if dz is not None:
            dz = dz.reshape(-1, dz.shape[-1]).astype(h.dtype)
            dz = (lay_by_columns(dz) if pass_.by_columns else dz)[None]
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
    # A TPU makes it within the products, if a chunk is one block.
    is_written = parts[0].shape[0] > 1 or not pass_.may_round or pass_.on_gpu
    if is_written:
        # Otherwise each of the two products would recompute it from the logits.
        dz = lax.optimization_barrier(dz)
    rows = parts[0].reshape(len(parts[0]), -1, h.shape[-1])
    rows = _lay_rows(pass_, rows, is_written)
    return carry, rows, dz, join_rows(d_inputs, h.shape, size)


def _lay_rows(pass_: Pass, rows: Float[Array, "n c D"], is_written: bool):
    """Constrains the layout of hidden states for the projection's gradient on TPUs.

    XLA chooses one by what else they are used for. By its own estimates the product
    takes up to 1.5 times as long with another than this; only on a mesh, where the
    gradient of the logits is fused into the product, no choice was better than XLA's.

    Args:
      pass_: the pass.
      rows: the hidden states of a chunk.
      is_written: whether the chunk's gradient of the logits is in memory.
    """
    if not pass_.by_columns or (pass_.on_mesh and not is_written):
        return rows
    return row_major(rows) if is_written else lay_by_columns(rows)


def _merge(a: Sums, b: Sums) -> Sums:
    return a | {k: a[k] + v if k in a else v for k, v in b.items()}
