"""What the pass over the vocabulary computes: sums of the token terms over a block."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ava_jax.kernel.passes import Columns
from ava_jax.kernel.product import Product
from ava_jax.kernel.statistics import cooled, token_statistics
from ava_jax.kernel.stats import Kernel, Query, TokenStats
from ava_jax.losses.likelihood import smoothed_cross_entropy
from ava_jax.reduce import along_axis, as_float, weighted_sum
from ava_jax.terms.base import (
    LogitsTerm,
    TokenInputs,
    TokenTerm,
    candidates_of,
    per_token,
    values_of,
)
from ava_jax.tokens import Tokens

_CANDIDATES = "all"
_OF_TOP = frozenset(("top", "second_shift", "second_log_sum"))
_OF_LOG_ONE_MINUS_P = frozenset(("queried", "second_shift", "second_log_sum"))
# Calls of another jaxpr with the same inputs and outputs.
_CALLS = ("jit", "pjit", "closed_call", "checkpoint", "custom_jvp_call")
# With it, exponentials are 0 of classes whose probability at temperature 1 is 1e-9.
_COLDEST = 0.25


@flax.struct.dataclass
class Shared:
    """What every block sees whole.

    Attributes:
      temperature: of the tempered statistics; None is 1.
      states: of the terms that read theirs, by name.
      whole: what the terms' `whole` returned, by name.
    """

    temperature: Float[Array, ""] | None
    states: dict[str, Any]
    whole: dict[str, Any]


class Group(NamedTuple):
    """Tokens whose logits come from one array.

    Attributes:
      objective: what is computed of them.
      source: logits, or hidden states if `is_projected`, [G, B, S, ·].
      inputs: the tokens, [G, B, S, ...].
      is_projected: whether `lm_head` makes the logits.
      coefficients: the weight of each sum in the loss, by name.
    """

    objective: "TokenObjective | HeadObjective"
    source: Float[Array, "G B S X"]
    inputs: TokenInputs
    is_projected: bool
    coefficients: dict[str, Float[Array, "..."]]


def token_inputs(
    tokens: Tokens,
    *,
    prepared: Any = None,
    extra: dict[str, Array | Columns] | None = None,
) -> TokenInputs:
    """Returns what terms know of the tokens before any logits are there."""
    shape = tokens.targets.shape
    return TokenInputs(
        targets=tokens.targets,
        weights=tokens.weights,
        positions=tokens.positions,
        segments=tokens.segments,
        row_positions=lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1),
        extra=extra or {},
        prepared=prepared,
    )


@dataclasses.dataclass(frozen=True)
class TokenObjective:
    """The token terms that look at the same logits.

    Attributes:
      terms: the terms.
      vocab_size: V.
      soft_cap: of the logits.
      measures: whether `nll`, `accuracy` and `entropy` are computed, too.
    """

    terms: tuple[TokenTerm, ...]
    vocab_size: int
    soft_cap: float | None
    measures: bool

    def __call__(
        self,
        logits: Float[Array, "B C V"] | Product,
        inputs: TokenInputs,
        rows: dict[str, Any],
        shared: Shared,
        kernel: Kernel,
    ) -> dict[str, Float[Array, ""]]:
        """Returns `Σ w·value` over the block, by term.

        Args:
          logits: a block's.
          inputs: the block's tokens; `prepared` is a dict by term.
          rows: by term, what its `rows` returned.
          shared: what is the same for every token.
          kernel: how the block is reduced.
        """
        own = self._inputs_by_term(inputs, rows, shared)
        if self._needs_logits(self._reads(own)) and isinstance(logits, Product):
            logits = logits.logits()
        values: dict[str, Array] = {}
        for temperature, objective in self._by_temperature().items():
            given = logits, inputs, own, shared, kernel
            values |= objective._values(temperature, *given)
        return {k: weighted_sum(v, inputs.weights) for k, v in values.items()}

    def num_ids(
        self, inputs: TokenInputs, rows: dict[str, Any], shared: Shared
    ) -> int | None:
        """Returns for how many ids of a token it wants logits; None for all of them.

        A soft-cap's slope, too, wants the logits themselves. So does what is measured
        at temperature 1 beside very cold logits, whose exponentials underflow.
        """
        own = self._inputs_by_term(inputs, rows, shared)
        if self.soft_cap is not None or self._needs_logits(self._reads(own)):
            return None
        parts = self._by_temperature().items()
        if any(part.measures and divisor < _COLDEST for divisor, part in parts):
            return None
        found = jax.eval_shape(self._candidates, own)
        return 1 + sum(ids.shape[-1] for ids in found.values())

    def _reads(self, inputs: dict[str, TokenInputs]) -> frozenset[str]:
        """Returns the statistics that the terms' values depend on."""
        of_stats = (t for t in self.terms if not isinstance(t, LogitsTerm))
        return frozenset().union(
            *(statistics_read(t, inputs[t.name]) for t in of_stats)
        )

    def _needs_logits(self, reads: frozenset[str]) -> bool:
        has_own = any(t.logits_temperature != 1 for t in self.terms)
        # A product applies a temperature last, and so no soft-cap.
        is_capped = has_own and self.soft_cap is not None
        has_logits_term = any(isinstance(t, LogitsTerm) for t in self.terms)
        return is_capped or has_logits_term or not reads.isdisjoint(_OF_TOP)

    def _by_temperature(self) -> dict[float, "TokenObjective"]:
        """Returns the objectives of the temperatures of logits, that of 1 first.

        One of them measures: that of 1, if it has any terms.
        """

        def divisor(term: TokenTerm) -> float:
            # Terms of the logits themselves divide them on their own.
            is_own = isinstance(term, LogitsTerm)
            return 1.0 if is_own else float(term.logits_temperature)

        found: dict[float, list[TokenTerm]] = {}
        for term in sorted(self.terms, key=lambda term: divisor(term) != 1):
            found.setdefault(divisor(term), []).append(term)
        parts: dict[float, TokenObjective] = {}
        for temperature, terms in (found or {1.0: []}).items():
            measures = self.measures and not parts
            parts[temperature] = dataclasses.replace(
                self, terms=tuple(terms), measures=measures
            )
        return parts

    def _values(
        self, divisor: float, logits, inputs, own, shared: Shared, kernel: Kernel
    ) -> dict[str, Array]:
        """Returns the values per token of terms whose logits have one temperature."""
        values: dict[str, Array] = {}
        of_stats = []
        for t in self.terms:
            if isinstance(t, LogitsTerm):
                vocabulary = kernel.vocabulary(self.vocab_size, self.soft_cap)
                given = own[t.name], vocabulary, kernel.precision
                value = t.of_logits(logits, *given)
                values[t.name] = per_token(t, "value", value, inputs.targets.shape)
            else:
                of_stats.append(t)
        if not of_stats and not self.measures:
            return values
        objective = dataclasses.replace(self, terms=tuple(of_stats))
        candidates = objective._candidates(own)
        query = objective._query(inputs, candidates, objective._reads(own))
        stats = objective._statistics(divisor, logits, query, shared, kernel)
        given = stats if divisor == 1 else _untempered(stats)
        seen = _by_term(given, candidates)
        for t in of_stats:
            stats_of_term = seen.get(t.name, given)
            values |= values_of(t, stats_of_term, own[t.name])
        if self.measures:
            is_one = divisor == 1
            values["nll"] = stats.nll if is_one else stats.tempered_nll
            values["accuracy"] = as_float(stats.is_top)
            values["entropy"] = stats.entropy if is_one else stats.tempered_entropy
        return values

    def _inputs_by_term(self, inputs: TokenInputs, rows, shared: Shared):
        prepared = inputs.prepared or {}
        return {
            t.name: dataclasses.replace(
                inputs,
                prepared=prepared.get(t.name),
                rows=rows.get(t.name),
                whole=shared.whole.get(t.name),
                state=shared.states.get(t.name),
            )
            for t in self.terms
        }

    def _candidates(self, inputs: dict[str, TokenInputs]) -> dict[str, Array]:
        found = ((t.name, candidates_of(t, inputs[t.name])) for t in self.terms)
        return {name: ids for name, ids in found if ids is not None}

    def _query(self, inputs: TokenInputs, candidates, reads: frozenset[str]) -> Query:
        ids = list(candidates.values())
        return Query(
            targets=inputs.targets,
            active=inputs.weights != 0,
            candidates={_CANDIDATES: jnp.concatenate(ids, -1)} if ids else {},
            log_one_minus_p=not reads.isdisjoint(_OF_LOG_ONE_MINUS_P),
            tempered_entropy="expected_tempered" in reads,
            top=not reads.isdisjoint(_OF_TOP),
        )

    def _statistics(
        self, divisor: float, logits, query: Query, shared: Shared, kernel: Kernel
    ) -> TokenStats:
        vocabulary = kernel.vocabulary(self.vocab_size, self.soft_cap)
        if divisor == 1:
            return token_statistics(logits, query, vocabulary, shared.temperature)
        given = query.active, vocabulary, as_float(divisor)
        logits, vocabulary = cooled(logits, *given)
        if not self.measures:
            query = dataclasses.replace(query, tempered_entropy=False)
            return token_statistics(logits, query, vocabulary)
        # What is measured is at temperature 1, which undoes the division.
        query = dataclasses.replace(query, tempered_entropy=True)
        undone = 1 / as_float(divisor)
        return token_statistics(logits, query, vocabulary, undone)


