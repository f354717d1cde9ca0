"""The pass over all tokens, from logits or from hidden states, with its derivative.

Its gradient is computed in the forward pass, see `chunks`; only the derivative of the
loop is written by hand, in this module.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.kernel.execute import (
    Plan,
    largest,
    map_gradients,
    run_gradients,
    run_values,
    with_equal_shards,
    with_masked_token,
)
from ava_jax.kernel.gradient import is_zero_cotangent
from ava_jax.kernel.passes import Objective, Operands, Sums, TokenFunction
from ava_jax.kernel.projections import all_gradients, all_sums
from ava_jax.reduce import as_float, float_dtype, weighted_sum


def token_sums(
    objectives: tuple[Objective, ...],
    operands: Operands,
    coefficients: Mapping[str, Float[Array, "..."]],
    plan: Plan,
) -> tuple[Float[Array, ""], Sums]:
    """Sums functions of the logits; from hidden states, the logits never exist whole.

    `total = Σ_name coefficients[name] · sums[name]`. Its gradient is computed in the
    forward pass: 6·N·D·V flops from hidden states, 2·N·D·V without differentiation. A
    gradient through `sums` is exact as well, but runs the pass again.

    With several projections, the tokens of `inputs[0][k]` have the logits of
    `sources[0]` with `kernel[k]`: a pass per projection, one after the other.

    Args:
      objectives: one per source; sums of the same name are added.
      operands: the arrays; ids and masks among them have no gradient.
      coefficients: the weight of each sum in `total`.
      plan: the static options.

    Returns:
      The total and the sums; zeros for a batch without tokens.
    """
    is_empty = plan.batch * plan.length == 0
    if is_empty:
        plan, operands = with_masked_token(plan, operands)
    operands = _ready(plan, operands)
    if is_empty:
        run = functools.partial(_token_sums, objectives, plan)
        shapes = jax.eval_shape(run, operands, dict(coefficients))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return _token_sums(objectives, plan, operands, dict(coefficients))


def token_values(
    function: TokenFunction, operands: Operands, plan: Plan
) -> dict[str, Float[Array, "G B S"]]:
    """Computes values per token; from hidden states, the logits never exist whole.

    2·N·D·V flops. Their gradient computes the logits again: 8·N·D·V in all, or 6 if
    the hidden states or the projection are not differentiated.

    Args:
      function: what is computed of a block of logits.
      operands: the arrays, of one source.
      plan: the static options.

    Returns:
      The values by name; those of masked tokens have no meaning.
    """
    if plan.batch * plan.length == 0:
        shape = operands.sources[0].shape[:3]
        return {name: jnp.zeros(shape, float_dtype()) for name in function.names}
    return _token_values(function, plan, _ready(plan, operands))


def _ready(plan: Plan, operands: Operands) -> Operands:
    """Gives all devices equal shards, and both factors of the product one dtype."""
    operands = with_equal_shards(plan.layout, operands)
    kernel = operands.kernel
    if kernel is None:
        return operands
    # The wider dtype is what the documentation promises, under strict promotion too.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(operands.sources[0].dtype, kernel.dtype)
    return dataclasses.replace(
        operands,
        sources=tuple(h.astype(dtype) for h in operands.sources),
        kernel=kernel.astype(dtype),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_sums(objectives, plan: Plan, operands, coefficients):
    sums = all_sums(objectives, plan, operands)
    return _weigh(coefficients, sums), sums


def _forward(objectives, plan: Plan, operands, coefficients):
    needed = jax.tree.map(lambda primal: primal.perturbed, operands)
    operands, coefficients = jax.tree.map(
        lambda primal: primal.value, (operands, coefficients)
    )
    sums, gradients = all_gradients(objectives, plan, needed, operands, coefficients)
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
        needed = map_gradients(lambda g, _: g is not None, gradients, operands)
        _, gradients = all_gradients(objectives, plan, needed, operands, wanted)
    gradients = map_gradients(
        lambda g, x: None if g is None else g.astype(x.dtype), gradients, operands
    )
    return gradients, by_name


_token_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _weigh(coefficients: Mapping[str, Array], sums: Sums) -> Float[Array, ""]:
    parts = (jnp.sum(weight * sums[name]) for name, weight in coefficients.items())
    return sum(parts, start=jnp.zeros((), float_dtype()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_values(function, plan: Plan, operands):
    return run_values(function, plan, operands)


def _values_forward(function, plan: Plan, operands):
    # An empty tuple or None: a static fact is passed on as pytree structure.
    needed = jax.tree.map(lambda primal: () if primal.perturbed else None, operands)
    operands = jax.tree.map(lambda primal: primal.value, operands)
    return run_values(function, plan, operands), (operands, needed)


def _values_backward(function, plan: Plan, residuals, cotangents):
    operands, needed = residuals
    given = {k: c for k, c in cotangents.items() if not is_zero_cotangent(c)}
    (active,) = operands.active
    given = {k: jnp.where(active, c, jnp.zeros_like(c)) for k, c in given.items()}
    # Small cotangents would underflow in float16, see `run_gradients`.
    scale = largest(given)
    weights = {k: c / scale for k, c in given.items()}
    weighted = dataclasses.replace(
        operands, inputs=(_Weighted(operands.inputs[0], weights),)
    )
    needed = jax.tree.map(
        lambda n, _: n is not None, needed, operands, is_leaf=_is_flag
    )
    no_weights = jax.tree.map(lambda _: False, weights)
    needed = dataclasses.replace(
        needed, inputs=(_Weighted(needed.inputs[0], no_weights),)
    )
    objectives, wanted = (_WeightedSum(function),), {_TOTAL: scale}
    _, gradients = run_gradients(objectives, plan, needed, weighted, wanted)
    gradients = dataclasses.replace(gradients, inputs=(gradients.inputs[0].inputs,))
    return (
        map_gradients(
            lambda g, x: None if g is None else g.astype(x.dtype), gradients, operands
        ),
    )


_token_values.defvjp(_values_forward, _values_backward, symbolic_zeros=True)

_TOTAL = "total"


def _is_flag(x: object) -> bool:
    return x is None or x == ()


@flax.struct.dataclass
class _Weighted:
    """The inputs of a function of tokens, and the weight of each of its values."""

    inputs: Any
    weights: dict[str, Float[Array, "*n"]]


@dataclasses.dataclass(frozen=True)
class _WeightedSum:
    """The weighted sum of the values of a function of tokens: an objective."""

    function: TokenFunction

    def __call__(self, logits, inputs: _Weighted, rows, shared, kernel) -> Sums:
        values = self.function(logits, inputs.inputs, rows, shared, kernel)
        sums = (weighted_sum(values[k], w) for k, w in inputs.weights.items())
        return {_TOTAL: sum(sums, start=jnp.zeros((), float_dtype()))}

    def num_ids(self, inputs: _Weighted, rows: Any) -> int | None:
        return self.function.num_ids(inputs.inputs, rows)
