"""Policy losses token by token, advantages of groups, weights of the sampler."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.policy_batches import ARRAYS, EVERYTHING, B, S, batch
from support.post_training_oracles import (
    PolicyOracle,
    group_advantages,
    sampler_weights,
)

from ava_jax import losses, terms

policy_values = jax.jit(losses.policy_values, static_argnames="kind")


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_values_are_the_oracles(kind: str) -> None:
    x = batch()
    spread = np.repeat(x["advantages"][:, None], S, axis=1)
    oracle = PolicyOracle(x, kind=kind, **EVERYTHING)
    arrays: dict[str, Any] = {name: x[name] for name in ARRAYS}
    values = jax.device_get(
        policy_values(
            x["log_probs"], spread, x["mask"], kind=kind, **arrays, **EVERYTHING
        )
    )
    assert values.kl is not None
    for b in range(B):
        for t in oracle.tokens(b):
            policy, is_clipped = oracle.policy(b, t)
            want = [oracle.loss_at(b, t), policy, oracle.kl(b, t), oracle.ratio(b, t)]
            got = [values.loss, values.policy_loss, values.kl, values.ratio]
            np.testing.assert_allclose([y[b, t] for y in got], want, rtol=2e-5)
            assert values.is_clipped[b, t] == is_clipped


def test_values_of_a_block_are_those_of_the_whole() -> None:
    x = batch()
    spread = np.repeat(x["advantages"][:, None], S, axis=1)
    whole = jax.device_get(policy_values(x["log_probs"], spread))
    block = policy_values(x["log_probs"].reshape(-1)[3:9], spread.reshape(-1)[3:9])
    np.testing.assert_array_equal(block.loss, whole.loss.reshape(-1)[3:9])
    assert block.kl is None


def test_values_do_not_see_rows() -> None:
    x = jnp.zeros((B, S))
    for kind in ("luspo", "vespo"):
        with pytest.raises(ValueError, match=f"kind='{kind}' sees whole rows"):
            losses.policy_values(x, x, kind=kind)
    with pytest.raises(ValueError, match="did you mean 'cispo'"):
        losses.policy_values(x, x, kind="cipso")


# Helpers ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages(scale: bool) -> None:
    rewards = np.array([1, 0, 4, 3, 3, 3, -1, 2, 5], np.float32)
    of_groups = jax.jit(
        losses.group_advantages, static_argnames=("group_size", "scale", "eps")
    )
    got = of_groups(rewards, group_size=3, scale=scale, eps=1e-2)
    want = group_advantages(rewards, 3, scale, 1e-2)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    certain = np.array([1, 1, 0, 1])
    whole = of_groups(certain, group_size=2, scale=scale, eps=0)
    assert whole[0] == whole[1] == 0
    assert np.isfinite(whole).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("eps", [1e-4, 1e-6, 0.0])
def test_equal_rewards_have_no_advantage(dtype: jnp.dtype, eps: float) -> None:
    """Numbers that a float cannot represent, in groups whose mean is rounded."""
    of_groups = jax.jit(losses.group_advantages, static_argnames=("group_size", "eps"))
    for size in (2, 3, 6, 7, 12):
        values = np.array([0.1, 3.3, 1000.1, -512.3, 0.35, 1e30, 1e-30])
        equal = jnp.asarray(np.repeat(values, size), dtype)
        assert not np.any(of_groups(equal, group_size=size, eps=eps))
        assert not np.any(losses.group_advantages(equal, size, scale=False))


def test_nearly_equal_rewards() -> None:
    """Rewards one float apart: what is left of them is exact."""
    low = np.float32(1000.1)
    high = np.nextafter(low, np.float32(2000))
    rewards = np.array([low, high, high, low, low, low], np.float32)
    exact = rewards.astype(np.float64)
    apart = exact - exact.mean()
    for eps in (1e-4, 0.0):
        got = losses.group_advantages(jnp.asarray(rewards), 6, eps=eps)
        want = apart / (exact.std(ddof=1) + eps)
        np.testing.assert_allclose(got, want, rtol=1e-5)
    got = losses.group_advantages(jnp.asarray(rewards), 6, scale=False)
    np.testing.assert_allclose(got, apart, rtol=1e-5)


def test_k1_as_a_loss_is_refused() -> None:
    """Its gradient does not depend on the reference; that of k2 is d."""
    x = np.array([[-1.0, -2.0]], np.float32), np.zeros(1), np.ones((1, 2))
    log_probs, advantages, mask = map(jnp.asarray, x)
    reference = {"ref_log_probs": log_probs - 0.5, "kl_weight": 1.0}

    def loss(log_probs, **options):
        return losses.policy_loss(log_probs, advantages, mask, **reference | options)[0]

    with pytest.raises(ValueError, match=r'kl_estimator="k1".*"k2".*importance'):
        loss(log_probs, kl_estimator="k1")
    with pytest.raises(ValueError, match='kl_estimator="k1"'):
        jax.eval_shape(lambda w: loss(log_probs, kl_estimator="k1", kl_weight=w), 0.1)
    with pytest.raises(ValueError, match='kl_estimator="k1"'):
        terms.PolicyTerm(kl_estimator="k1", kl_weight=0.1)
    loss(log_probs, kl_estimator="k1", kl_weight=0.0)
    terms.PolicyTerm(kl_estimator="k1")
    weighted = {"kl_estimator": "k1", "kl_importance_weighting": True}
    for options in ({"kl_estimator": "k2"}, weighted):
        slope = jax.grad(functools.partial(loss, **options))(log_probs)
        extra = 0.5 if options is weighted else 0.0
        np.testing.assert_allclose(slope, np.full((1, 2), (0.5 + 2 * extra) / 2))


def test_group_advantages_errors() -> None:
    for size, rows in ((1, 4), (3, 4)):
        message = rf"group_size must be at least 2.* {size} and \({rows},\)"
        with pytest.raises(ValueError, match=message):
            losses.group_advantages(jnp.zeros(rows), size)
    with pytest.raises(ValueError, match="eps must be"):
        losses.group_advantages(jnp.zeros(4), 2, eps=-1.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sampler_weights(level: str) -> None:
    x = batch()
    own, other, mask = x["log_probs"], x["old_log_probs"], x["mask"]
    want = sampler_weights(own, other, mask, 1.2, level)
    assert np.max(want) > 1.19
    other = np.where(mask == 0, np.nan, other)
    own = np.where(mask == 0, -np.inf, own)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_weights(
        own: jax.Array, other: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        weights = losses.sampler_weights(
            own, other, jax.device_put(mask), cap=1.2, level=level
        )
        return jnp.sum(weights), weights

    grad, full = gradient_and_weights(own, other)
    assert not np.any(grad)
    np.testing.assert_allclose(full, want, rtol=1e-5)
    far = np.full((1, 2), 1e4, np.float32)
    capped = jax.jit(functools.partial(losses.sampler_weights, level=level))
    ends = capped(far, -far, np.ones_like(far))
    np.testing.assert_allclose(ends, 2, rtol=1e-6)


def test_sampler_weights_errors() -> None:
    x = jnp.zeros((B, S))
    with pytest.raises(ValueError, match="unknown level 'row'"):
        losses.sampler_weights(x, x, x, level="row")
    with pytest.raises(ValueError, match="cap must be in"):
        losses.sampler_weights(x, x, x, cap=0.0)
