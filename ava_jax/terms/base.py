"""What a term is: one frozen object that holds everything about it.

A token term is a function of `TokenStats`, averaged over the unmasked tokens. A batch
term is a function of the call's arguments. Built-in terms and a user's own have the
same form: adding one takes a class, and nothing else has to know of it.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ava_jax.config import Settings, Weight, weight_at
from ava_jax.inputs import LossInputs, Normalizers, array
from ava_jax.kernel.execute import Plan
from ava_jax.kernel.stats import TokenStats, Vocabulary
from ava_jax.reduce import as_float, safe_divide
from ava_jax.tokens import Tokens

Aux = dict[str, Array]
Scalar = Float[Array, ""]


@flax.struct.dataclass
class TokenInputs:
    """What a token term knows of a block of tokens besides their logits.

    Attributes:
      targets: ids; 0 where the token is masked.
      weights: per-token weights; 0 where the token is masked.
      positions: position within the segment.
      segments: segment ids.
      row_positions: position within the row.
      extra: the caller's `extra_inputs`, see `TokenTerm.columns_extra`.
      prepared: this block's part of what the term's `prepare` returned.
      rows: all of what the term's `rows` returned for these rows.
      whole: what the term's `whole` returned.
      state: the term's state.
    """

    targets: Int[Array, "B S"]
    weights: Float[Array, "B S"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    row_positions: Int[Array, "B S"]
    extra: dict[str, Any]
    prepared: Any = None
    rows: Any = None
    whole: Any = None
    state: Any = None


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the loss, read and checked: what a batch term is a function of.

    Attributes:
      inputs: the arguments, see `LossInputs`.
      tokens: the targets, their weights and segments.
      normalizers: the denominators of the optimizer step.
      states: the terms' states, by name.
      step: the optimizer steps taken; schedules are evaluated at it.
      train: whether this is a training step.
      settings: the vocabulary, and how passes over it go.
      plan: the same for this call's shapes.
    """

    inputs: LossInputs
    tokens: Tokens
    normalizers: Normalizers
    states: dict[str, Any]
    step: Int[Array, ""]
    train: bool
    settings: Settings
    plan: Plan

    def array(self, name: str) -> Array:
        """Returns an argument that the term requires."""
        return array(self.inputs, name)

    @property
    def share(self) -> Scalar:
        """The call's share of the optimizer step's weights; 1 without micro-batches."""
        return safe_divide(jnp.sum(self.tokens.weights), self.normalizers.tokens)

    @property
    def routed_share(self) -> Scalar:
        """The call's share of the optimizer step's routed tokens."""
        routed = jnp.sum(as_float(self.tokens.routed))
        return safe_divide(routed, self.normalizers.routed)


class Step(NamedTuple):
    """A finished training step.

    Attributes:
      number: how many steps came before it; schedules are evaluated at it.
      main_loss: its main loss.
    """

    number: Int[Array, ""]
    main_loss: Scalar


class Output(NamedTuple):
    """What a term adds to one call; all of it adds up over micro-batches.

    Attributes:
      loss: the call's share of the weighted term.
      outside: how much of `loss` is not part of the pass over the vocabulary.
      aux: the term's entries of `aux`.
      statistics: what `update` and `report` need of the step.
    """

    loss: Scalar
    outside: Scalar
    aux: Aux
    statistics: Any = None