@flax.struct.dataclass
class _Probe(TokenStats):
    """Statistics to trace a term with.

    Attributes:
      queried: `log_sum_without_queried_top`, whose other numbers it does not depend on.
    """

    queried: Float[Array, "*n"] | None = None

    @property
    def log_sum_without_queried_top(self) -> Float[Array, "*n"]:
        assert self.queried is not None
        return self.queried


def statistics_read(term: TokenTerm, inputs: TokenInputs) -> frozenset[str]:
    """Returns the fields of `TokenStats` that a term's values depend on.

    `"queried"` is among them for `log_sum_without_queried_top`, and so for log(1 − p).
    """
    leaves, tree = jax.tree.flatten(inputs)
    shapes = (jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)
    return _statistics_read(term, tree, tuple(shapes))


@functools.lru_cache(256)
def _statistics_read(
    term: TokenTerm, tree: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]
) -> frozenset[str]:
    inputs = jax.tree.unflatten(tree, shapes)
    shape, dtype = inputs.weights.shape, inputs.weights.dtype

    def like(dtype: Any, *more: int) -> Any:
        return jax.ShapeDtypeStruct((*shape, *more), dtype)

    ids = jax.eval_shape(functools.partial(candidates_of, term), inputs)
    of_ids = () if ids is None else ids.shape[-1:]
    named = () if ids is None else (term.name,)
    scalar: Any = jax.ShapeDtypeStruct((), dtype)
    fields: dict[str, Any] = {f.name: like(dtype) for f in dataclasses.fields(_Probe)}
    fields |= {"top": like(jnp.int32), "is_top": like(bool), "temperature": scalar}
    fields["candidates"] = {name: like(dtype, *of_ids) for name in named}
    fields["candidate_is_top"] = {name: like(bool, *of_ids) for name in named}
    probe = _Probe(**fields)

    def values(probe: _Probe, inputs: TokenInputs):
        return values_of(term, probe, inputs)

    jaxpr = jax.make_jaxpr(values)(probe, inputs).jaxpr
    used = _used_inputs(jaxpr, [True] * len(jaxpr.outvars))
    paths = jax.tree_util.tree_leaves_with_path(probe)
    return frozenset(
        path[0].name for (path, _), is_used in zip(paths, used, strict=False) if is_used
    )


