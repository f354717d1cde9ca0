"""Batches of generated tokens, and the policy loss of them under jit."""

import functools
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from ava_jax import losses

B, S = 4, 5
KINDS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
ARRAYS = ("old_log_probs", "ref_log_probs", "sampler_weights", "entropy")
EVERYTHING: dict[str, Any] = {"kl_weight": 0.3, "entropy_weight": 0.2}
STATIC = ("kind", "ratio_level", "kl_estimator", "kl_importance_weighting")
Batch = dict[str, NDArray]


def batch(seed: int = 0, rows: int = B) -> Batch:
    """A batch with float weights, a row that is masked, and ratios on either side."""
    rng = np.random.default_rng(seed)
    weights = (rng.random((rows, S)) < 0.7) * rng.uniform(0.5, 1.5, (rows, S))
    weights[1] = 0
    weights[0, :2] = 1
    drawn = {
        "log_probs": -rng.exponential(1.0, (rows, S)),
        "advantages": rng.normal(size=rows),
        "mask": weights,
        "entropy": rng.exponential(1.0, (rows, S)),
        "sampler_weights": rng.uniform(0.5, 2.0, (rows, S)),
    }
    drawn["old_log_probs"] = drawn["log_probs"] + rng.normal(size=(rows, S)) / 2
    drawn["ref_log_probs"] = drawn["log_probs"] + rng.normal(size=(rows, S)) / 2
    return {name: x.astype(np.float32) for name, x in drawn.items()}


def needed(kind: str) -> dict[str, Any]:
    return {"max_length": 7} if kind == "dr_grpo" else {}


@functools.partial(jax.jit, static_argnames=STATIC)
def run(x: dict[str, jax.Array], **options: Any) -> tuple[Any, Any, Any]:
    """The loss, `aux`, and the gradients of log-probabilities and entropy."""

    def loss_of(trained: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        y = {**x, **trained}
        arrays = {name: y[name] for name in ARRAYS if name in y}
        return losses.policy_loss(
            y["log_probs"], y["advantages"], y["mask"], **arrays, **options
        )

    trained = {name: x[name] for name in ("log_probs", "entropy") if name in x}
    (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
    return loss, aux, grads


def on_device(x: Batch) -> dict[str, jax.Array]:
    return {name: jax.device_put(value) for name, value in x.items()}
