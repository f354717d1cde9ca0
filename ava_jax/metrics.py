"""Metrics of generated text, calibration, expert balance and speculative decoding.

Pure functions of arrays, which run under `jax.jit` and `jax.vmap`. Positions with a
mask or weight of 0 are left out, whatever their values.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Integer, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.arrays import as_labels, as_weights
from ava_jax.kernel.sharding import in_one_program
from ava_jax.losses.moe import max_violation as max_violation
from ava_jax.ranges import check_range
from ava_jax.reduce import as_float, safe_divide, weighted_mean
from ava_jax.tokens import Tokens, count_ngrams, plain_tokens, stretch_lengths

# Generated text ------------------------------------------------------------------


@with_checked_arrays
def repeated_ngrams(
    ids: Integer[Array, "B S"],
    mask: Shaped[Array, "B S"] | None = None,
    *,
    ngram_size: int,
) -> Float[Array, "B"]:
    """Computes the share of each row's n-grams that repeat an earlier one (seq-rep-n).

    `1 − distinct / total`, over the n-grams of adjacent unmasked positions. With
    `ngram_size=1`, it is the share of repeated tokens.

    Args:
      ids: token ids of any range [B, S].
      mask: [B, S]; 0 leaves a position out; ones if None.
      ngram_size: n, at least 1.

    Returns:
      The share per row [B], 0 to less than 1; 0 for a row without an n-gram.

    Raises:
      ValueError: `ngram_size` is below 1, or shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import metrics
      >>> ids = jnp.array([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]])
      >>> metrics.repeated_ngrams(ids, ngram_size=2).tolist()
      [0.5, 0.0]

    References:
      Welleck et al., Neural Text Generation with Unlikelihood Training, 2020.
    """
    distinct, total = count_ngrams(_read_ids(ids, mask), ngram_size)
    return safe_divide(total - distinct, total)


@with_checked_arrays
def distinct_ngrams(
    ids: Integer[Array, "B S"],
    mask: Shaped[Array, "B S"] | None = None,
    *,
    ngram_size: int,
) -> Float[Array, ""]:
    """Computes the share of distinct n-grams among those of all rows (distinct-n).

    `distinct / total`, over the n-grams of adjacent unmasked positions of one row. It
    is exact: n-grams are sorted, not hashed. The share decreases with the amount of
    text: compare only equal amounts.

    Args:
      ids: token ids of any range [B, S].
      mask: [B, S]; 0 leaves a position out; ones if None.
      ngram_size: n, at least 1.

    Returns:
      The share, a scalar in (0, 1]; 0 if there is no n-gram.

    Raises:
      ValueError: `ngram_size` is below 1, or shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import metrics
      >>> ids = jnp.array([[1, 2, 1], [1, 2, 3]])
      >>> float(metrics.distinct_ngrams(ids, ngram_size=2))
      0.75

    References:
      Li et al., A Diversity-Promoting Objective Function, 2016.
    """
    # One long row whose positions restart at every row: no n-gram crosses rows.
    joined = jax.tree.map(lambda x: x.reshape(1, -1), _read_ids(ids, mask))
    distinct, total = count_ngrams(joined, ngram_size)
    return safe_divide(distinct[0], total[0])


@with_checked_arrays
def longest_loop(
    ids: Integer[Array, "B S"],
    mask: Shaped[Array, "B S"] | None = None,
    *,
    max_period: int,
) -> Int[Array, "B"]:
    """Computes the length of each row's longest periodic span.

    The largest `p + r` over the periods p ≤ `max_period` and the runs of r ≥ p adjacent
    positions with `x_t = x_{t−p}`: the period occurs at least twice in full. The span
    contains no masked position.

    Args:
      ids: token ids of any range [B, S].
      mask: [B, S]; 0 leaves a position out; ones if None.
      max_period: the longest period to search for, in tokens, at least 1; the time
        grows with it, the memory does not.

    Returns:
      The length in tokens [B], int32; 0 without a loop, otherwise at least 2.

    Raises:
      ValueError: `max_period` is below 1, or shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import metrics
      >>> ids = jnp.array([[9, 1, 2, 1, 2, 1], [1, 2, 3, 4, 1, 2]])
      >>> metrics.longest_loop(ids, max_period=4).tolist()
      [5, 0]

    References:
      Holtzman et al., The Curious Case of Neural Text Degeneration, 2020 (the loops).
    """
    check_range("max_period", max_period, 1, whole=True)
    tokens = _read_ids(ids, mask)
    # A longer period does not fit into a row twice.
    last = min(max_period, ids.shape[1] // 2)
    return in_one_program(_longest_loop, (last,), tokens)


def _longest_loop(last: int, tokens: Tokens) -> Int[Array, "B"]:
    ids = tokens.raw
    index = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
    stretch = stretch_lengths(tokens)

    def lengthen(period: Int[Array, ""], longest: Int[Array, "B"]) -> Int[Array, "B"]:
        same = tokens.raw == jnp.roll(tokens.raw, period, axis=1)
        breaks = ~same | (stretch <= period)
        run = index - lax.cummax(jnp.where(breaks, index, -1), axis=1)
        loops = jnp.where(run >= period, period + run, 0)
        return jnp.maximum(longest, jnp.max(loops, axis=1, initial=0))

    nothing = jnp.zeros(ids.shape[:1], jnp.int32)
    return lax.fori_loop(jnp.int32(1), jnp.int32(last + 1), lengthen, nothing)


def _read_ids(ids: Integer[Array, "B S"], mask: Shaped[Array, "B S"] | None) -> Tokens:
    if mask is None:
        return plain_tokens(ids, jnp.ones_like(ids, dtype=bool))
    return plain_tokens(ids, as_weights("mask", mask) != 0)


# Calibration ---------------------------------------------------------------------


@flax.struct.dataclass
class CalibrationBins:
    """Bins of predictions by confidence, as sums, so that batches and devices add up.

    Attributes:
      weight: Σ w of each bin's predictions.
      confidence: Σ w · confidence.
      correct: Σ w · correct.
      invalid: the number of predictions with w ≠ 0 in no bin: their confidence is NaN
        or outside [0, 1].
    """

    weight: Float[Array, "K"]
    confidence: Float[Array, "K"]
    correct: Float[Array, "K"]
    invalid: Float[Array, ""]


@with_checked_arrays
def calibration_bins(
    confidence: Float[Array, "*n"],
    correct: Shaped[Array, "*n"],
    weights: Shaped[Array, "*n"] | None = None,
    *,
    num_bins: int = 15,
) -> CalibrationBins:
    """Bins predictions by their confidence, in bins of equal width.

    Bin k of K has the sums of w, `w · confidence` and `w · correct` over the
    predictions with a confidence in `(k/K, (k+1)/K]`; 0 belongs to the first bin.

    Args:
      confidence: probability of the prediction, of any shape [...].
      correct: whether it was right [...]: bool, or a number from 0 to 1.
      weights: weight per prediction [...]; 0 leaves it out; ones if None.
      num_bins: K, at least 1.

    Returns:
      `CalibrationBins`: three sums per bin [K], and the number of confidences outside
      [0, 1], which are in no bin.

    Raises:
      ValueError: `num_bins` is below 1, or shapes do not match.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from ava_jax import metrics
      >>> one = metrics.calibration_bins(
      ...     jnp.array([0.25, 0.75]), jnp.array([False, True]), num_bins=2)
      >>> two = metrics.calibration_bins(
      ...     jnp.array([1.0, 1.5]), jnp.array([True, True]), num_bins=2)
      >>> bins = jax.tree.map(jnp.add, one, two)
      >>> bins.weight.tolist(), bins.confidence.tolist(), bins.correct.tolist()
      ([1.0, 2.0], [0.25, 1.75], [0.0, 2.0])
      >>> float(bins.invalid)
      1.0

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    check_range("num_bins", num_bins, 1, whole=True)
    given = _read_weights(weights, confidence.shape)
    return in_one_program(_bins, (num_bins,), confidence, correct, given)


