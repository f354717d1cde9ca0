"""Quantile balancing: the histograms of cutoffs, and the bias made of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import oracle_batch
from support.loss_checks import FEW, untyped, value_of, values

from ava_jax import losses
from ava_jax.losses import cutoff_histogram, max_violation, quantile_bias, route

histogram_of = jax.jit(cutoff_histogram, static_argnames=("k", "bins"))
bias_of = jax.jit(quantile_bias, static_argnames=("k", "momentum"))


def skewed(tokens: int, experts: int, seed: int = 0) -> jax.Array:
    """Scores in (0, 1) that favour the first experts."""
    gates = values(tokens, experts, seed=seed) + np.linspace(2, -2, experts)
    return jnp.asarray(1 / (1 + np.exp(-gates)), jnp.float32)


# Histograms. -----------------------------------------------------------------------


def test_a_histogram_by_hand() -> None:
    """Three experts, two of them chosen; the third largest is the cutoff."""
    scores, bias = jnp.array([[0.9, 0.5, 0.2]]), jnp.array([0.0, -0.5, 0.25])
    # Biased: 0.9, 0, 0.45. The cutoff, 0, less the scores: −0.9, −0.5, −0.2.
    got = histogram_of(scores, bias, 2, bins=11)  # 0.25 wide, from −1.5 on
    want = np.zeros((3, 11))
    want[[0, 1, 2], [2, 4, 5]] = 1
    np.testing.assert_array_equal(got, want)


@FEW
@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 3),
    bins=st.sampled_from([1, 5, 200]),
    scale=st.sampled_from([0.3, 8.0]),
)
def test_both_functions_are_the_oracles(seed, k, bins, scale: float) -> None:
    rng = np.random.default_rng(seed)
    scores = (scale * rng.random((9, 4))).astype(np.float32)
    bias = rng.normal(size=4).astype(np.float32)
    weights = rng.integers(0, 3, 9) / 2
    tokens = [int(n) for n in np.flatnonzero(weights)]
    wide = bias.astype(float)
    with jax.enable_x64(True):
        counts = histogram_of(
            jax.device_put(np.where(weights[:, None] != 0, scores, np.nan)),
            jax.device_put(bias),
            k,
            bins=bins,
            token_weights=jax.device_put(weights),
        )
        want = oracle_batch.cutoff_histogram(
            scores.astype(float), wide, k, tokens, bins
        )
        np.testing.assert_array_equal(counts, want)
        new = bias_of(jax.device_put(wide), counts, k, momentum=0.25)
        oracle = oracle_batch.next_quantile_bias(wide, want, k, 0.25)
        np.testing.assert_allclose(new, oracle, rtol=1e-12, atol=1e-12)


def test_nothing_outside_the_bins_is_dropped() -> None:
    """Logits may lie anywhere, and an expert may be impossible."""
    scores = jnp.array([[90.0, 0.0, -80.0], [-np.inf, 3.0, 2.5], [1e30, -1e30, 0.0]])
    got = histogram_of(scores, np.zeros(3, np.float32), 1, bins=4)
    want = [[2, 0, 0, 1], [0, 1, 1, 1], [0, 0, 2, 1]]
    np.testing.assert_array_equal(got, want)
    # With two impossible experts the third is chosen whatever its bias.
    scores = jnp.array([[-jnp.inf, 0.3, -jnp.inf]])
    got = histogram_of(scores, np.zeros(3, np.float32), 1, bins=4)
    np.testing.assert_array_equal(got, [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1]])


def test_scores_of_probabilities_fill_the_range_and_no_more() -> None:
    """The largest number is max(bias) + 1, the smallest is min(bias) − 1."""
    scores, bias = jnp.array([[1.0, 1.0, 0.0]]), jnp.array([0.5, 0.5, -1.0])
    # Over [−2, 1.5], half a number wide. The cutoff is 1.5, then −1.
    got = np.asarray(histogram_of(scores, bias, 1, bins=7))
    np.testing.assert_array_equal(np.argmax(got, -1), [5, 5, 6])
    got = np.asarray(histogram_of(scores, bias, 2, bins=7))
    np.testing.assert_array_equal(np.argmax(got, -1), [0, 0, 2])
    np.testing.assert_array_equal(got.sum(-1), 1)


def test_histograms_of_parts_add_up() -> None:
    scores, bias = np.asarray(skewed(24, 4)), jnp.array([0.3, -0.1, 0.0, -0.2])
    whole = np.asarray(histogram_of(scores, bias, 2))
    parts = [histogram_of(scores[i : i + 6], bias, 2) for i in range(0, 24, 6)]
    np.testing.assert_array_equal(whole, sum(np.asarray(part) for part in parts))
    np.testing.assert_array_equal(whole.sum(-1), 24)


def test_low_precision_scores_are_added_to_the_bias_exactly() -> None:
    scores, bias = jnp.array([[0.5, 0.25]], jnp.bfloat16), jnp.array([0.0, 2**-12])
    # The second expert's number is its bias: just in the upper half of [−1, 1 + 2⁻¹²].
    got = histogram_of(scores, bias, 1, bins=2)
    np.testing.assert_array_equal(got, [[1, 0], [0, 1]])
    assert got.dtype == jnp.float32


def test_it_has_no_gradient() -> None:
    def bias(scores: jax.Array, old: jax.Array) -> jax.Array:
        counts = cutoff_histogram(scores, jax.lax.stop_gradient(old), 1, bins=9)
        return jnp.sum(quantile_bias(jax.lax.stop_gradient(old), counts, 1) ** 2)

    grads = jax.jit(jax.grad(bias, argnums=(0, 1)))(skewed(6, 3), jnp.zeros(3))
    chex.assert_trees_all_equal(grads, (jnp.zeros((6, 3)), jnp.zeros(3)))


def test_explicit_axes() -> None:
    scores, bias = skewed(8, 3), jnp.array([0.2, 0.0, -0.2])
    want = histogram_of(scores, bias, 1)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        sharded = jax.device_put(scores, sharding)
        got = histogram_of(sharded, bias, 1)
        layers = jax.vmap(lambda s: histogram_of(s, bias, 1))(sharded[None])
    np.testing.assert_array_equal(jax.device_get(got), want)
    np.testing.assert_array_equal(jax.device_get(layers)[0], want)


# The bias. -------------------------------------------------------------------------


def test_the_quantile_is_linear_inside_a_bin() -> None:
    """Two bins, [−1, 0] and [0, 1]; a half of the tokens is wanted."""
    histogram = jnp.array([[3.0, 1.0], [1.0, 3.0]])
    # 2 of 3 in the first bin: −1/3. 1 of 3 in the second: 1/3.
    got = bias_of(np.zeros(2, np.float32), histogram, 1)
    np.testing.assert_allclose(got, [-1 / 3, 1 / 3], rtol=1e-6)
    # At an old bias of ±1 the bins are [−2, 0] and [0, 2].
    got = bias_of(jnp.array([1.0, -1.0]), histogram, 1)
    np.testing.assert_allclose(got, [-2 / 3, 2 / 3], rtol=1e-6)
    got = bias_of(jnp.array([1.0, -1.0]), histogram, 1, momentum=0.75)
    np.testing.assert_allclose(got, [0.75 - 1 / 6, -0.75 + 1 / 6], rtol=1e-6)


@pytest.mark.parametrize(
    ("k", "experts", "tokens"), [(1, 3, 3), (3, 5, 25), (1, 7, 21), (5, 9, 27)]
)
def test_a_share_that_is_just_reached(k: int, experts: int, tokens: int) -> None:
    """k/E of the tokens in the first bin, the rest in the last: not a bin further.

    The product of k/E, rounded, and the number of tokens may be above that.
    """
    reached = tokens * k // experts
    histogram = np.zeros((experts, 10), np.float32)
    histogram[:, 9] = tokens
    histogram[0, [0, 9]] = reached, tokens - reached
    got = np.asarray(bias_of(np.zeros(experts, np.float32), histogram, k))
    first, last = -1 + 0.2, 0.8 + 0.2 * k / experts
    mean = (first + (experts - 1) * last) / experts
    np.testing.assert_allclose(got[0], first - mean, rtol=1e-6)
    np.testing.assert_allclose(got[1:], last - mean, rtol=1e-5)


def test_it_is_the_quantile_of_the_numbers() -> None:
    """With narrow bins, what NumPy finds among the numbers themselves."""
    scores, bias, k = skewed(4000, 5), jnp.array([0.1, 0.0, -0.2, 0.0, 0.1]), 2
    got = np.asarray(bias_of(bias, histogram_of(scores, bias, k, bins=20_000), k))
    scores, bias = np.asarray(scores), np.asarray(bias)
    biased = np.sort(scores + bias, axis=-1)
    numbers = biased[:, -1 - k, None] - scores
    found = np.quantile(numbers, k / 5, axis=0)
    np.testing.assert_allclose(got, found - found.mean(), atol=5e-4)
    assert abs(float(got.sum())) < 1e-5
    assert np.ptp(got) > 0.5


def test_a_step_without_tokens_changes_nothing() -> None:
    bias = jnp.array([0.25, 0.5])
    nothing = np.full((3, 2), np.nan, np.float32)
    masked = histogram_of(nothing, bias, 1, token_weights=np.zeros(3, np.float32))
    np.testing.assert_array_equal(masked, 0)
    chex.assert_trees_all_equal(bias_of(bias, masked, 1, momentum=0.5), bias)


def test_the_bias_keeps_its_dtype() -> None:
    with jax.enable_x64(True):
        bias = np.zeros(2, np.float32)
        new = bias_of(bias, np.ones((2, 4)), 1)
        assert new.dtype == jnp.float32


@pytest.mark.parametrize(
    ("kind", "steps"), [("sigmoid", 8), ("softmax", 6), ("logits", 6)]
)
def test_a_skewed_router_is_even_after_a_few_steps(kind: str, steps: int) -> None:
    experts, k = 8, 2
    gates = jax.device_put(values(4096, experts) + np.linspace(1.5, -1.5, experts))
    gates = gates.astype(jnp.float32)
    scores = gates if kind == "logits" else getattr(jax.nn, kind)(gates)

    @jax.jit
    def step(bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, chosen = route(scores, bias, k)
        load = jnp.bincount(chosen.reshape(-1), length=experts).astype(jnp.float32)
        counts = cutoff_histogram(scores, bias, k)
        return quantile_bias(bias, counts, k), max_violation(load)

    bias, seen = jnp.zeros(experts), []
    for _ in range(steps):
        bias, violation = step(bias)
        seen.append(float(violation))
    assert seen[0] > 0.5
    assert seen[-1] <= 0.05
    np.testing.assert_allclose(jnp.mean(bias), 0, atol=1e-6)


# Errors. ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 3, 4])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in \[1, 3\), got {k}.*3 experts"):
        cutoff_histogram(jnp.ones((2, 3)), jnp.zeros(3), k)
    with pytest.raises(ValueError, match=rf"k must be in \[1, 3\), got {k}"):
        quantile_bias(jnp.zeros(3), jnp.ones((3, 5)), k)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_out_of_range(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"momentum .* got {momentum}"):
        quantile_bias(jnp.zeros(2), jnp.ones((2, 4)), 1, momentum=momentum)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"bins must be in \[1, inf\), got 0"):
        cutoff_histogram(jnp.ones((2, 3)), jnp.zeros(3), 1, bins=0)
    with untyped(), pytest.raises(ValueError, match=r"bias .*\(3,\).* got \(2,\)"):
        cutoff_histogram(jnp.ones((2, 3)), jnp.zeros(2), 1)
    with untyped(), pytest.raises(ValueError, match=r"histogram must be \[E, bins\]"):
        quantile_bias(jnp.zeros(2), jnp.ones((3, 4)), 1)
    with untyped(), pytest.raises(ValueError, match="token_weights"):
        losses.cutoff_histogram(
            jnp.ones((2, 3)), jnp.zeros(3), 1, token_weights=jnp.ones(3)
        )


def test_it_runs_under_vmap() -> None:
    """A bias per layer."""
    scores = np.stack([skewed(16, 3), skewed(16, 3, seed=1)])
    bias = np.array([[0.1, 0.0, -0.1], [0.0, 0.2, -0.2]], np.float32)
    counts = value_of(jax.vmap(lambda s, b: cutoff_histogram(s, b, 1)), scores, bias)
    own = [histogram_of(s, b, 1) for s, b in zip(scores, bias, strict=True)]
    np.testing.assert_array_equal(counts, own)
