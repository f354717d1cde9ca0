"""Held-out metrics, at temperature 1 and at that of the model."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

import ava_jax
from ava_jax import BiasBalanceState
from ava_jax.losses import layer_norm
from trainer.model.language_model import LanguageModel, is_adaptive, loss_inputs
from trainer.model.layers import Batch
from trainer.model.temperature import is_tempered
from trainer.report.metrics import Record
from trainer.run.devices import loss_on


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
    state: ava_jax.LossState,
    batches: Iterable[Batch],
    mesh: Mesh,
) -> Record:
    """Returns nll, perplexity and accuracy over all tokens of the batches.

    `nll` and `perplexity` are those of softmax(z). A model that was trained at another
    temperature than 1 is softmax(z/T), with T from the loss state: `tempered_nll` and
    `tempered_perplexity`.

    `head_accuracy_j` is how often head j of multi-token prediction is right about
    `targets[t + j]`, where that lies in the segment of t; NaN if it never does.
    """
    # With lm_head, the loss makes the logits in chunks, and none are stored.
    model = model.clone(fused=True)
    total = sum(
        np.asarray(_count(model, mesh, params, state, batch), np.float64)
        for batch in batches
    )
    return _record(_names(model.loss), np.asarray(total))


def _names(loss: ava_jax.UnifiedLossConfig) -> list[str]:
    """Returns the names in `aux` of the means that are reported of every head."""
    return ["nll", "accuracy", *["tempered_nll"] * is_tempered(loss)]


def _judging_loss(loss: ava_jax.UnifiedLossConfig) -> ava_jax.UnifiedLossConfig:
    """The plain loss, with the model's temperature where that is not 1."""
    plain = plain_loss(loss)
    if not is_tempered(loss):
        return plain
    return dataclasses.replace(
        plain, primary_loss_type="deepseek", adaptive_temperature=False
    )


# Not made anew by each call: a run evaluates twice, and its program is traced once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _count(
    model: LanguageModel,
    mesh: Mesh,
    params: optax.Params,
    state: ava_jax.LossState,
    batch: Batch,
) -> Float[Array, "heads sums"]:
    """Returns the tokens of a batch and the sums over them, for each head."""
    loss_fn = loss_on(mesh, _judging_loss(model.loss))

    def sums(inputs: ava_jax.LossInputs) -> Float[Array, "sums"]:
        _, aux, _ = loss_fn(state, train=False, **inputs)
        tokens = aux["num_tokens"].astype(jnp.float32)
        return jnp.stack([tokens, *(aux[n] * tokens for n in _names(model.loss))])

    inputs = loss_inputs(model, params, batch, routing_bias(state))
    main = sums(main_head(inputs, batch))[None]
    shared, own = further_heads(model, params, inputs, batch)
    if not own:
        return main
    further = jax.lax.map(lambda head: sums(shared | head), own)
    return jnp.concatenate([main, further])


def _record(names: Sequence[str], total: Float[np.ndarray, "heads sums"]) -> Record:
    """Returns the means of all heads' sums, the first of which are the tokens."""
    tokens, *sums = total.T
    nothing = np.full_like(tokens, np.nan)
    means = {
        name: np.divide(x, tokens, out=nothing.copy(), where=tokens > 0).tolist()
        for name, x in zip(names, sums, strict=True)
    }
    record = {name: values[0] for name, values in means.items()}
    for name in [name for name in names if name.endswith("nll")]:
        record[name.replace("nll", "perplexity")] = float(np.exp(record[name]))
    further = enumerate(means["accuracy"][1:], start=1)
    return record | {f"head_accuracy_{j}": accuracy for j, accuracy in further}


def main_head(inputs: ava_jax.LossInputs, batch: Batch) -> ava_jax.LossInputs:
    """Returns the next-token head as the inputs of a plain loss."""
    return {
        "targets": batch.targets,
        "attention_mask": batch.segment_ids > 0,
        "hidden_states": inputs.get("hidden_states"),
        "lm_head": inputs.get("lm_head"),
    }


def further_heads(
    model: LanguageModel,
    params: optax.Params,
    inputs: ava_jax.LossInputs,
    batch: Batch,
) -> tuple[ava_jax.LossInputs, ava_jax.LossInputs]:
    """Returns the multi-token prediction heads as the inputs of a plain loss.

    Adaptive heads are evaluated even where their gate would not let them run.

    Returns:
      The inputs of a plain loss that the K heads share, and those that each has for
      itself, stacked [K, ...]; nothing for a model without further heads.
    """
    targets, segments = (
        look_ahead(x, model.loss.num_future_tokens)
        for x in (batch.targets, batch.segment_ids)
    )
    unmasked = (segments > 0) & (segments == batch.segment_ids)
    own: ava_jax.LossInputs = {"targets": targets, "attention_mask": unmasked}
    depths = inputs.get("mtp_hidden_states")
    if depths is not None:
        return {"lm_head": inputs.get("lm_head")}, own | {"hidden_states": depths}
    heads = inputs.get("mtp_params")
    if is_adaptive(model.loss):
        heads = cast(Mapping[str, Mapping[str, Mapping]], params)["mtp"]["heads"]
    hidden = inputs.get("hidden_states")
    if heads is None or hidden is None:
        return {}, {}
    normed = layer_norm(hidden, heads["norm"]["scale"], heads["norm"]["bias"])
    kernel, bias = heads["heads"]["kernel"], heads["heads"]["bias"]
    return {"hidden_states": normed}, own | {"lm_head": kernel, "lm_head_bias": bias}


def look_ahead(x: Int[Array, "B S"], count: int) -> Int[Array, "K B S"]:
    """Stacks x shifted left by 1 to K tokens, with zeros at the end of the row."""
    length = x.shape[1]
    steps = [min(step, length) for step in range(1, count + 1)]
    return jnp.stack([jnp.pad(x[:, step:], ((0, 0), (0, step))) for step in steps])
