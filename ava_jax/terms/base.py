"""What a term is: one frozen object that holds everything about it.

A token term is a function of `TokenStats`, averaged over the unmasked tokens. A batch
term is a function of the call's arguments. Built-in terms and a user's own have the
same form: adding one takes a class, and nothing else has to know of it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ava_jax.config import Settings, Weight, weight_at
from ava_jax.inputs import LossInputs, Normalizers, array
from ava_jax.kernel.execute import Plan
from ava_jax.kernel.stats import TokenStats, Vocabulary
from ava_jax.ranges import is_real_scalar
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
    it alike, a block of the rows at a time, so it treats tokens one by one. It costs
    the statistics that its values depend on, which are found by tracing it.

    Attributes:
      source: the argument whose logits it looks at, if that is given; the main logits
        otherwise.
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
        value = scalar(self, "value", self(call))
        if not self.is_share:
            value = self.share(call) * value
        loss = self.weight_at(call.step) * value
        return Output(loss, loss, {self.name: loss}, value)


# What terms return is checked here: an error names the term and what it has to return.

_UNREDUCED = "return the values unreduced, the loss takes their weighted mean"


def values_of(
    term: TokenTerm, stats: TokenStats, inputs: TokenInputs
) -> dict[str, Float[Array, "B S"]]:
    """Returns a term's value per token and its measurements, by name."""
    shape = inputs.targets.shape
    values = {term.name: per_token(term, "value", term(stats, inputs), shape)}
    measured = _mapping(term, "measurements", term.measurements(stats, inputs))
    if set(measured) != set(term.measured):
        raise ValueError(
            f"the term {term.name!r} must return from measurements what its `measured` "
            f"lists, {sorted(term.measured)}, got {sorted(measured)}"
        )
    return values | {
        name: per_token(term, f"measurement {name!r}", value, shape)
        for name, value in measured.items()
    }


def per_token(
    term: Term, what: str, value: Any, shape: tuple[int, ...]
) -> Float[Array, "B S"]:
    """Returns a floating-point number per token."""
    wanted = f"a floating-point array {shape}, a number for each token of the block"
    if not _is_array(value, jnp.floating) or value.shape != shape:
        _refuse(term, what, wanted, value, _UNREDUCED)
    return as_float(value)


def candidates_of(term: TokenTerm, inputs: TokenInputs) -> Int[Array, "B S Q"] | None:
    """Returns a term's candidates: ids of each token, or None."""
    ids, shape = term.candidates(inputs), inputs.targets.shape
    if ids is None:
        return None
    if not _is_array(ids, jnp.integer) or ids.ndim != 3 or ids.shape[:2] != shape:
        wanted = f"integers {(*shape, 'Q')}, ids of each token of the block, or None"
        _refuse(term, "candidates", wanted, ids)
    return ids


def arrays_like(term: Term, what: str, tree: Any, start: tuple[int, ...]) -> Any:
    """Returns a pytree of arrays whose shapes have to start with the given one."""
    for leaf in jax.tree.leaves(tree):
        if not _is_array(leaf) or leaf.shape[: len(start)] != start:
            _refuse(term, what, f"arrays that start with the shape {start}", leaf)
    return tree


def scalar(term: Term, what: str, value: Any, hint: str = "") -> Scalar:
    """Returns a real number, an array of no axes."""
    if not is_real_scalar(value):
        _refuse(term, what, "a real scalar ()", value, hint)
    return as_float(value)


def output_of(term: Term, output: Any) -> Output:
    """Returns what a term's `finish` has returned."""
    if not isinstance(output, Output):
        _refuse(term, "finish", "a terms.base.Output", output)
    scalar(term, "finish: loss", output.loss)
    scalar(term, "finish: outside", output.outside)
    return output._replace(aux=aux_of(term, "finish: aux", output.aux))


def aux_of(term: Term, what: str, aux: Any) -> dict[str, Array]:
    """Returns entries of `aux`, which the term has to have declared."""
    entries = _mapping(term, what, aux)
    if is_own(term) and (unknown := sorted({*entries} - entries_of(term))):
        raise ValueError(
            f"the term {term.name!r} returns from {what} the entries {unknown}, which "
            "its `keys` must list, so that no other term overwrites them"
        )
    for name, value in entries.items():
        if not _is_array(value):
            _refuse(term, f"{what}[{name!r}]", "an array", value)
    return entries


def entries_of(term: Term) -> set[str]:
    """Returns all entries of `aux` that a term may make, parts aside."""
    measured = term.measured if isinstance(term, TokenTerm) else ()
    return {term.name, *term.keys, *measured}


def is_own(term: Term) -> bool:
    """Whether a term is a user's, also in the form of `ava_jax.terms.user`."""
    module = type(term).__module__
    return module == "ava_jax.terms.user" or not module.startswith("ava_jax.terms.")


def new_state(term: Term, old: Any, new: Any) -> Any:
    """Returns the state after a step, which must be of the form of the one before."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        wanted = f"a state of the form {jax.tree.structure(old)}, which it has before"
        _refuse(term, "update", wanted, jax.tree.structure(new))
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if not _is_array(after) or _form(before) != _form(after):
            wanted = f"a state with {_shown(before)}, as it has before the step"
            _refuse(term, "update", wanted, after)
    return new


def first_state(term: Term, state: Any) -> Any:
    """Returns the state of step 0, a pytree of arrays."""
    for leaf in jax.tree.leaves(state):
        if not _is_array(leaf):
            _refuse(term, "init", "a pytree of arrays, such as jnp.zeros(())", leaf)
    return state


def _mapping(term: Term, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        _refuse(term, what, "a dict of arrays by name", value)
    return dict(value)


def _is_array(value: object, kind: Any = np.generic) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic) and jnp.issubdtype(
        value.dtype, kind
    )


def _form(x: Array) -> tuple[tuple[int, ...], Any]:
    return x.shape, x.dtype


def _shown(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"{value!r} ({type(value).__name__})"


def _refuse(term: Term, what: str, wanted: str, value: Any, hint: str = "") -> None:
    """Raises ValueError for another shape, TypeError for anything else."""
    message = f"the term {term.name!r} must return {wanted}, as its {what}; got "
    message += _shown(value) + (hint and f": {hint}")
    raise (ValueError if _is_array(value) else TypeError)(message)
