"""How precise log-probabilities are; run with `python -m benchmarks.precision`."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

import ava_jax

# Of the logits; that of a trained language model's is 2 to 3.
STANDARD_DEVIATION = 2.5
SIZES = (512, 1024, 50304)  # tokens, width, vocabulary


class Arrays(NamedTuple):
    """Operands in float32, [N, D] and [D, V], and the targets [N].

    Hidden states are standard normal, as after a normalization. The projection is
    normal with the standard deviation 2.5/√D. Targets are drawn from the softmax.
    """

    hidden: jax.Array
    head: jax.Array
    targets: jax.Array


class Error(NamedTuple):
    """The errors of one way to compute log-probabilities, in nats.

    They are relative to float64 on the operands before they are rounded and, where
    `_rounded`, on the operands that it gets.
    """

    name: str
    largest: float
    mean: float
    largest_rounded: float
    mean_rounded: float


def draw(tokens: int, width: int, vocab: int, seed: int = 0) -> Arrays:
    """Draws operands that give logits a realistic spread, and likely targets."""
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (tokens, width))
    head = jax.random.normal(keys[1], (width, vocab))
    head *= STANDARD_DEVIATION / width**0.5
    logits = jnp.matmul(hidden, head, precision="highest")
    return Arrays(hidden, head, jax.random.categorical(keys[2], logits))


def exact(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> NDArray:
    """Computes the log-probabilities in float64 on the host."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    largest = logits.max(-1, keepdims=True)
    log_z = largest[:, 0] + np.log(np.exp(logits - largest).sum(-1))
    return logits[np.arange(len(logits)), np.asarray(targets)] - log_z


def usual(hidden, head, targets, *, widens: bool) -> jax.Array:
    """Computes `log_softmax` of bfloat16 logits, which may be cast to float32."""
    # A product accumulates in float32, and its result is rounded once.
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    # A cast alone may be left out within a program: `xla_allow_excess_precision`.
    logits = lax.reduce_precision(logits, exponent_bits=8, mantissa_bits=7)
    every = jax.nn.log_softmax(logits if widens else logits.astype(jnp.bfloat16))
    return jnp.take_along_axis(every, targets[:, None], -1)[:, 0]


def ours(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes them with `token_log_probs`, with exact products of float32."""
    return ava_jax.token_log_probs(
        targets=targets[None],
        hidden_states=hidden[None],
        lm_head=head,
        precision="highest",
    ).log_probs[0]


def errors(arrays: Arrays) -> list[Error]:
    """Computes the errors of each way."""
    short = jnp.bfloat16
    hidden, head = arrays.hidden.astype(short), arrays.head.astype(short)
    unrounded = exact(*arrays)
    rounded = exact(hidden, head, arrays.targets)
    wide_head = exact(hidden, arrays.head, arrays.targets)
    ways = (
        ("bfloat16 logits", head, partial(usual, widens=False), rounded),
        ("bfloat16 logits, widened", head, partial(usual, widens=True), rounded),
        ("token_log_probs", head, ours, rounded),
        ("token_log_probs, float32 lm_head", arrays.head, ours, wide_head),
    )

    def error(name, own, function, want):
        got = jax.jit(function)(hidden, own, arrays.targets)
        got = np.asarray(got.astype(jnp.float32), np.float64)
        first, second = np.abs(got - unrounded), np.abs(got - want)
        return Error(name, first.max(), first.mean(), second.max(), second.mean())

    return [error(*way) for way in ways]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of the errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs=3, default=SIZES, metavar="N")
    given = parser.parse_args(arguments)
    print("| error, nats | largest | mean | largest, rounded | mean, rounded |")
    print("|---|---|---|---|---|")
    for name, *figures in errors(draw(*given.sizes)):
        print("|", " | ".join([name, *(f"{x:.1e}" for x in figures)]), "|")


if __name__ == "__main__":
    main()
