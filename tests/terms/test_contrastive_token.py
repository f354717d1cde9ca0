"""The contrastive token loss: its ids, its numbers, and how a pass makes it."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import oracle_terms
from support.kernel_batches import compile_for
from support.loss_checks import check_gradient, untyped
from support.trees import assert_trees_close

import ava_jax
from ava_jax import losses, terms
from ava_jax.terms.objective import statistics_read, token_inputs
from ava_jax.tokens import read_tokens
from ava_jax.windows import read_recent, recent_ids

B, S, D, V = 4, 24, 6, 11
NAME = "contrastive_token"
PATHS = ("logits", "fused")


def batch(seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Few ids, so that they recur; holes in the mask; packed rows."""
    rng = np.random.default_rng(seed)
    arrays = {
        "hidden_states": rng.normal(size=(B, S, D)),
        "lm_head": rng.normal(size=(D, V)),
    }
    ints = {
        "targets": rng.integers(0, 6, (B, S)).astype(np.int32),
        "attention_mask": (rng.random((B, S)) < 0.8) * rng.integers(1, 4, (B, S)) / 2,
        "segment_ids": 1 + (np.arange(S) >= rng.integers(4, S, (B, 1))),
    }
    ints["attention_mask"] = ints["attention_mask"].astype(np.float32)
    ints["segment_ids"] = ints["segment_ids"].astype(np.int32)
    return {k: v.astype(np.float32) for k, v in arrays.items()}, ints


def only_it(window: int, **options: Any) -> ava_jax.UnifiedLoss:
    """The loss that has no other term."""
    term = terms.ContrastiveToken(window, 1.0)
    return ava_jax.compose([term], vocab_size=V, **options)


def value_of(arrays, loss_fn, ints, path):
    given = dict(arrays)
    if path == "logits":
        hidden, head = given.pop("hidden_states"), given.pop("lm_head")
        given["logits"] = hidden @ head
    return loss_fn(loss_fn.init(), **given, **ints)[0]


@functools.partial(jax.jit, static_argnums=(0, 3))
def value_and_grads(loss_fn, arrays, ints, path):
    return jax.value_and_grad(value_of)(arrays, loss_fn, ints, path)


def oracle(arrays, ints, window):
    logits = arrays["hidden_states"].astype(float) @ arrays["lm_head"]
    weights = ints["attention_mask"]
    return oracle_terms.contrastive_token(
        logits, ints["targets"], weights, ints["segment_ids"], window
    )


of_rows = jax.jit(losses.contrastive_token_loss, static_argnames="window")


def of_row(logits, targets, window=60, **options):
    """The loss of one row, under jit."""
    return of_rows(logits[None], np.asarray([targets]), window=window, **options)


@functools.partial(jax.jit, static_argnames="window")
def row_and_grad(logits, targets, window=60, **options):
    """The same with its gradient with respect to the logits."""

    def loss(logits):
        return losses.contrastive_token_loss(
            logits[None], targets[None], window=window, **options
        )

    return jax.value_and_grad(loss)(logits)


# Which ids. ------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [1, 5, 250])
def test_it_is_the_oracles(path, window):
    for seed in range(3):
        arrays, ints = batch(seed)
        value, _ = value_and_grads(only_it(window), arrays, ints, path)
        np.testing.assert_allclose(value, oracle(arrays, ints, window), rtol=2e-5)


