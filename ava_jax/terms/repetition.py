"""Penalties of repetition and of an early end of the sequence.

Those on predictions name ids, the candidates, that a token should not predict, and pay
for their unlikelihood −log(1 − p), or for logits that come near the target's. Those on
targets are numbers computed from the ids alone; they have no gradient.
"""

import dataclasses

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ava_jax.config import Weight
from ava_jax.inputs import LossInputs
from ava_jax.kernel.stats import TokenStats
from ava_jax.losses.repetition import contrast
from ava_jax.reduce import as_float, safe_divide, weighted_sum
from ava_jax.terms.base import BatchTerm, Call, Scalar, TokenInputs, TokenTerm
from ava_jax.tokens import (
    History,
    Tokens,
    earlier_continuations,
    earlier_ids,
    longest_runs,
    read_history,
    repeated_ngram_pairs,
    repeated_token,
    whole_windows,
)
from ava_jax.windows import Recent, read_recent, recent_ids


@flax.struct.dataclass
class Penalized:
    """Ids whose unlikelihood a token pays for.

    Attributes:
      ids: the candidates.
      amounts: how much of the unlikelihood of each; 0 where there is none.
    """

    ids: Int[Array, "B S Q"]
    amounts: Float[Array, "B S Q"]


class UnlikelihoodTerm(TokenTerm):
    """`Σ_c amount_c · −log(1 − p_c)` over the ids that a token is penalized for.

    References:
      Welleck et al., Neural Text Generation with Unlikelihood Training, 2020.
    """

    def penalized(self, inputs: TokenInputs) -> Penalized:
        """Returns the ids of a block and their amounts."""
        return inputs.prepared

    def candidates(self, inputs: TokenInputs) -> Int[Array, "B S Q"]:
        return self.penalized(inputs).ids

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> Float[Array, "B S"]:
        amounts = self.penalized(inputs).amounts
        return jnp.sum(amounts * stats.unlikelihood(self.name), -1)


@dataclasses.dataclass(frozen=True)
class NgramPenalty(UnlikelihoodTerm):
    """Penalizes what followed the same n−1 tokens earlier, unless it is the target.

    Attributes:
      ngram_size: n.
      max_matches: how many earlier matches of a context are looked at, latest first.
    """

    ngram_size: int
    max_matches: int
    weight: Weight
    name: str = "ngram_repetition"
    part = "ngram_penalty"
    keys = ("ngram_repetition", "ngram_penalty")

    def prepare(self, tokens: Tokens) -> Penalized:
        ids, exists = earlier_continuations(tokens, self.ngram_size, self.max_matches)
        return Penalized(ids, as_float(exists & (ids != tokens.targets[..., None])))


@dataclasses.dataclass(frozen=True)
class ImmediatePenalty(UnlikelihoodTerm):
    """Penalizes the token before, by 2r−1 after a run of r, unless it is the target."""

    weight: Weight
    name: str = "immediate_repetition_penalty"
    keys = ("immediate_repetition_penalty",)

    def prepare(self, tokens: Tokens) -> Penalized:
        ids, run = repeated_token(tokens)
        wrong = tokens.active & (run > 0) & (ids != tokens.targets)
        amounts = as_float(jnp.where(wrong, 2 * run - 1, 0))
        return Penalized(ids[..., None], amounts[..., None])


@dataclasses.dataclass(frozen=True)
class EarlyEOSPenalty(UnlikelihoodTerm):
    """Penalizes the end-of-sequence id at early positions whose target it is not.

    Attributes:
      eos_token_id: the id.
      min_length: positions of a segment below it are early.
    """

    eos_token_id: int
    min_length: int
    weight: Weight
    name: str = "eos_penalty"
    part = "main_loss"
    keys = ("eos_penalty",)

    def prepare(self, tokens: Tokens) -> Penalized:
        early = _early(tokens, self.min_length)
        amounts = as_float(early & (tokens.targets != self.eos_token_id))
        ids = jnp.full((*tokens.targets.shape, 1), self.eos_token_id, jnp.int32)
        return Penalized(ids, amounts[..., None])


