"""Every implementation of the kernel says what its definition says."""

import dataclasses
import functools
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_passes import assert_trees_close, dot_flops, jaxprs_of

import ava_jax
from ava_jax import Query, TokenStats, Vocabulary, token_statistics
from ava_jax.kernel import fused, rounded, statistics
from ava_jax.kernel.platforms import Implementation, Target
from ava_jax.kernel.product import Product, near_largest, sample_columns
from ava_jax.kernel.summary import NOT_ASKED

IMPLEMENTATIONS: tuple[Implementation, ...] = ("cpu", "xla")
MESH = jax.make_mesh(
    (4,), ("vocab",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]
)

# Statistics of single rows ---------------------------------------------------------

TEMPERATURE = 1.3
WIDTH = 512  # a row of the cpu implementation has 8 parts, that of a shard 2


class Options(NamedTuple):
    """What a program is traced for.

    Attributes:
      size: classes; the columns from it on are padding.
      cap: the soft cap.
      finite: only rows without −inf and NaN, and the promise of that.
      tempered: whether there is a temperature.
      complements: whether log(1 − p) is asked for.
      ids: how many candidates.
      dtype: of the logits.
    """

    size: int = WIDTH
    cap: float | None = None
    finite: bool = False
    tempered: bool = True
    complements: bool = True
    ids: int = 3
    dtype: str = "float32"


