"""The baselines: other implementations of the same losses, and lower bounds.

Each takes the targets [B, S] and the arrays by the loss's argument names.
"""

import importlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks.timing import Unavailable

CHUNK = 512
MTP_WEIGHT = 0.1
NEEDS_NEWER_TOKAMAX = (
    "tokamax >= 0.0.17 with Python >= 3.12 has the chunked implementation"
)


def optax_loss(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """Computes Optax's cross-entropy in float32."""
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), targets
    )
    return each.mean()


def naive(
    targets: jax.Array, hidden_states: jax.Array, lm_head: jax.Array
) -> jax.Array:
    """Computes all logits, then `optax_loss`."""
    return optax_loss(targets, hidden_states @ lm_head)


def naive_depths(
    targets: jax.Array,
    hidden_states: jax.Array,
    lm_head: jax.Array,
    mtp_hidden_states: jax.Array,
) -> jax.Array:
    """Computes the naive loss of the main head and, weighted, of each depth."""
    depths = [
        naive(targets[:, ahead:], states[:, :-ahead], lm_head)
        for ahead, states in enumerate(mtp_hidden_states, start=1)
    ]
    main = naive(targets, hidden_states, lm_head)
    return main + MTP_WEIGHT * jnp.stack(depths).mean()


def checkpointed(
    targets: jax.Array, hidden_states: jax.Array, lm_head: jax.Array
) -> jax.Array:
    """Computes the naive loss of 512 tokens at a time, with `jax.checkpoint`."""
    chunk = min(CHUNK, targets.size)

    @jax.checkpoint
    def step(
        total: jax.Array, part: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        return total + naive(*part, lm_head), None

    width = hidden_states.shape[-1]
    parts = targets.reshape(-1, chunk), hidden_states.reshape(-1, chunk, width)
    total, _ = lax.scan(step, jnp.float32(0), parts)
    return total / len(parts[0])


def tokamax_loss(
    targets: jax.Array,
    hidden_states: jax.Array,
    lm_head: jax.Array,
    implementation: Literal["chunked_xla", "xla"] = "chunked_xla",
) -> jax.Array:
    """Computes Tokamax's loss, by default the chunked one.

    Raises:
      ImportError: tokamax is not installed.
      Unavailable: this version of tokamax does not support it here.
    """
    tokamax = importlib.import_module("tokamax")
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    try:
        return tokamax.linear_softmax_cross_entropy_loss(
            flat,
            targets.reshape(-1),
            lm_head,
            reduction="mean",
            implementation=implementation,
        )
    except (NotImplementedError, ValueError) as error:
        if "Unsupported implementation" in str(error):
            raise Unavailable(NEEDS_NEWER_TOKAMAX) from error
        raise Unavailable(f"tokamax: {error}") from error


def matmul_forward(
    targets: jax.Array, hidden_states: jax.Array, lm_head: jax.Array
) -> jax.Array:
    """Computes the product of every loss; reduced, so that it is not an output."""
    del targets
    return jnp.max(hidden_states @ lm_head)


def matmul_three(
    targets: jax.Array, hidden_states: jax.Array, lm_head: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the three products of every loss with a gradient."""
    del targets
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = hidden @ lm_head
    return logits @ lm_head.T, hidden.T @ logits


def copy(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """Reads and writes an array of the size of the logits."""
    del targets
    return logits + jnp.ones((), logits.dtype)


def exact_loss(
    targets: jax.Array, hidden_states: jax.Array, lm_head: jax.Array
) -> float:
    """Computes the naive loss in float64 on the host."""
    hidden = np.asarray(hidden_states, np.float64).reshape(-1, hidden_states.shape[-1])
    head, ids = np.asarray(lm_head, np.float64), np.asarray(targets).reshape(-1)
    total = 0.0
    for start in range(0, len(ids), CHUNK):
        logits = hidden[start : start + CHUNK] @ head
        row_max = logits.max(-1)
        log_z = row_max + np.log(np.exp(logits - row_max[:, None]).sum(-1))
        chosen = ids[start : start + CHUNK, None]
        total += (log_z - np.take_along_axis(logits, chosen, -1)[:, 0]).sum()
    return total / len(ids)