def _bins(
    num_bins: int,
    confidence: Float[Array, "*n"],
    correct: Shaped[Array, "*n"],
    given: Float[Array, "*n"],
) -> CalibrationBins:
    level = as_float(confidence)
    unmasked = given != 0
    known = unmasked & (level >= 0) & (level <= 1)
    values = (given, given * level, given * as_float(correct))
    # Python's quotients are correctly rounded; XLA's, by a constant, are not.
    edges = [edge / num_bins for edge in range(1, num_bins + 1)]
    bounds = jnp.asarray([-1.0, *edges[:-1]]), jnp.asarray(edges)

    def sums(bound: tuple[Float[Array, ""], Float[Array, ""]]) -> list[Array]:
        within = known & (level > bound[0]) & (level <= bound[1])
        return [jnp.sum(jnp.where(within, x, 0)) for x in values]

    # One bin at a time: no [..., K] array, and no scatter with its varying order.
    per_bin = lax.map(sums, bounds)
    return CalibrationBins(*per_bin, invalid=jnp.sum(as_float(unmasked & ~known)))


@with_checked_arrays
def expected_calibration_error(bins: CalibrationBins) -> Float[Array, ""]:
    """Computes the expected calibration error (ECE).

    `Σ_k w_k/W · |accuracy_k − confidence_k|` of each bin's means, with `W = Σ_k w_k`.
    Predictions in no bin (`bins.invalid`) are left out.

    Args:
      bins: from `calibration_bins`, summed over all batches.

    Returns:
      A scalar in [0, 1]; 0 if all bins are empty.

    Raises:
      ValueError: the fields are not vectors of one length.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import metrics
      >>> bins = metrics.calibration_bins(
      ...     jnp.array([0.75, 0.75, 0.25]), jnp.array([True, False, False]))
      >>> float(metrics.expected_calibration_error(bins))
      0.25

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    shape = bins.weight.shape
    if len(shape) != 1 or not bins.confidence.shape == bins.correct.shape == shape:
        raise ValueError(
            f"the fields of bins must be vectors of one length, got shapes {shape}, "
            f"{bins.confidence.shape} and {bins.correct.shape}; add the bins of "
            "several batches with jax.tree.map(jnp.add, a, b)"
        )
    # w · |correct/w − confidence/w|, without dividing by an empty bin.
    gap = jnp.sum(jnp.abs(as_float(bins.correct) - as_float(bins.confidence)))
    return safe_divide(gap, jnp.sum(as_float(bins.weight)))


def _read_weights(
    weights: Shaped[Array, "*n"] | None, shape: tuple[int, ...]
) -> Float[Array, "*n"]:
    if weights is None:
        return as_float(jnp.ones(shape))
    return as_weights("weights", weights)


# Speculative decoding ------------------------------------------------------------


@with_checked_arrays
def accepted_lengths(
    drafts: Integer[Array, "*n K"], verified: Integer[Array, "*n K"]
) -> Int[Array, "*n"]:
    """Computes how many drafted tokens of each model call the verifier accepts.

    The largest a with `drafts_j = verified_j` for all j ≤ a: drafts after a wrong one
    are discarded.

    Args:
      drafts: the K tokens drafted in each call [..., K].
      verified: the verifier's tokens at the same positions [..., K], each given the
        drafts before it.

    Returns:
      The number accepted [...], int32, 0 to K.

    Raises:
      ValueError: shapes do not match, or dtypes are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import metrics
      >>> drafts = jnp.array([[5, 6, 7], [5, 6, 7], [5, 6, 7]])
      >>> verified = jnp.array([[5, 6, 7], [5, 0, 7], [0, 6, 7]])
      >>> metrics.accepted_lengths(drafts, verified).tolist()
      [3, 1, 0]

    References:
      Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023.
    """
    integers = all(jnp.issubdtype(x.dtype, jnp.integer) for x in (drafts, verified))
    if not integers or drafts.ndim == 0 or drafts.shape != verified.shape:
        raise ValueError(
            "drafts and verified must be integers of one shape [..., K], got "
            f"{drafts.dtype} {drafts.shape} and {verified.dtype} {verified.shape}"
        )
    ids = as_labels("drafts", drafts), as_labels("verified", verified)
    widest = max((x.dtype for x in ids), key=lambda dtype: dtype.itemsize)
    equal = (ids[0].astype(widest) == ids[1].astype(widest)).astype(jnp.int32)
    return jnp.sum(jnp.cumprod(equal, axis=-1), axis=-1, dtype=jnp.int32)


@with_checked_arrays
def acceptance_length(
    drafts: Integer[Array, "*n K"],
    verified: Integer[Array, "*n K"],
    weights: Shaped[Array, "*n"] | None = None,
) -> Float[Array, ""]:
    """Computes the mean number of tokens per call of the model.

    `mean_w(1 + accepted)`: the verifier adds one token to the accepted drafts.

    Args:
      drafts: the K tokens drafted in each call [..., K].
      verified: the verifier's tokens at the same positions [..., K].
      weights: weight per call [...]; 0 leaves it out; ones if None.

    Returns:
      A scalar in tokens per call, 1 to K + 1; 0 if all weights are 0.

    Raises:
      ValueError: shapes do not match, or dtypes are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import metrics
      >>> drafts = jnp.array([[5, 6], [5, 6]])
      >>> verified = jnp.array([[5, 6], [5, 0]])
      >>> float(metrics.acceptance_length(drafts, verified))
      2.5

    References:
      Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023.
    """
    accepted = accepted_lengths(drafts, verified)
    given = _read_weights(weights, accepted.shape)
    return weighted_mean(as_float(accepted + 1), given)


@with_checked_arrays
def acceptance_rates(
    drafts: Integer[Array, "*n K"],
    verified: Integer[Array, "*n K"],
    weights: Shaped[Array, "*n"] | None = None,
) -> Float[Array, "K"]:
    """Computes how often the j-th draft is accepted if all drafts before it were.

    `rate_j = Σ_w [accepted ≥ j] / Σ_w [accepted ≥ j−1]`. The first rate is over all
    calls; with one draft it is DeepSeek-V3's acceptance rate. The product of the first
    j rates is the share of calls that accept j drafts or more; 1 plus the sum of these
    products is `acceptance_length`.

    Args:
      drafts: the K tokens drafted in each call [..., K].
      verified: the verifier's tokens at the same positions [..., K].
      weights: weight per call [...]; 0 leaves it out; ones if None.

    Returns:
      The rates [K], in [0, 1]; 0 where no call accepted all drafts before.

    Raises:
      ValueError: shapes do not match, or dtypes are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import metrics
      >>> drafts = jnp.array([[5, 6], [5, 6], [5, 6], [5, 6]])
      >>> verified = jnp.array([[5, 6], [5, 0], [0, 6], [0, 0]])
      >>> metrics.acceptance_rates(drafts, verified).tolist()
      [0.5, 0.5]

    References:
      Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023.
      DeepSeek-V3 Technical Report, 2024.
    """
    accepted = accepted_lengths(drafts, verified)
    given = _read_weights(weights, accepted.shape)
    depth = jnp.arange(drafts.shape[-1] + 1, dtype=jnp.int32)
    reached = jnp.where(accepted[..., None] >= depth, given[..., None], 0)
    calls = jnp.sum(reached, axis=tuple(range(accepted.ndim)))
    return safe_divide(calls[1:], calls[:-1])
