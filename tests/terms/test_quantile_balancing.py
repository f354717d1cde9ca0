"""Quantile balancing in the unified loss: its state, micro-batches, meshes."""

import contextlib
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.loss_checks import values
from support.scenes import jitted

import ava_jax
from ava_jax import losses, terms

B, S, V, E, K = 8, 6, 5, 4, 2
CONFIG: dict[str, Any] = {
    "vocab_size": V,
    "num_experts": E,
    "use_moe_balancing": True,
    "moe_balancing_type": "quantile",
    "use_ngram_penalty": False,
    "use_immediate_repetition_penalty": False,
}


def batch(*leading: int, seed: int = 0) -> dict[str, Any]:
    """Scores that favour the first experts, and the experts they choose."""
    gates = values(*leading, B, S, E, seed=seed) + np.linspace(1, -1, E)
    scores = (1 / (1 + np.exp(-gates))).astype(np.float32)
    chosen = np.argsort(-scores, axis=-1, kind="stable")[..., :K]
    arrays = {
        "targets": np.ones((B, S), np.int32),
        "logits": values(B, S, V),
        "gate_logits": scores,
        "expert_indices": chosen.astype(np.int32),
    }
    return jax.device_put(arrays)


def bias_of(state: ava_jax.LossState) -> jax.Array:
    """The state's routing bias."""
    assert isinstance(state.moe_balancing, ava_jax.BiasBalanceState)
    return state.moe_balancing.bias


@functools.partial(jax.jit, static_argnames=("bins", "momentum"))
def expected(scores, old, weights, bins=1000, momentum=0.0):
    """The bias after a step, from the two functions."""
    histogram = losses.cutoff_histogram(
        scores.reshape(-1, E), old, K, bins=bins, token_weights=weights.reshape(-1)
    )
    return losses.quantile_bias(old, histogram, K, momentum=momentum)


def test_the_state_moves_as_the_functions_say():
    given, weights = batch(), jnp.ones((B, S))
    loss_fn = ava_jax.create_unified_loss(CONFIG, balancing_bins=50, bias_momentum=0.25)
    state = loss_fn.init()
    want, aux = jnp.zeros(E), {}
    for _ in range(3):
        want = expected(given["gate_logits"], want, weights, 50, 0.25)
        _, aux, state = jitted(loss_fn)(state, given)
        np.testing.assert_allclose(bias_of(state), want, atol=1e-6)
    load = jnp.bincount(given["expert_indices"].reshape(-1), length=E)
    worst = losses.max_violation(load.astype(jnp.float32))
    np.testing.assert_allclose(aux["moe_max_violation"], worst, rtol=1e-6)
    assert worst > 0.2
    chex.assert_trees_all_equal(
        ava_jax.statistics(state)["moe_balancing"], {"bias": bias_of(state)}
    )


def test_layers_have_their_own_bias_or_add_up_their_histograms():
    given, weights = batch(2), jnp.ones((B, S))
    own = ava_jax.create_unified_loss(CONFIG, num_moe_layers=2)
    _, _, state = jitted(own)(own.init(), given)
    each = [expected(given["gate_logits"][i], jnp.zeros(E), weights) for i in (0, 1)]
    np.testing.assert_allclose(bias_of(state), jnp.stack(each), atol=1e-6)
    shared = ava_jax.create_unified_loss(CONFIG)
    _, _, state = jitted(shared)(shared.init(), given)
    both = expected(given["gate_logits"], jnp.zeros(E), jnp.ones((2, B, S)))
    np.testing.assert_allclose(bias_of(state), both, atol=1e-6)
    assert jnp.max(jnp.abs(each[0] - both)) > 1e-3


def test_it_adds_nothing_to_the_loss_and_has_no_gradient():
    given = batch()
    loss_fn = ava_jax.create_unified_loss(CONFIG)
    off = {k: v for k, v in CONFIG.items() if "moe" not in k}
    plain = ava_jax.create_unified_loss(off)
    loss, aux, _ = jitted(loss_fn)(loss_fn.init(), given)
    rest = {k: given[k] for k in ("targets", "logits")}
    want, others, _ = jitted(plain)(plain.init(), rest)
    assert loss == want
    assert set(aux) - set(others) == {"moe_max_violation"}

    def value(scores):
        return loss_fn(loss_fn.init(), **{**given, "gate_logits": scores})[0]

    grads = jax.jit(jax.grad(value))(given["gate_logits"])
    assert not np.asarray(grads).any()


def test_evaluation_changes_nothing():
    loss_fn = ava_jax.create_unified_loss(CONFIG)
    state = loss_fn.init()
    _, aux, after = jitted(loss_fn, train=False)(state, batch())
    chex.assert_trees_all_equal(after, state)
    assert "moe_max_violation" not in aux


def test_masked_tokens_count_nowhere_and_weights_are_ones():
    given = batch()
    weights = jnp.ones((B, S)).at[3].set(0).at[0, 2].set(0).at[1].set(0.25)
    loss_fn = ava_jax.create_unified_loss(CONFIG)
    dirty = jnp.where(weights[..., None] == 0, jnp.nan, given["gate_logits"])
    masked = {**given, "attention_mask": weights, "gate_logits": dirty}
    _, _, state = jitted(loss_fn)(loss_fn.init(), masked)
    want = expected(given["gate_logits"], jnp.zeros(E), weights != 0)
    np.testing.assert_allclose(bias_of(state), want, atol=1e-6)
    everything = expected(given["gate_logits"], jnp.zeros(E), jnp.ones((B, S)))
    assert jnp.max(jnp.abs(want - everything)) > 1e-3
    empty = {**given, "attention_mask": jnp.zeros((B, S))}
    _, _, after = jitted(loss_fn)(state, empty)
    chex.assert_trees_all_equal(after, state)


