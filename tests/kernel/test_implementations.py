"""Every implementation of the kernel agrees with its definition."""

import dataclasses
import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from support.kernel_batches import (
    WHOLE,
    B,
    D,
    Lead,
    S,
    V,
    compile_for,
    normal,
    whole_batch,
)
from support.kernel_rows import IMPLEMENTATIONS
from support.trees import assert_trees_close

import ava_jax
from ava_jax.kernel import execute, sizes
from ava_jax.kernel.platforms import Implementation, Target


@functools.cache
def whole_loss(path, implementation):
    """Returns loss, aux and all gradients."""
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


def loss_far_ahead(implementation: Implementation, path="fused"):
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
    if path == "logits":
        arrays["logits"] = arrays.pop("hidden_states") @ arrays["lm_head"]

    def loss(arrays: dict[str, Any]):
        total, aux, _ = loss_fn(loss_fn.init(), **arrays, **ints)
        # The exponential of the mean is infinite.
        del aux["perplexity"]
        return total, aux

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


def test_the_whole_loss_where_a_column_is_far_ahead(monkeypatch):
    """Also in the form for TPUs, with logits by columns."""
    for path in ("fused", "logits"):
        want = loss_far_ahead("reference", path)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(want))
        assert want[0][0] > 100
        for platform in ("gpu", "tpu"):
            with monkeypatch.context() as patch:
                compile_for(patch, platform)
                assert_trees_close(loss_far_ahead("xla", path), want, 2e-5)


def loss_of(hidden, head, targets, **config):
    """Loss and aux, and the gradients of hidden states and projection."""
    loss_fn = ava_jax.create_unified_loss(**config)

    def loss(hidden, head):
        total, aux, _ = loss_fn(
            loss_fn.init(), targets=targets, hidden_states=hidden, lm_head=head
        )
        return total, aux

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(both)(hidden, head)


@pytest.mark.parametrize(("chunk_size", "first"), [(None, 16), (12, 12)])
def test_the_first_chunk_on_a_gpu_has_larger_blocks(monkeypatch, chunk_size, first):
    """Than the others' blocks of 8 tokens, which divide the chunk or do not."""
    keys = jax.random.split(jax.random.key(1), 3)
    operands = normal(keys[0], 2, 64, 32), normal(keys[1], 32, 40)
    targets = jax.random.randint(keys[2], (2, 64), 0, 40)

    def run(implementation):
        config = {"vocab_size": 40, "chunk_size": chunk_size}
        return loss_of(*operands, targets, implementation=implementation, **config)

    want = run("reference")
    for name, tokens in (("_GPU_CHUNK", 32), ("_GPU_BLOCK", 16)):
        monkeypatch.setattr(sizes, name, sizes._Limits(tokens, 2**20))
    compile_for(monkeypatch, "gpu")
    chosen = sizes.choose_sizes(Target("xla", "gpu"), 2, 64, 40, 32, chunk=chunk_size)
    assert chosen == sizes.Sizes(chunk_size or 16, 8, first=first)
    assert_trees_close(run("xla"), want, 2e-5)


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
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, S, D)), rng.normal(size=(D, V))
    targets = jax.device_put(rng.integers(0, V, (B, S), np.int32))
    one = jax.jit(loss_fn.normalizers)(targets=targets)
    many = dataclasses.replace(one, tokens=jax.device_put(tokens))

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
    monkeypatch.setattr(execute, "largest", lambda _: jnp.asarray(1.0))
    assert not any(x.any() for x in mean_over(1e9, jnp.float16))


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.data())
def test_shapes_that_divide_nothing(data):
    def size(most):
        return data.draw(st.integers(1, most))

    b, s, d, v = size(3), size(17), size(9), 1 + size(40)
    chunk, block, padding = size(19), size(9), size(4) - 1
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    arrays = (
        rng.standard_normal((b, s, d), np.float32),
        rng.standard_normal((d, v + padding), np.float32),
    )
    targets = jax.device_put(rng.integers(0, v, (b, s), np.int32))

    def run(implementation):
        config = {"vocab_size": v, "chunk_size": chunk, "block_size": block}
        return loss_of(*arrays, targets, implementation=implementation, **config)

    assert_trees_close(run("xla"), run("reference"), 2e-5)
