"""Small batches and losses for whole calls of the kernel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ava_jax.kernel import execute
from ava_jax.kernel.platforms import Target

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
    rng = np.random.default_rng(0)
    weights = rng.random((B, S))
    weights[0, 3:7] = 0.0
    hidden = rng.normal(size=(B, S, D))
    depths = rng.normal(size=(2, B, S, D))
    # The last position predicts no further token.
    depths[:, :, -1] = np.nan
    arrays = {
        "hidden_states": np.where(weights[..., None] == 0, np.nan, hidden),
        "lm_head": rng.normal(size=(D, V)),
        "lm_head_bias": rng.normal(size=V),
        "mtp_hidden_states": depths,
    }
    arrays = {k: jnp.asarray(x, jnp.float32) for k, x in arrays.items()}
    targets = jnp.asarray(rng.integers(0, 6, (B, S)), jnp.int32)
    weights = jnp.asarray(weights, jnp.float32)
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


def compile_for(monkeypatch, platform, *, rounds=False):
    """Makes passes use the sizes and the implementation of another platform.

    Args:
      monkeypatch: pytest's.
      platform: that one.
      rounds: whether exponentials are rounded for operands of float32: a processor has
        no products of bfloat16 by columns.
    """
    target = Target("xla", platform)
    if rounds:
        monkeypatch.setattr(execute, "ROUNDED_OPERANDS", "float32")
    monkeypatch.setattr(
        execute, "by_platform", lambda _, __, run, *operands: run(target, *operands)
    )
