"""Token terms: functions of TokenStats, summed with the tokens' weights.

The same objective serves both doors, one block of the rows at a time.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ava_jax.config import UnifiedLossConfig, Weight, weight_at
from ava_jax.kernel.product import Product
from ava_jax.kernel.statistics import token_statistics
from ava_jax.kernel.stats import Kernel, Query, TokenStats
from ava_jax.losses import likelihood
from ava_jax.losses.repetition import (
    Charges,
    early_eos_charges,
    history_charges,
    immediate_charges,
    join_charges,
    ngram_charges,
)
from ava_jax.reduce import as_float, weighted_sum
from ava_jax.tokens import History, Tokens


@flax.struct.dataclass
class TokenInputs:
    """What the token terms know of each token besides its logits, [B, S, ...].

    Attributes:
      targets: ids; 0 where the token does not count.
      weights: per-token weights; 0 where the token does not count.
      positions: position within the segment.
      segments: segment ids.
      row_positions: position within the row.
      charges: what the penalties charge; None if there are none.
      extra: the caller's `extra_inputs`.
    """

    targets: Int[Array, "B S"]
    weights: Float[Array, "B S"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    row_positions: Int[Array, "B S"]
    charges: Charges | None
    extra: dict[str, Array]


@flax.struct.dataclass
class SharedInputs:
    """What every block sees whole.

    Attributes:
      temperature: T of the main loss; None is 1.
      extra: the states of the extra terms, by name.
    """

    temperature: Float[Array, ""] | None
    extra: dict[str, Any]


@runtime_checkable
class ExtraTerm(Protocol):
    """A token term of the user's own, served by both doors.

    It must be hashable (a frozen dataclass, say). `weight · mean_w(apply(...))` is part
    of the loss and reported in `aux` under `name`. Two members are optional: `weight`,
    a number or a schedule of the step (1 without it), and `update(state, mean)`, which
    returns the state after a training step whose unweighted mean is given.

    Example:
      >>> import dataclasses, jax.numpy as jnp, ava_jax
      >>> @dataclasses.dataclass(frozen=True)
      ... class ConfidencePenalty:
      ...     name: str = "confidence_penalty"
      ...     weight: float = 0.1
      ...     def init(self):
      ...         return ()
      ...     def apply(self, state, stats, inputs):
      ...         return -stats.entropy
      >>> config = ava_jax.UnifiedLossConfig(vocab_size=8)
      >>> loss_fn = ava_jax.unified_loss(config, extra_terms=(ConfidencePenalty(),))
      >>> _, aux, _ = loss_fn(loss_fn.init(), logits=jnp.zeros((1, 4, 8)),
      ...                     targets=jnp.array([[1, 2, 3, 4]]))
      >>> round(float(aux["confidence_penalty"]), 4)
      -0.2079

    References:
      Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output
      Distributions, 2017 (the example).
    """

    @property
    def name(self) -> str:
        """The key in `aux` and in `state.extra`."""
        ...

    def init(self) -> Any:
        """Returns the term's state, a pytree of arrays; `()` for none."""
        ...

    def apply(
        self, state: Any, stats: TokenStats, inputs: TokenInputs
    ) -> Float[Array, "B S"]:
        """Returns the value per token of a block; tokens of weight 0 are left out."""
        ...


def extra_weight(term: ExtraTerm, step: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the term's weight at the step."""
    weight: Weight = getattr(term, "weight", 1.0)
    return weight_at(weight, step)


def updated_extra(term: ExtraTerm, state: Any, mean: Float[Array, ""]) -> Any:
    """Returns the term's state after a training step."""
    update = getattr(term, "update", None)
    return state if update is None else update(state, mean)


def charges_for(config: UnifiedLossConfig, tokens: Tokens) -> Charges | None:
    """Finds, once per step, what the penalties on predictions charge."""
    if config.penalty_source != "predictions":
        return None
    charges = []
    if config.use_ngram_penalty:
        size, most = config.ngram_size, config.ngram_max_matches
        charges.append(ngram_charges(tokens, size, most))
    if config.use_immediate_repetition_penalty:
        charges.append(immediate_charges(tokens))
    if config.eos_token_id is not None and config.is_on("eos_penalty_weight"):
        length = config.min_sequence_length
        charges.append(early_eos_charges(tokens, config.eos_token_id, length))
    return join_charges(charges)


def token_inputs(
    tokens: Tokens, charges: Charges | None, extra: dict[str, Array]
) -> TokenInputs:
    """Collects the per-token inputs of the objectives."""
    shape = tokens.targets.shape
    return TokenInputs(
        targets=tokens.targets,
        weights=tokens.weights,
        positions=tokens.positions,
        segments=tokens.segments,
        row_positions=jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1),
        charges=charges,
        extra=extra,
    )


