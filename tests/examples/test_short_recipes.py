"""The short recipes: each runs, learns, and shows what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accumulate_gradients
import add_a_term
import ava_jax
import shard_over_mesh


def test_accumulation_gives_the_gradient_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accumulate_gradients, "STEPS", 8)
    found = accumulate_gradients.main()
    assert found["mean_of_means"] > 0.05
    assert found["accumulated"] < 1e-5
    assert found["last_nll"] < found["first_nll"] - 0.3


def test_the_mesh_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_over_mesh, "STEPS", 8)
    assert shard_over_mesh.make_mesh().shape == {"data": 4, "tensor": 2}
    found = shard_over_mesh.main()
    assert found["gap"] < 1e-5
    assert found["last"] < found["first"] - 0.3


def test_a_term_of_ones_own_is_added_and_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(add_a_term, "STEPS", 8)
    found = add_a_term.main()
    assert found["last"] < found["first"]
    logits = jax.random.normal(jax.random.key(0), (2, 5, add_a_term.VOCAB))
    targets = jax.random.randint(jax.random.key(1), (2, 5), 0, add_a_term.VOCAB)
    plain = ava_jax.unified_loss(add_a_term.CONFIG)

    @jax.jit
    def losses(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        with_term = add_a_term.LOSS
        loss, aux, _ = with_term(with_term.init(), targets=targets, logits=logits)
        without, _, _ = plain(plain.init(), targets=targets, logits=logits)
        return loss, aux["poly_loss"], without

    loss, term, without = losses(logits)
    p = jnp.take_along_axis(jax.nn.softmax(logits), targets[..., None], -1)
    expected = 2 * np.mean(1 - np.asarray(p))
    np.testing.assert_allclose(term, expected, rtol=1e-5)
    np.testing.assert_allclose(loss - without, expected, rtol=1e-4)
