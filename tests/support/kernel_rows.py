"""Rows on which an implementation of the kernel could fail, and their statistics."""

import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ava_jax import Query, TokenStats, Vocabulary, token_statistics
from ava_jax.kernel.platforms import Implementation

IMPLEMENTATIONS: tuple[Implementation, ...] = ("cpu", "xla")
MESH = jax.make_mesh(
    (4,), ("vocab",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]
)
TEMPERATURE = 1.3
WIDTH = 512  # 8 segments of a row in the cpu implementation, 2 on a shard


class Options(NamedTuple):
    """The static options of a traced program.

    Attributes:
      size: classes; the columns from it on are padding.
      cap: the soft cap.
      finite: only rows without −inf and NaN, and the promise of that.
      tempered: whether there is a temperature.
      log_one_minus_p: whether log(1 − p) is requested.
      ids: how many candidates.
      dtype: of the logits.
      biased: whether a bias is added, −inf for some classes, without that promise.
      top: whether the top is requested where its id is not queried.
      coarse: whether the logits, without the bias, have no more bits than bfloat16.
      parts: of a row, which are summed apart.
    """

    size: int = WIDTH
    cap: float | None = None
    finite: bool = False
    tempered: bool = True
    log_one_minus_p: bool = True
    ids: int = 3
    dtype: str = "float32"
    biased: bool = False
    top: bool = True
    coarse: bool = False
    parts: int = 1

    @property
    def promises(self) -> bool:
        """Whether the vocabulary promises finite logits."""
        return self.finite and not self.biased


