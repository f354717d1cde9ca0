"""The adaptive heads: when they run, and that skipping saves their work."""

from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.head_checks import KEY, B, D, K, S, V, adaptive, apply, init, made, normal

from ava_jax.heads import AdaptiveMTPOutput, ConfidenceGate, MTPHeads


def with_nan_heads(variables: Any) -> Any:
    params = variables["params"]
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params["heads"])
    return {"params": params | {"heads": poisoned}}


def matmuls(jaxpr: Any, in_cond: bool = False) -> Iterator[tuple[bool, list]]:
    """(whether under a conditional, shapes in and out) of every matmul."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield in_cond, [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        inside = in_cond or eqn.primitive.name == "cond"
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple) else (value,):
                if hasattr(part, "jaxpr"):
                    yield from matmuls(part.jaxpr, inside)


def test_output_holds_the_arguments_of_the_loss() -> None:
    module, h = adaptive(), normal(B, S, D)
    variables = init(module, h)
    out = apply(module, variables, h)
    assert isinstance(out, AdaptiveMTPOutput)
    assert set(vars(out)) == {"additional_logits", "confidence_scores", "mtp_active"}
    chex.assert_shape(out.additional_logits, (K, B, S, V))
    chex.assert_shape(out.confidence_scores, (B, 1))
    chex.assert_shape(out.mtp_active, ())
    assert out.mtp_active.dtype == jnp.bool_
    params = variables["params"]
    heads = apply(MTPHeads(K, V), {"params": params["heads"]}, h)
    gate = apply(ConfidenceGate((8, 5)), {"params": params["gate"]}, h)
    chex.assert_trees_all_close(out.additional_logits, heads, rtol=1e-5)
    chex.assert_trees_all_close(out.confidence_scores, gate, rtol=1e-5)


def test_init_makes_all_parameters_though_the_heads_are_skipped() -> None:
    h = normal(B, S, D)
    shut = made(adaptive(confidence_threshold=1.0, warmup_steps=5), h, step=0)
    assert shut == {
        "gate": made(ConfidenceGate((8, 5)), h),
        "heads": made(MTPHeads(K, V), h),
    }


@pytest.mark.parametrize("differentiate", [False, True])
def test_every_matmul_of_the_heads_is_under_the_conditional(
    differentiate: bool,
) -> None:
    module, h = adaptive(), normal(B, S, D)
    variables = init(module, h)

    def loss(variables: Any) -> jax.Array:
        return apply(module, variables, h).additional_logits.sum()

    run = jax.grad(loss) if differentiate else loss
    found = list(matmuls(jax.make_jaxpr(run)(variables).jaxpr))
    under = {inside for inside, dims in found if any(V in shape for shape in dims)}
    assert under == {True}
    text = jax.jit(run).lower(variables).compile().as_text()
    assert text is not None
    assert " conditional(" in text


@pytest.mark.parametrize(
    ("options", "step"),
    [({"confidence_threshold": 1.0}, 0), ({"warmup_steps": 3}, 2)],
)
def test_skipped_heads_give_zeros_and_no_gradient(options: dict, step: int) -> None:
    module, h = adaptive(**options), normal(B, S, D)
    variables = with_nan_heads(init(module, h, step=0))

    @jax.jit
    def loss(variables: Any, h: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        out = apply(module, variables, h, step=step)
        return jnp.sum(out.additional_logits) + jnp.sum(out.confidence_scores), out

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, out), (grads, _) = got = grad(variables, h, jax.device_put(step))
    chex.assert_tree_all_finite(got)
    assert not out.mtp_active
    np.testing.assert_array_equal(out.additional_logits, 0)
    chex.assert_trees_all_equal(
        grads["params"]["heads"], jax.tree.map(jnp.zeros_like, grads["params"]["heads"])
    )
    assert np.abs(grads["params"]["gate"]["dense_2"]["kernel"]).max() > 0
    ran = apply(adaptive(), variables, h)
    assert np.isnan(ran.additional_logits).all()


def test_heads_run_from_the_end_of_the_warmup_and_from_the_threshold() -> None:
    h = normal(1, S, D)
    variables = init(adaptive(), h)
    score = float(apply(adaptive(), variables, h).confidence_scores[0, 0])
    above = float(np.nextafter(np.float32(score), np.float32(1)))
    for threshold, expected in ((score, True), (above, False)):
        module = adaptive(confidence_threshold=threshold)
        assert bool(apply(module, variables, h).mtp_active) is expected
    module = adaptive(warmup_steps=3, confidence_threshold=0.0)
    active = [bool(apply(module, variables, h, step=t).mtp_active) for t in range(5)]
    assert active == [False, False, False, True, True]


@pytest.mark.parametrize("per_token", [False, True])
def test_mean_confidence_is_over_unmasked_tokens(per_token: bool) -> None:
    h = normal(3, S, D)
    mask = jnp.array([[1, 1, 0, 0, 0, 0], [0, 2, 0, 0, 0, 1], [0] * S], "float32")
    variables = init(adaptive(per_token=per_token), h)
    scores = apply(adaptive(per_token=per_token), variables, h, mask).confidence_scores
    weights = mask if per_token else jnp.any(mask != 0, axis=1)
    mean = float(np.average(scores[..., 0], weights=weights))
    assert abs(mean - float(jnp.mean(scores))) > 1e-3
    for threshold, expected in ((mean - 1e-4, True), (mean + 1e-4, False)):
        module = adaptive(per_token=per_token, confidence_threshold=threshold)
        assert bool(apply(module, variables, h, mask).mtp_active) is expected


def test_all_masked_skips_the_heads() -> None:
    module, h = adaptive(confidence_threshold=0.1), normal(B, S, D)
    variables = init(module, h)
    out = apply(module, variables, h * jnp.nan, jnp.zeros((B, S)))
    assert not out.mtp_active
    chex.assert_tree_all_finite(vars(out))


def test_masked_nan_does_not_reach_the_adaptive_heads() -> None:
    module, mask = (
        adaptive(confidence_threshold=0.0),
        jnp.arange(S) < jnp.full((B, 1), 3),
    )
    h = normal(B, S, D)
    variables = init(module, h)

    def loss(variables: Any, h: jax.Array) -> jax.Array:
        out = apply(module, variables, h, mask)
        return jnp.sum(out.additional_logits) + jnp.sum(out.confidence_scores)

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    got = grad(variables, jnp.where(mask[..., None], h, jnp.nan))
    chex.assert_trees_all_equal(got, grad(variables, h))
    np.testing.assert_array_equal(got[1][1][:, 3:], 0)


def test_steps_do_not_retrace_and_dropout_reaches_both_parts() -> None:
    module = adaptive(
        warmup_steps=2, head_type="mlp", dropout_rate=0.5, confidence_threshold=0.0
    )
    h = normal(B, S, D)
    variables = init(module, h, step=0)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(step: jax.Array, key: jax.Array) -> Any:
        rngs = {"dropout": key}
        return apply(module, variables, h, step=step, deterministic=False, rngs=rngs)

    first, second = (run(jnp.asarray(2), jax.random.key(i)) for i in range(2))
    assert not run(jnp.asarray(1), KEY).mtp_active
    assert np.abs(first.additional_logits - second.additional_logits).max() > 1e-3
    assert np.abs(first.confidence_scores - second.confidence_scores).max() > 1e-3


def test_warmup_needs_the_step() -> None:
    with pytest.raises(ValueError, match="step is required with warmup_steps=3"):
        made(adaptive(warmup_steps=3), normal(B, S, D))