class Term:
    """What token terms and batch terms have in common.

    A term is a frozen dataclass, so that it can be compared and hashed.

    Attributes:
      name: its key in `aux`, and in `state.extra` if it has a state.
      weight: a number, or a schedule evaluated at `state.step`.
      part: the entry of `aux` that sums it up with others, such as `"main_loss"`; None
        if `total_loss` alone does.
      requires: arguments of the call that it cannot do without.
      accepts: arguments that it reads if they are given.
      requires_extra: entries of `extra_inputs` that it cannot do without.
      accepts_extra: entries of `extra_inputs` that it reads if they are given; None if
        it may read any.
      option: what switches it on, for error messages; the name if empty.
      keys: all entries of `aux` that it may make.
      fields: the fields of `LossState` that are its state; `state.extra` if empty.
    """

    name: str
    weight: Weight = 1.0
    part: str | None = None
    requires: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()
    requires_extra: tuple[str, ...] = ()
    accepts_extra: tuple[str, ...] | None = ()
    option: str = ""
    keys: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = ()

    def weight_at(self, step: Int[Array, ""]) -> Scalar:
        """Returns the weight at an optimizer step."""
        return weight_at(self.weight, step)

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        """Raises ValueError or TypeError where arguments of the term do not fit."""

    def counts(self, tokens: Tokens, inputs: LossInputs) -> dict[str, Array]:
        """Returns the denominators that the term needs, by field of `Normalizers`."""
        del tokens, inputs
        return {}

    def init(self) -> Any:
        """Returns the state of step 0, a pytree of arrays; None for no state.

        A term with `fields` returns a dict of them.
        """
        return None

    def update(self, state: Any, statistics: Any, step: Step) -> Any:
        """Returns the state after a training step.

        Args:
          state: the state before it.
          statistics: the step's, see `Output`; the unweighted mean of a token term, or
            of a batch term its value, unless its class says otherwise.
          step: the step.
        """
        del statistics, step
        return state

    def report(self, state: Any, statistics: Any) -> Aux:
        """Returns the entries of `aux` that do not add up over micro-batches.

        Args:
          state: the state after the step.
          statistics: as for `update`.
        """
        del state, statistics
        return {}


class TokenTerm(Term):
    """A function of each token's statistics; the loss has its mean over w.

    `weight · Σ w·value / Σ w`, over the unmasked tokens. Logits and hidden states serve
    it alike, a block of the rows at a time, so it treats tokens one by one.

    Attributes:
      source: the argument whose logits it looks at, if that is given; the main logits
        otherwise.
      needs_log_one_minus_p: whether it asks for log(1 − p) of the target or of a
        candidate.
      needs_logits: whether it asks for more than sums over the vocabulary and the
        logits of the target and the candidates: for `top`, say.
      logits_temperature: the logits are divided by it before their statistics are
        taken; the statistics are then those of that distribution.
      measured: the entries of `aux` that `measurements` makes.
      columns_extra: entries of `extra_inputs` whose last axis is the vocabulary; the
        term finds them wrapped in `Columns`.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, ava_jax
      >>> @dataclasses.dataclass(frozen=True)
      ... class ConfidencePenalty(ava_jax.TokenTerm):
      ...     name: str = "confidence_penalty"
      ...     weight: float = 0.1
      ...     def __call__(self, stats, inputs):
      ...         return -stats.entropy
      >>> config = ava_jax.UnifiedLossConfig(vocab_size=8)
      >>> loss_fn = ava_jax.unified_loss(config, extra_terms=(ConfidencePenalty(),))
      >>> _, aux, _ = jax.jit(loss_fn)(
      ...     loss_fn.init(), logits=jnp.zeros((1, 4, 8)),
      ...     targets=jnp.array([[1, 2, 3, 4]]))
      >>> round(float(aux["confidence_penalty"]), 4)
      -0.2079

    References:
      Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output
      Distributions, 2017 (the example).
    """

    source: ClassVar[str] = "logits"
    needs_log_one_minus_p: bool = True
    needs_logits: bool = True
    accepts_extra: tuple[str, ...] | None = None
    logits_temperature: float = 1.0
    measured: ClassVar[tuple[str, ...]] = ()
    columns_extra: ClassVar[tuple[str, ...]] = ()

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> Float[Array, "B S"]:
        """Returns the value per token of a block."""
        raise NotImplementedError(f"{type(self).__name__} needs a __call__")

    def prepare(self, tokens: Tokens) -> Any:
        """Returns arrays [B, S, ...] of integers and masks, made once per step."""
        del tokens
        return None

    def rows(self, tokens: Tokens) -> Any:
        """Returns arrays [B, ...] that every block of these rows sees whole."""
        del tokens
        return None

    def whole(self, inputs: LossInputs) -> Any:
        """Returns constants that every block sees whole, such as a teacher's head.

        Those whose last axis is the vocabulary are wrapped in `Columns`.
        """
        del inputs
        return None

    def candidates(self, inputs: TokenInputs) -> Int[Array, "B S Q"] | None:
        """Returns ids whose logits it sees: `stats.candidates[name]` and more."""
        del inputs
        return None

    def measurements(self, stats: TokenStats, inputs: TokenInputs) -> Aux:
        """Returns further numbers per token; `aux` has their means over w."""
        del stats, inputs
        return {}

    def denominator(self, normalizers: Normalizers) -> Scalar:
        """Returns what the sum of the weighted values is divided by."""
        return normalizers.tokens

    def temperature(self, state: Any) -> Scalar | None:
        """Returns the temperature of the tempered statistics; None leaves it at 1."""
        del state
        return None

    def finish(self, call: Call, mean: Scalar) -> Output:
        """Returns what the term adds to the call, given its share of the mean."""
        loss = self.weight_at(call.step) * mean
        return Output(loss, jnp.zeros_like(loss), {self.name: loss}, mean)