def _used_inputs(jaxpr: Any, used_outputs: list[bool]) -> list[bool]:
    """Returns which inputs of a jaxpr its used outputs depend on: a backward walk."""
    # A literal, which is not an input, cannot be hashed.
    used = {
        id(v) for v, is_used in zip(jaxpr.outvars, used_outputs, strict=True) if is_used
    }
    for equation in reversed(jaxpr.eqns):
        outputs = [id(v) in used for v in equation.outvars]
        if not any(outputs):
            continue
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        needed = [True] * len(equation.invars)
        if inner is not None and equation.primitive.name in _CALLS:
            needed = _used_inputs(getattr(inner, "jaxpr", inner), outputs)
        used |= {
            id(v) for v, is_used in zip(equation.invars, needed, strict=True) if is_used
        }
    return [id(v) in used for v in jaxpr.invars]


def _untempered(stats: TokenStats) -> TokenStats:
    """Returns the statistics at temperature 1 of the logits they are of."""
    return dataclasses.replace(
        stats,
        log_sum_tempered=stats.log_sum,
        expected_tempered=stats.expected,
        temperature=jnp.ones_like(stats.temperature),
    )


@flax.struct.dataclass
class _TermStats(TokenStats):
    """The statistics that one term sees: its own candidates.

    The unlikelihood of all terms' candidates is computed once, side by side.

    Attributes:
      own: of the term's candidates; None if no term asks for it.
    """

    own: Float[Array, "*n Q"] | None = None

    def unlikelihood(self, name: str) -> Float[Array, "*n Q"]:
        return super().unlikelihood(name) if self.own is None else self.own


