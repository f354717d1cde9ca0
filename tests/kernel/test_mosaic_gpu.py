"""The kernel in Mosaic GPU, run by Pallas's interpreter: no GPU is needed."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from support import mosaic_programs
from support.kernel_batches import compile_for
from support.kernel_products import NEAR, assert_product_agrees
from support.kernel_rows import WIDTH, Options
from support.trees import assert_trees_close

import ava_jax
from ava_jax.kernel import execute, mosaic_gpu
from ava_jax.kernel.product import Product

OPTIONS = {
    "one id": Options(ids=0),
    "five ids": Options(ids=3),
    "padding": Options(ids=1, size=WIDTH - 130),
    "no temperature": Options(tempered=False),
    "without log(1 - p)": Options(log_one_minus_p=False),
    "a bias": Options(biased=True),
    "a bias and padding": Options(biased=True, size=WIDTH - 130),
}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    mosaic_programs.interpret(monkeypatch)


def assert_kernel_agrees(name: str, **how):
    options = OPTIONS[name]._replace(finite=True, coarse=True)
    assert_product_agrees(
        options, by_columns=False, may_round=True, by_mosaic=True, **how
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_a_product_has_the_statistics_of_its_logits(name):
    assert_kernel_agrees(name)


@pytest.mark.parametrize("near", NEAR)
def test_any_number_is_near_enough(near):
    assert_kernel_agrees("five ids", near=near)


@pytest.mark.skipif(
    not mosaic_programs.RUNS_ON_SEVERAL_DEVICES,
    reason="this interpreter waits for ever if several devices run a kernel",
)
@pytest.mark.parametrize("name", ["five ids", "padding", "a bias and padding"])
def test_shards_of_a_product(name):
    assert_kernel_agrees(name, axis="vocab")


@pytest.mark.parametrize("column", [0, 255, 256, 703])
def test_an_id_is_taken_out_of_its_tile(column):
    """Also where no other token has an id in that tile."""
    keys = jax.random.split(jax.random.key(0), 2)
    hidden = jax.random.normal(keys[0], (1, 64)).astype(jnp.bfloat16)
    head = (jax.random.normal(keys[1], (64, 704)) / 8).astype(jnp.bfloat16)
    ids, zeros = jnp.asarray([column], jnp.int32), jnp.zeros(1)
    found = mosaic_gpu.multiply_and_sum(
        Product(hidden, head, zeros),
        ava_jax.Vocabulary(704),
        ava_jax.Query(ids, jnp.ones(1, bool)),
        ids[:, None],
        None,
        zeros,
        writes_exponentials=True,
    )
    (logits,) = np.asarray(hidden, float) @ np.asarray(head, float)
    others = np.exp(np.delete(logits, column))
    np.testing.assert_allclose(found.at_ids[0, 0], logits[column], rtol=1e-5)
    np.testing.assert_allclose(found.sums["exp_sum"][0], others.sum(), rtol=1e-5)
    assert found.exponentials is not None
    (written,) = np.asarray(found.exponentials, float)
    assert written[column] == 0
    np.testing.assert_allclose(np.delete(written, column), others, rtol=2**-8)


def inputs_of(batch: int, length: int, features: int, vocab: int):
    """Hidden states and a projection in bfloat16, targets and a mask."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (batch, length, features))
    head = 2 * jax.random.normal(keys[1], (features, vocab)) / features**0.5
    targets = jax.random.randint(keys[2], (batch, length), 0, min(vocab - 3, 40))
    mask = jax.random.bernoulli(keys[3], 0.8, (batch, length))
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    return hidden, head, targets, mask


def losses(monkeypatch, implementation, shape, **config):
    """The loss and aux without a gradient, then with one, and the gradients."""
    hidden, head, targets, mask = inputs_of(*shape)
    loss_fn = ava_jax.create_unified_loss(vocab_size=shape[-1] - 3, **config)

    def loss(hidden, head):
        value, aux, _ = loss_fn(
            loss_fn.init(),
            hidden_states=hidden,
            lm_head=head,
            targets=targets,
            attention_mask=mask,
        )
        return value, aux

    with monkeypatch.context() as patch:
        compile_for(patch, "gpu", implementation=implementation)
        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(loss)(hidden, head), jax.jit(both)(hidden, head)


def assert_losses_agree(monkeypatch, shape, **config):
    run = functools.partial(losses, monkeypatch, shape=shape, **config)
    want, got = run("xla"), run("mosaic_gpu")
    assert_trees_close(got[0], want[0], 4e-6)
    assert_trees_close(got[1][0], want[1][0], 4e-6)
    assert_gradients_agree(got[1][1], want[1][1])


def assert_gradients_agree(got, want):
    """The logits' has the 8 bits of bfloat16, and so have those it makes."""
    for x, y in zip(got, want, strict=True):
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        assert np.abs(x - y).max() < 2**-7 * np.abs(y).max()


@pytest.mark.slow
@hypothesis.settings(max_examples=5, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.tuples(
        st.integers(1, 3), st.integers(1, 90), st.integers(1, 3), st.integers(1, 11)
    )
)
def test_shapes_that_divide_nothing(shape):
    """Features and classes are multiples of 64, but not of a tile."""
    shape = *shape[:2], 64 * shape[2], 64 * shape[3]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert_losses_agree(monkeypatch, shape, chunk_size=60)


def test_everything(monkeypatch):
    config = {
        "eos_token_id": 3,
        "z_loss_weight": 1e-4,
        "initial_temperature": 1.3,
        "chunk_size": 60,
    }
    assert_losses_agree(monkeypatch, (2, 100, 128, 320), **config)


def test_the_kernel_is_taken_where_it_can_be(monkeypatch):
    """Not for a soft-cap, operands of 32 bits, or sizes that are no multiples of 64."""
    calls = []
    real = mosaic_gpu.multiply_and_sum
    monkeypatch.setattr(
        mosaic_gpu,
        "multiply_and_sum",
        lambda *a, **k: calls.append(a) or real(*a, **k),
    )
    shape = (1, 8, 64, 64)
    losses(monkeypatch, "xla", shape)
    losses(monkeypatch, "mosaic_gpu", shape, logit_soft_cap=30.0)
    with monkeypatch.context() as patch:
        patch.setattr(execute, "ROUNDED_OPERANDS", "float16")
        losses(patch, "mosaic_gpu", shape)
    losses(monkeypatch, "mosaic_gpu", (1, 8, 60, 64))
    losses(monkeypatch, "mosaic_gpu", (1, 8, 64, 60))
    assert not calls
    losses(monkeypatch, "mosaic_gpu", shape)
    assert calls


def test_an_older_jax_is_an_error(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "OLDEST_JAX", (99, 0, 0))
    with pytest.raises(RuntimeError, match=r"needs JAX 0\.10\.2 or newer"):
        losses(monkeypatch, "mosaic_gpu", (1, 20, 64, 320))


def test_log_probs(monkeypatch):
    hidden, head, targets, mask = inputs_of(2, 70, 64, 512)

    def run(hidden, head):
        found = ava_jax.token_log_probs(
            hidden_states=hidden,
            lm_head=head,
            targets=targets,
            attention_mask=mask,
            temperature=0.7,
        )
        return jnp.sum(found.log_probs * jnp.cos(targets)), found

    def both(implementation):
        with monkeypatch.context() as patch:
            compile_for(patch, "gpu", implementation=implementation)
            grad = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))
            return grad(hidden, head)

    (want, found), (got, own) = both("xla"), both("mosaic_gpu")
    assert_trees_close(own, found, 4e-6)
    assert_gradients_agree(got, want)