OPTIONS = {
    "plain": Options(),
    "padding and many ids": Options(size=WIDTH - 5, ids=20),
    # Of four shards the last has no class and the one before it a single one.
    "soft cap": Options(cap=30.0, size=WIDTH // 2 + 1),
    "no temperature": Options(tempered=False, ids=0),
    "without log(1 - p)": Options(log_one_minus_p=False, tempered=False, ids=17),
    "bfloat16": Options(log_one_minus_p=False, dtype="bfloat16", cap=30.0),
    "float64": Options(dtype="float64", size=WIDTH - 5),
    "finite": Options(finite=True),
    "finite with padding": Options(finite=True, size=WIDTH - 130, cap=30.0),
}
SHARED = (
    "plain",
    "soft cap",
    "without log(1 - p)",
    "finite",
    "finite with padding",
    "float64",
)


def named_rows() -> dict[str, np.ndarray]:
    """Returns rows on which an implementation could fail."""
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
def bias_of(options: Options) -> jax.Array:
    """Returns the bias of every class; −inf for one class in 32."""
    bias = np.random.default_rng(2).normal(size=WIDTH)
    bias[9::32] = -np.inf
    return jax.device_put(bias.astype(jnp.dtype(options.dtype)))


@functools.cache
def batch(options: Options):
    """The rows' names, logits [2, n, WIDTH] and a query: the targets of [0] are top."""
    names, z = unbiased(options)
    if options.biased:
        z += bias_of(options)
    return names, z, _query(options, names, z)


@functools.cache
def unbiased(options: Options):
    """The rows' names, and their logits without the bias."""
    rows = named_rows()
    if options.finite:
        # Masked ones are zeros in a pass; these are finite as well.
        rows = {k: z for k, z in rows.items() if np.isfinite(z).all()}
        del rows["inactive, large"]
    names = list(rows)
    z = np.stack(list(rows.values()))
    if options.coarse:
        z = z.astype(jnp.bfloat16)
    return names, jax.device_put(np.stack([z, z]).astype(jnp.dtype(options.dtype)))


def _query(options: Options, names, z) -> Query:
    rng = np.random.default_rng(1)
    top = np.where(np.isnan(z.astype(float)), 0, z.astype(float))
    top = top[..., : options.size].argmax(-1)
    other = rng.integers(0, options.size, top.shape[1:])
    targets = np.stack([top[0], other])
    candidates = {}
    if options.ids:
        ids = rng.integers(0, options.size, (*top.shape, options.ids))
        ids[:, ::2, 0] = top[:, ::2]
        ids[:, ::5, 0], ids[:, ::7, 0] = WIDTH + 3, -1  # outside [0, V)
        ids[:, 1::11, 0] = options.size  # likewise, where there is padding its first
        ids[:, ::3, -1] = ids[:, ::3, 0]  # one of them twice
        candidates = {
            "a": jax.device_put(ids.astype(np.int32)),
            "b": jax.device_put(np.stack([other[:, None]] * 2).astype(np.int32)),
        }
    active = [not name.startswith("inactive") for name in names]
    return Query(
        targets=jax.device_put(targets.astype(np.int32)),
        active=jax.device_put(np.array([active, active])),
        candidates=candidates,
        log_one_minus_p=options.log_one_minus_p,
        tempered_entropy=True,
        top=options.top,
    )


def describe(stats: TokenStats, query: Query) -> dict[str, jax.Array]:
    """Returns all differentiable values, [2, n] or [2, n, Q]."""
    names = ["log_z", "nll", "entropy", "total", "count", "expected", "target"]
    names += ["log_sum_tempered", "expected_tempered", "tempered_entropy"]
    if query.log_one_minus_p:
        names += ["log_sum_without_top", "log_one_minus_p"]
    values = {name: getattr(stats, name) for name in names}
    for name in query.candidates:
        values[f"logits of {name}"] = stats.candidates[name]
        if query.log_one_minus_p:
            values[f"unlikelihood of {name}"] = stats.unlikelihood(name)
    return values


def facts(stats: TokenStats, query: Query) -> dict[str, jax.Array]:
    """Returns the values without a gradient."""
    matches = {f"is {k}": stats.candidate_is_top[k] for k in query.candidates}
    return {"top": stats.top, "is_top": stats.is_top, **matches}


class TopLogit(NamedTuple):
    """The largest logits of rows, [2, n].

    Attributes:
      is_queried: whether the first of the largest is the target or a candidate.
      is_tied: whether several logits are largest.
      lead: the difference of the largest and the second largest logit.
    """

    is_queried: np.ndarray
    is_tied: np.ndarray
    lead: np.ndarray


@functools.cache
def top_logit_of(options: Options) -> TopLogit:
    _, z, query = batch(options)
    raw = np.asarray(z)[..., : options.size]
    z = raw if options.cap is None else options.cap * np.tanh(raw / options.cap)
    top = raw.argmax(-1)
    named = [np.asarray(ids) for ids in query.candidates.values()]
    ids = np.concatenate([np.asarray(query.targets)[..., None], *named], -1)
    lead = np.diff(np.sort(z, -1)[..., -2:])[..., 0]
    is_queried = (ids == top[..., None]).any(-1)
    return TopLogit(is_queried, lead == 0, lead)


def unknown(options: Options) -> dict[str, np.ndarray]:
    """Returns where which values of a product are unspecified."""
    return {"log_sum_without_top": ~top_logit_of(options).is_queried}


def mixed(stats: TokenStats, query: Query, left_out: dict[str, np.ndarray]):
    """A mixture of all values, except where they are left out; values and facts."""
    values = describe(stats, query)
    total = jnp.zeros_like(stats.temperature)
    for name, value in values.items():
        mix = jnp.asarray(weights_of(name, value.shape), value.dtype)
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
        options.promises,
        implementation,
        options.parts,
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
    grads, (values, found) = jax.jit(run)(z, jax.device_put(TEMPERATURE), query)
    return jax.tree.map(np.asarray, (values, found, grads))


def weights_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a mixture multiplies a value with, other numbers for every name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def gradient_of_temperature(options: Options) -> float:
    """The derivative of what depends on T, its moments over p at T, in float64.

    That of `log_sum_tempered` is −E[z]/T², of `expected_tempered` −Var[z]/T², and of
    `tempered_entropy` Var[z]/T³.
    """
    _, z, query = batch(options)
    names = ("log_sum_tempered", "expected_tempered", "tempered_entropy")
    of_sum, of_mean, of_entropy = (weights_of(name, z.shape[:-1]) for name in names)
    z = np.asarray(z, np.float64)[..., : options.size]
    active = np.asarray(query.active)
    z = np.where(active[..., None], z, 0.0)
    if options.cap is not None:
        z = np.where(np.isinf(z), z, options.cap * np.tanh(z / options.cap))
    relative = z - z.max(-1, keepdims=True)
    e = np.exp(relative / TEMPERATURE)
    p = e / e.sum(-1, keepdims=True)
    relative = np.maximum(relative, -1e15)
    mean = (p * relative).sum(-1)
    variance = (p * (relative - mean[..., None]) ** 2).sum(-1)
    total = of_sum * mean + (of_mean - of_entropy / TEMPERATURE) * variance
    return float(-(active * total).sum() / TEMPERATURE**2)


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
      is_rounded: whether gradients at ids that are not queried have 8 bits.
    """
    names, _, query = batch(options)
    named = [query.targets[..., None], *query.candidates.values()]
    ids = np.concatenate(named, -1)[..., None, :]
    is_queried = (np.arange(WIDTH)[:, None] == ids).any(-1)
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
        limit = np.where(is_queried[:, i] | (not is_rounded), limit, limit + 2**-7)
        error = np.abs(grad - slope) / (limit * size)
        assert error.max() <= 1, (row, error.max(), size)
    assert not got[2][0][..., options.size :].any()
