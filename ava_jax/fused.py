"""The vocabulary pass from hidden states: the logits exist one chunk at a time.

In a chunk the logits are whole, so its share of the loss is known and its gradient is
taken right there, in the forward pass: 6·N·D·V flops where recomputing costs 8. Only
the loop's derivative is written by hand; `jax.vjp` differentiates the chunk, so that a
bias, a soft-cap or the temperature cannot be forgotten.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ava_jax.reduce import as_float, float_dtype
from ava_jax.vocab import chunk_length, is_zero_cotangent

Sums = dict[str, Array]

# A pure, hashable function of a block of logits [B, C, V], the block's inputs and the
# shared ones, to weighted sums over the block.
Objective = Callable[[Array, Any, Any], Sums]


@flax.struct.dataclass
class FusedOperands:
    """The arrays of a fused pass.

    Attributes:
      hidden: one [G, B, S, D] array per objective.
      inputs: one pytree of [G, B, S, ...] arrays per objective.
      shared: a pytree that every block sees whole.
      kernel: the projection.
      bias: its bias or None.
    """

    hidden: tuple[Float[Array, "G B S D"], ...]
    inputs: tuple[Any, ...]
    shared: Any
    kernel: Float[Array, "D V"]
    bias: Float[Array, "V"] | None = None


def fused_sums(
    objectives: tuple[Objective, ...],
    operands: FusedOperands,
    coefficients: Mapping[str, Float[Array, "..."]],
    chunk_size: int | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """Sums functions of the logits `hidden · kernel + bias`, which never exist whole.

    `total = Σ_name coefficients[name] · sums[name]`. Its gradient costs 6·N·D·V flops,
    forward pass included; without differentiation the pass costs 2·N·D·V. A gradient
    through `sums` is exact too, but runs the pass again.

    Args:
      objectives: one per group of hidden states; sums of the same name add up.
      operands: the arrays; ids and masks among them have no gradient.
      coefficients: the weight of each sum in `total`.
      chunk_size: tokens of a row per chunk; `None` chooses.

    Returns:
      The total and the sums.
    """
    batch, length = operands.hidden[0].shape[1:3]
    size = min(chunk_size or chunk_length(batch, length), length)
    dtype = jnp.promote_types(operands.hidden[0].dtype, operands.kernel.dtype)
    operands = dataclasses.replace(
        operands,
        hidden=tuple(h.astype(dtype) for h in operands.hidden),
        kernel=operands.kernel.astype(dtype),
    )
    return _fused(objectives, size, operands, dict(coefficients))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(objectives, size, operands, coefficients):
    sums = _sums(objectives, size, operands)
    return _weigh(coefficients, sums), sums


def _fused_forward(objectives, size, operands, coefficients):
    operands, coefficients = jax.tree.map(
        lambda primal: primal.value, (operands, coefficients)
    )
    shapes = jax.eval_shape(lambda o: _sums(objectives, size, o), operands)
    wanted = {k: jnp.zeros(s.shape, s.dtype) for k, s in shapes.items()}
    sums, gradients = _gradients(objectives, size, operands, wanted | coefficients)
    residuals = (operands, coefficients, sums, gradients)
    return (_weigh(coefficients, sums), sums), residuals


def _fused_backward(objectives, size, residuals, cotangents):
    operands, coefficients, sums, gradients = residuals
    of_total, of_sums = cotangents
    if is_zero_cotangent(of_total):
        of_total = jnp.zeros((), float_dtype())
    by_name = {k: of_total * sums[k] for k in coefficients}
    if all(is_zero_cotangent(c) for c in of_sums.values()):
        gradients = jax.tree.map(lambda g: of_total * as_float(g), gradients)
    else:
        wanted = {k: jnp.zeros_like(s) for k, s in sums.items()}
        for name, weight in coefficients.items():
            wanted[name] += of_total * weight
        for name, cotangent in of_sums.items():
            if not is_zero_cotangent(cotangent):
                wanted[name] += cotangent
        _, gradients = _gradients(objectives, size, operands, wanted)
    gradients = jax.tree.map(
        lambda g, x: None if g is None else g.astype(x.dtype),
        gradients,
        operands,
        is_leaf=lambda g: g is None,
    )
    return gradients, by_name


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)


def _weigh(coefficients: Mapping[str, Array], sums: Sums) -> Float[Array, ""]:
    parts = (jnp.sum(weight * sums[name]) for name, weight in coefficients.items())
    return sum(parts, start=jnp.zeros((), float_dtype()))


class _Group(NamedTuple):
    """One objective and its chunks."""

    objective: Objective
    hidden: Float[Array, "n B C D"]
    inputs: Any

    def sums(self, kernel, bias, shared) -> dict[str, jax.ShapeDtypeStruct]:
        """Describes the sums of a block, without computing them."""
        block = jax.tree.map(lambda x: x[0], (self.hidden, self.inputs))
        return jax.eval_shape(
            lambda h, inputs: self.evaluate(_project(h, kernel), bias, inputs, shared),
            *block,
        )

    def evaluate(self, z, bias, inputs, shared) -> Sums:
        biased = z if bias is None else z + as_float(bias)
        return self.objective(biased, inputs, shared)


def _groups(objectives, size, operands):
    for objective, *arrays in zip(
        objectives, operands.hidden, operands.inputs, strict=True
    ):
        yield _Group(objective, *jax.tree.map(lambda x: _split(x, size), arrays))


def _sums(objectives, size, operands: FusedOperands) -> Sums:
    """The forward pass alone."""
    kernel, bias, shared = operands.kernel, operands.bias, operands.shared
    totals: Sums = {}
    for group in _groups(objectives, size, operands):

        def body(sums, block, group=group):
            h, inputs = block
            return _add(sums, group.evaluate(_project(h, kernel), bias, inputs, shared))

        start = _zeros(group.sums(kernel, bias, shared))
        sums, _ = lax.scan(
            lambda c, x, body=body: (body(c, x), None),
            start,
            (group.hidden, group.inputs),
        )
        totals = _merge(totals, sums)
    return totals


def _gradients(objectives, size, operands: FusedOperands, wanted: Sums):
    """The forward pass and, in the same loop, the gradient of Σ wanted · sums."""
    kernel, shared = operands.kernel, operands.shared
    whole = (operands.bias, _floats(shared))
    gradient = _zeros((kernel, whole))
    totals: Sums = {}
    by_group = []
    for group in _groups(objectives, size, operands):
        block = functools.partial(_block_gradient, group, kernel, whole, shared, wanted)
        start = (gradient, _zeros(group.sums(kernel, operands.bias, shared)))
        (gradient, sums), by_chunk = lax.scan(
            block, start, (group.hidden, group.inputs)
        )
        totals = _merge(totals, sums)
        by_group.append(by_chunk)
    hidden, inputs = zip(*by_group, strict=True)
    d_kernel, (d_bias, d_shared) = gradient
    return totals, FusedOperands(
        hidden=_join(hidden, operands.hidden),
        inputs=_join(inputs, _floats(operands.inputs)),
        shared=d_shared,
        kernel=d_kernel,
        bias=d_bias,
    )


def _block_gradient(group, kernel, whole, shared, wanted, carry, block):
    (d_kernel, d_whole), sums = carry
    h, inputs = block

    def evaluate(z, whole, floats):
        bias, shared_floats = whole
        return group.evaluate(
            z, bias, _refill(floats, inputs), _refill(shared_floats, shared)
        )

    z = _project(h, kernel)
    block_sums, pull = jax.vjp(evaluate, z, whole, _floats(inputs))
    dz, block_whole, d_inputs = pull({k: wanted[k] for k in block_sums})
    dz = dz.astype(h.dtype)
    dh = jnp.einsum("bcv,dv->bcd", dz, kernel, preferred_element_type=float_dtype())
    d_kernel += jnp.einsum("bcd,bcv->dv", h, dz, preferred_element_type=float_dtype())
    d_whole = jax.tree.map(lambda total, g: total + as_float(g), d_whole, block_whole)
    return ((d_kernel, d_whole), _add(sums, block_sums)), (dh.astype(h.dtype), d_inputs)


def _project(hidden, kernel):
    return jnp.einsum(
        "bcd,dv->bcv", hidden, kernel, preferred_element_type=float_dtype()
    )


def _split(x: Array, size: int) -> Array:
    """[G, B, S, ...] to [G·n, B, C, ...] chunks, the last one padded with zeros."""
    groups, batch, length = x.shape[:3]
    count = -(-length // size)
    widths = [(0, 0)] * x.ndim
    widths[2] = (0, count * size - length)
    x = jnp.pad(x, widths).reshape(groups, batch, count, size, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(groups * count, batch, size, *x.shape[4:])


def _join(chunks, like):
    """The inverse of `_split`, leaf by leaf."""

    def join(x: Array, y: Array) -> Array:
        groups, batch, length = y.shape[:3]
        x = x.reshape(groups, -1, *x.shape[1:])
        x = jnp.moveaxis(x, 1, 2).reshape(groups, batch, -1, *y.shape[3:])
        return x[:, :, :length]

    return jax.tree.map(join, chunks, like)


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, float_dtype()), tree)


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


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