class LogitsTerm(TokenTerm):
    """A token term of the logits themselves, not of their statistics.

    On a mesh with a `vocab_axis` it sees a shard's columns, inside `jax.shard_map`. JAX
    differentiates a `psum` there as if its result were not shared, so a sum over the
    shards needs a derivative of its own (`jax.custom_vjp`).
    """

    def of_logits(
        self,
        logits: Float[Array, "B S V"],
        inputs: TokenInputs,
        vocabulary: Vocabulary,
        precision: lax.PrecisionLike,
    ) -> Float[Array, "B S"]:
        """Returns the value per token of a block.

        Args:
          logits: this shard's columns; masked tokens may hold anything.
          inputs: the block's tokens.
          vocabulary: which columns are classes, and how they are sharded.
          precision: of further products.
        """
        raise NotImplementedError(f"{type(self).__name__} needs of_logits")


class BatchTerm(Term):
    """A function of the call's arguments; the loss has its value, a scalar.

    Attributes:
      is_share: whether the value is divided by the optimizer step's denominators.
        Otherwise it is averaged over micro-batches, weighted by their tokens.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, ava_jax
      >>> @dataclasses.dataclass(frozen=True)
      ... class SmallStates(ava_jax.BatchTerm):
      ...     name: str = "small_states"
      ...     weight: float = 0.1
      ...     requires = ("hidden_states",)
      ...     def __call__(self, call):
      ...         return jnp.mean(call.array("hidden_states") ** 2)
      >>> config = ava_jax.UnifiedLossConfig(vocab_size=8)
      >>> loss_fn = ava_jax.unified_loss(config, extra_terms=(SmallStates(),))
      >>> _, aux, _ = jax.jit(loss_fn)(
      ...     loss_fn.init(), hidden_states=jnp.ones((1, 4, 2)),
      ...     lm_head=jnp.zeros((2, 8)), targets=jnp.array([[1, 2, 3, 4]]))
      >>> round(float(aux["small_states"]), 4)
      0.1
    """

    is_share: bool = False

    def __call__(self, call: Call) -> Scalar:
        """Returns the value."""
        raise NotImplementedError(f"{type(self).__name__} needs a __call__")

    def share(self, call: Call) -> Scalar:
        """Returns the call's share of the optimizer step, by the term's tokens."""
        return call.share

    def finish(self, call: Call) -> Output:
        """Returns what the term adds to the call."""
        value = self(call)
        if not self.is_share:
            value = self.share(call) * value
        loss = self.weight_at(call.step) * value
        return Output(loss, loss, {self.name: loss}, value)
