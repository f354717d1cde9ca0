"""A sharded vocabulary gives the numbers and gradients of the whole one."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ava_jax import Query, TokenStats, Vocabulary, token_statistics

WIDTH = 16
MESH = jax.make_mesh(
    (4,),
    ("vocab",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:4],
)


def rows():
    """Rows on which a merge of shards could fail."""
    z = np.array(jax.random.normal(jax.random.key(0), (12, WIDTH)))
    z[1] = 0.0  # the row max is on every shard
    z[2, [3, 13]] = 9.0  # on two shards
    z[3, [4, 5]] = 9.0  # twice on one shard
    z[4, 6], z[4, 7] = (
        500.0,
        90.0,
    )  # the others underflow; the second largest is on the same shard
    z[5, 2], z[5, 9] = 500.0, 90.0  # and is on another shard
    z[6, 4:8] = -np.inf  # a shard without a possible class
    z[7, :4], z[7, 8:] = -np.inf, -np.inf  # only one shard has any
    z[8, 1:] = -np.inf  # one class
    z[9] = np.nan  # masked
    z[10] *= 1e8
    z[11] = np.where(np.arange(WIDTH) == 8, 1e4, -1e4)
    return jnp.asarray(z, jnp.float32)


def make_query(log_one_minus_p=True):
    ids = jax.random.randint(jax.random.key(1), (12, 5), 0, 9).at[3].set(4)
    return Query(
        targets=jnp.array([0, 3, 3, 5, 6, 2, 8, 5, 0, 0, 7, 8]),
        active=jnp.arange(12) != 9,
        candidates={"a": ids},
        log_one_minus_p=log_one_minus_p,
    )


def measure(vocabulary, query, z, temperature):
    """Returns the statistics, and the gradient of a mixture of all of them."""

    def mixture(z, temperature):
        stats = token_statistics(z, query, vocabulary, temperature)
        known = (stats.count > 0) & query.active
        parts = [stats.log_sum, stats.log_sum_tempered, stats.target, stats.total]
        parts += [stats.expected, *jnp.moveaxis(stats.candidates["a"], -1, 0)]
        if query.log_one_minus_p:
            parts += [stats.log_one_minus_p, stats.unlikelihood("a").sum(-1)]
        weights = jnp.arange(1.0, 1 + len(parts))
        kept = [jnp.where(known & jnp.isfinite(x), x, 0.0) for x in parts]
        return weights @ jnp.stack(kept).sum(-1), stats

    grads, stats = jax.grad(mixture, argnums=(0, 1), has_aux=True)(z, temperature)
    return stats, grads


@pytest.mark.parametrize("log_one_minus_p", [True, False])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("size", [WIDTH, WIDTH - 2, 9])
def test_shards_have_the_statistics_of_the_whole_row(size, cap, log_one_minus_p):
    """With 9 classes, the last shard has none and the one before it a single one."""
    query, temperature = make_query(log_one_minus_p), jnp.asarray(1.3)
    z = rows() if cap is None else jnp.clip(rows(), -1e4, 1e4)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=MESH,
        in_specs=(P(None, "vocab"), P()),
        out_specs=(P(), (P(None, "vocab"), P())),
        check_vma=False,
    )
    def shared(z, temperature):
        return measure(Vocabulary(size, cap, "vocab"), query, z, temperature)

    want = jax.jit(lambda z, t: measure(Vocabulary(size, cap), query, z, t))(
        z, temperature
    )
    got = shared(z, temperature)
    assert not bool(jnp.any(got[1][0][9]))
    got, want = jax.tree.map(without_inactive, jax.device_get((got, want)))
    for name in ("shift", "second_shift", "count", "top", "is_top", "candidate_is_top"):
        chex.assert_trees_all_equal(getattr(got[0], name), getattr(want[0], name))
    chex.assert_trees_all_close(finite(got), finite(want), rtol=3e-6, atol=3e-6)
    assert np.isfinite(got[1][0]).all()


def without_inactive(x):
    """The statistics of the masked row 9 are unspecified."""
    return np.delete(x, 9, axis=0) if x.shape[:1] == (12,) else x


def finite(tree):
    """Replaces every infinity by a finite number."""
    return jax.tree.map(lambda x: np.nan_to_num(x.astype(float), posinf=7e5), tree)


def test_an_id_that_is_no_class_has_no_probability():
    """It is read neither as the last class nor as a logit of 0."""

    def nll(axis, z, targets):
        query = Query(targets=targets, active=jnp.ones(1, bool))
        return token_statistics(z, query, Vocabulary(WIDTH - 2, None, axis)).nll

    shared = jax.shard_map(
        functools.partial(nll, "vocab"),
        mesh=MESH,
        in_specs=(P(None, "vocab"), P()),
        out_specs=P(),
        check_vma=False,
    )
    alone = functools.partial(nll, None)
    for run, target in itertools.product(
        map(jax.jit, (alone, shared)), (-1, 14, WIDTH, 10**6)
    ):
        assert run(rows()[:1], jnp.array([target])) == jnp.inf


def test_a_shard_alone_is_far_off():
    """The smoothing and entropy of a single slice are wrong by far."""
    query = make_query()
    run = jax.jit(token_statistics, static_argnums=2)
    whole = run(rows(), query, Vocabulary(WIDTH))
    slice_ = run(rows()[:, :4], query, Vocabulary(4))

    def uniform(stats: TokenStats):
        return (stats.log_sum - stats.total / stats.count)[0]

    assert abs(uniform(whole) - uniform(slice_)) > 0.5
    assert abs(whole.entropy[0] - slice_.entropy[0]) > 0.5
