"""The losses of a pair of sequences against a reference, one short function each."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float


class Pairs(NamedTuple):
    """What the losses against a reference are made of.

    chosen, rejected: log-probabilities minus those of the reference, [P].
    a, b: both times β, the rewards.
    h: `a − b`.
    beta: β.
    eps: ε, the label smoothing.
    tau: τ, the temperature of `"discopop"`.
    """

    chosen: Float[Array, "P"]
    rejected: Float[Array, "P"]
    a: Float[Array, "P"]
    b: Float[Array, "P"]
    h: Float[Array, "P"]
    beta: Float[Array, ""]
    eps: Float[Array, ""]
    tau: Float[Array, ""]


def _sigmoid(p: Pairs) -> Float[Array, "P"]:
    return -log_sigmoid(p.h)


def _hinge(p: Pairs) -> Float[Array, "P"]:
    return jnp.maximum(0, 1 - p.h)


def _ipo(p: Pairs) -> Float[Array, "P"]:
    return (p.chosen - p.rejected - 1 / (2 * p.beta)) ** 2


def _robust(p: Pairs) -> Float[Array, "P"]:
    right, wrong = log_sigmoid(p.h), log_sigmoid(-p.h)
    return (-(1 - p.eps) * right + p.eps * wrong) / (1 - 2 * p.eps)


def _exo_pair(p: Pairs) -> Float[Array, "P"]:
    right = sigmoid(p.h) * (log_sigmoid(p.h) - jnp.log1p(-p.eps))
    return right + sigmoid(-p.h) * (log_sigmoid(-p.h) - jnp.log(p.eps))


def _nca_pair(p: Pairs) -> Float[Array, "P"]:
    return -log_sigmoid(p.a) - (log_sigmoid(-p.a) + log_sigmoid(-p.b)) / 2


def _bco_pair(p: Pairs) -> Float[Array, "P"]:
    return -log_sigmoid(p.a) - log_sigmoid(-p.b)


def _sppo_hard(p: Pairs) -> Float[Array, "P"]:
    half = 1 / (2 * p.beta)
    return (p.chosen - half) ** 2 + (p.rejected + half) ** 2


def _apo_zero(p: Pairs) -> Float[Array, "P"]:
    return sigmoid(-p.a) + sigmoid(p.b)


def _apo_down(p: Pairs) -> Float[Array, "P"]:
    return sigmoid(p.a) + sigmoid(-p.h)


def _discopop(p: Pairs) -> Float[Array, "P"]:
    logistic = -log_sigmoid(p.h) * sigmoid(-p.h / p.tau)
    # One exponential, because e^(−h) alone overflows where m underflows.
    return logistic + jnp.exp(log_sigmoid(p.h / p.tau) - p.h)


PAIR_LOSSES: dict[str, Callable[[Pairs], Float[Array, "P"]]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}