def test_step_two_does_not_recompile():
    for layers in (None, 2):
        loss_fn = ava_jax.create_unified_loss(CONFIG, num_moe_layers=layers)
        given = batch() if layers is None else batch(2)

        @jax.jit
        @chex.assert_max_traces(n=1)
        def step(state, given, loss_fn=loss_fn):
            return loss_fn(state, **given)[2]

        state = loss_fn.init()
        for _ in range(3):
            before, state = state, step(state, given)
            chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
        chex.clear_trace_counter()


def window(loss_fn, rows):
    """Aux and state of a step over micro-batches, [M, ...] each."""
    normalizers = loss_fn.normalizers(targets=rows["targets"])

    def share(_, micro):
        state = loss_fn.init()
        return None, loss_fn.accumulate(state, normalizers=normalizers, **micro)[2]

    stats = jax.lax.scan(share, None, rows)[1]
    stats = jax.tree.map(lambda x: jnp.sum(x, 0), stats)
    after = loss_fn.commit(loss_fn.init(), stats)
    return loss_fn.summary(after, stats), after


def cut(given, count):
    return {k: v.reshape(count, -1, *v.shape[1:]) for k, v in given.items()}


def check_same(got, want):
    (aux, state), (want_aux, want_state) = got, want
    np.testing.assert_array_equal(bias_of(state), bias_of(want_state))
    name = "moe_max_violation"
    np.testing.assert_allclose(aux[name], want_aux[name], rtol=1e-6)


def test_micro_batches_add_up_exactly():
    given, loss_fn = batch(), ava_jax.create_unified_loss(CONFIG)
    run = jax.jit(window, static_argnums=0)
    want = run(loss_fn, cut(given, 1))
    check_same(run(loss_fn, cut(given, 4)), want)
    # The mean of the micro-batches' own biases is another number.
    micro = [{k: v[i] for k, v in cut(given, 4).items()} for i in range(4)]
    parts = [bias_of(jitted(loss_fn)(loss_fn.init(), own)[2]) for own in micro]
    mean = jnp.mean(jnp.stack(parts), 0)
    assert jnp.max(jnp.abs(mean - bias_of(want[1]))) > 1e-3


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_changes_nothing(types):
    given = batch()
    alone = ava_jax.create_unified_loss(CONFIG)
    want = jax.jit(window, static_argnums=0)(alone, cut(given, 1))
    mesh = jax.make_mesh((4, 2), ("data", "sequence"), axis_types=(types,) * 2)
    layout = {"batch_axes": "data", "sequence_axis": "sequence"}
    loss_fn = ava_jax.create_unified_loss(CONFIG, mesh=mesh, **layout)
    context = jax.set_mesh(mesh) if types is AxisType.Explicit else None
    with context or contextlib.nullcontext():
        sharding = NamedSharding(mesh, P(None, "data", "sequence"))
        rows = jax.device_put(cut(given, 2), sharding)
        got = jax.jit(window, static_argnums=0)(loss_fn, rows)
    check_same(jax.device_get(got), jax.device_get(want))


def test_devices_exchange_histograms_and_no_tokens():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    loss_fn = ava_jax.create_unified_loss(CONFIG, mesh=mesh, batch_axes="data")
    given = jax.device_put(batch(), NamedSharding(mesh, P("data")))

    def bias(state, given):
        return bias_of(loss_fn(state, **given)[2])

    program = jax.jit(bias).lower(loss_fn.init(), given).compile()
    assert "all-reduce" in str(program.as_text())
    assert "all-gather" not in str(program.as_text())


def test_repeated_steps_even_out_the_experts():
    scores = jnp.asarray(values(B * 64, E) + np.linspace(1, -1, E), jnp.float32)
    scores = jax.nn.sigmoid(scores).reshape(B, 64, E)
    loss_fn = ava_jax.create_unified_loss(CONFIG)

    @jax.jit
    def step(state):
        _, chosen = losses.route(scores, bias_of(state), K)
        targets = jnp.ones((B, 64), jnp.int32)
        return loss_fn(
            state,
            targets=targets,
            logits=jnp.zeros((B, 64, V)),
            gate_logits=scores,
            expert_indices=chosen,
        )

    state, seen = loss_fn.init(), []
    for _ in range(8):
        _, aux, state = step(state)
        seen.append(float(aux["moe_max_violation"]))
    assert seen[0] > 0.5
    assert seen[-1] <= 0.05


def test_all_experts_for_every_token_is_an_error():
    given = batch()
    given["expert_indices"] = jnp.zeros((B, S, E), jnp.int32)
    loss_fn = ava_jax.create_unified_loss(CONFIG)
    with pytest.raises(ValueError, match=r"num_experts=4, got expert_indices of 4"):
        loss_fn(loss_fn.init(), **given)


def test_it_is_a_term_of_a_list():
    listed = [terms.CrossEntropy(), terms.QuantileBalancing(E, bins=50)]
    loss_fn = ava_jax.compose(listed, vocab_size=V)
    _, _, state = jitted(loss_fn)(loss_fn.init(), batch())
    want = expected(batch()["gate_logits"], jnp.zeros(E), jnp.ones((B, S)), 50)
    np.testing.assert_allclose(bias_of(state), want, atol=1e-6)
