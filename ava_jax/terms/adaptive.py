"""The adaptive loss: given heads, scaled by a gate's confidence."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ava_jax.config import Settings, Weight, weight_at
from ava_jax.inputs import (
    LossInputs,
    Normalizers,
    array,
    check_float,
    heads_of,
    tokens_of,
)
from ava_jax.kernel.fused import token_sums
from ava_jax.kernel.passes import Operands
from ava_jax.kernel.stats import TokenStats
from ava_jax.losses.mtp import confidence_regularizer, effective_mtp_weight
from ava_jax.ranges import check_all
from ava_jax.reduce import as_float, float_dtype, safe_divide, weighted_mean
from ava_jax.terms.base import (
    Aux,
    BatchTerm,
    Call,
    Output,
    Scalar,
    Step,
    Term,
    TokenInputs,
    TokenTerm,
)
from ava_jax.terms.likelihood import CrossEntropy, FocalLoss
from ava_jax.terms.mtp import (
    head_denominators,
    head_inputs,
    head_weights,
    usable_heads,
)
from ava_jax.terms.objective import HeadObjective
from ava_jax.tokens import Tokens


@flax.struct.dataclass
class AdaptiveMTPState:
    """Running sums of the adaptive MTP loss's parts, and how many steps they hold."""

    primary_loss: Float[Array, ""]
    additional_loss: Float[Array, ""]
    confidence_reg: Float[Array, ""]
    confidence: Float[Array, ""]
    count: Int[Array, ""]

    def statistics(self) -> dict[str, Array]:
        """Returns the means over the steps, for `ava_jax.statistics`."""
        return {
            "avg_primary_loss": safe_divide(self.primary_loss, self.count),
            "avg_additional_loss": safe_divide(self.additional_loss, self.count),
            "avg_confidence_reg": safe_divide(self.confidence_reg, self.count),
            "avg_confidence": safe_divide(self.confidence, self.count),
            "total_computations": self.count,
        }


@flax.struct.dataclass
class AdaptiveParts:
    """The parts of an adaptive loss.

    Attributes:
      primary: the cross-entropy of the main logits.
      additional: the heads' mean loss times the effective weight.
      confidence_reg: the weighted regulariser.
      confidence: the mean confidence; 0 without scores.
      effective_weight: the heads' weight.
    """

    primary: Scalar
    additional: Scalar
    confidence_reg: Scalar
    confidence: Scalar
    effective_weight: Scalar

    def aux(self, prefix: str) -> Aux:
        """Returns the entries of aux."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return dict(zip(_adaptive_keys(prefix), values, strict=True))


def _adaptive_keys(prefix: str) -> tuple[str, ...]:
    """Lists the entries of aux of `AdaptiveParts`, in its order."""
    return (
        f"{prefix}_primary_loss",
        f"{prefix}_additional_loss",
        f"{prefix}_confidence_reg",
        f"{prefix}_avg_confidence",
        f"{prefix}_effective_mtp_weight",
    )


@dataclasses.dataclass(frozen=True)
class AdaptiveHeads:
    """Given heads, weighted by a gate's confidence, and the gate's regulariser.

    Over micro-batches the confidence that scales the heads is each one's own.

    Attributes:
      num_heads: K of the denominators; a call may give fewer heads.
      weight: of the heads' mean cross-entropy.
      label_smoothing: ε of the heads.
      use_confidence_weighting: whether the mean confidence scales the weight.
      stop_confidence_gradient: whether no gradient flows through that.
      confidence_reg_strength: the weight of the regulariser.
    """

    num_heads: int
    weight: Weight
    label_smoothing: float = 0.0
    use_confidence_weighting: bool = True
    stop_confidence_gradient: bool = False
    confidence_reg_strength: float = 0.01

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        """Raises where logits or scores do not fit the targets."""
        shape = array(inputs, "targets").shape
        for j, logits in enumerate(heads_of(inputs.get("additional_logits"))):
            name = f"additional_logits[{j}]"
            check_float(name, logits, shape, 3, vocab_size=settings.vocab_size)
        scores = inputs.get("confidence_scores")
        allowed = (shape[:1], (shape[0], 1), shape, (*shape, 1))
        if scores is not None and scores.shape not in allowed:
            raise ValueError(
                f"confidence_scores must have one of the shapes {allowed}, "
                f"got {scores.shape}"
            )
        if scores is not None:
            read = confidences(scores, tokens_of(settings, inputs))
            check_all("confidence_scores", read.values, 0, 1)

    def counts(self, tokens: Tokens, inputs: LossInputs) -> dict[str, Array]:
        """Returns the heads' denominators."""
        given = len(heads_of(inputs.get("additional_logits")))
        return {"heads": head_weights(tokens, max(self.num_heads, given))}

    def parts(self, call: Call, primary: Scalar) -> AdaptiveParts:
        """Returns the parts of the loss, given the primary one."""
        zero = jnp.zeros((), float_dtype())
        confidence = regularizer = zero
        scale = None
        if (given := call.inputs.get("confidence_scores")) is not None:
            scores, counts = confidences(given, call.tokens), call.normalizers
            confidence = scores.share_of_mean(scores.values, counts)
            regularizer = self.confidence_reg_strength * scores.share_of_mean(
                confidence_regularizer(scores.values), counts
            )
            if self.use_confidence_weighting:
                scale = weighted_mean(scores.values, scores.weights)
        if call.inputs.get("additional_logits") is None:
            return AdaptiveParts(primary, zero, regularizer, confidence, zero)
        active = call.inputs.get("mtp_active", True)
        effective = effective_mtp_weight(
            weight_at(self.weight, call.step),
            scale,
            active=active,
            stop_gradient=self.stop_confidence_gradient,
        )
        additional = jnp.where(active, self._mean(call) * effective, zero)
        shown = effective * call.share
        return AdaptiveParts(primary, additional, regularizer, confidence, shown)

    def _mean(self, call: Call) -> Scalar:
        heads = call.inputs.get("additional_logits")
        assert heads is not None
        count = usable_heads(len(heads), call.tokens)
        if count < 1:
            return jnp.zeros((), float_dtype())
        stacked = head_inputs(call.tokens, count)
        if isinstance(heads, jax.Array):
            sources, inputs = (heads[:count],), (stacked,)
        else:
            sources = tuple(logits[None] for logits in heads[:count])
            inputs = tuple(
                jax.tree.map(lambda x, j=j: x[j : j + 1], stacked) for j in range(count)
            )
        settings = call.settings
        objective = HeadObjective(
            "heads",
            count,
            settings.vocab_size,
            settings.logit_soft_cap,
            self.label_smoothing,
        )
        active = tuple(of_head.weights != 0 for of_head in inputs)
        operands = Operands(sources, inputs, active, rows=None, shared=None)
        share = safe_divide(
            jnp.full((count,), 1 / count), head_denominators(call, count)
        )
        objectives = (objective,) * len(sources)
        return token_sums(objectives, operands, {"heads": share}, call.plan)[0]


