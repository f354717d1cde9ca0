"""A pass over the same tokens for each of several projections, such as parallel heads.

The passes follow one another, and each writes its projection's gradient to its place
among the others: there is never a second copy of all of them.
"""

import dataclasses
from typing import Any

import jax
from jax import lax

from ava_jax.kernel.execute import Plan, run_gradients, run_sums
from ava_jax.kernel.passes import Operands, Sums
from ava_jax.reduce import as_float, float_zeros


def all_sums(objectives, plan: Plan, operands: Operands) -> Sums:
    """Computes the sums of the pass, or of the passes of all projections."""
    if not _has_several(operands):
        return run_sums(objectives, plan, operands)

    def one_pass(own: Any) -> Sums:
        return run_sums(objectives, plan, _with(operands, own))

    def step(sums: Sums, own: Any) -> tuple[Sums, None]:
        return _plus(sums, one_pass(own)), None

    every = _own(operands)
    return lax.scan(step, _zeros(one_pass, every), every)[0]


def all_gradients(objectives, plan: Plan, needed, operands: Operands, wanted: Sums):
    """Computes the sums and the gradient of Σ wanted · sums; see `run_gradients`."""
    if not _has_several(operands):
        return run_gradients(objectives, plan, needed, operands, wanted)

    def one_pass(own: Any):
        one = _with(operands, own)
        sums, gradients = run_gradients(objectives, plan, needed, one, wanted)
        return (sums, gradients.sources), gradients

    def step(carry, own):
        added, gradients = one_pass(own)
        return _plus(carry, added), dataclasses.replace(gradients, sources=())

    every = _own(operands)
    start = _zeros(lambda own: one_pass(own)[0], every)
    (sums, sources), own = lax.scan(step, start, every)
    # Each pass has groups of one; together they are one group.
    inputs = jax.tree.map(lambda x: x[:, 0], own.inputs)
    return sums, dataclasses.replace(own, sources=sources, inputs=inputs)


def _has_several(operands: Operands) -> bool:
    return operands.kernel is not None and operands.kernel.ndim == 3


def _own(operands: Operands) -> Any:
    """Returns what each pass has of its own, on a leading axis."""
    tokens = jax.tree.map(lambda x: x[:, None], (operands.inputs, operands.active))
    return (*tokens, operands.kernel, operands.bias)


def _with(operands: Operands, own: Any) -> Operands:
    """Returns the operands of one pass."""
    inputs, active, kernel, bias = own
    return dataclasses.replace(
        operands, inputs=inputs, active=active, kernel=kernel, bias=bias
    )


def _plus(totals, more):
    return jax.tree.map(lambda total, x: total + as_float(x), totals, more)


def _zeros(function, every):
    """Returns zeros in the shape of what the function makes of the first pass's own."""
    return float_zeros(jax.eval_shape(function, jax.tree.map(lambda x: x[0], every)))