@dataclasses.dataclass(frozen=True)
class TokenObjective:
    """The token terms of one source of logits, as sums over a block.

    Attributes:
      config: the loss configuration.
      main: whether the main loss is taken from this source.
      others: whether penalties, metrics and extra terms are.
      extra_terms: the user's terms.
    """

    config: UnifiedLossConfig
    main: bool
    others: bool
    extra_terms: tuple[ExtraTerm, ...] = ()

    def __call__(
        self,
        logits: Float[Array, "B C V"] | Product,
        inputs: TokenInputs,
        history: History | None,
        shared: SharedInputs,
        kernel: Kernel,
    ) -> dict[str, Float[Array, ""]]:
        """Returns `Σ w·value` over the block, by term.

        Args:
          logits: a block's.
          inputs: the block's tokens.
          history: their rows, for penalties that look at all earlier tokens.
          shared: what is the same for every token.
          kernel: how the block is reduced.
        """
        charges = self._charges(inputs, history)
        stats = self._statistics(logits, inputs, charges, shared.temperature, kernel)
        values = {}
        if self.main:
            values |= self._main(stats, inputs)
        if self.others:
            values |= self._penalties(stats, charges)
            values |= {
                "nll": stats.nll,
                "accuracy": as_float(stats.is_top),
                "entropy": stats.entropy,
            }
            for term in self.extra_terms:
                state = shared.extra[term.name]
                values[term.name] = term.apply(state, stats, inputs)
        return {k: weighted_sum(v, inputs.weights) for k, v in values.items()}

    def num_ids(self, inputs: TokenInputs, history: History | None) -> int | None:
        """Returns how many ids of a token it asks for; None with the user's terms.

        A soft-cap's slope, too, wants the logits themselves.
        """
        if self.extra_terms or self.config.logit_soft_cap is not None:
            return None
        charges = jax.eval_shape(self._charges, inputs, history)
        return 1 + (0 if charges is None else charges.ids.shape[-1])

    def _charges(self, inputs, history) -> Charges | None:
        if not self.others or history is None:
            return inputs.charges if self.others else None
        of_history = history_charges(
            history, inputs.targets, inputs.segments, inputs.row_positions
        )
        return join_charges([c for c in (inputs.charges, of_history) if c is not None])

    def _statistics(self, logits, inputs, charges, temperature, kernel) -> TokenStats:
        config = self.config
        is_penalized = charges is not None
        query = Query(
            targets=inputs.targets,
            active=inputs.weights != 0,
            candidates={"penalized": charges.ids} if is_penalized else {},
            log_one_minus_p=bool(
                is_penalized or config.use_focal_loss or self.extra_terms
            ),
        )
        vocabulary = kernel.vocabulary(config.vocab_size, config.logit_soft_cap)
        if self.extra_terms and isinstance(logits, Product):
            # They may ask for the largest logit, whichever it is.
            logits = logits.logits()
        return token_statistics(logits, query, vocabulary, temperature)

    def _main(self, stats, inputs):
        config = self.config
        if config.use_focal_loss:
            primary = likelihood.focal_cross_entropy(
                stats, inputs.targets, config.focal_alpha, config.focal_gamma
            )
        else:
            primary = likelihood.smoothed_cross_entropy(stats, config.label_smoothing)
        values = {"primary": primary}
        if config.is_on("z_loss_weight"):
            values["z_loss"] = likelihood.log_z_squared(stats)
        return values

    def _penalties(self, stats, charges):
        values = {}
        if charges is not None:
            values |= charges.of(stats.unlikelihood("penalized"))
        if self.config.use_ngram_penalty:
            values["token_diversity"] = likelihood.token_diversity(
                stats, self.config.vocab_size
            )
        return values


@dataclasses.dataclass(frozen=True)
class HeadObjective:
    """The cross-entropies of multi-token-prediction heads, summed per head.

    Attributes:
      config: the loss configuration.
      num_heads: K; the block's `extra["head"]` says which head a token belongs to.
      smoothing: ε of the label smoothing.
    """

    config: UnifiedLossConfig
    num_heads: int
    smoothing: float

    def __call__(
        self,
        logits: Float[Array, "*n V"] | Product,
        inputs: TokenInputs,
        history: History | None,
        shared: SharedInputs | None,
        kernel: Kernel,
    ) -> dict[str, Float[Array, "K"]]:
        """Returns `Σ w·ce` over the block, [K]."""
        config = self.config
        query = Query(
            targets=inputs.targets, active=inputs.weights != 0, log_one_minus_p=False
        )
        vocabulary = kernel.vocabulary(config.vocab_size, config.logit_soft_cap)
        stats = token_statistics(logits, query, vocabulary)
        values = likelihood.smoothed_cross_entropy(stats, self.smoothing)
        heads = jnp.arange(self.num_heads, dtype=jnp.int32)
        mine = inputs.extra["head"][..., None] == heads
        weights = jnp.where(mine, inputs.weights[..., None], 0.0)
        spread = jnp.broadcast_to(values[..., None], weights.shape)
        kept = jnp.where(weights != 0, spread, jnp.zeros_like(spread))
        axes = tuple(range(weights.ndim - 1))
        return {"heads": jnp.sum(weights * kept, axes)}

    def num_ids(self, inputs: TokenInputs, history: History | None) -> int | None:
        """Returns that it asks for one id of a token; None with a soft-cap."""
        del inputs, history
        return 1 if self.config.logit_soft_cap is None else None