@pytest.mark.parametrize(
    ("targets", "window", "counts"),
    [
        ([1, 2, 3, 4], 60, [0, 1, 2, 3]),
        ([1, 2, 3, 4], 2, [0, 1, 2, 2]),
        ([1, 1, 1, 2], 60, [0, 0, 0, 1]),  # distinct, and not the target
        ([1, 2, 1, 2], 1, [0, 1, 1, 1]),
        ([1, 2, 1, 3], 2, [0, 1, 1, 2]),  # the first 1 left the window, not the second
        ([1, 2, 2, 2], 2, [0, 1, 1, 0]),  # the 1 left it
        ([1, -100, 3, 1], 60, [0, 0, 1, 1]),  # no id, but a position
        ([1, -100, 3, 4], 2, [0, 0, 1, 1]),
    ],
)
def test_equal_logits_count_the_ids(targets, window, counts):
    kept = [count for y, count in zip(targets, counts, strict=True) if y >= 0]
    want = np.mean([math.log(1 + count) for count in kept])
    got = of_row(np.zeros((4, V), np.float32), targets, window)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_segments_see_nothing_of_each_other():
    segments, logits = np.array([[1, 1, 2, 2, 2, 0]]), np.zeros((6, V), np.float32)
    got = of_row(logits, [1, 2, 3, 1, 1, 4], segment_ids=segments)
    want = (0 + math.log(2) + 0 + math.log(2) + math.log(2)) / 5
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_function_is_the_term():
    arrays, ints = batch()
    logits = arrays["hidden_states"] @ arrays["lm_head"]
    given = (ints["targets"], ints["attention_mask"])
    got = of_rows(logits, *given, window=5, segment_ids=ints["segment_ids"])
    np.testing.assert_allclose(got, oracle(arrays, ints, 5), rtol=2e-5)


def test_it_asks_for_no_more_than_a_rows_ids():
    def recent(targets, index, window):
        tokens = read_tokens(targets, vocab_size=V)
        return recent_ids(read_recent(tokens), tokens.segments, index, window)

    given = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    for window, count in ((3, 3), (250, 7)):
        shape_of = functools.partial(recent, window=window)
        ids, found = jax.eval_shape(shape_of, given, given)
        assert ids.shape == found.shape == (2, 7, count)
    tokens = read_tokens(jnp.zeros((2, 7), jnp.int32), vocab_size=V)
    inputs = dataclasses.replace(token_inputs(tokens), rows=read_recent(tokens))
    read = statistics_read(terms.ContrastiveToken(3, 1.0), inputs)
    assert read == {"target", "candidates"}


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_below_one_is_an_error(window):
    with pytest.raises(ValueError, match=f"window must be in .1, inf., got {window}"):
        of_row(np.zeros((3, V), np.float32), [1, 2, 3], window)


def test_shapes_that_do_not_match_are_an_error():
    with untyped(), pytest.raises(ValueError, match=r"must (be|have)"):
        of_rows(np.zeros((3, V), np.float32), np.array([1, 2, 3]), window=60)


# Its numbers. ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "want"),
    [
        (-30.0, math.exp(-30.0)),
        (-5.0, math.log1p(math.exp(-5.0))),
        (0.5, math.log1p(math.exp(0.5))),
        (40.0, 40.0),
        (1e6, 1e6),
        (-math.inf, 0.0),
    ],
)
def test_any_gap_is_exact(gap, want):
    """Two tokens, of which the first has nothing before it."""
    logits = np.full((2, V), 7.0, np.float32)
    logits[:, 1] += np.float32(gap)
    got, grad = jax.device_get(row_and_grad(logits, np.array([1, 2])))
    np.testing.assert_allclose(2 * got, want, rtol=1e-6)
    pull = 1 / (1 + math.exp(-gap)) / 2
    np.testing.assert_allclose(grad[1, 1:3], [pull, -pull], rtol=1e-5, atol=1e-30)
    assert float(np.sum(np.abs(grad))) == pytest.approx(2 * pull, rel=1e-5)


def test_classes_that_cannot_be_add_nothing():
    logits = np.zeros((3, V), np.float32)
    logits[:, 1] = -np.inf
    given = {"targets": np.array([5, 1, 2]), "mask": np.array([[1, 0, 1]])}
    value, grad = row_and_grad(logits, **given)
    np.testing.assert_allclose(value, math.log(2) / 2, rtol=1e-6)
    assert np.isfinite(grad).all()
    logits[2, 1] = 0
    ones, _ = row_and_grad(logits, **given)
    np.testing.assert_allclose(ones, value, rtol=1e-6)  # the 1 is masked as well


