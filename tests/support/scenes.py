"""Small batches with everything on, shared by the tests of the unified loss."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import ava_jax

B, S, D, V, K, E = 4, 9, 5, 13, 2, 3
PATHS = ("logits", "fused")

EVERYTHING: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "label_smoothing": 0.1,
    "z_loss_weight": 1e-2,
    "use_mtp": True,
    "num_future_tokens": K,
    "ngram_size": 2,
    "ngram_max_matches": 2,
    "unlikelihood_weight": 0.3,
    "eos_token_id": 2,
    "min_sequence_length": 5,
    "num_experts": E,
    "use_moe_balancing": True,
    "use_auxiliary_loss": True,
    "use_diversity_loss": True,
    "use_contrastive_loss": True,
    "contrastive_type": "simctg",
}
ADAPTIVE: dict[str, Any] = {
    "vocab_size": V,
    "primary_loss_type": "adaptive_mtp",
    "num_future_tokens": K,
    "eos_token_id": 2,
}


def integers(key: int = 0, rows: int = B, *, experts: bool = True) -> dict[str, Any]:
    """Targets with repeats and a mask with holes, no row empty, and chosen experts."""
    rng = np.random.default_rng(key)
    mask = rng.random((rows, S)) < 0.8
    mask[:, 0] = True
    ints = {
        "targets": rng.integers(0, 4, (rows, S), np.int32),
        "attention_mask": mask,
    }
    if experts:
        ints["expert_indices"] = rng.integers(0, E, (rows, S, 2), np.int32)
    return jax.device_put(ints)


def floats(key: int = 1, rows: int = B) -> dict[str, Any]:
    """The differentiable inputs of `EVERYTHING`, both paths' among them."""
    rng = np.random.default_rng(key)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    arrays = {
        "hidden_states": normal(rows, S, D),
        "lm_head": normal(D, V),
        "gate_logits": normal(rows, S, E),
        "expert_outputs": normal(E, rows, S, 4),
        "mtp_params": {
            "norm": {"scale": 1 + normal(D) / 10, "bias": normal(D)},
            "heads": {"kernel": normal(K, D, V), "bias": normal(K, V)},
        },
    }
    return jax.device_put(arrays)


def adaptive_floats(key: int = 2) -> dict[str, Any]:
    """The differentiable inputs of `ADAPTIVE`."""
    rng = np.random.default_rng(key)
    arrays = {
        "logits": rng.standard_normal((B, S, V), np.float32),
        "additional_logits": rng.standard_normal((K, B, S, V), np.float32),
        "confidence_scores": rng.random((B, S), np.float32),
    }
    return jax.device_put(arrays)


@functools.partial(jax.jit, static_argnames=("loss_fn", "train"))
def _call(loss_fn: ava_jax.UnifiedLoss, train: bool, state: Any, inputs: Any) -> Any:
    return loss_fn(state, **inputs, train=train)


def jitted(loss_fn: ava_jax.UnifiedLoss, train: bool = True) -> Callable[..., Any]:
    """The loss call under jit, taking the state and one mapping of arguments.

    Equal losses share a program.
    """
    return functools.partial(_call, loss_fn, train)


@functools.partial(jax.jit, static_argnames=("loss_fn", "path"))
def value_and_grads(
    loss_fn: ava_jax.UnifiedLoss, state: Any, arrays: Any, ints: Any, path: str
) -> Any:
    """(loss, (aux, state)) and gradients; equal losses share a program."""

    def loss(arrays: dict[str, Any]) -> Any:
        total, aux, after = loss_fn(state, **through(path, arrays), **ints)
        return total, (aux, after)

    return jax.value_and_grad(loss, has_aux=True)(arrays)


def through(path: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments for `"logits"` or `"fused"`; `"given"` takes all as is."""
    if path in ("given", "fused"):
        return arrays
    rest = {k: v for k, v in arrays.items() if k != "lm_head"}
    return {**rest, "logits": arrays["hidden_states"] @ arrays["lm_head"]}