OPTIONS = {
    "plain": Options(),
    "padding and many ids": Options(size=WIDTH - 5, ids=20),
    # Of four shards the last has no class and the one before it a single one.
    "soft cap": Options(cap=30.0, size=WIDTH // 2 + 1),
    "no temperature": Options(tempered=False, ids=0),
    "no complements": Options(complements=False, tempered=False, ids=17),
    "bfloat16": Options(complements=False, dtype="bfloat16", cap=30.0),
    "float64": Options(dtype="float64", size=WIDTH - 5),
    "finite": Options(finite=True),
    "finite with padding": Options(finite=True, size=WIDTH - 130, cap=30.0),
}
SHARED = (
    "plain",
    "soft cap",
    "no complements",
    "finite",
    "finite with padding",
    "float64",
)


def named_rows() -> dict[str, np.ndarray]:
    """Rows that an implementation could get wrong."""
    z = np.random.default_rng(0).normal(size=(40, WIDTH))
    named = {f"of size {s:g}": s * z[i] for i, s in enumerate((0.01, 1, 30, 1e4))}
    # Where exponentials of the others are small, denormal or 0.
    for i, gap in enumerate((20, 55, 65, 75, 90, 105, 1e3, 1e6)):
        row = z[4 + i].copy()
        row[37 * i] = row.max() + gap
        named[f"ahead by {gap:g}"] = row
    edits: dict[str, list[tuple[Any, float]]] = {
        "the first one is the largest": [(0, 9.0)],
        "the last class of 257 is the largest": [(256, 9.0)],
        "two largest side by side": [([4, 5], 9.0)],
        "two largest far apart": [([3, 250], 9.0)],
        "two largest, far ahead": [([3, 250], 500.0)],
        "a distant second beside the largest": [(6, 500.0), (7, 90.0)],
        "a distant second elsewhere": [(6, 500.0), (250, 90.0)],
        "two distant seconds": [(200, 500.0), ([6, 250], 90.0)],
        "all equal": [(slice(None), -3.0)],
        "holes": [(slice(1, None, 2), -np.inf)],
        "holes and far ahead": [(slice(1, None, 2), -np.inf), (2, 500.0)],
        "a part without classes": [(slice(64, 160), -np.inf)],
        "only one part has classes": [
            (slice(0, 64), -np.inf),
            (slice(80, None), -np.inf),
        ],
        "two classes": [(slice(2, None), -np.inf)],
        "one class": [(slice(1, None), -np.inf)],
        "inactive": [(slice(None), 7.0)],
        "inactive NaN": [(slice(None), np.nan)],
        "inactive inf": [(5, np.inf), (6, -np.inf)],
        "inactive, large": [(slice(None), 1e30)],
    }
    for i, (name, values) in enumerate(edits.items()):
        named[name] = z[12 + i].copy()
        for where, value in values:
            named[name][where] = value
    return named


@functools.cache
def batch(options: Options):
    """The rows' names, logits [2, n, WIDTH] and a query: the targets of [0] are top."""
    rows = named_rows()
    if options.finite:
        # Inactive ones are zeros in a pass; these are as harmless.
        rows = {k: z for k, z in rows.items() if np.isfinite(z).all()}
        del rows["inactive, large"]
    names = list(rows)
    z = np.stack(list(rows.values()))
    z = jnp.asarray(np.stack([z, z]), options.dtype)
    rng = np.random.default_rng(1)
    top = np.where(np.isnan(z.astype(float)), 0, z.astype(float))
    top = top[..., : options.size].argmax(-1)
    other = rng.integers(0, options.size, top.shape[1:])
    targets = np.stack([top[0], other])
    candidates = {}
    if options.ids:
        ids = rng.integers(0, options.size, (*top.shape, options.ids))
        ids[:, ::2, 0] = top[:, ::2]
        ids[:, ::5, 0], ids[:, ::7, 0] = WIDTH + 3, -1  # no classes
        ids[:, 1::11, 0] = options.size  # likewise, where there is padding its first
        ids[:, ::3, -1] = ids[:, ::3, 0]  # one of them twice
        candidates = {
            "a": jnp.asarray(ids, jnp.int32),
            "b": jnp.asarray(other[:, None]),
        }
        candidates["b"] = jnp.stack([candidates["b"].astype(jnp.int32)] * 2)
    active = [not name.startswith("inactive") for name in names]
    query = Query(
        targets=jnp.asarray(targets, jnp.int32),
        active=jnp.asarray([active, active]),
        candidates=candidates,
        complements=options.complements,
    )
    return names, z, query


def describe(stats: TokenStats, query: Query) -> dict[str, jax.Array]:
    """Everything that a loss can ask for, [2, n] or [2, n, Q]."""
    names = ["log_z", "nll", "entropy", "total", "count", "expected", "target"]
    names += ["log_sum_tempered"]
    if query.complements:
        names += ["log_rest", "target_complement"]
    values = {name: getattr(stats, name) for name in names}
    for name in query.candidates:
        values[f"logits of {name}"] = stats.candidates[name]
        if query.complements:
            values[f"unlikelihood of {name}"] = stats.unlikelihood(name)
    return values


def facts(stats: TokenStats, query: Query) -> dict[str, jax.Array]:
    """What has no gradient."""
    matches = {f"is {k}": stats.candidate_is_top[k] for k in query.candidates}
    return {"top": stats.top, "is_top": stats.is_top, **matches}


def mixed(stats: TokenStats, query: Query, left_out: dict[str, np.ndarray]):
    """A mixture of all values, except where they are left out; values and facts."""
    values = describe(stats, query)
    total = jnp.zeros_like(stats.temperature)
    for name, value in values.items():
        mix = weights_of(name, value)
        kept = query.active[(..., *[None] * (value.ndim - 2))]
        # log(1 − p) of a class alone is a constant.
        kept &= jnp.isfinite(value) & (jnp.abs(value) < 1e29)
        if name in left_out:
            kept &= ~left_out[name]
        total += jnp.sum(jnp.where(kept, mix * value, jnp.zeros_like(value)))
    return total, (values, facts(stats, query))


@functools.cache
def measured(
    options: Options,
    implementation: Implementation,
    axis: str | None,
    *,
    as_product: bool = False,
):
    """Values, facts, and the gradients of a mixture of all values.

    Args:
      options: what the program is traced for.
      implementation: of the kernel.
      axis: of the mesh, or None.
      as_product: whether the mixture is that of `measured_product`.
    """
    vocabulary = Vocabulary(
        options.size,
        options.cap,
        axis,
        options.finite,
        implementation,
    )
    _, z, query = batch(options)

    def mixture(z, temperature, query):
        given = temperature if options.tempered else None
        stats = token_statistics(z, query, vocabulary, given)
        return mixed(stats, query, unknown(options) if as_product else {})

    run = jax.grad(mixture, argnums=(0, 1), has_aux=True)
    if axis is not None:
        run = jax.shard_map(
            run,
            mesh=MESH,
            in_specs=(P(None, None, axis), P(), P()),
            out_specs=((P(None, None, axis), P()), P()),
            check_vma=False,
        )
    grads, (values, found) = jax.jit(run)(z, jnp.asarray(TEMPERATURE), query)
    return jax.tree.map(np.asarray, (values, found, grads))


def weights_of(name, value):
    """What a mixture multiplies a value with, other numbers for every name."""
    return jax.random.normal(
        jax.random.key(zlib.crc32(name.encode())), value.shape, value.dtype
    )


def gradient_of_temperature(options: Options) -> float:
    """−Σ mix·E[z]/T², the mean over p at that temperature, in float64."""
    _, z, query = batch(options)
    mix = weights_of("log_sum_tempered", jnp.zeros(z.shape[:-1], float))
    z = np.asarray(z, np.float64)[..., : options.size]
    mix, active = np.asarray(mix, np.float64), np.asarray(query.active)
    z = np.where(active[..., None], z, 0.0)
    if options.cap is not None:
        z = np.where(np.isinf(z), z, options.cap * np.tanh(z / options.cap))
    relative = z - z.max(-1, keepdims=True)
    e = np.exp(relative / TEMPERATURE)
    mean = (e * np.maximum(relative, -1e15)).sum(-1) / e.sum(-1)
    return float(-(mix * active * mean).sum() / TEMPERATURE**2)


def assert_rows_agree(
    options: Options,
    got,
    want,
    *,
    absolute,
    of_inactive,
    rounding: Any = 0.0,
    is_rounded: bool = False,
):
    """Compares what `measured` returns, row by row.

    Args:
      options: what both were traced for.
      got: values, facts and gradients.
      want: the definition's.
      absolute: error that the values may have besides a relative one.
      of_inactive: whether the values of inactive tokens must be finite.
      rounding: further error of the gradients, for all or [2, n].
      is_rounded: whether gradients at ids that are not asked for have 8 bits.
    """
    names, _, query = batch(options)
    named = [query.targets[..., None], *query.candidates.values()]
    ids = np.concatenate(named, -1)[..., None, :]
    is_asked = (np.arange(WIDTH)[:, None] == ids).any(-1)
    rounding = np.broadcast_to(rounding, (2, len(names)))
    tolerance = 1e-12 if options.dtype == "float64" else 4e-6
    for i, row in enumerate(names):
        if row.startswith("inactive"):
            if of_inactive:
                assert all(np.isfinite(v[:, i]).all() for v in got[0].values()), row
            assert not got[2][0][:, i].any(), row
            continue
        for key, value in want[0].items():
            np.testing.assert_allclose(
                got[0][key][:, i],
                value[:, i],
                rtol=tolerance,
                atol=absolute,
                err_msg=f"{key}, {row}",
            )
        for key, value in want[1].items():
            np.testing.assert_array_equal(
                got[1][key][:, i], value[:, i], f"{key}, {row}"
            )
        grad, slope = (x[2][0][:, i].astype(float) for x in (got, want))
        size = np.abs(slope).max()
        limit = 8e-3 if options.dtype == "bfloat16" else 5 * tolerance
        limit += rounding[:, i].max()
        limit = np.where(is_asked[:, i] | (not is_rounded), limit, limit + 2**-7)
        error = np.abs(grad - slope) / (limit * size)
        assert error.max() <= 1, (row, error.max(), size)
    assert not got[2][0][..., options.size :].any()


CASES = [
    *((name, None, i) for name in OPTIONS for i in IMPLEMENTATIONS),
    *((name, "vocab", i) for name in SHARED for i in IMPLEMENTATIONS),
    ("finite", "vocab", "reference"),
    ("plain", None, "reference"),
    ("soft cap", None, "reference"),
]


@pytest.mark.parametrize(("name", "axis", "implementation"), CASES)
def test_statistics_and_gradients_are_those_of_the_definition(
    name, axis, implementation
):
    options = OPTIONS[name]
    with jax.enable_x64(options.dtype == "float64"):
        _, z, _ = batch(options)
        want = measured(options, "reference", None)
        got = measured(options, implementation, axis)
        exact = gradient_of_temperature(options) if options.tempered else 0.0
    tolerance = 1e-12 if options.dtype == "float64" else 4e-6
    # Programs round tanh differently, by few units in the last place of the cap.
    absolute = tolerance if options.cap is None else options.cap * 5e-7
    assert_rows_agree(
        options,
        got,
        want,
        absolute=absolute,
        of_inactive=implementation != "reference",
    )
    grad, of_temperature = got[2]
    assert grad.dtype == z.dtype
    np.testing.assert_allclose(of_temperature, exact, rtol=1e-4)


@pytest.mark.parametrize("complements", [True, False])
@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_a_row_without_classes_is_infinite_and_has_no_gradient(
    implementation, complements
):
    z = jnp.stack([jnp.full(8, -jnp.inf), jnp.arange(8.0)])
    query = Query(
        targets=jnp.array([1, 2]), active=jnp.ones(2, bool), complements=complements
    )

    def nll(z):
        vocabulary = Vocabulary(8, implementation=implementation)
        values = token_statistics(z, query, vocabulary).nll
        return jnp.sum(values), values

    grad, values = jax.jit(jax.grad(nll, has_aux=True))(z)
    assert not np.isfinite(values[0])
    assert np.isfinite(values[1])
    np.testing.assert_array_equal(grad[0], 0)
    assert np.isfinite(grad[1]).all()
    assert grad[1].any()


# Statistics of a product -----------------------------------------------------------

PRODUCTS = {
    "finite": OPTIONS["finite"],
    "finite with padding": OPTIONS["finite with padding"],
    "no temperature": Options(finite=True, tempered=False),
    "no complements": Options(finite=True, complements=False),
    "no candidates": Options(finite=True, ids=0),
    "many ids": Options(finite=True, ids=20),  # these take two passes
    "float64": Options(finite=True, dtype="float64", size=WIDTH - 5),
}
# Numbers near each token's largest logit, as a function of it.
NEAR: dict[str, Any] = {
    "the largest": lambda largest: largest,
    "55 below": lambda largest: largest - 55,
    "zero": jnp.zeros_like,
    "far below": lambda largest: jnp.full_like(largest, -1e6),
    "far above": lambda largest: jnp.full_like(largest, 1e6),
}


class Largest(NamedTuple):
    """What is known of rows' largest logits, [2, n].

    Attributes:
      is_asked: whether the first largest one is the target's or a candidate's.
      is_tied: whether several are equal.
      lead: how far the largest logit is above the second largest.
    """

    is_asked: np.ndarray
    is_tied: np.ndarray
    lead: np.ndarray


@functools.cache
def largest_of(options: Options) -> Largest:
    _, z, query = batch(options)
    raw = np.asarray(z)[..., : options.size]
    z = raw if options.cap is None else options.cap * np.tanh(raw / options.cap)
    top = raw.argmax(-1)
    named = [np.asarray(ids) for ids in query.candidates.values()]
    ids = np.concatenate([np.asarray(query.targets)[..., None], *named], -1)
    lead = np.diff(np.sort(z, -1)[..., -2:])[..., 0]
    is_asked = (ids == top[..., None]).any(-1)
    return Largest(is_asked, lead == 0, lead)


def unknown(options: Options) -> dict[str, np.ndarray]:
    """Where which values of a product mean nothing."""
    return {"log_rest": ~largest_of(options).is_asked}


@functools.cache
def measured_product(
    options: Options,
    *,
    by_columns: bool,
    axis: str | None = None,
    near: str = "",
    may_round: bool = False,
):
    """What `measured` returns, of rows that are a product with the identity.

    Args:
      options: what the program is traced for.
      by_columns: see `Product`.
      axis: of the mesh, or None.
      near: one of `NEAR`; what a pass takes if it is empty.
      may_round: see `Product`; the temperature then has no gradient.
    """
    vocabulary = Vocabulary(options.size, options.cap, axis, True, "xla")
    _, z, query = batch(options)
    hidden = jnp.where(query.active[..., None], z, jnp.zeros_like(z))
    hidden = hidden.reshape(-1, WIDTH)

    def mixture(probe, temperature, kernel, query):
        if near:
            given = NEAR[near](jnp.max(hidden[:, : options.size], -1))
        else:
            columns = sample_columns(kernel, by_columns=by_columns)
            given = near_largest(hidden, columns)
        product = Product(
            hidden,
            kernel,
            given,
            probe,
            query.targets.shape,
            by_columns=by_columns,
            may_round=may_round,
        )
        if may_round:
            temperature = jax.lax.stop_gradient(temperature)
        given = temperature if options.tempered else None
        stats = token_statistics(product, query, vocabulary, given)
        return mixed(stats, query, unknown(options))

    run = jax.grad(mixture, argnums=(0, 1), has_aux=True)
    if axis is not None:
        run = jax.shard_map(
            run,
            mesh=MESH,
            in_specs=(P(None, axis), P(), P(None, axis), P()),
            out_specs=((P(None, axis), P()), P()),
            check_vma=False,
        )
    kernel = jnp.eye(WIDTH, dtype=z.dtype)
    probe = jnp.zeros(hidden.shape, jnp.asarray(0.0).dtype)
    temperature = jnp.asarray(TEMPERATURE)
    (grad, slope), (values, found) = jax.jit(run)(probe, temperature, kernel, query)
    grads = (grad.reshape(z.shape), slope)
    return jax.tree.map(np.asarray, (values, found, grads))


def assert_product_agrees(
    options: Options, *, near: str = "", may_round: bool = False, **how
):
    """Compares a product with the definition, where it says what that says."""
    with jax.enable_x64(options.dtype == "float64"):
        largest = largest_of(options)
        want = measured(options, "reference", None, as_product=True)
        got = measured_product(options, near=near, may_round=may_round, **how)
        exact = gradient_of_temperature(options) if options.tempered else 0.0
    assert largest.is_asked.any()
    assert not largest.is_asked.all()
    values, found, slopes = want
    if options.ids <= 16:
        found = found | {"top": np.where(largest.is_asked, found["top"], NOT_ASKED)}

    def comparable(values, found, slopes):
        """Zeros where the two may differ."""
        # Label smoothing takes the mean; its rounding is that of a single logit.
        values = values | {"total": values["total"] / options.size}
        if "log_rest" in values:
            log_rest = np.where(largest.is_asked, values["log_rest"], 0)
            values = values | {"log_rest": log_rest}
        kept = {}
        for key, fact in found.items():
            # Of several largest logits any that is asked for may be the one, but the
            # target is only if it is the first.
            differs = largest.is_tied & (key != "is_top")
            differs = differs.reshape(*differs.shape, *[1] * (fact.ndim - 2))
            kept[key] = np.where(differs, 0, fact)
        return values, kept, slopes

    # Relative to a number up to 60 below the largest logit, sums lose some digits.
    absolute = 2e-5 if near else 5e-6
    absolute = 1e-12 if options.dtype == "float64" else absolute
    if options.cap is not None:
        absolute += options.cap * 5e-7
    assert_rows_agree(
        options,
        comparable(*got),
        comparable(values, found, slopes),
        absolute=absolute,
        of_inactive=True,
        # A logit's distance from the largest one is rounded; in log(1 − p) it counts.
        rounding=largest.lead * np.finfo(largest.lead.dtype).eps,
        is_rounded=may_round,
    )
    if not may_round:
        np.testing.assert_allclose(got[2][1], exact, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "by_columns"),
    [
        *((name, False) for name in PRODUCTS),
        ("finite", True),
        ("finite with padding", True),
        ("many ids", True),
        ("float64", True),
    ],
)
def test_a_product_has_the_statistics_of_its_logits(name, by_columns):
    assert_product_agrees(PRODUCTS[name], by_columns=by_columns)