def test_a_target_that_cannot_be_costs_infinity():
    logits = np.zeros((2, V), np.float32)
    logits[1, 2] = -np.inf
    assert float(of_row(logits, [1, 2])) == math.inf
    logits[1, 1] = -np.inf
    assert float(of_row(logits, [1, 2])) == 0


@pytest.mark.parametrize("path", PATHS)
def test_gradients(path):
    arrays, ints = batch()

    def value(hidden, head):
        given = {"hidden_states": hidden, "lm_head": head}
        return value_of(given, only_it(7), jax.device_put(ints), path)

    check_gradient(value, arrays["hidden_states"], arrays["lm_head"])


def test_the_gradient_touches_the_ids_alone():
    """It pushes recent ids down and the target up; nothing else has a gradient."""
    logits, targets = np.zeros((4, V), np.float32), np.array([1, 2, 3, 4])
    _, grad = row_and_grad(logits, targets, window=2)
    signs = np.zeros((4, V))
    signs[1, [1, 2]] = 1, -1
    signs[2, [1, 2, 3]] = 1, 1, -1
    signs[3, [2, 3, 4]] = 1, 1, -1
    np.testing.assert_array_equal(np.sign(grad), signs)


# In the unified loss. --------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_masked_tokens_may_hold_anything(path):
    arrays, ints = batch()
    masked = ints["attention_mask"] == 0
    head = arrays["lm_head"]

    @jax.jit
    @jax.value_and_grad
    def run(given, ints):
        loss_fn = only_it(5)
        return loss_fn(loss_fn.init(), **given, **ints)[0]

    given = {"logits": arrays["hidden_states"] @ head} if path == "logits" else arrays
    name = "logits" if path == "logits" else "hidden_states"
    want = run(given, ints)
    dirty = {**given, name: np.where(masked[..., None], np.nan, given[name])}
    targets = np.where(masked, -9, ints["targets"])
    got = run(dirty, {**ints, "targets": targets})
    assert_trees_close(got, want, 1e-6)
    assert not got[1][name][masked].any()


@pytest.mark.parametrize("window", [5, 30])
@pytest.mark.parametrize("implementation", ["reference", "cpu", "xla"])
@pytest.mark.parametrize("sizes", [(None, None), (7, 3)])
def test_kernels_and_sizes_change_nothing(window, implementation, sizes):
    """Fewer than 16 ids are compared with the classes; more are gathered."""
    arrays, ints = batch()
    want = value_and_grads(only_it(window), arrays, ints, "logits")
    chunk, block = sizes
    options = {"implementation": implementation, "chunk_size": chunk}
    loss_fn = only_it(window, block_size=block, **options)
    got = value_and_grads(loss_fn, arrays, ints, "fused")
    assert_trees_close(got, want, 2e-5)


def test_a_tpu_may_round_its_exponentials(monkeypatch):
    """The loss and the gradient at the ids are of logits that are not rounded."""
    arrays, ints = batch()
    want = value_and_grads(
        only_it(5, implementation="reference"), arrays, ints, "fused"
    )
    compile_for(monkeypatch, "tpu", rounds=True)
    value, grads = value_and_grads(
        only_it(5, implementation="xla", chunk_size=16), arrays, ints, "fused"
    )
    np.testing.assert_allclose(value, want[0], rtol=2e-5)
    assert_trees_close(grads, want[1], 2**-9)