def _by_term(
    stats: TokenStats, candidates: dict[str, Int[Array, "B C Q"]]
) -> dict[str, TokenStats]:
    """Gives every term the statistics of its own candidates."""
    if not candidates:
        return {}
    is_known = stats.second_log_sum is not None
    every = stats.unlikelihood(_CANDIDATES) if is_known else None
    shared = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats)}
    logits = shared.pop("candidates")[_CANDIDATES]
    is_top = shared.pop("candidate_is_top")[_CANDIDATES]
    seen, start = {}, 0
    for name, ids in candidates.items():
        own = slice(start, start + ids.shape[-1])
        seen[name] = _TermStats(
            **shared,
            candidates={name: logits[..., own]},
            candidate_is_top={name: is_top[..., own]},
            own=None if every is None else every[..., own],
        )
        start = own.stop
    return seen


@dataclasses.dataclass(frozen=True)
class HeadObjective:
    """The cross-entropies of multi-token-prediction heads, summed per head.

    Attributes:
      name: of the sums.
      num_heads: K; the block's `prepared` says which head a token belongs to.
      vocab_size: V.
      soft_cap: of the logits.
      label_smoothing: ε.
    """

    name: str
    num_heads: int
    vocab_size: int
    soft_cap: float | None
    label_smoothing: float = 0.0

    def __call__(
        self,
        logits: Float[Array, "*n V"] | Product,
        inputs: TokenInputs,
        rows: Any,
        shared: Any,
        kernel: Kernel,
    ) -> dict[str, Float[Array, "K"]]:
        """Returns `Σ w·ce` over the block, [K]."""
        active = inputs.weights != 0
        query = Query(inputs.targets, active, log_one_minus_p=False, top=False)
        vocabulary = kernel.vocabulary(self.vocab_size, self.soft_cap)
        stats = token_statistics(logits, query, vocabulary)
        values = smoothed_cross_entropy(stats, self.label_smoothing)
        heads = jnp.arange(self.num_heads, dtype=jnp.int32)
        mine = inputs.prepared[..., None] == along_axis(heads, active.ndim + 1)
        weights = jnp.where(mine, inputs.weights[..., None], 0.0)
        spread = jnp.broadcast_to(values[..., None], weights.shape)
        kept = jnp.where(weights != 0, spread, jnp.zeros_like(spread))
        axes = tuple(range(weights.ndim - 1))
        return {self.name: jnp.sum(weights * kept, axes)}

    def num_ids(self, inputs: TokenInputs, rows: Any, shared: Any) -> int | None:
        """Returns that it wants one logit of a token; None, all, with a soft-cap."""
        del inputs, rows, shared
        return 1 if self.soft_cap is None else None
