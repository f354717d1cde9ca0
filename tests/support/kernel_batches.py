"""Small batches and losses for whole calls of the kernel."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ava_jax.kernel import execute
from ava_jax.kernel.platforms import Implementation, Target

B, S, D, V = 2, 29, 6, 23
WHOLE: dict[str, Any] = {
    "vocab_size": V - 3,
    "initial_temperature": 1.4,
    "use_mtp": True,
    "mtp_type": "sequential",
    "num_future_tokens": 2,
    "unlikelihood_weight": 0.5,
    "logit_soft_cap": 5.0,
    "chunk_size": 13,
    "block_size": 5,
}


def whole_batch() -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns floats and integers; masked floats are NaN."""
    arrays, ints = _drawn()
    return dict(arrays), dict(ints)


@functools.cache
@jax.jit
def _drawn() -> tuple[dict[str, Any], dict[str, Any]]:
    keys = jax.random.split(jax.random.key(0), 6)
    weights = jax.random.uniform(keys[4], (B, S)).at[0, 3:7].set(0.0)
    hidden = jnp.where(weights[..., None] == 0, jnp.nan, normal(keys[0], B, S, D))
    # The last position predicts no further token.
    depths = normal(keys[3], 2, B, S, D).at[:, :, -1].set(jnp.nan)
    arrays = {
        "hidden_states": hidden,
        "lm_head": normal(keys[1], D, V),
        "lm_head_bias": normal(keys[2], V),
        "mtp_hidden_states": depths,
    }
    targets = jax.random.randint(keys[5], (B, S), 0, 6)
    return arrays, {"targets": targets, "attention_mask": weights}


def normal(key, *shape):
    """Normal numbers."""
    return jax.random.normal(key, shape)


@dataclasses.dataclass(frozen=True)
class Lead:
    """A term of the largest logit and its difference to the second largest."""

    name: str = "lead"

    def init(self):
        return ()

    def apply(self, state, stats, inputs):
        return stats.top.astype(jnp.float32) - stats.log_sum_without_top


def compile_for(
    monkeypatch, platform, *, rounds=False, implementation: Implementation = "xla"
):
    """Makes passes use the sizes and the implementation of another platform.

    Args:
      monkeypatch: pytest's.
      platform: that one.
      rounds: whether exponentials are rounded for operands of float32: a processor has
        no products of bfloat16 by columns.
      implementation: that one.
    """
    target = Target(implementation, platform)
    if rounds:
        monkeypatch.setattr(execute, "ROUNDED_OPERANDS", "float32")
    monkeypatch.setattr(
        execute, "by_platform", lambda _, __, run, *operands: run(target, *operands)
    )
