"""What a loss config cannot express: rows of their own, sequences, learned weights."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from ava_jax import losses
from experiments.variants import OwnParams, Report, StepContext
from trainer.decode.decoder import generate
from trainer.model.language_model import (
    LanguageModel,
    balances_by_quantiles,
    hidden_and_head,
)
from trainer.model.layers import Batch


def _logits(
    model: LanguageModel,
    params: optax.Params,
    ids: Int[Array, "B S"],
    bias: Float[Array, "L E"] | None,
) -> Float[Array, "B S V"]:
    """Logits of whole rows, each one segment."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    batch = Batch(ids, ids, jnp.ones_like(ids), positions)
    hidden, head = hidden_and_head(model, params, batch, bias)
    return (hidden @ head)[..., : model.loss.vocab_size]


class Untrained:
    """An addition without parameters of its own."""

    def init(self) -> OwnParams:
        """Nothing to train."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepetitionDecay(Untrained):
    """Adds rows that repeat a span of the batch, under the repetition decay.

    Attributes:
      weight: of the loss of these rows.
      rows: how many rows per step.
      spans: shortest and longest span, in tokens.
      decay: by how much a repeat's probability should fall.
    """

    weight: float
    rows: int
    spans: tuple[int, int]
    decay: float = 0.5
    name: str = "repetition_decay"

    def apply(
        self, own: OwnParams, loss: Float[Array, ""], context: StepContext
    ) -> tuple[Float[Array, ""], Report]:
        """Adds the loss of the repeated rows."""
        low, high = self.spans
        text = context.batch.inputs[: self.rows]
        rows, width = text.shape
        size_key, start_key = jax.random.split(context.key)
        size = jax.random.randint(size_key, (rows,), low, high + 1)
        start = jax.random.randint(start_key, (rows,), 0, width - high)
        offsets = start[:, None] + jnp.arange(width + 1) % size[:, None]
        ids = jnp.take_along_axis(text, offsets, axis=1)
        logits = _logits(context.model, context.params, ids[:, :-1], context.bias)
        value = losses.repetition_decay_loss(
            logits, ids[:, 1:], span_length=size, decay=self.decay
        )
        return loss + self.weight * value, {self.name: value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceUnlikelihood(Untrained):
    """Adds the sequence unlikelihood of the model's own greedy continuations.

    Attributes:
      weight: of the loss of the continuations.
      rows: how many rows of the batch are continued, per step.
      prompt: tokens of each that are read.
      count: tokens that are made.
      start: first step that does it; before, it costs nothing.
      ngram_size: n of the repeats that are penalized.
    """

    weight: float
    rows: int
    prompt: int
    count: int
    start: int
    ngram_size: int = 4
    name: str = "sequence_unlikelihood"

    def apply(
        self, own: OwnParams, loss: Float[Array, ""], context: StepContext
    ) -> tuple[Float[Array, ""], Report]:
        """Adds the loss of the continuations."""
        value = jax.lax.cond(
            context.step >= self.start,
            lambda: self._value(context),
            lambda: jnp.zeros((), loss.dtype),
        )
        return loss + self.weight * value, {self.name: value}

    def _value(self, context: StepContext) -> Float[Array, ""]:
        model, prompts = context.model, context.batch.inputs[: self.rows, : self.prompt]
        made = generate(
            model,
            jax.lax.stop_gradient(context.params),
            context.bias,
            prompts,
            jnp.full(prompts.shape[0], self.prompt, jnp.int32),
            context.key,
            count=self.count,
        )
        ids = jnp.concatenate([prompts, made], axis=1)
        logits = _logits(model, context.params, ids[:, :-1], context.bias)
        own = logits[:, self.prompt - 1 :]
        return losses.sequence_unlikelihood(own, made, ngram_size=self.ngram_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceBalance(Untrained):
    """Adds the sequence-wise balance loss of every expert layer.

    Attributes:
      weight: of the mean over the layers.
    """

    weight: float
    name: str = "sequence_balance"

    def apply(
        self, own: OwnParams, loss: Float[Array, ""], context: StepContext
    ) -> tuple[Float[Array, ""], Report]:
        """Adds the balance loss."""
        segments = context.batch.segment_ids
        logits = context.inputs.get("gate_logits")
        indices = context.inputs.get("expert_indices")
        if logits is None or indices is None:
            raise ValueError("the sequence balance needs a model with experts")
        scored = balances_by_quantiles(context.model.loss)
        scores = logits if scored else jax.nn.softmax(logits)
        value = jax.vmap(
            lambda scores, chosen: losses.sequence_balance_loss(
                scores.reshape(*segments.shape, -1),
                chosen.reshape(*segments.shape, -1),
                token_weights=segments > 0,
            )
        )(scores, indices)
        mean = jnp.mean(value)
        return loss + self.weight * mean, {self.name: mean}


def first_drafts(
    ahead: Float[Array, "B S V"],
    logits: Float[Array, "B S V"],
    segments: Int[Array, "B S"],
) -> tuple[Bool[Array, "B S-1"], Bool[Array, "B S-1"]]:
    """Returns which drafts of the second next token the main head would accept.

    Args:
      ahead: logits of the first further head, without padding columns.
      logits: of the main head, likewise.
      segments: of the rows; 0 is padding.

    Returns:
      Whether each is accepted, and whether it is unmasked: not at a segment's end.
    """
    accepted = jnp.argmax(ahead[:, :-1], -1) == jnp.argmax(logits[:, 1:], -1)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return accepted, inside


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateCalibration(Untrained):
    """Teaches the gate of adaptive heads whether the first draft will be accepted.

    Attributes:
      weight: of the binary cross-entropy of its confidence.
    """

    weight: float
    name: str = "gate_calibration"

    def apply(
        self, own: OwnParams, loss: Float[Array, ""], context: StepContext
    ) -> tuple[Float[Array, ""], Report]:
        """Adds the cross-entropy."""
        confidence = context.inputs.get("confidence_scores")
        ahead = context.inputs.get("additional_logits")
        logits = context.inputs.get("logits")
        if confidence is None or ahead is None or logits is None:
            raise ValueError("only adaptive heads have a gate")
        real = context.model.loss.vocab_size
        segments = context.batch.segment_ids
        accepted, unmasked = first_drafts(
            ahead[0][..., :real], logits[..., :real], segments
        )
        # A saturated sigmoid has no logarithm.
        sure = jnp.clip(confidence[:, :-1, 0], 1e-6, 1 - 1e-6)
        entropy = -jnp.where(accepted, jnp.log(sure), jnp.log1p(-sure))
        mean = jnp.sum(entropy, where=unmasked) / jnp.maximum(jnp.sum(unmasked), 1)
        return loss + self.weight * mean, {self.name: mean}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedWeights:
    """Weighs terms of the loss by learned uncertainties instead of summing them.

    Attributes:
      terms: keys of `aux`.
    """

    terms: tuple[str, ...]
    name: str = "learned_weights"

    def init(self) -> OwnParams:
        """The log-variance of each term."""
        return {"bias": jnp.zeros(len(self.terms))}

    def apply(
        self, own: OwnParams, loss: Float[Array, ""], context: StepContext
    ) -> tuple[Float[Array, ""], Report]:
        """Replaces the loss by the weighted terms."""
        parts = jnp.stack([context.aux[term] for term in self.terms])
        weighed = losses.homoscedastic_weighting(parts, own["bias"])
        return weighed, {self.name: jnp.exp(-own["bias"])}
