"""Held-out metrics at temperature 1, and a sample of the model's text."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from devices import loss_on
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from layers import Batch
from metrics import Record
from model import LanguageModel, hidden_and_head

import ava_jax
from ava_jax import BiasBalanceState

# Sampling keeps to the likeliest tokens: label smoothing spreads mass over all others.
CANDIDATES = 40


def routing_bias(state: ava_jax.LossState) -> Float[Array, "L E"] | None:
    """Returns the bias that the routers choose by, if the loss keeps one."""
    balance = state.moe_balancing
    return balance.bias if isinstance(balance, BiasBalanceState) else None


def plain_loss(loss: ava_jax.UnifiedLossConfig) -> ava_jax.UnifiedLossConfig:
    """The cross-entropy alone: no temperature, no smoothing, no penalties."""
    return ava_jax.UnifiedLossConfig(
        vocab_size=loss.vocab_size,
        logit_soft_cap=loss.logit_soft_cap,
        primary_loss_type="standard",
        label_smoothing=0.0,
        use_ngram_penalty=False,
        use_immediate_repetition_penalty=False,
    )


def evaluate(
    model: LanguageModel,
    params: optax.Params,
    bias: Float[Array, "L E"] | None,
    batches: Iterable[Batch],
    mesh: Mesh,
) -> Record:
    """Returns nll, perplexity and accuracy over all tokens of the batches."""
    loss_fn = loss_on(mesh, plain_loss(model.loss))
    state = loss_fn.init()

    @jax.jit
    def count(params: optax.Params, batch: Batch) -> Float[Array, "3"]:
        hidden, head = hidden_and_head(model, params, batch, bias)
        _, aux, _ = loss_fn(
            state,
            targets=batch.targets,
            attention_mask=batch.segment_ids > 0,
            hidden_states=hidden,
            lm_head=head,
            train=False,
        )
        tokens = aux["num_tokens"].astype(jnp.float32)
        return jnp.stack([tokens, aux["nll"] * tokens, aux["accuracy"] * tokens])

    total = sum(np.asarray(count(params, batch), np.float64) for batch in batches)
    tokens, nll, right = np.asarray(total).tolist()
    return {
        "nll": nll / tokens,
        "perplexity": float(np.exp(nll / tokens)),
        "accuracy": right / tokens,
    }


@functools.partial(jax.jit, static_argnames=("model", "prompt_length"))
def generate(
    model: LanguageModel,
    params: optax.Params,
    state: ava_jax.LossState,
    tokens: Int[Array, "S"],
    key: Array,
    *,
    prompt_length: int,
) -> Int[Array, "S"]:
    """Fills `tokens` after the prompt, sampling at the temperature of the loss state.

    Every token runs the whole row again, which is short; attention is causal, so what
    lies after the token does not matter.
    """
    length = tokens.shape[0]
    temperature = 1.0 if state.temperature is None else state.temperature
    padding = jnp.arange(model.columns) >= model.loss.vocab_size

    def extend(index: Int[Array, ""], tokens: Int[Array, "S"]) -> Int[Array, "S"]:
        row = tokens[None]
        batch = Batch(row, row, jnp.ones_like(row), jnp.arange(length)[None])
        hidden, head = hidden_and_head(model, params, batch, routing_bias(state))
        logits = (hidden[0, index - 1] @ head).astype(jnp.float32)
        if (cap := model.loss.logit_soft_cap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        logits = jnp.where(padding, -jnp.inf, logits / temperature)
        best, ids = jax.lax.top_k(logits, min(CANDIDATES, model.loss.vocab_size))
        chosen = ids[jax.random.categorical(jax.random.fold_in(key, index), best)]
        return tokens.at[index].set(chosen.astype(tokens.dtype))

    return jax.lax.fori_loop(prompt_length, length, extend, tokens)
