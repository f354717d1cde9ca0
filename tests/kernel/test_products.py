"""The statistics of a product that is never stored equal those of its logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.kernel_products import (
    NEAR,
    assert_one_pass_agrees,
    assert_product_agrees,
)
from support.kernel_rows import (
    MESH,
    OPTIONS,
    WIDTH,
    Options,
    describe,
    measured,
    weights_of,
)
from support.trees import assert_trees_close

from ava_jax import Query, Vocabulary, token_statistics
from ava_jax.kernel.collectives import shared_scalar
from ava_jax.kernel.product import Product, near_largest, sample_columns

PRODUCTS = {
    "finite": OPTIONS["finite"],
    "finite with padding": OPTIONS["finite with padding"],
    "no temperature": Options(finite=True, tempered=False),
    "without log(1 - p)": Options(finite=True, log_one_minus_p=False),
    "no candidates": Options(finite=True, ids=0),
    "many ids": Options(finite=True, ids=20),  # of these the logits are written
    "a bias": Options(finite=True, biased=True),
    "a bias and padding": Options(
        finite=True, biased=True, size=WIDTH - 130, cap=30.0, tempered=False
    ),
    "a bias and many ids": Options(finite=True, biased=True, ids=20),
    "float64": Options(finite=True, dtype="float64", size=WIDTH - 5),
}


@pytest.mark.parametrize(
    ("name", "by_columns"),
    [
        *((name, False) for name in PRODUCTS),
        ("finite", True),
        ("finite with padding", True),
        ("many ids", True),
        ("float64", True),
        ("a bias", True),
    ],
)
def test_a_product_has_the_statistics_of_its_logits(name, by_columns):
    assert_product_agrees(PRODUCTS[name], by_columns=by_columns)


@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize(
    ("name", "by_columns"),
    [("finite", True), ("finite with padding", False), ("a bias and padding", True)],
)
def test_any_number_is_near_enough(name, by_columns, near):
    assert_product_agrees(PRODUCTS[name], by_columns=by_columns, near=near)


@pytest.mark.parametrize(
    ("name", "by_columns"),
    [
        ("finite", True),
        ("finite with padding", False),
        ("without log(1 - p)", True),
        ("no candidates", False),
        ("many ids", False),
        ("a bias", True),
        ("a bias and padding", False),
    ],
)
def test_shards_of_a_product_have_its_statistics(name, by_columns):
    assert_product_agrees(PRODUCTS[name], by_columns=by_columns, axis="vocab")


@pytest.mark.parametrize("name", ["finite with padding", "a bias and padding"])
@pytest.mark.parametrize("parts", [2, 3])  # 3 does not divide a row
def test_a_product_is_summed_in_parts(name, parts):
    assert_product_agrees(PRODUCTS[name]._replace(parts=parts), by_columns=False)


GIVEN = {name: options._replace(top=False) for name, options in OPTIONS.items()}


@pytest.mark.parametrize(
    ("name", "axis", "parts"),
    [
        *((name, axis, 1) for name in GIVEN for axis in (None, "vocab")),
        *((name, None, 4) for name in GIVEN),
        ("soft cap", "vocab", 4),
    ],
)
def test_given_logits_are_read_once_where_the_top_is_not_wanted(name, axis, parts):
    options = GIVEN[name]._replace(parts=parts)
    with jax.enable_x64(options.dtype == "float64"):
        got = measured(options, "xla", axis, as_product=True)
    # The sums are relative to one of four sampled logits.
    assert_one_pass_agrees(options, got, is_near=False)


ROUNDED = {
    "one id": Options(finite=True, ids=0),
    "three ids, padding": Options(finite=True, ids=1, size=WIDTH - 130),
    "four ids": Options(finite=True, ids=2),
    "five ids": Options(finite=True, ids=3),
    "no temperature": Options(finite=True, ids=1, tempered=False),
    "without log(1 - p)": Options(finite=True, ids=1, log_one_minus_p=False),
    "a bias": Options(finite=True, ids=1, biased=True),
    "a bias and padding": Options(finite=True, biased=True, size=WIDTH - 130),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_exponentials_are_exact_where_it_counts(name):
    assert_product_agrees(ROUNDED[name], by_columns=True, may_round=True)


@pytest.mark.parametrize("near", NEAR)
def test_rounded_exponentials_may_be_relative_to_anything(near):
    options = ROUNDED["three ids, padding"]
    assert_product_agrees(options, by_columns=True, may_round=True, near=near)


@pytest.mark.parametrize(
    "name",
    [
        "three ids, padding",
        "five ids",
        "without log(1 - p)",
        "a bias and padding",
    ],
)
def test_shards_of_rounded_exponentials(name):
    options = ROUNDED[name]
    assert_product_agrees(options, by_columns=True, may_round=True, axis="vocab")


@pytest.mark.parametrize("near", [0.0, 200.0, -500.0])
def test_a_product_whose_classes_are_all_asked_for(near):
    z = jnp.array([[0.0, -200.0, -1.0], [0.0, -200.0, -300.0]])
    query = Query(
        targets=jnp.zeros(2, jnp.int32),
        active=jnp.ones(2, bool),
        candidates={"a": jnp.array([[1, 2], [2, 1]])},
    )

    def run(probe, implementation):
        vocabulary = Vocabulary(3, None, None, True, implementation)
        near_of_rows = jnp.full(2, near)
        product = Product(z, jnp.eye(3), near_of_rows, probe=probe, shape=(2,))
        logits = product if implementation == "xla" else z + probe
        stats = token_statistics(logits, query, vocabulary)
        names = ("nll", "entropy", "total", "log_one_minus_p", "log_sum_without_top")
        values = [getattr(stats, name) for name in names]
        return sum(map(jnp.sum, values)), values

    grad = jax.jit(jax.grad(run, has_aux=True), static_argnums=1)
    got, want = (grad(jnp.zeros_like(z), i) for i in ("xla", "reference"))
    assert_trees_close(got, want, 4e-6)


@pytest.mark.parametrize("kept", [[5], [5, 6], [6, 7], []])
def test_a_bias_may_leave_few_classes(kept):
    """None of the sampled columns is possible, and perhaps not the target."""
    hidden = jax.device_put(np.random.default_rng(0).normal(size=(2, 256)))
    bias = jnp.full(256, -jnp.inf).at[np.array(kept, int)].set(0.5)
    query = Query(targets=jnp.array([5, 5]), active=jnp.ones(2, bool))

    def run(probe, implementation):
        vocabulary = Vocabulary(256, None, None, False, implementation)
        near = near_largest(
            hidden, sample_columns(jnp.eye(256), bias, by_columns=False)
        )
        product = Product(hidden, jnp.eye(256), near, bias, probe=probe, shape=(2,))
        logits = product if implementation == "xla" else hidden + bias + probe
        stats = token_statistics(logits, query, vocabulary)
        values = [getattr(stats, name) for name in ("log_sum", "entropy", "total")]
        return sum(map(jnp.sum, values)), (values, jnp.exp(stats.target), stats.count)

    grad = jax.jit(jax.grad(run, has_aux=True), static_argnums=1)
    got, want = (grad(jnp.zeros_like(hidden), i) for i in ("xla", "reference"))
    assert not np.isnan(want[0]).any()
    assert_trees_close(got, want, 4e-6)


@functools.cache
def scaled_program(implementation, *, axis, by_columns, may_round):
    """A mixture of the statistics at temperatures 1/scale and 1.9/scale; gradients."""
    vocabulary = Vocabulary(300, None, axis, False, implementation)

    def mixture(probe, scale, hidden, kernel, bias, query):
        if may_round:
            scale = jax.lax.stop_gradient(scale)
        if implementation == "xla":
            near = near_largest(
                hidden, sample_columns(kernel, bias, by_columns=by_columns)
            )
            logits = Product(
                hidden,
                kernel,
                near,
                bias,
                shared_scalar(axis, scale),
                probe,
                (24,),
                by_columns=by_columns,
                may_round=may_round,
            )
        else:
            possible = bias != -jnp.inf
            logits = hidden @ kernel + probe + jnp.where(possible, bias, 0.0)
            logits = jnp.where(possible, logits * scale, -jnp.inf)
        stats = token_statistics(logits, query, vocabulary, jnp.float32(1.9))
        values = describe(stats, query)
        del values["log_sum_without_top"]  # unspecified if the top is not queried

        def keep(value):
            known = jnp.isfinite(value) & (jnp.abs(value) < 1e29)
            known &= query.active.reshape(-1, *[1] * (value.ndim - 1))
            return jnp.where(known, value, 0.0)

        kept = jax.tree.map(keep, values)
        mix = (jnp.sum(weights_of(k, v.shape) * v) for k, v in kept.items())
        return sum(mix, start=jnp.float32(0)), kept

    run = jax.grad(mixture, argnums=(0, 1), has_aux=True)
    if axis is not None:
        columns = P(None, axis)
        run = jax.shard_map(
            run,
            mesh=MESH,
            in_specs=(columns, P(), P(), columns, P(axis), P()),
            out_specs=((columns, P()), P()),
            check_vma=False,
        )
    return jax.jit(run)


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("axis", [None, "vocab"])
@pytest.mark.parametrize("form", ["gpu", "tpu", "tpu, rounded"])
def test_a_scaled_product(form, axis, scale):
    """Its gradients are those of logits at scale 1, and of the scale."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(24, 16)).astype(np.float32)
    kernel = rng.normal(size=(16, 512)).astype(np.float32)
    bias = rng.normal(size=512).astype(np.float32)
    bias[7::40] = -np.inf
    ids = rng.integers(0, 300, (2, 24, 2)).astype(np.int32)
    query = Query(
        targets=jax.device_put(ids[0, :, 0]),
        active=jax.device_put(np.arange(24) != 3),
        candidates={"a": jax.device_put(ids[1])},
        tempered_entropy=True,
    )
    probe = np.zeros((24, 512), np.float32)
    given = jax.device_put((probe, np.float32(scale), hidden, kernel, bias, query))
    may_round, by_columns = form.endswith("rounded"), form.startswith("tpu")
    want = scaled_program("reference", axis=None, by_columns=False, may_round=False)
    run = scaled_program("xla", axis=axis, by_columns=by_columns, may_round=may_round)
    ((dz, slope), values), ((exact, of_scale), expected) = run(*given), want(*given)
    assert_trees_close(values, expected, 1e-5)
    # The mean of all logits alone has a large gradient, which bfloat16 rounds.
    assert_trees_close(dz, exact, 2**-8 if may_round else 4e-6)
    if not may_round:
        np.testing.assert_allclose(slope, of_scale, rtol=2e-5)
