"""The one pass over all tokens, from logits or from hidden states.

Tokens are handled in blocks. In a block the logits are whole, so its share of the loss
is known and its gradient is taken right there, in the forward pass: from hidden states
that is 6·N·D·V flops where recomputing costs 8, and the logits exist one chunk at a
time. Only the loops' derivative is written by hand; `jax.vjp` differentiates the block,
so that a bias, a soft-cap or the temperature cannot be forgotten.

On a mesh every device walks over its own tokens and its own slice of the vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ava_jax.blocks import fold, is_one_block, transform
from ava_jax.reduce import as_float, float_dtype
from ava_jax.sharding import Layout
from ava_jax.sizes import Sizes
from ava_jax.vocab import is_zero_cotangent

Sums = dict[str, Array]

# A pure, hashable function of a block of logits [B, C, V] and its inputs, of its rows
# and of what is shared, to weighted sums over the block.
Objective = Callable[[Array, Any, Any, Any], Sums]


@flax.struct.dataclass
class Operands:
    """The arrays of a pass.

    Attributes:
      sources: per objective, hidden states [G, B, S, D] or, without a kernel, logits.
      inputs: per objective, a pytree of [G, B, S, ...] arrays.
      rows: a pytree of [B, ...] integers, which every block of these rows sees whole.
      shared: a pytree that every block sees whole.
      kernel: the projection, or None.
      bias: its bias or None.
    """

    sources: tuple[Float[Array, "G B S X"], ...]
    inputs: tuple[Any, ...]
    rows: Any
    shared: Any
    kernel: Float[Array, "D V"] | None = None
    bias: Float[Array, "V"] | None = None


class Plan(NamedTuple):
    """How a pass goes: the static facts besides what it computes.

    Attributes:
      sizes: how many tokens are handled at a time, on each device.
      layout: how tokens and vocabulary lie on a mesh; None leaves that to XLA.
    """

    sizes: Sizes
    layout: Layout | None = None

    @property
    def vocab_axis(self) -> str | None:
        """The mesh axis that shares the vocabulary."""
        return None if self.layout is None else self.layout.vocab_axis


def token_sums(
    objectives: tuple[Objective, ...],
    operands: Operands,
    coefficients: Mapping[str, Float[Array, "..."]],
    plan: Plan,
) -> tuple[Float[Array, ""], Sums]:
    """Sums functions of the logits, which from hidden states never exist whole.

    `total = Σ_name coefficients[name] · sums[name]`. Its gradient is taken in the
    forward pass: 6·N·D·V flops from hidden states, 2·N·D·V if nothing is
    differentiated. A gradient through `sums` is exact too, but runs the pass again.

    Args:
      objectives: one per source; sums of the same name add up.
      operands: the arrays; ids and masks among them have no gradient.
      coefficients: the weight of each sum in `total`.
      plan: how the walk goes.

    Returns:
      The total and the sums.
    """
    operands = _with_equal_shards(plan.layout, operands)
    kernel = operands.kernel
    if kernel is not None:
        dtype = jnp.promote_types(operands.sources[0].dtype, kernel.dtype)
        operands = dataclasses.replace(
            operands,
            sources=tuple(h.astype(dtype) for h in operands.sources),
            kernel=kernel.astype(dtype),
        )
    return _token_sums(objectives, plan, operands, dict(coefficients))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_sums(objectives, plan: Plan, operands, coefficients):
    sums = _sums(objectives, plan, operands)
    return _weigh(coefficients, sums), sums


def _forward(objectives, plan: Plan, operands, coefficients):
    operands, coefficients = jax.tree.map(
        lambda primal: primal.value, (operands, coefficients)
    )
    sums, gradients = _gradients(objectives, plan, operands, coefficients)
    residuals = (operands, coefficients, sums, gradients)
    return (_weigh(coefficients, sums), sums), residuals


def _backward(objectives, plan: Plan, residuals, cotangents):
    operands, coefficients, sums, gradients = residuals
    of_total, of_sums = cotangents
    if is_zero_cotangent(of_total):
        of_total = jnp.zeros((), float_dtype())
    by_name = {k: of_total * sums[k] for k in coefficients}
    if all(is_zero_cotangent(c) for c in of_sums.values()):
        gradients = jax.tree.map(lambda g: of_total * as_float(g), gradients)
    else:
        wanted = {k: of_total * weight for k, weight in coefficients.items()}
        for name, cotangent in of_sums.items():
            if not is_zero_cotangent(cotangent):
                wanted[name] = wanted.get(name, jnp.zeros_like(cotangent)) + cotangent
        _, gradients = _gradients(objectives, plan, operands, wanted)
    gradients = jax.tree.map(
        lambda g, x: None if g is None else g.astype(x.dtype),
        gradients,
        operands,
        is_leaf=lambda g: g is None,
    )
    return gradients, by_name


_token_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _weigh(coefficients: Mapping[str, Array], sums: Sums) -> Float[Array, ""]:
    parts = (jnp.sum(weight * sums[name]) for name, weight in coefficients.items())
    return sum(parts, start=jnp.zeros((), float_dtype()))


def _with_equal_shards(layout: Layout | None, operands: Operands) -> Operands:
    """Pads the vocabulary so that every device gets as many columns."""
    kernel, bias = operands.kernel, operands.bias
    width = (operands.sources[0] if kernel is None else kernel).shape[-1]
    missing = 0 if layout is None else -width % layout.vocab_shards
    if not missing:
        return operands

    def pad(x):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])

    if kernel is None:
        return dataclasses.replace(operands, sources=tuple(map(pad, operands.sources)))
    bias = None if bias is None else pad(bias)
    return dataclasses.replace(operands, kernel=pad(kernel), bias=bias)


def _specs(layout: Layout, operands: Operands) -> Operands:
    """Where the operands, and their gradients, lie."""
    columns = layout.vocab_axis
    specs: dict[str, Any] = {
        "sources": layout.tokens(None if operands.kernel is not None else columns),
        "inputs": layout.tokens(),
        "rows": layout.rows(),
        "shared": P(),
        "kernel": P(None, columns),
        "bias": P(columns),
    }
    return Operands(**specs)


def _sums(objectives, plan: Plan, operands: Operands) -> Sums:
    """The forward pass alone."""
    layout = plan.layout
    if layout is None:
        return _local_sums(objectives, plan, operands)

    def of_shard(operands):
        return layout.over_tokens(_local_sums(objectives, plan, operands))

    return layout.run(of_shard, (_specs(layout, operands),), P())(operands)


def _gradients(objectives, plan: Plan, operands: Operands, wanted: Sums):
    """The forward pass and, in the same walk, the gradient of Σ wanted · sums."""
    layout = plan.layout
    if layout is None:
        return _local_gradients(objectives, plan, operands, wanted)

    def of_shard(operands, wanted):
        sums, own = _local_gradients(objectives, plan, operands, wanted)
        kernel, bias, shared, sums = layout.over_tokens(
            (own.kernel, own.bias, own.shared, sums)
        )
        return sums, dataclasses.replace(own, kernel=kernel, bias=bias, shared=shared)

    specs = _specs(layout, operands)
    run = layout.run(of_shard, (specs, P()), (P(), specs))
    return run(operands, wanted)


def _local_sums(objectives, plan: Plan, operands: Operands) -> Sums:
    kernel, bias, sizes = operands.kernel, operands.bias, plan.sizes
    totals: Sums = {}
    for objective, source, inputs in _groups(objectives, operands):

        def of_block(sums, z, inputs, objective=objective):
            own = objective(_biased(z, bias), inputs, operands.rows, operands.shared)
            return _merge(sums, own)

        def of_chunk(sums, h, inputs, of_block=of_block):
            z, inputs = jax.tree.map(lambda x: x[None], (_project(h, kernel), inputs))
            return fold(of_block, sums, z, inputs, sizes.block)

        sums = _no_sums(objective, operands, sizes, source, inputs)
        if kernel is None:
            sums = fold(of_block, sums, source, inputs, sizes.block)
        else:
            sums = fold(of_chunk, sums, source, inputs, sizes.chunk)
        totals = _merge(totals, sums)
    return totals


def _local_gradients(objectives, plan: Plan, operands: Operands, wanted: Sums):
    kernel, sizes = operands.kernel, plan.sizes
    whole = (operands.bias, _floats(operands.shared))
    d_kernel, d_whole = _zeros((kernel, whole))
    totals: Sums = {}
    d_sources, d_inputs = [], []
    for objective, source, inputs in _groups(objectives, operands):
        sums = _no_sums(objective, operands, sizes, source, inputs)
        of_block = functools.partial(
            _block_gradient, objective, whole, operands, wanted
        )
        carry = (sums, d_whole)
        if kernel is None:
            carry, d_source, d_input = transform(
                of_block, carry, source, inputs, sizes.block
            )
        else:
            of_chunk = functools.partial(_chunk_gradient, of_block, kernel, plan)
            (carry, d_kernel), d_source, d_input = transform(
                of_chunk, (carry, d_kernel), source, inputs, sizes.chunk
            )
        sums, d_whole = carry
        totals = _merge(totals, sums)
        d_sources.append(d_source)
        d_inputs.append(d_input)
    d_bias, d_shared = d_whole
    return totals, Operands(
        sources=tuple(d_sources),
        inputs=tuple(d_inputs),
        rows=None,
        shared=d_shared,
        kernel=d_kernel,
        bias=d_bias,
    )


def _groups(objectives, operands: Operands):
    return zip(objectives, operands.sources, operands.inputs, strict=True)


def _no_sums(objective, operands: Operands, sizes: Sizes, source, inputs) -> Sums:
    """What the sums begin with: zeros, or nothing where one block is all there is."""
    walked = [sizes.block] if operands.kernel is None else [sizes.chunk, sizes.block]
    if all(is_one_block(source, size) for size in walked):
        return {}

    def one_token(source, inputs):
        block, inputs = jax.tree.map(lambda x: x[0, :, :1], (source, inputs))
        if operands.kernel is not None:
            block = _project(block, operands.kernel)
        block = _biased(block, operands.bias)
        return objective(block, inputs, operands.rows, operands.shared)

    return _zeros(jax.eval_shape(one_token, source, inputs))


def _block_gradient(objective, whole, operands, wanted, carry, z, inputs):
    """The gradient of one block of logits."""
    sums, d_whole = carry

    def evaluate(z, whole, floats):
        bias, shared_floats = whole
        shared = _refill(shared_floats, operands.shared)
        inputs_again = _refill(floats, inputs)
        block_sums = objective(_biased(z, bias), inputs_again, operands.rows, shared)
        return {k: v for k, v in block_sums.items() if k in wanted}, block_sums

    of_interest, pull, block_sums = jax.vjp(
        evaluate, z, whole, _floats(inputs), has_aux=True
    )
    dz, of_whole, d_inputs = pull({k: wanted[k] for k in of_interest})
    d_whole = jax.tree.map(lambda total, g: total + as_float(g), d_whole, of_whole)
    return (_merge(sums, block_sums), d_whole), dz, d_inputs


def _chunk_gradient(of_block, kernel, plan: Plan, carry, h, inputs):
    """The gradient of one chunk of hidden states."""
    carry, d_kernel = carry
    z, inputs = jax.tree.map(lambda x: x[None], (_project(h, kernel), inputs))
    carry, dz, d_inputs = transform(of_block, carry, z, inputs, plan.sizes.block)
    dz = dz[0].astype(h.dtype)
    dh = jnp.einsum("bcv,dv->bcd", dz, kernel, preferred_element_type=float_dtype())
    if plan.vocab_axis is not None:
        dh = lax.psum(dh, plan.vocab_axis)
    d_kernel = _add_product(d_kernel, h, dz, plan.sizes.parts)
    d_inputs = jax.tree.map(lambda x: x[0], d_inputs)
    return (carry, d_kernel), dh.astype(h.dtype), d_inputs


def _add_product(d_kernel, h, dz, parts: int):
    """Adds hᵀ·dz, by parts of D so that little exists besides the sum."""
    width = h.shape[-1] // parts if h.shape[-1] % parts == 0 else h.shape[-1]

    def add_part(i, total):
        part = lax.dynamic_slice_in_dim(h, i * width, width, 2)
        product = jnp.einsum(
            "bcd,bcv->dv", part, dz, preferred_element_type=float_dtype()
        )
        old = lax.dynamic_slice_in_dim(total, i * width, width, 0)
        return lax.dynamic_update_slice_in_dim(total, old + product, i * width, 0)

    return lax.fori_loop(0, h.shape[-1] // width, add_part, d_kernel)


def _project(hidden, kernel):
    return jnp.einsum(
        "bcd,dv->bcv", hidden, kernel, preferred_element_type=float_dtype()
    )


def _biased(z, bias):
    return z if bias is None else z + as_float(bias)


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, float_dtype()), tree)


def _merge(a: Sums, b: Sums) -> Sums:
    return a | {k: a[k] + v if k in a else v for k, v in b.items()}


def _floats(tree):
    """The tree with None in place of every array that has no gradient."""
    return jax.tree.map(
        lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree
    )


def _refill(floats, tree):
    """Puts the arrays of `tree` where `floats` has None."""
    return jax.tree.map(
        lambda f, x: x if f is None else f, floats, tree, is_leaf=lambda x: x is None
    )