@dataclasses.dataclass(frozen=True)
class TokenUnlikelihood(UnlikelihoodTerm):
    """Penalizes all distinct earlier ids of the segment but the target."""

    weight: Weight
    name: str = "unlikelihood"
    keys = ("unlikelihood",)

    def rows(self, tokens: Tokens) -> History:
        return read_history(tokens)

    def penalized(self, inputs: TokenInputs) -> Penalized:
        ids, found = earlier_ids(inputs.rows, inputs.segments, inputs.row_positions)
        return Penalized(ids, as_float(found & (ids != inputs.targets[..., None])))


@dataclasses.dataclass(frozen=True)
class ContrastiveToken(TokenTerm):
    """`log(1 + Σ_c exp(z_c − z_y))` over the distinct recent ids c but the target y.

    Attributes:
      window: how many positions before a token are looked at, in its segment.

    References:
      Jiang et al., A Simple Contrastive Learning Objective for Alleviating Neural Text
      Degeneration, 2022.
    """

    window: int
    weight: Weight
    name: str = "contrastive_token"
    keys = ("contrastive_token",)

    def rows(self, tokens: Tokens) -> Recent:
        return read_recent(tokens)

    def candidates(self, inputs: TokenInputs) -> Int[Array, "B S Q"]:
        return self._recent(inputs)[0]

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> Float[Array, "B S"]:
        ids, found = self._recent(inputs)
        others = found & (ids != inputs.targets[..., None])
        return contrast(stats.target, stats.candidates[self.name], others)

    def _recent(self, inputs: TokenInputs):
        positions = inputs.row_positions
        return recent_ids(inputs.rows, inputs.segments, positions, self.window)


def _early(tokens: Tokens, min_length: int) -> Bool[Array, "B S"]:
    """Returns the unmasked tokens at early positions of their segment."""
    return tokens.active & (tokens.positions < min_length)


class _OfTargets(BatchTerm):
    """A number of the target ids alone, without a gradient."""

    is_share = True


@dataclasses.dataclass(frozen=True)
class TargetNgrams(_OfTargets):
    """`Σ_rows Σ_distinct c(c−1)/2 / windows` over the n-grams of the targets.

    Attributes:
      ngram_size: n.
    """

    ngram_size: int
    weight: Weight
    name: str = "ngram_repetition"
    part = "ngram_penalty"
    keys = ("ngram_repetition", "ngram_penalty")

    def __call__(self, call: Call) -> Scalar:
        pairs = repeated_ngram_pairs(call.tokens, self.ngram_size)
        return safe_divide(pairs, call.normalizers.windows)

    def counts(self, tokens: Tokens, inputs: LossInputs) -> dict[str, Array]:
        windows = whole_windows(tokens, self.ngram_size)
        return {"windows": jnp.sum(as_float(windows))}


@dataclasses.dataclass(frozen=True)
class TargetRuns(_OfTargets):
    """The mean over rows of (longest run of equal targets − 1)²."""

    weight: Weight
    name: str = "immediate_repetition_penalty"
    keys = ("immediate_repetition_penalty",)

    def __call__(self, call: Call) -> Scalar:
        squares = as_float(longest_runs(call.tokens) - 1) ** 2
        return safe_divide(jnp.sum(squares), call.normalizers.rows)


@dataclasses.dataclass(frozen=True)
class TargetEarlyEOS(_OfTargets):
    """The share of the tokens whose target is an early end of the sequence.

    Attributes:
      eos_token_id: the id.
      min_length: positions of a segment below it are early.
    """

    eos_token_id: int
    min_length: int
    weight: Weight
    name: str = "eos_penalty"
    part = "main_loss"
    keys = ("eos_penalty",)

    def __call__(self, call: Call) -> Scalar:
        tokens = call.tokens
        early = _early(tokens, self.min_length)
        found = as_float(early & (tokens.targets == self.eos_token_id))
        total = weighted_sum(found, tokens.weights)
        return safe_divide(total, call.normalizers.tokens)
