"""Drawn calls of `token_log_probs`, and what the oracle expects of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

import ava_jax
from ava_jax.kernel.platforms import Implementation
from support.log_probs_oracle import Numbers, log_probs_oracle
from support.oracle_scenarios import pick

NAMES = ("log_probs", "entropy", "log_z")


class DrawnCall(NamedTuple):
    """A call, with masked positions that hold anything.

    Attributes:
      floats: the differentiable arguments; a temperature, if it is traced.
      integers: targets and mask.
      options: the static arguments; a temperature that is a number.
      active: marks the unmasked tokens.
      num_invalid: how many ids are out of range.
      cotangents: of the three values, NaN where masked.
    """

    floats: dict[str, NDArray]
    integers: dict[str, NDArray]
    options: dict[str, Any]
    active: NDArray[np.bool_]
    num_invalid: int
    cotangents: Numbers


def draw_call(rng: Generator, implementation: Implementation | None) -> DrawnCall:
    """Draws shapes, arguments and options."""
    shape = (int(rng.integers(1, 4)), int(rng.integers(1, 10)))
    vocab, extra = int(rng.integers(2, 30)), int(rng.integers(0, 5))
    options: dict[str, Any] = {
        "vocab_size": vocab if extra else pick(rng, [None, vocab]),
        "logit_soft_cap": pick(rng, [None, 4.0]),
        "block_size": pick(rng, [None, 1, 2, 3]),
        "implementation": implementation,
        "ignore_index": int(rng.choice([-100, 1])),
    }
    integers, active, num_invalid = draw_integers(
        rng, shape, vocab, options["ignore_index"]
    )
    if rng.random() < 0.5:
        floats = draw_logits(rng, active, vocab, extra)
    else:
        floats = draw_product(rng, active, vocab + extra)
        options["chunk_size"] = pick(rng, [None, 2, 4])
    where = rng.integers(3)
    if where:
        temperature = np.float32(rng.choice([0.6, 1.0, 1.7]))
        if where == 1:
            floats["temperature"] = np.asarray(temperature)
        else:
            options["temperature"] = float(temperature)
    cotangents = rng.standard_normal((3, *shape))
    cotangents[:, ~active] = np.nan
    return DrawnCall(floats, integers, options, active, num_invalid, cotangents)


def draw_integers(rng: Generator, shape: tuple[int, ...], vocab: int, ignored: int):
    """Returns targets and mask, the unmasked tokens, and the number of invalid ids."""
    targets = rng.integers(0, vocab, shape)
    targets = np.where(rng.random(shape) < 0.1, ignored, targets)
    wild = rng.choice([-1, vocab, vocab + 1, 2**31 - 1], shape)
    targets = np.where(rng.random(shape) < 0.1, wild, targets).astype(np.int32)
    kept = rng.random(shape) < rng.choice([0.0, 0.3, 0.8])
    masks = [kept, kept.astype(np.int32), kept * np.float32(0.25)]
    integers = {"targets": targets}
    if rng.random() < 0.8:
        integers["attention_mask"] = masks[rng.integers(3)]
    else:
        kept = np.ones(shape, bool)
    wanted = kept & (targets != ignored)
    is_valid = (targets >= 0) & (targets < vocab)
    return integers, wanted & is_valid, int(np.sum(wanted & ~is_valid))


def draw_logits(rng: Generator, active: NDArray, vocab: int, extra: int):
    """Returns logits: −inf among them, anything where they are masked or padding."""
    logits = 3 * rng.standard_normal((*active.shape, vocab + extra))
    kept = rng.random(logits.shape) < rng.choice([0.7, 1.0])
    kept[..., 0] = True
    logits = np.where(kept, logits, -np.inf)
    anything = rng.choice([np.nan, np.inf, -np.inf, 1e30], logits.shape)
    is_class = np.arange(vocab + extra) < vocab
    logits = np.where(is_class & active[..., None], logits, anything)
    return {"logits": logits.astype(np.float32)}


def draw_product(rng: Generator, active: NDArray, columns: int):
    """Returns hidden states, which hold anything where masked, and a projection."""
    width = int(rng.integers(1, 6))
    hidden = rng.standard_normal((*active.shape, width))
    anything = rng.choice([np.nan, np.inf, -np.inf], hidden.shape)
    floats = {
        "hidden_states": np.where(active[..., None], hidden, anything),
        "lm_head": rng.standard_normal((width, columns)),
    }
    if rng.random() < 0.5:
        floats["lm_head_bias"] = rng.standard_normal(columns)
    return {name: value.astype(np.float32) for name, value in floats.items()}


def expected(call: DrawnCall) -> tuple[Numbers, dict[str, Numbers]]:
    """Returns the values [3, B, S] and the gradient of `Σ cotangents · values`."""
    floats = {k: np.asarray(v, np.float64) for k, v in call.floats.items()}
    is_product = "logits" not in floats
    if is_product:
        hidden = np.where(call.active[..., None], floats["hidden_states"], 0.0)
        logits = hidden @ floats["lm_head"] + floats.get("lm_head_bias", 0.0)
    else:
        hidden, logits = np.zeros(()), floats["logits"]
    given = floats.get("temperature", np.asarray(call.options.get("temperature", 1.0)))
    values, of_logits, of_temperature = log_probs_oracle(
        logits,
        call.integers["targets"],
        call.active,
        call.cotangents,
        vocab_size=call.options["vocab_size"] or logits.shape[-1],
        temperature=float(given),
        soft_cap=call.options["logit_soft_cap"],
    )
    grads = {"logits": of_logits, "temperature": np.asarray(of_temperature)}
    if is_product:
        grads["hidden_states"] = of_logits @ floats["lm_head"].T
        grads["lm_head"] = np.einsum("bsd,bsv->dv", hidden, of_logits)
        grads["lm_head_bias"] = of_logits.sum((0, 1))
    return values, {name: grads[name] for name in floats}


def evaluate(call: DrawnCall, **options: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Returns the package's result, and its gradient, in the arithmetic dtype."""
    wide = jnp.result_type(float)
    floats, cotangents = jax.tree.map(
        lambda x: x.astype(wide), jax.device_get((call.floats, call.cotangents))
    )
    run = value_and_pullback({**call.options, **options})
    return run(jax.device_put(floats), call.integers, jax.device_put(cotangents))


def value_and_pullback(options: dict[str, Any]) -> Callable[..., Any]:
    """Returns the jitted function of (floats, integers, cotangents [3, B, S])."""

    @jax.jit
    def run(floats, integers, cotangents):
        def values(floats):
            out = ava_jax.token_log_probs(**floats, **integers, **options)
            return tuple(getattr(out, name) for name in NAMES), out

        _, pull, out = jax.vjp(values, floats, has_aux=True)
        return out, pull(tuple(cotangents))[0]

    return run