@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize(
    ("name", "by_columns"), [("finite", True), ("finite with padding", False)]
)
def test_any_number_is_near_enough(name, by_columns, near):
    assert_product_agrees(PRODUCTS[name], by_columns=by_columns, near=near)


@pytest.mark.parametrize(
    ("name", "by_columns"),
    [
        ("finite", True),
        ("finite with padding", False),
        ("no complements", True),
        ("no candidates", False),
        ("many ids", False),
    ],
)
def test_shards_of_a_product_have_its_statistics(name, by_columns):
    assert_product_agrees(PRODUCTS[name], by_columns=by_columns, axis="vocab")


ROUNDED = {
    "one id": Options(finite=True, ids=0),
    "three ids, padding": Options(finite=True, ids=1, size=WIDTH - 130),
    "four ids": Options(finite=True, ids=2),
    "five ids": Options(finite=True, ids=3),
    "no temperature": Options(finite=True, ids=1, tempered=False),
    "no complements": Options(finite=True, ids=1, complements=False),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_exponentials_are_exact_where_it_counts(name):
    assert_product_agrees(ROUNDED[name], by_columns=True, may_round=True)


@pytest.mark.parametrize("near", NEAR)
def test_rounded_exponentials_may_be_relative_to_anything(near):
    options = ROUNDED["three ids, padding"]
    assert_product_agrees(options, by_columns=True, may_round=True, near=near)


@pytest.mark.parametrize("name", ["three ids, padding", "five ids", "no complements"])
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
        product = Product(z, jnp.eye(3), jnp.full(2, near), probe, (2,))
        logits = product if implementation == "xla" else z + probe
        stats = token_statistics(logits, query, vocabulary)
        names = ("nll", "entropy", "total", "target_complement", "log_rest")
        values = [getattr(stats, name) for name in names]
        return sum(map(jnp.sum, values)), values

    grad = jax.jit(jax.grad(run, has_aux=True), static_argnums=1)
    got, want = (grad(jnp.zeros_like(z), i) for i in ("xla", "reference"))
    assert_trees_close(got, want, 4e-6)


# The whole loss --------------------------------------------------------------------

B, S, D, V = 2, 29, 6, 23
WHOLE: dict[str, Any] = {
    "vocab_size": V - 3,
    "initial_temperature": 1.4,
    "use_mtp": True,
    "mtp_type": "sequential",
    "num_future_tokens": 2,
    "unlikelihood_weight": 0.5,
    "logit_soft_cap": 5.0,
    "chunk_size": 13,
    "block_size": 5,
}


def whole_batch() -> tuple[dict[str, Any], dict[str, Any]]:
    """Floats and integers; what does not count is NaN."""
    keys = jax.random.split(jax.random.key(0), 6)
    weights = jax.random.uniform(keys[4], (B, S)).at[0, 3:7].set(0.0)
    hidden = jnp.where(weights[..., None] == 0, jnp.nan, _normal(keys[0], B, S, D))
    # The last position predicts no further token.
    depths = _normal(keys[3], 2, B, S, D).at[:, :, -1].set(jnp.nan)
    arrays = {
        "hidden_states": hidden,
        "lm_head": _normal(keys[1], D, V),
        "lm_head_bias": _normal(keys[2], V),
        "mtp_hidden_states": depths,
    }
    targets = jax.random.randint(keys[5], (B, S), 0, 6)
    return arrays, {"targets": targets, "attention_mask": weights}


def _normal(key, *shape):
    return jax.random.normal(key, shape)


@functools.cache
def whole_loss(path, implementation):
    """Loss, aux and all gradients."""
    loss_fn = ava_jax.create_unified_loss(WHOLE, implementation=implementation)
    arrays, ints = whole_batch()
    if path == "logits":
        hidden = arrays.pop("hidden_states")
        arrays["logits"] = hidden @ arrays["lm_head"] + arrays["lm_head_bias"]

    def loss(arrays: dict[str, Any]):
        total, aux, _ = loss_fn(loss_fn.init(), **arrays, **ints)
        return total, aux

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


@pytest.mark.parametrize("path", ["fused", "logits"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_whole_loss_is_that_of_the_definition(implementation, path):
    want, got = whole_loss(path, "reference"), whole_loss(path, implementation)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(want))
    assert all(np.abs(np.asarray(g)).max() > 1e-3 for g in want[1].values())
    assert all(want[0][1][k] > 0 for k in ("mtp_loss", "unlikelihood"))
    assert_trees_close(got, want, 2e-5)


def loss_far_ahead(implementation: Implementation):
    """Loss, aux and gradients where a column is far above, or below, all others."""
    # With more candidates, such as earlier tokens, products take two passes.
    config = WHOLE | {
        "logit_soft_cap": None,
        "unlikelihood_weight": 0.0,
        "ngram_max_matches": 4,
    }
    loss_fn = ava_jax.create_unified_loss(config, implementation=implementation)
    arrays, ints = whole_batch()
    del arrays["lm_head_bias"]
    arrays["lm_head"] = arrays["lm_head"].at[:, 4].multiply(100)
    for name in ("hidden_states", "mtp_hidden_states"):
        arrays[name] *= 10

    def loss(arrays: dict[str, Any]):
        total, aux, _ = loss_fn(loss_fn.init(), **arrays, **ints)
        # The exponential of the mean is infinite.
        del aux["perplexity"]
        return total, aux

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


def test_the_whole_loss_where_a_column_is_far_ahead(monkeypatch):
    """Also as a TPU makes it, whose logits lie by columns."""
    want = loss_far_ahead("reference")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(want))
    assert want[0][0] > 100
    for platform in ("gpu", "tpu"):
        compile_for(monkeypatch, platform)
        assert_trees_close(loss_far_ahead("xla"), want, 2e-5)


def compile_for(monkeypatch, platform, *, rounds=False):
    """Has passes take the sizes and the ways of another platform than this one.

    Args:
      monkeypatch: pytest's.
      platform: that one.
      rounds: whether exponentials are rounded for operands of float32: a processor has
        no products of bfloat16 by columns.
    """
    target = Target("xla", platform)
    if rounds:
        monkeypatch.setattr(fused, "ROUNDED_OPERANDS", "float32")
    monkeypatch.setattr(
        fused, "by_platform", lambda _, __, run, *operands: run(target, *operands)
    )


OF_16_BITS: dict[str, dict[str, Any]] = {
    "one id": {
        "primary_loss_type": "standard",
        "use_immediate_repetition_penalty": False,
    },
    "eleven ids": {
        "use_ngram_penalty": True,
        "eos_token_id": 3,
        "min_sequence_length": 9,
        "eos_penalty_weight": 0.1,
        "z_loss_weight": 1e-2,
        "initial_temperature": 1.4,
    },
    "focal": {"use_focal_loss": True, "focal_gamma": 2.0},
    # The main loss asks for all earlier ids, the heads for one each.
    "heads": WHOLE | {"logit_soft_cap": None, "use_ngram_penalty": True},
}


def loss_of_16_bits(config, implementation: Implementation, arrays, ints):
    """Loss, aux and gradients."""
    config = {"vocab_size": V - 3, "use_ngram_penalty": False} | config
    loss_fn = ava_jax.create_unified_loss(config, implementation=implementation)

    def loss(arrays: dict[str, Any]):
        total, aux, _ = loss_fn(loss_fn.init(), **arrays, **ints)
        return total, aux

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", OF_16_BITS)
def test_the_whole_loss_of_16_bits_as_a_tpu_makes_it(monkeypatch, name, blocks):
    """The exponentials are rounded; the loss is not."""
    arrays, ints = whole_batch()
    del arrays["lm_head_bias"]
    if name != "heads":
        del arrays["mtp_hidden_states"]
    config = OF_16_BITS[name] | {"chunk_size": 15, "block_size": 15 // blocks}
    (loss, aux), want = loss_of_16_bits(config, "reference", arrays, ints)
    compile_for(monkeypatch, "tpu", rounds=True)
    calls = []
    real = rounded.logits_gradient
    monkeypatch.setattr(
        rounded, "logits_gradient", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    (own_loss, own_aux), got = loss_of_16_bits(config, "xla", arrays, ints)
    assert calls
    assert_trees_close((own_loss, own_aux), (loss, aux), 2e-5)
    for key, gradient in want.items():
        error = np.abs(got[key] - gradient).max()
        assert error <= 2**-9 * np.abs(gradient).max(), key


def test_rounded_exponentials_leave_a_certain_target_its_gradient(monkeypatch):
    """p − 1 is −9e-5 there, where bfloat16 knows no p between 0.996 and 1."""
    targets = jax.random.randint(jax.random.key(0), (B, S), 0, V - 3)
    hidden = 12 * jax.nn.one_hot(targets, V)
    hidden += _normal(jax.random.key(1), B, S, V) / 4
    arrays = {"hidden_states": hidden, "lm_head": jnp.eye(V)}
    config = OF_16_BITS["one id"] | {"label_smoothing": 0.0}
    ints = {"targets": targets}
    _, want = loss_of_16_bits(config, "reference", arrays, ints)
    compile_for(monkeypatch, "tpu", rounds=True)
    _, got = loss_of_16_bits(config, "xla", arrays, ints)
    for key, gradient in want.items():
        largest = np.abs(gradient).max()
        assert largest < 3e-4
        error = np.abs(got[key] - gradient).max()
        assert error <= 2**-9 * largest, (key, error / largest)


@pytest.mark.parametrize("change", ["cap", "extra", "bias", "temperature"])
def test_exponentials_are_not_rounded_where_logits_are_wanted(monkeypatch, change):
    compile_for(monkeypatch, "tpu", rounds=True)
    monkeypatch.delattr(rounded, "logits_gradient")
    arrays, ints = whole_batch()
    names = ["hidden_states", "lm_head", *["lm_head_bias"] * (change == "bias")]
    arrays = {k: arrays[k] for k in names}
    config = ava_jax.UnifiedLossConfig(
        vocab_size=V,
        use_ngram_penalty=False,
        logit_soft_cap=5.0 if change == "cap" else None,
    )
    extra = (Lead(),) if change == "extra" else ()
    loss_fn = ava_jax.unified_loss(config, extra_terms=extra)

    def loss(arrays, temperature):
        state = loss_fn.init()
        if change == "temperature":
            state = dataclasses.replace(state, temperature=temperature)
        return loss_fn(state, **arrays, **ints)[0]

    slopes, of_temperature = jax.grad(loss, argnums=(0, 1))(arrays, jnp.float32(1.2))
    assert all(np.isfinite(x).all() for x in slopes.values())
    assert (of_temperature != 0) == (change == "temperature")


@dataclasses.dataclass(frozen=True)
class Lead:
    """Reads the largest logit, whichever it is, and how far ahead it is."""

    name: str = "lead"

    def init(self):
        return ()

    def apply(self, state, stats, inputs):
        return stats.top.astype(jnp.float32) - stats.log_rest


def test_an_extra_term_sees_the_largest_logit():
    arrays, ints = whole_batch()
    arrays = {k: arrays[k] for k in ("hidden_states", "lm_head")}

    def run(implementation):
        config = ava_jax.UnifiedLossConfig(
            vocab_size=V - 3, implementation=implementation, chunk_size=13, block_size=5
        )
        loss_fn = ava_jax.unified_loss(config, extra_terms=(Lead(),))

        def loss(arrays: dict[str, Any]):
            total, aux, _ = loss_fn(loss_fn.init(), **arrays, **ints)
            return total, aux

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)

    want = run("reference")
    assert want[0][1]["lead"] > 1
    assert_trees_close(run("xla"), want, 2e-5)


def mean_over(tokens, dtype, implementation: Implementation | None = "xla"):
    """The gradients of a short batch's share of a mean over many tokens."""
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=V, use_ngram_penalty=False, implementation=implementation
    )
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = _normal(keys[0], B, S, D), _normal(keys[1], D, V)
    targets = jax.random.randint(keys[2], (B, S), 0, V)
    one = loss_fn.normalizers(targets=targets)
    many = dataclasses.replace(one, tokens=jnp.asarray(tokens))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(hidden, head):
        # As trainers in float16 do, to keep the gradients in its range.
        return (
            tokens
            * loss_fn.accumulate(
                loss_fn.init(),
                normalizers=many,
                targets=targets,
                hidden_states=hidden,
                lm_head=head,
            )[0]
        )

    return gradients(hidden.astype(dtype), head.astype(dtype))


def test_float16_gradients_survive_a_mean_over_many_tokens(monkeypatch):
    want = mean_over(1e9, jnp.float32)
    got = mean_over(1e9, jnp.float16)
    assert {x.dtype for x in got} == {jnp.dtype("float16")}
    assert_trees_close(got, want, 1e-2)
    monkeypatch.setattr(fused, "_largest", lambda _: jnp.asarray(1.0))
    assert not any(x.any() for x in mean_over(1e9, jnp.float16))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_a_row_without_a_class_leaves_the_temperature_alone(implementation):
    query = Query(targets=jnp.array([0, 1]), active=jnp.ones(2, bool))
    logits = jnp.array([[1.0, 2.0, 0.0], [-jnp.inf] * 3])
    vocabulary = Vocabulary(3, implementation=implementation)

    def first(temperature):
        stats = token_statistics(logits, query, vocabulary, temperature)
        return stats.log_sum_tempered[0], stats

    slope, stats = jax.grad(first, has_aux=True)(jnp.asarray(2.0))
    z = np.array([1.0, 2.0, 0.0])
    p = np.exp(z / 2) / np.exp(z / 2).sum()
    np.testing.assert_allclose(slope, -(p * (z - 2)).sum() / 4, rtol=1e-5)
    assert stats.nll[1] == jnp.inf
    assert stats.entropy[1] == 0


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.data())
def test_shapes_that_divide_nothing(data):
    def size(most):
        return data.draw(st.integers(1, most))

    b, s, d, v = size(3), size(17), size(9), 1 + size(40)
    chunk, block, padding = size(19), size(9), size(4) - 1
    keys = jax.random.split(jax.random.key(data.draw(st.integers(0, 99))), 3)
    arrays = (_normal(keys[0], b, s, d), _normal(keys[1], d, v + padding))
    targets = jax.random.randint(keys[2], (b, s), 0, v)

    def run(implementation):
        loss_fn = ava_jax.create_unified_loss(
            vocab_size=v,
            implementation=implementation,
            chunk_size=chunk,
            block_size=block,
        )

        def loss(hidden, head):
            total, aux, _ = loss_fn(
                loss_fn.init(), targets=targets, hidden_states=hidden, lm_head=head
            )
            return total, aux

        run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(run)(*arrays)

    assert_trees_close(run("xla"), run("reference"), 2e-5)


