"""Distillation from a teacher's top k: numbers, ids that are left out."""

import functools

import numpy as np
import pytest
from support import distillation_oracles as oracles
from support.distillation_batches import PATHS, V, batch, logits_of, run, top_k
from support.trees import assert_trees_close


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_is_the_oracles(path, tail):
    x, options = batch(11), {"tail": tail, "temperature": 2.0}
    given = top_k(x, temperature=2.0)
    if path == "logits":
        given = {k: v for k, v in given.items() if k[:2] != "lm" and k[:3] != "hid"}
        given["logits"] = logits_of(x).astype(np.float32)
    loss, aux, grads = run(given, **options, logit_soft_cap=3.0)
    names = ("teacher_ids", "teacher_log_probs", "attention_mask")
    arrays = (logits_of(x), *(given[name] for name in names))
    want = functools.partial(oracles.top_k_distillation, *arrays, vocab_size=V)
    right = want(**options, soft_cap=3.0)
    np.testing.assert_allclose(loss, right, rtol=2e-5)
    assert abs(want(tail=not tail, temperature=2.0, soft_cap=3.0) - right) > 0.01
    assert int(aux["num_invalid_ids"]) == 0
    assert not np.any(grads["teacher_log_probs"])


def test_ids_outside_the_vocabulary_are_left_out_and_counted():
    x = batch(12, width=V + 2)
    given = top_k(x)
    outside = {(0, 1, 0): -1, (0, 2, 3): V, (1, 1, 2): V + 1, (1, 3, 1): 10**6}
    for place, value in outside.items():
        given["teacher_ids"][place] = value
    given["attention_mask"][0, 1:3] = given["attention_mask"][1, 1:4] = 0.5
    # A masked token's ids are not counted.
    given["attention_mask"][1, 5] = 0
    given["teacher_ids"][1, 5] = -7
    given["teacher_log_probs"][1, 5] = np.nan
    loss, aux, grads = run(given, vocab_size=V)
    names = ("teacher_ids", "teacher_log_probs", "attention_mask")
    arrays = (logits_of(x), *(given[name] for name in names))
    want = oracles.top_k_distillation(*arrays, vocab_size=V)
    np.testing.assert_allclose(loss, want, rtol=2e-5)
    assert int(aux["num_invalid_ids"]) == len(outside)
    assert all(np.all(np.isfinite(g)) for g in grads.values())
    np.testing.assert_array_equal(grads["lm_head"][:, V:], 0)
    # Leaving one out is what a probability of 0 does.
    for place in outside:
        given["teacher_ids"][place] = 0
        given["teacher_log_probs"][place] = -np.inf
    same, aux, other = run(given, vocab_size=V)
    np.testing.assert_allclose(same, loss, rtol=1e-6)
    assert_trees_close(other, grads, 1e-6)
    assert int(aux["num_invalid_ids"]) == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_ids_of_any_integers(dtype):
    given = top_k(batch(13))
    want = run(given)[0]
    given["teacher_ids"] = given["teacher_ids"].astype(dtype)
    np.testing.assert_array_equal(run(given)[0], want)


@pytest.mark.parametrize("tail", [True, False])
def test_the_top_v_is_the_whole_distribution(tail):
    x = batch(14)
    loss, _, grads = run(top_k(x, k=V), tail=tail)
    whole = run(x)
    np.testing.assert_allclose(loss, whole[0], rtol=2e-5)
    names = ("hidden_states", "lm_head", "lm_head_bias")
    got, want = ({k: g[k] for k in names} for g in (grads, whole[2]))
    # With a tail the rest is a rounding error's, and its slope the teacher's part.
    assert_trees_close(got, want, 1e-3 if tail else 2e-5)


@pytest.mark.parametrize("implementation", ["reference", "cpu", "xla"])
@pytest.mark.parametrize("is_known", [True, False])
def test_what_a_certain_student_gives_to_the_rest_is_exact(implementation, is_known):
    """1 − p of its most probable class is 1e-5 to 1e-9, and 1 − Σ p a part of it."""
    rng = np.random.default_rng(15)
    shape = (3, 8)
    z = rng.normal(size=(*shape, V)).astype(np.float32)
    z[..., 4] += np.linspace(17, 24, shape[1], dtype=np.float32)
    ids = np.broadcast_to([7, 4, 2] if is_known else [7, 3, 2], (*shape, 3))
    q = np.array([0.1, 0.4, 0.2])
    given = {
        "logits": z,
        "teacher_ids": ids.astype(np.int32),
        "teacher_log_probs": np.broadcast_to(np.log(q), (*shape, 3)).astype(np.float32),
    }
    loss, _, grads = run(given, implementation=implementation)

    exp = np.exp(z.astype(np.float64))
    p = exp / exp.sum(-1, keepdims=True)
    is_rest = np.ones(V, bool)
    is_rest[ids[0, 0]] = False
    rest = exp[..., is_rest].sum(-1, keepdims=True)
    of_known = np.sum(q * np.log(q / np.take_along_axis(p, ids, -1)), -1)
    of_rest = 0.3 * np.log(0.3 / (rest / exp.sum(-1, keepdims=True)))
    np.testing.assert_allclose(loss, np.mean(of_known + of_rest[..., 0]), rtol=1e-6)
    wanted = np.zeros(V)
    wanted[ids[0, 0]] = q
    want = p - wanted - np.where(is_rest, 0.3 * exp / rest, 0)
    of_tokens = np.asarray(grads["logits"]) * np.prod(shape)
    np.testing.assert_allclose(of_tokens, want, atol=1e-5)
    # As a difference of numbers of float32, the rest would be wrong by 1e-7.
    if is_known:
        assert np.max(rest / exp.sum(-1, keepdims=True)) < 1e-5
