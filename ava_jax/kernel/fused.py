"""The pass over all tokens, from logits or from hidden states, with its derivative.

Its gradient is computed in the forward pass, see `chunks`; only the derivative of the
loop is written by hand, in this module. The reference implementation is plain JAX, and
the second derivatives of the others are those of the reference.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.kernel.execute import (
    Plan,
    largest,
    map_gradients,
    run_values,
    with_equal_shards,
    with_masked_token,
)
from ava_jax.kernel.forward_mode import reverse_only
from ava_jax.kernel.gradient import is_zero_cotangent
from ava_jax.kernel.passes import (
    Objective,
    Operands,
    Sums,
    TokenFunction,
    only,
    refill,
)
from ava_jax.kernel.projections import all_gradients, all_sums
from ava_jax.reduce import as_float, float_dtype, weighted_sum, wider


def token_sums(
    objectives: tuple[Objective, ...],
    operands: Operands,
    coefficients: Mapping[str, Float[Array, "..."]],
    plan: Plan,
) -> tuple[Float[Array, ""], Sums]:
    """Sums functions of the logits; from hidden states, the logits never exist whole.

    `total = Σ_name coefficients[name] · sums[name]`. Its gradient is computed in the
    forward pass: 6·N·D·V flops from hidden states, 2·N·D·V without differentiation. A
    gradient through `sums` is exact as well, but runs the pass again. So is a second
    derivative, by the reference implementation.

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
    given = _ready(plan, operands), dict(coefficients)
    run = functools.partial(_token_sums, objectives, plan)
    if is_empty:
        shapes = jax.eval_shape(run, *given)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if plan.implementation == "reference":
        return _reference_sums(objectives, plan, *given)
    return reverse_only(run, *given)


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
    operands = _ready(plan, operands)
    if plan.implementation == "reference":
        return run_values(function, plan.by_reference(), operands)
    run = functools.partial(_token_values, function, plan)
    return cast(dict[str, Array], reverse_only(run, operands))


def _ready(plan: Plan, operands: Operands) -> Operands:
    """Gives all devices equal shards, and both factors of the product one dtype."""
    operands = with_equal_shards(plan.layout, operands)
    kernel = operands.kernel
    if kernel is None:
        return operands
    dtype = wider(operands.sources[0].dtype, kernel.dtype)
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
    given = needed, operands, coefficients
    sums, gradients = cast(Any, _gradients(objectives, plan, *given))
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
        run = functools.partial(_gradients, objectives, plan, needed)
        _, gradients = cast(Any, reverse_only(run, operands, wanted))
    gradients = map_gradients(
        lambda g, x: None if g is None else g.astype(x.dtype), gradients, operands
    )
    return gradients, by_name


_token_sums.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gradients(objectives, plan: Plan, needed, operands, wanted):
    return all_gradients(objectives, plan, needed, operands, wanted)


def _gradients_forward(objectives, plan: Plan, needed, operands, wanted):
    gradients = _gradients(objectives, plan, needed, operands, wanted)
    return gradients, (operands, wanted)


def _gradients_backward(objectives, plan: Plan, needed, residuals, cotangents):
    """Differentiates the reference twice."""
    given, treedef = jax.tree.flatten(cotangents)
    del treedef

    def gradients(operands, wanted):
        # Gradients at the scale of the weights would underflow in float16.
        operands = jax.tree.map(_widened, operands)

        def total(floats):
            whole = refill(floats, operands)
            return _reference_sums(objectives, plan, whole, wanted)

        own, sums = jax.grad(total, has_aux=True)(only(needed, operands))
        pairs = zip(jax.tree.leaves((sums, own)), given, strict=True)
        return [x.astype(c.dtype) for x, c in pairs]

    return jax.vjp(gradients, *residuals)[1](given)


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _widened(x: Array) -> Array:
    return as_float(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _reference_sums(objectives, plan: Plan, operands, coefficients):
    """Computes the total and the sums so that JAX can differentiate them."""
    sums = all_sums(objectives, plan.by_reference(), operands)
    return _weigh(coefficients, sums), sums


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
    return _token_values(function, plan, operands), (operands, needed)


def _values_backward(function, plan: Plan, residuals, cotangents):
    operands, needed = residuals
    known = {k: c for k, c in cotangents.items() if not is_zero_cotangent(c)}
    (active,) = operands.active
    known = {k: jnp.where(active, c, jnp.zeros_like(c)) for k, c in known.items()}
    # Small cotangents would underflow in float16, see `run_gradients`.
    scale = largest(known)
    weights = {k: c / scale for k, c in known.items()}
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
    run = functools.partial(_gradients, objectives, plan, needed)
    _, gradients = cast(Any, reverse_only(run, weighted, wanted))
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

    def num_ids(self, inputs: _Weighted, rows: Any, shared: Any) -> int | None:
        return self.function.num_ids(inputs.inputs, rows, shared)