# What a program computes and holds -------------------------------------------------


def fused_loss(dtype: Any = jnp.bfloat16, **options):
    """The loss of hidden states and lm_head, and both."""
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=V, use_ngram_penalty=False, chunk_size=13, block_size=5, **options
    )

    def loss(hidden, head):
        targets = jnp.ones(hidden.shape[:2], jnp.int32)
        return loss_fn(
            loss_fn.init(), targets=targets, hidden_states=hidden, lm_head=head
        )[0]

    return loss, (jnp.ones((B, 26, D), dtype), jnp.ones((D, V), dtype))


def arrays_of(jaxpr):
    """The shape and dtype of all that a program computes."""
    found = {(v.aval.shape, v.aval.dtype) for eqn in jaxpr.eqns for v in eqn.outvars}
    inside = (j for eqn in jaxpr.eqns for j in jaxprs_of(eqn))
    return found.union(*map(arrays_of, inside))


@pytest.mark.parametrize("implementation", [None, "reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize(
    ("arguments", "units"), [((), 2), ((0,), 4), ((1,), 4), ((0, 1), 6)]
)
def test_what_is_not_differentiated_costs_nothing(arguments, units, implementation):
    loss, operands = fused_loss(implementation=implementation, logit_soft_cap=5.0)
    run = jax.grad(loss, argnums=arguments) if arguments else loss
    jaxpr = jax.make_jaxpr(run)(*operands).jaxpr
    # Blocks of 5 tokens repeat some of a chunk of 13, and their logits.
    blocks = 13 if implementation == "cpu" else 15
    # xla also makes a few of a token's logits, one in 128, to know how large they are.
    sampled = max(min(128, V // 128), 1) if implementation in (None, "xla") else 0
    logits = 2 * B * 26 * D * (V + sampled)
    products = (units - 2) * B * 26 * D * V
    assert dot_flops(jaxpr) <= (logits + products) * blocks / 13
    assert dot_flops(jaxpr) >= logits + products
    assert (((D, V), jnp.dtype("float32")) in arrays_of(jaxpr)) == (1 in arguments)


# Which implementation runs ---------------------------------------------------------


def lowered(function, operands, platform):
    traced = jax.jit(function).trace(*operands)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("path", ["fused", "statistics"])
def test_the_platform_of_the_lowering_chooses(path):
    """All programs are lowered here, on a processor, for devices it does not have."""
    if path == "fused":
        loss, operands = fused_loss()
        function = jax.grad(loss, argnums=(0, 1))
    else:
        query = Query(targets=jnp.zeros(9, jnp.int32), active=jnp.ones(9, bool))
        operands = (jnp.ones((9, 256)),)

        def function(z):
            return token_statistics(z, query, Vocabulary(256)).nll

    programs = {p: lowered(function, operands, p) for p in ("cpu", "tpu", "cuda")}
    assert programs["cpu"] != programs["tpu"]
    assert programs["cpu"] != programs["cuda"]


def test_one_implementation_on_another_platform():
    loss, operands = fused_loss(jnp.float32, implementation="xla")
    own, _ = fused_loss(jnp.float32)
    program = lowered(loss, operands, "cpu")
    assert program != lowered(own, operands, "cpu")
    np.testing.assert_allclose(
        jax.jit(loss)(*operands), jax.jit(own)(*operands), rtol=1e-6
    )


def test_a_mesh_of_processors_takes_their_implementation(monkeypatch):
    """Nothing else is traced there; without a mesh everything is."""
    monkeypatch.setattr(statistics, "_MODULES", {"cpu": statistics.cpu})
    loss, operands = fused_loss(mesh=MESH, vocab_axis="vocab")
    jax.make_jaxpr(jax.grad(loss))(*operands)
    loss, operands = fused_loss()
    with pytest.raises(KeyError, match="xla"):
        jax.make_jaxpr(jax.grad(loss))(*operands)


def test_an_unknown_implementation_is_refused():
    allowed = r"implementation must be one of \('reference', 'cpu', 'xla', None\)"
    with pytest.raises(ValueError, match=f"{allowed}, got 'gpu'"):
        ava_jax.create_unified_loss(vocab_size=V, implementation="gpu")


def test_the_default_backend_decides_nothing():
    sources = Path(ava_jax.__path__[0]).rglob("*.py")
    assert not [p.name for p in sources if "default_backend" in p.read_text()]