@pytest.mark.parametrize(
    ("path", "sizes"),
    [("fused", (2, 2, 2)), ("logits", (2, 2, 2)), ("fused", (1, 8, 1))],
)
def test_a_mesh_changes_nothing(path, sizes):
    """Windows reach over the edges of the shards of a row."""
    arrays, ints = batch()
    axes = ("data", "sequence", "tensor")
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh(sizes, axes, axis_types=types)
    layout = {"batch_axes": "data", "sequence_axis": "sequence", "vocab_axis": "tensor"}
    loss_fn = only_it(9, mesh=mesh, **layout)
    tokens, head = P("data", "sequence"), P(None, None)
    specs = {"lm_head": head}
    placed = {
        k: jax.device_put(v, NamedSharding(mesh, specs.get(k, tokens)))
        for k, v in {**arrays, **ints}.items()
    }
    got = value_and_grads(
        loss_fn, {k: placed[k] for k in arrays}, {k: placed[k] for k in ints}, path
    )
    want = value_and_grads(only_it(9), arrays, ints, path)
    assert_trees_close(jax.device_get(got), jax.device_get(want), 2e-5)


def test_micro_batches_add_up():
    arrays, ints = batch()
    want = value_and_grads(only_it(5), arrays, ints, "fused")
    loss_fn = only_it(5)
    normalizers = jax.jit(loss_fn.normalizers)(**ints)
    by_row = {**ints, "hidden_states": arrays["hidden_states"]}

    @jax.jit
    @jax.value_and_grad
    def share(head, own):
        given = {"lm_head": head, "normalizers": normalizers, **own}
        return loss_fn.accumulate(loss_fn.init(), **given)[0]

    cuts = [{k: v[2 * i : 2 * i + 2] for k, v in by_row.items()} for i in range(2)]
    parts = [jax.device_get(share(arrays["lm_head"], own)) for own in cuts]
    got = jax.tree.map(np.add, *parts)
    assert_trees_close(got, (want[0], want[1]["lm_head"]), 2e-6)


def test_the_config_weighs_and_reports_it():
    arrays, ints = batch()
    logits = arrays["hidden_states"] @ arrays["lm_head"]

    def half_a_step(step):
        return 0.5 * step.astype(jnp.float32)

    loss_fn = ava_jax.create_unified_loss(
        vocab_size=V,
        contrastive_token_weight=half_a_step,
        contrastive_token_window=5,
        penalty_source="targets",
    )
    given = {"logits": jax.device_put(logits), **jax.device_put(ints)}
    step = jax.jit(lambda state: loss_fn(state, **given))
    _, first, state = step(loss_fn.init())
    loss, second, _ = step(state)
    assert first[NAME] == 0
    want = 0.5 * oracle(arrays, ints, 5)
    np.testing.assert_allclose(second[NAME], want, rtol=2e-5)
    parts = ("main_loss", "ngram_penalty", "immediate_repetition_penalty", NAME)
    np.testing.assert_allclose(loss, sum(second[k] for k in parts), rtol=1e-6)
    off = ava_jax.create_unified_loss(vocab_size=V)
    assert NAME not in [term.name for term in off.terms]


@pytest.mark.usefixtures("optimized_text")
def test_no_array_of_tokens_squared_or_tokens_times_vocabulary_exists():
    rows, length, vocab, window = 2, 67, 101, 13
    term = terms.ContrastiveToken(window, 1.0)
    loss_fn = ava_jax.compose([term], vocab_size=vocab, chunk_size=4)

    def loss(hidden, head):
        given = {"hidden_states": hidden, "lm_head": head}
        targets = jnp.ones((rows, length), jnp.int32)
        return loss_fn(loss_fn.init(), targets=targets, **given)[0]

    arrays = (jnp.ones((rows, length, D)), jnp.ones((D, vocab)))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text = str(step.lower(*arrays).compile().as_text())
    shapes = {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"[a-z]+\d*\[([\d,]+)\]", text)
    }
    assert any(vocab in shape for shape in shapes)
    sizes = [math.prod(shape) for shape in shapes if vocab in shape]
    assert max(sizes) < rows * length * vocab
    assert any(window in shape for shape in shapes)
    sizes = [math.prod(shape) for shape in shapes if window in shape]
    assert max(sizes) < rows * length * window
    assert not [shape for shape in shapes if shape.count(length) > 1]
