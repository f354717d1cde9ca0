"""Small students and teachers, and the loss of them under jit."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import ava_jax

B, S, D, E, V, K = 2, 8, 5, 7, 19, 4
PATHS = ("fused", "logits")
Arrays = dict[str, Any]
# What a CPU takes anyway; the others are not traced then.
CPU: dict[str, Any] = {"implementation": "cpu"}


def batch(seed: int = 0, width: int = V, teacher_width: int = V) -> Arrays:
    """Hidden states, projections and biases of both; weights with holes."""
    rng = np.random.default_rng(seed)
    shapes = {
        "hidden_states": (B, S, D),
        "lm_head": (D, width),
        "lm_head_bias": (width,),
        "teacher_hidden_states": (B, S, E),
        "teacher_lm_head": (E, teacher_width),
        "teacher_lm_head_bias": (teacher_width,),
    }
    drawn = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    weights = (rng.random((B, S)) < 0.7) * rng.uniform(0.5, 1.5, (B, S))
    weights[0, 0], weights[1, 1] = 0, 0.75
    drawn["attention_mask"] = weights
    return {name: x.astype(np.float32) for name, x in drawn.items()}


def logits_of(x: Mapping[str, NDArray], prefix: str = "") -> NDArray:
    """The logits of one of them in float64."""
    names = (f"{prefix}{name}" for name in ("hidden_states", "lm_head", "lm_head_bias"))
    hidden, head, bias = (np.asarray(x[name], np.float64) for name in names)
    return hidden @ head + bias


def on(path: str, x: Arrays) -> Arrays:
    """The arguments of a path."""
    if path == "fused":
        return dict(x)
    return {
        "logits": logits_of(x).astype(np.float32),
        "teacher_logits": logits_of(x, "teacher_").astype(np.float32),
        "attention_mask": x["attention_mask"],
    }


def top_k(x: Arrays, k: int = K, temperature: float = 1.0) -> Arrays:
    """The student of a batch, and the teacher's k most probable ids."""
    z = logits_of(x, "teacher_") / temperature
    log_q = z - np.log(np.sum(np.exp(z), -1, keepdims=True))
    ids = np.argsort(-log_q, -1)[..., :k]
    kept = {name: v for name, v in x.items() if not name.startswith("teacher_")}
    return {
        **kept,
        "teacher_ids": ids.astype(np.int32),
        "teacher_log_probs": np.take_along_axis(log_q, ids, -1).astype(np.float32),
    }


@functools.partial(jax.jit, static_argnums=0)
def _run(options: tuple[tuple[str, Any], ...], trained: Arrays, rest: Arrays) -> Any:
    def loss(trained: Arrays) -> Any:
        return ava_jax.distillation_loss(**trained, **rest, **dict(options))

    return jax.value_and_grad(loss, has_aux=True)(trained)


def run(x: Arrays, **options: Any) -> tuple[jax.Array, Any, Arrays]:
    """The loss, `aux`, and the gradients of all arrays of floats but the mask."""
    trained = {
        name: jax.device_put(value)
        for name, value in x.items()
        if jnp.issubdtype(value.dtype, jnp.floating) and name != "attention_mask"
    }
    rest = {name: jax.device_put(x[name]) for name in x if name not in trained}
    given = tuple(sorted({**CPU, **options}.items()))
    (loss, aux), grads = _run(given, trained, rest)
    return loss, aux, grads