@flax.struct.dataclass
class Confidences:
    """Confidence scores and their weights.

    A score per row is weighted by whether the row has an unmasked token; a score per
    token has the token's weight.

    Attributes:
      values: the scores; 1 where the weight is 0.
      weights: their weights.
    """

    values: Float[Array, "*n"]
    weights: Float[Array, "*n"]

    def share_of_mean(self, values: Float[Array, "*n"], counts: Normalizers) -> Scalar:
        """Returns this batch's share of the step's mean of one value per score."""
        per_row = self.weights.ndim == 1
        total = counts.active_rows if per_row else counts.tokens
        return weighted_mean(values, self.weights, total)


def confidences(scores: Float[Array, "B ..."], tokens: Tokens) -> Confidences:
    """Returns confidence scores with their weights."""
    shape = tokens.targets.shape
    per_row = scores.shape in (shape[:1], (shape[0], 1))
    weights = as_float(jnp.any(tokens.active, 1)) if per_row else tokens.weights
    given = as_float(scores).reshape(weights.shape)
    values = jnp.where(weights != 0, given, jnp.ones_like(given))
    return Confidences(values, weights)


class _Adaptive(Term):
    """Carries the running sums of an adaptive loss's parts."""

    heads: AdaptiveHeads
    fields = ("adaptive_mtp",)

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        self.heads.check(inputs, settings)

    def counts(self, tokens: Tokens, inputs: LossInputs) -> dict[str, Array]:
        return self.heads.counts(tokens, inputs)

    def init(self) -> dict[str, AdaptiveMTPState]:
        # An array each: the state may be donated.
        sums = {
            name: jnp.zeros((), float_dtype())
            for name in (
                "primary_loss",
                "additional_loss",
                "confidence_reg",
                "confidence",
            )
        }
        count = jnp.zeros((), jnp.int32)
        return {"adaptive_mtp": AdaptiveMTPState(**sums, count=count)}

    def update(self, state: dict[str, Any], statistics: AdaptiveParts, step: Step):
        old, new = state["adaptive_mtp"], statistics
        return {
            "adaptive_mtp": AdaptiveMTPState(
                primary_loss=old.primary_loss + new.primary,
                additional_loss=old.additional_loss + new.additional,
                confidence_reg=old.confidence_reg + new.confidence_reg,
                confidence=old.confidence + new.confidence,
                count=old.count + 1,
            )
        }


@dataclasses.dataclass(frozen=True)
class AdaptivePrimary(_Adaptive, TokenTerm):
    """The adaptive loss as the main loss: of the main logits, heads and confidences.

    The main logits are `primary_logits` if those are given.

    Attributes:
      primary: the loss of the main logits.
      heads: the rest.
    """

    primary: CrossEntropy | FocalLoss
    heads: AdaptiveHeads
    name: str = "main"
    source = "primary_logits"
    part = "main_loss"
    option = 'primary_loss_type="adaptive_mtp"'
    accepts = ("primary_logits", "additional_logits", "confidence_scores", "mtp_active")
    keys = _adaptive_keys("main")

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        self.primary.check(inputs, settings)
        super().check(inputs, settings)

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> Float[Array, "B S"]:
        return self.primary(stats, inputs)

    def finish(self, call: Call, mean: Scalar) -> Output:
        primary = self.primary.finish(call, mean)
        parts = self.heads.parts(call, primary.loss)
        rest = parts.additional + parts.confidence_reg
        aux = primary.aux | parts.aux("main")
        return Output(primary.loss + rest, rest, aux, parts)


@dataclasses.dataclass(frozen=True)
class AdaptiveSecondary(_Adaptive, BatchTerm):
    """The adaptive loss of heads and confidences beside another main loss.

    `primary_logits` and `hidden_states`, which models with such heads return as well,
    may be given: their weight is 0 here.

    Attributes:
      heads: what it consists of.
    """

    heads: AdaptiveHeads
    name: str = "adaptive_mtp_loss"
    option = 'mtp_type="adaptive"'
    requires = ("additional_logits",)
    accepts = ("confidence_scores", "mtp_active", "primary_logits", "hidden_states")
    keys = ("adaptive_mtp_loss", *_adaptive_keys("adaptive_mtp"))

    def finish(self, call: Call) -> Output:
        parts = self.heads.parts(call, jnp.zeros((), float_dtype()))
        loss = parts.additional + parts.confidence_reg
        aux = {self.name: loss} | parts.aux("adaptive_mtp")
        return Output(loss, loss, aux, parts)
