"""Weights, shifts, windows, matches and runs of handmade rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ava_jax.tokens import (
    ahead,
    earlier_continuations,
    earlier_ids,
    longest_runs,
    plain_tokens,
    read_history,
    read_tokens,
    repeated_ngram_pairs,
    repeated_token,
)

read = jax.jit(
    read_tokens, static_argnames=("vocab_size", "pad_token_id", "eos_token_id")
)
shifted = jax.jit(ahead, static_argnums=1)
repeats = jax.jit(repeated_ngram_pairs, static_argnums=1)
loops = jax.jit(longest_runs)


def rows(*targets, **options):
    return read(np.array(targets), vocab_size=10, **options)


def test_ids_outside_the_vocabulary_are_masked_and_reported():
    tokens = rows([1, -1, 10, 10**6, -100, 2])
    np.testing.assert_array_equal(tokens.weights, [[1, 0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(tokens.invalid, [[0, 1, 1, 1, 0, 0]])
    masked = rows([1, -1], attention_mask=np.array([[True, False]]))
    assert not np.any(masked.invalid)


@pytest.mark.parametrize("kind", [bool, jnp.int32, jnp.float16, jnp.float32])
def test_the_mask_may_have_any_dtype(kind):
    tokens = rows([1, 2, 3], attention_mask=np.array([[1, 0, 1]]).astype(kind))
    np.testing.assert_array_equal(tokens.weights, [[1, 0, 1]])
    assert tokens.weights.dtype == jnp.float32


@pytest.mark.parametrize("kind", [jnp.uint8, jnp.int8, jnp.uint32, jnp.int16])
def test_targets_may_have_any_integer_type(kind):
    ids = np.array([[1, 2, 100]]).astype(kind)
    tokens = read(ids, vocab_size=50257)
    np.testing.assert_array_equal(tokens.targets, [[1, 2, 100]])
    np.testing.assert_array_equal(tokens.weights, [[1, 1, 1]])


@pytest.mark.parametrize("kind", ["int64", "uint64"])
def test_ids_of_64_bits_are_not_cut_to_the_vocabulary(kind):
    with jax.enable_x64(True):
        tokens = read(np.array([[1, 2**32 + 5]], kind), vocab_size=10)
        np.testing.assert_array_equal(tokens.weights, [[1, 0]])
        np.testing.assert_array_equal(tokens.invalid, [[False, True]])


def test_padding_without_a_mask():
    tokens = rows([3, 1, 0, 0], pad_token_id=0)
    np.testing.assert_array_equal(tokens.weights, [[1, 1, 0, 0]])
    same = rows([3, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], pad_token_id=0, eos_token_id=0)
    np.testing.assert_array_equal(
        same.weights, [[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
    )
    given = rows([3, 0], pad_token_id=0, attention_mask=np.ones((1, 2), np.float32))
    np.testing.assert_array_equal(given.weights, [[1, 1]])


def test_positions_of_a_single_segment_are_no_scan_of_a_constant():
    """XLA would fold it, which takes minutes for a large batch."""
    ids = jnp.zeros((2, 7), jnp.int32)
    tokens = read(ids, vocab_size=9)
    np.testing.assert_array_equal(tokens.positions, [range(7)] * 2)
    program = jax.make_jaxpr(functools.partial(read_tokens, vocab_size=9))(ids)
    assert "cummax" not in str(program)
    segmented = functools.partial(read_tokens, segment_ids=ids, vocab_size=9)
    assert "cummax" in str(jax.make_jaxpr(segmented)(ids))


def test_segments_and_positions():
    tokens = rows([1, 2, 3, 4, 5], segment_ids=np.array([[7, 7, 9, 9, 0]]))
    np.testing.assert_array_equal(tokens.weights, [[1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(tokens.positions, [[0, 1, 0, 1, 0]])


def test_ahead_stays_in_the_row_and_the_segment():
    tokens = rows([1, 2, 3, 4], segment_ids=np.array([[1, 1, 1, 2]]))
    np.testing.assert_array_equal(shifted(tokens, 1).targets, [[2, 3, 0, 0]])
    np.testing.assert_array_equal(shifted(tokens, 1).weights, [[1, 1, 0, 0]])
    np.testing.assert_array_equal(shifted(tokens, 9).weights, [[0, 0, 0, 0]])


def test_pairs_of_equal_windows_are_counted_exactly():
    assert float(repeats(rows([1, 2, 1, 2, 1, 2]), 2)) == 3 + 1
    split = rows([1, 2, 1, 2], segment_ids=np.array([[1, 1, 2, 2]]))
    assert float(repeats(split, 2)) == 0
    hole = rows([1, 2, 1, 2], attention_mask=np.array([[1, 1, 0, 1]]))
    assert float(repeats(hole, 2)) == 0
    assert float(repeats(rows([1, 2]), 4)) == 0


def test_no_hash_can_collide():
    """Ids whose polynomial hashes overflow to the same int32."""
    ids = np.array([[0, 2**16, 2**16, 0, 2**30, 2**30, 1, 2**30]], np.int32)
    tokens = jax.jit(plain_tokens)(ids, np.ones(ids.shape, bool))
    assert float(repeats(tokens, 3)) == 0
    assert float(repeats(tokens, 1)) == 1 + 1 + 3


def test_continuations_are_the_latest_first():
    tokens = rows([1, 2, 1, 3, 1, 4, 1, 5])
    continuations = jax.jit(lambda tokens: earlier_continuations(tokens, 2, 2))
    ids, exists = jax.device_get(continuations(tokens))
    np.testing.assert_array_equal(ids[0, 7], [4, 3])
    np.testing.assert_array_equal(ids[0, 3], [2, 0])
    np.testing.assert_array_equal(exists[0, 3], [True, False])
    assert not exists[0, :3].any()


def test_runs_are_neither_extended_nor_broken_by_masked_positions():
    np.testing.assert_array_equal(loops(rows([1, 1, 1, 2, 2])), [3])
    masked = rows([1, 1, 1, 1, 2], attention_mask=np.array([[1, 1, 0, 1, 1]]))
    np.testing.assert_array_equal(loops(masked), [3])
    skipped = rows([1, 1, 5, 5], attention_mask=np.array([[1, 1, 0, 1]]))
    np.testing.assert_array_equal(loops(skipped), [3])
    split = rows([1, 1, 1, 1], segment_ids=np.array([[1, 1, 2, 2]]))
    np.testing.assert_array_equal(loops(split), [2])


def test_repeated_token_does_not_look_at_masked_ones():
    repeated = jax.jit(repeated_token)
    ids, run = repeated(rows([1, 1, 2, 2]))
    np.testing.assert_array_equal(ids, [[0, 1, 1, 2]])
    np.testing.assert_array_equal(run, [[0, 1, 2, 1]])
    mask = np.array([[1, 0, 1, 1]])
    for hidden in (1, 5):
        _, run = repeated(rows([1, hidden, 1, 1], attention_mask=mask))
        np.testing.assert_array_equal(run, [[0, 1, 0, 1]])
    _, long = repeated(rows([3] * 15))
    assert np.max(long) == 10


def test_earlier_ids_by_brute_force():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 6, (3, 17))
    segments = np.sort(rng.integers(0, 4, (3, 17)), axis=1)
    mask = rng.random((3, 17)) < 0.8
    tokens = rows(
        *targets.tolist(),
        attention_mask=mask,
        segment_ids=segments,
    )
    start, size = 4, 9
    positions = np.tile(np.arange(start, start + size, dtype=np.int32), (3, 1))

    @jax.jit
    def of_part(tokens):
        part = tokens.segments[:, start : start + size]
        return earlier_ids(read_history(tokens), part, jnp.asarray(positions))

    ids, found = jax.device_get(of_part(tokens))
    active = np.asarray(tokens.active)
    for b in range(3):
        for t in range(start, start + size):
            want = {
                int(targets[b, j])
                for j in range(t)
                if active[b, j] and segments[b, j] == segments[b, t]
            }
            got = ids[b, t - start][found[b, t - start]]
            assert sorted(got) == sorted(want), "every id once"
